"""Making pseudo-terminals again, with the numbers by which their programs know them (ttyname(3), $TMUX, utmp).

A master is there before the processes: who leads a session takes its terminal before its children are made, which get
it by fork(2) alone (kernel/fork.c, copy_signal).
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from lazyproc.errors import RestoreError
from lazyproc.kernel import terminal
from lazyproc.kernel.remote import Call
from lazyproc.model import Checkpoint, OpenFile, TerminalMaster, TerminalSlave
from lazyproc.needs import TerminalNeed
from lazyproc.restore.site import Site
from lazyproc.restore.workshop import REOPEN_FLAGS, OpenPath, Workshop, finish, probe, words


def masters_of(files: Mapping[int, OpenFile]) -> dict[int, TerminalMaster]:
    """By file id. Pure."""
    return {
        number: file.resource for number, file in files.items() if isinstance(file.resource, TerminalMaster)
    }


@contextmanager
def made_masters(files: Mapping[int, OpenFile], open_path: OpenPath) -> Iterator[dict[int, int]]:
    """Descriptors of ours by file id, of masters whose slaves are as they were and unlocked. Closed on leaving: what
    was not given to anybody is hung up then. Raises RestoreError.
    """
    masters = masters_of(files)
    with ExitStack() as stack:
        made: dict[int, int] = {}
        for path in {master.path for master in masters.values()}:
            wanted = {each.number: number for number, each in masters.items() if each.path == path}
            for found, fd in _new_masters(open_path, path, wanted).items():
                stack.callback(os.close, fd)
                made[wanted[found]] = fd
        for number, master in masters.items():
            if number not in made:
                raise _taken(master.number)
            with _words(master.number):
                _arrange(made[number], master)
                finish(made[number], files[number])
        yield made


def check_number(need: TerminalNeed) -> None:
    """Raises RestoreError when somebody has it here."""
    made = _new_masters(lambda path, flags, mode: os.open(path, flags, mode), need.path, [need.number])
    if not made:
        raise _taken(need.number)
    os.close(made[need.number])


def _new_masters(open_path: OpenPath, path: str, numbers: Collection[int]) -> dict[int, int]:
    with probe(open_path, path) as found:
        if not stat.S_ISCHR(os.fstat(found).st_mode) or os.fstat(found).st_rdev != terminal.PTMX:
            raise RestoreError("is no ptmx on this host", where=f"file {path}", remedy="mount devpts there")
        flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
        with words(f"file {path}", "makes no terminal", "see kernel.pty.max"):
            return terminal.new_masters(lambda: os.open(f"/proc/self/fd/{found}", flags), numbers)


def _taken(number: int) -> RestoreError:
    return RestoreError(
        "its number is in use on this host",
        where=f"terminal /dev/pts/{number}",
        remedy="end the session that has it (who), or receive in a mount namespace with a devpts of its own",
    )


def _arrange(master: int, wanted: TerminalMaster) -> None:
    terminal.tell(master, terminal.TIOCSPTLCK, 0)
    fcntl.ioctl(master, terminal.TCSETS2, wanted.termios)
    fcntl.ioctl(master, terminal.TIOCSWINSZ, terminal.WINSIZE.pack(*wanted.size))
    slave = terminal.open_slave(master, os.O_PATH)
    try:
        os.chown(f"/proc/self/fd/{slave}", wanted.uid, wanted.gid)
        if wanted.mode is not None:
            os.chmod(f"/proc/self/fd/{slave}", stat.S_IMODE(wanted.mode))
    finally:
        os.close(slave)
    if wanted.left:
        os.close(terminal.open_slave(master, os.O_RDWR))


def make_slave(workshop: Workshop, file: OpenFile, slave: TerminalSlave) -> int:
    """Another open file description of it."""
    masters = masters_of(workshop.checkpoint.files).items()
    master = next(number for number, each in masters if each.number == slave.number)
    return terminal.open_slave(workshop.files[master], file.flags & REOPEN_FLAGS)


def close_to_others(checkpoint: Checkpoint, files: Mapping[int, int]) -> None:
    """When every slave has been opened: what would have been in the way of that. `files` are descriptors of ours."""
    slaves = {
        file.resource.number: files[number]
        for number, file in checkpoint.files.items()
        if isinstance(file.resource, TerminalSlave)
    }
    for number, master in masters_of(checkpoint.files).items():
        with _words(master.number):
            fcntl.ioctl(files[number], terminal.TIOCSLCKTRMIOS, master.locked_termios)
            if master.exclusive and master.number in slaves:
                fcntl.ioctl(slaves[master.number], terminal.TIOCEXCL, 0)
            if master.packets:
                terminal.tell(files[number], terminal.TIOCPKT, 1)
            if master.locked:
                terminal.tell(files[number], terminal.TIOCSPTLCK, 1)


def take(site: Site, master: int) -> None:
    """The process, which leads a session and has nothing open, gets the terminal as that of its session."""
    site.receive_later([master], [0])
    site.run(Call("ioctl", (0, terminal.TIOCSCTTY, 0)), Call("close", (0,)))


def bring_to_foreground(site: Site, master: int, group: int) -> None:
    """A group of its session, which is there. Its own is in the foreground until then, so that nobody gets SIGTTOU."""
    site.receive_later([master], [0])
    number = site.bench.place(struct.pack("<i", group))
    site.run(Call("ioctl", (0, terminal.TIOCSPGRP, number)), Call("close", (0,)))


@contextmanager
def _words(number: int) -> Iterator[None]:
    with words(f"terminal /dev/pts/{number}", "cannot be made as it was", "see `lazyproc check`"):
        yield
