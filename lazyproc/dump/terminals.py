"""Pseudo-terminals of which the tree has both ends, and what of terminals cannot travel.

A pair is described with its master; a slave is only the number. Bytes that wait in it can be read and not copied.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat as st
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from lazyproc.dump.files import TERMINAL_MAJORS, terminal_of_host
from lazyproc.dump.look import Look, attempt
from lazyproc.dump.registry import Refused, Registry
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import replace
from lazyproc.kernel import proc, terminal
from lazyproc.model import TerminalMaster, TerminalSlave


def is_terminal(status: os.stat_result) -> bool:
    return st.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in TERMINAL_MAJORS


def gather_terminal(registry: Registry, look: Look, taken: int) -> TerminalMaster | TerminalSlave:
    """Raises Refused for what is no end of a pseudo-terminal. Who has the other end is seen in `finish_terminals`."""
    if os.fstat(taken).st_rdev == terminal.PTMX:
        return _master(registry, look, taken)
    number = terminal.slave_number(taken)
    if number is None:
        raise terminal_of_host(look.link)
    if fcntl.fcntl(taken, fcntl.F_GETFL) & os.O_CLOEXEC:  # dup(2) has not, and fdinfo shows it all the same
        raise Refused(
            "was opened by TIOCGPTPEER with O_CLOEXEC: which of its descriptors exec closes cannot be seen",
            "open it by its name",
        )
    return TerminalSlave(number)


def _master(registry: Registry, look: Look, taken: int) -> TerminalMaster:
    modes = fcntl.ioctl(taken, terminal.TCGETS2, bytes(terminal.TERMIOS2.size))
    discipline = terminal.TERMIOS2.unpack(modes)[4]
    if discipline != terminal.N_TTY:
        raise Refused(
            f"has line discipline {discipline}, whose state cannot be read", "let the program set N_TTY"
        )
    with _slave_seen(taken) as slave:
        session = _session(registry, taken)
        return TerminalMaster(
            number=terminal.ask(taken, terminal.TIOCGPTN),
            path=registry.inside(look.link),
            termios=modes,
            locked_termios=fcntl.ioctl(taken, terminal.TIOCGLCKTRMIOS, bytes(terminal.TERMIOS.size)),
            size=terminal.WINSIZE.unpack(fcntl.ioctl(taken, terminal.TIOCGWINSZ, bytes(8))),
            mode=st.S_IMODE(slave.st_mode),
            uid=slave.st_uid,
            gid=slave.st_gid,
            session=session,
            foreground=_foreground(registry, taken) if session else 0,
            packets=bool(terminal.ask(taken, terminal.TIOCGPKT)),
            locked=bool(terminal.ask(taken, terminal.TIOCGPTLCK)),
            exclusive=False,
            left=bool(terminal.events(taken) & select.POLLHUP),
        )


@contextmanager
def _slave_seen(master: int) -> Iterator[os.stat_result]:
    try:
        fd = terminal.open_slave(master, os.O_PATH)
    except OSError as error:
        raise Refused(
            f"its slave cannot be looked at ({error.strerror})", "mount its devpts again"
        ) from error
    try:
        yield os.fstat(fd)
    finally:
        os.close(fd)


def _session(registry: Registry, master: int) -> int:
    try:
        leader = terminal.session_of(master)
    except OSError:  # its number cannot be seen from here
        leader = -1
    session = registry.vpid(leader) if leader else 0
    if session is None:
        raise Refused(
            f"is the terminal of a session ({leader}) whose leader is not in the tree",
            "move that process too (give the pid that started both)",
        )
    return session


def _foreground(registry: Registry, master: int) -> int:
    """By the tree's own numbers, 0 when it cannot be told: between two commands of a shell that is a group which has
    ended, or of which a zombie is left.
    """
    group = terminal.ask(master, terminal.TIOCGPGRP)
    for pid in (*(task.pid for task in registry.tasks), group):
        with suppress(NoSuchProcess):
            if proc.stat(proc.read(pid, "stat")).pgrp == group:
                return proc.status(proc.read(pid, "status")).ns_pgid[-1]
    return registry.number_of_dead(group)


def finish_terminals(registry: Registry, looks: Mapping[int, Look]) -> None:
    """What both ends together tell, and of the processes whether they have the terminals of their sessions. `looks`
    holds a descriptor for each file.
    """
    masters: dict[int, int] = {}  # file ids by number
    for number, file in registry.files.items():
        if isinstance(file.resource, TerminalMaster):
            with _blamed(registry, looks[number]):
                if masters.setdefault(file.resource.number, number) != number:
                    raise Refused(
                        f"has the number {file.resource.number}, as another of the tree's terminals has",
                        "move each in a tree of its own: they are of two mounts of devpts",
                    )
                _refuse_unread(registry, looks[number])
                _refuse_nobody(registry, file.resource)
    for number, file in list(registry.files.items()):
        if isinstance(file.resource, TerminalSlave):
            with _blamed(registry, looks[number]):
                _finish_slave(registry, looks, number, masters.get(file.resource.number))
    sessions = {_of(registry, each).session: _of(registry, each).number for each in masters.values()}
    for task in registry.tasks:
        with attempt(registry, task.pid, "process"), suppress(NoSuchProcess):
            _refuse_controlling(registry, proc.stat(proc.read(task.pid, "stat")), sessions)


@contextmanager
def _blamed(registry: Registry, look: Look) -> Iterator[None]:
    with attempt(registry, look.pid, f"fd {look.fd}"):
        yield


def _of(registry: Registry, number: int) -> TerminalMaster:
    master = registry.files[number].resource
    assert isinstance(master, TerminalMaster)
    return master


def _finish_slave(registry: Registry, looks: Mapping[int, Look], number: int, master: int | None) -> None:
    look = looks[number]
    with registry.taken(look.pid, look.fd) as taken:
        if master is None or not _are_pair(registry, looks[master], taken):
            raise terminal_of_host(look.link)
        if terminal.ask(taken, terminal.TIOCGEXCL):
            file = registry.files[master]
            registry.files[master] = replace(file, resource=replace(_of(registry, master), exclusive=True))
        if not registry.contents_wanted:
            return
        _refuse_unread(registry, look)
        if not terminal.events(taken) & select.POLLOUT:
            raise Refused("is a terminal whose output is stopped", "let it go on (Ctrl-Q)")


def _are_pair(registry: Registry, look: Look, slave: int) -> bool:
    """Each mount of devpts has its own numbers. What was opened as /dev/tty does not say of which it is."""
    status = os.fstat(slave)
    if status.st_rdev == terminal.OWN_TERMINAL:
        return True
    with registry.taken(look.pid, look.fd) as master, _slave_seen(master) as seen:
        return (status.st_dev, status.st_ino) == (seen.st_dev, seen.st_ino)


def _refuse_unread(registry: Registry, look: Look) -> None:
    if registry.contents_wanted:
        with registry.taken(look.pid, look.fd) as taken:
            if terminal.unread(taken):
                raise Refused(
                    "is a terminal with unread bytes, which cannot be copied out and put back",
                    "try again when the program has read them",
                )


def _refuse_nobody(registry: Registry, master: TerminalMaster) -> None:
    if registry.contents_wanted and master.session and not master.foreground:
        raise Refused("is a terminal whose foreground process group has ended", "try again in a moment")


def _refuse_controlling(registry: Registry, stat: proc.Stat, sessions: Mapping[int, int]) -> None:
    """A restored process has the terminal of its session, and no other: it gets it by fork(2)."""
    session = registry.vpid(stat.session) or 0
    number = sessions.get(session) if session else None
    device = os.major(stat.tty), os.minor(stat.tty)
    if stat.tty and device != (terminal.SLAVE_MAJOR, number):
        raise Refused(
            f"has a controlling terminal ({device[0]}:{device[1]})",
            "start it without: setsid prog </dev/null >log 2>&1",
        )
    if number is not None and not stat.tty:
        raise Refused(
            f"has given up the terminal of its session, /dev/pts/{number} (TIOCNOTTY)",
            "start it with setsid",
        )
