"""`--external` and `--inherit-fd`: what a process shares with others that are not dumped is given by who restores."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import tty
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lazyproc.kernel import proc, sockdiag
from lazyproc.kernel.netfilter import leftovers, release_session
from lazyproc.kernel.proc_fdinfo import fdinfo
from tests import peer
from tests.interop.test_criu_command import DEADLINE_S, Place, dumped, gone, lazy_pages, place
from tests.live.programs import Program, running, wait_until
from tests.needs import require_root

__all__ = ["place"]  # the fixture
MODES = ("plain", "lazy")


@pytest.fixture(autouse=True)
def _root() -> None:
    require_root()


class Ends:
    """Two descriptors of ours that lead to those of a program, which are `theirs` until it has them."""

    def __init__(self, writing: int, reading: int, *theirs: int) -> None:
        self.writing, self.reading, self.theirs = writing, reading, theirs

    @classmethod
    def pipes(cls) -> Ends:
        (their_input, writing), (reading, their_output) = os.pipe(), os.pipe()
        return cls(writing, reading, their_input, their_output)

    @classmethod
    def sockets(cls) -> Ends:
        ours, theirs = (sock.detach() for sock in socket.socketpair())
        return cls(ours, os.dup(ours), theirs, os.dup(theirs))

    def write(self, first: int, last: int) -> None:
        os.write(self.writing, bytes(range(first, last)))

    def expect(self, first: int, last: int) -> None:
        got = b""
        while len(got) < last - first and (data := os.read(self.reading, last - first - len(got))):
            got += data
        assert got == bytes(range(first, last))

    def let_go(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        self.theirs = ()

    def close(self) -> None:
        self.let_go()
        os.close(self.writing)
        os.close(self.reading)


@contextmanager
def ends(kind: str) -> Iterator[Ends]:
    made = Ends.pipes() if kind == "pipes" else Ends.sockets()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def talking(there: Ends, tmp_path: Path) -> Iterator[Program]:
    streams = dict(zip(("stdin", "stdout"), there.theirs, strict=True))
    with running("fd_outside", directory=tmp_path, streams=streams) as program:
        there.let_go()
        there.write(0, 10)
        there.expect(0, 10)
        yield program


def name(program: Program, fd: int) -> str:
    return os.readlink(f"/proc/{program.pid}/fd/{fd}")


def inheriting(names: dict[str, int]) -> list[str]:
    return [word for key, fd in names.items() for word in ("--inherit-fd", f"fd[{fd}]:{key}")]


def restore(place: Place, mode: str, names: dict[str, int]) -> None:
    options = inheriting(names)
    with ExitStack() as stack:
        if mode == "lazy":
            daemon = stack.enter_context(lazy_pages("ours", place))
            options.append("--lazy-pages")
        place.handed = tuple(names.values())
        place.restore(*options)
        if mode == "lazy":
            assert daemon.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("mode", MODES)
def test_pipes_are_given_by_who_restores(mode: str, place: Place, tmp_path: Path) -> None:
    """What the program had not read is in the new pipe, before what is written to it."""
    with ends("pipes") as before, ends("pipes") as after, talking(before, tmp_path) as program:
        names = {name(program, 0): after.theirs[0], name(program, 1): after.theirs[1]}
        program.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
        before.write(10, 15)
        dumped(place, program)
        assert all(f"{each} stays outside" in place.log("dump") for each in names)
        restore(place, mode, names)
        after.let_go()
        after.write(15, 20)
        os.kill(place.restored, signal.SIGCONT)
        after.expect(10, 20)
        place.verify(program)
        assert os.read(after.reading, 1) == b""  # nobody else holds the other end


def test_the_very_pipes_of_before_still_have_what_lies_in_them(place: Place, tmp_path: Path) -> None:
    with ends("pipes") as there:
        kept = tuple(map(os.dup, there.theirs))
        with talking(there, tmp_path) as program:
            names = dict(zip((name(program, 0), name(program, 1)), kept, strict=True))
            program.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
            there.write(10, 15)
            dumped(place, program)
            restore(place, "plain", names)
            for fd in kept:
                os.close(fd)
            os.kill(place.restored, signal.SIGCONT)
            there.expect(10, 15)
            place.verify(program)


def test_what_nobody_gives_is_named_and_nothing_is_restored(place: Place, tmp_path: Path) -> None:
    with ends("pipes") as there, talking(there, tmp_path) as program:
        names = name(program, 0), name(program, 1)
        dumped(place, program)
        assert place.run("restore", "--restore-detached") == 1
        assert "nothing is given in its place" in place.errors("restore")[0]
        assert any(each in place.errors("restore")[0] for each in names)
        gone(program.pid)


@pytest.mark.parametrize("mode", MODES)
def test_a_socket_to_the_outside(mode: str, place: Place, tmp_path: Path) -> None:
    with ends("sockets") as before, ends("sockets") as after, talking(before, tmp_path) as program:
        known = name(program, 0)
        inode = known.removeprefix("socket:[").removesuffix("]")
        assert place.run("dump", "--tree", program.pid) == 1
        assert "outside of the process tree" in place.errors("dump")[0]
        program.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
        before.write(10, 11)
        assert place.run("dump", "--tree", program.pid, "--external", f"unix[{inode}]") == 1
        assert "that it has not read" in place.errors("dump")[0]
        program.process.send_signal(signal.SIGCONT)
        before.expect(10, 11)
        dumped(place, program, "--external", f"unix[{inode}]")
        restore(place, mode, {known: after.theirs[0]})
        after.let_go()
        after.write(11, 20)
        after.expect(11, 20)
        place.verify(program)


@pytest.mark.parametrize(
    ("prefix", "criu_does"),
    [("", "nothing"), ("", "the dump"), ("\0", "nothing"), ("\0", "the restore")],
    ids=["path", "path-from-criu", "abstract", "abstract-to-criu"],
)
def test_a_datagram_socket_finds_its_peer_by_name(
    prefix: str, criu_does: str, place: Place, tmp_path: Path
) -> None:
    """As of syslog(3); the peer was started again meanwhile."""
    where = f"{prefix}{tmp_path / 'peer'}"
    with ends("pipes") as before, ends("pipes") as after, ExitStack() as stack:
        outside = stack.enter_context(datagrams(where))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs:
            theirs.connect(where)
            streams = {"stdin": before.theirs[0], "stdout": theirs.fileno()}
            program = stack.enter_context(running("fd_outside", directory=tmp_path, streams=streams))
        before.write(0, 1)
        assert outside.recv(9) == b"\0"
        names = {name(program, 0): after.theirs[0]}
        assert place.run("dump", "--tree", program.pid) == 1
        assert "outside of the process tree" in place.errors("dump")[0]
        if criu_does != "the dump":
            dumped(place, program, "--ext-unix-sk")
        else:
            criu(place, "dump", "-t", program.pid, "--ext-unix-sk")
            assert program.process.wait(DEADLINE_S) == -signal.SIGKILL
        outside.close()
        (tmp_path / "peer").unlink(missing_ok=True)
        place.handed = tuple(names.values())
        assert place.run("restore", "--restore-detached", *inheriting(names)) == 1
        assert "nobody outside of the tree answers there" in place.errors("restore")[0]
        gone(program.pid)
        again = stack.enter_context(datagrams(where))
        if criu_does == "the restore":
            criu(place, "restore", "-d", "--ext-unix-sk", *inheriting(names))
            place.restored = place.reaper = program.pid
        else:
            restore(place, "plain", names)
        after.write(1, 2)
        assert again.recv(9) == b"\1"
        place.verify(program)


def datagrams(where: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(where)
    return sock


def external_file(program: Program, fd: int) -> str:
    status = os.stat(f"/proc/{program.pid}/fd/{fd}")
    return f"file[{fdinfo(proc.read(program.pid, f'fdinfo/{fd}')).mnt_id:x}:{status.st_ino:x}]"


@pytest.mark.parametrize("how", ["external", "path", "criu's"])
def test_another_file_takes_the_place_of_one(how: str, place: Place, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with ExitStack() as stack:
        before, after = (stack.enter_context(ends("pipes")) for _ in range(2))
        log = stack.enter_context(old.open("wb"))
        streams = {"stdin": before.theirs[0], "stdout": log.fileno()}
        program = stack.enter_context(running("fd_outside", directory=tmp_path, streams=streams))
        before.write(0, 10)
        wait_until(lambda: old.stat().st_size == 10, "all have come")
        key = str(old).lstrip("/") if how == "path" else external_file(program, 1)
        names = {name(program, 0): after.theirs[0]}
        if how == "criu's":
            criu(place, "dump", "-t", program.pid, "--external", key)
            assert program.process.wait(DEADLINE_S) == -signal.SIGKILL
        else:
            dumped(place, program, *(["--external", key] if how == "external" else []))
        new.write_bytes(b"head:")
        with new.open("ab") as other:
            restore(place, "plain", {**names, key: other.fileno()})
        after.write(10, 20)
        wait_until(lambda: new.stat().st_size == 15, "all have come")
        place.verify(program)
    assert (old.read_bytes(), new.read_bytes()) == (bytes(range(10)), b"head:" + bytes(range(10, 20)))


def test_a_terminal_that_is_not_its_own(place: Place, tmp_path: Path) -> None:
    terminals = [pty.openpty(), pty.openpty()]
    try:
        for _, slave in terminals:
            tty.setraw(slave)
        (_, old), (_, new) = terminals
        with running("fd_outside", directory=tmp_path, streams={"stdin": old, "stdout": old}) as program:
            status = os.fstat(old)
            key = f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
            assert place.run("dump", "--tree", program.pid) == 1
            assert "is a terminal of this host" in place.errors("dump")[0]
            there = Ends(terminals[1][0], terminals[1][0])
            os.write(terminals[0][0], bytes(range(10)))
            assert os.read(terminals[0][0], 10) != b""
            dumped(place, program, "--external", key)
            restore(place, "plain", {key: new})
            there.write(10, 20)
            there.expect(10, 20)
            place.verify(program)
    finally:
        for pair in terminals:
            for fd in pair:
                os.close(fd)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("fd[x]:y", "is not understood"),
        ("fd[77]:y", "descriptor 77 is of no use"),
        ("fd[0]:", "not understood"),
    ],
)
def test_a_descriptor_that_is_none_is_refused(option: str, words: str, place: Place) -> None:
    assert place.run("restore", "--inherit-fd", option) == 1
    assert words in place.errors("restore")[0]


def criu(place: Place, action: str, *options: object) -> None:
    words = [*peer.criu(), action, "--no-default-config", "-D", place.images, "-o", f"{action}.log", *options]
    done = subprocess.run([*map(str, words)], pass_fds=place.handed, check=False)
    assert done.returncode == 0, place.log(action)


@pytest.mark.parametrize("kind", ["pipes", "sockets"])
@pytest.mark.parametrize("restorer", ["ours", "criu's"])
def test_with_criu_at_the_other_end(restorer: str, kind: str, place: Place, tmp_path: Path) -> None:
    with ends(kind) as before, ends(kind) as after, talking(before, tmp_path) as program:
        names = dict(zip((name(program, 0), name(program, 1)), after.theirs, strict=kind == "pipes"))
        inodes = [each.removeprefix("socket:[").removesuffix("]") for each in names]
        external = [word for inode in inodes for word in ("--external", f"unix[{inode}]")]
        if restorer == "ours":
            criu(place, "dump", "-t", program.pid, *external)
            assert program.process.wait(DEADLINE_S) == -signal.SIGKILL
            restore(place, "plain", names)
        else:
            dumped(place, program, *external)
            place.handed = tuple(names.values())
            criu(place, "restore", "-d", *inheriting(names))
            place.restored = place.reaper = program.pid
        after.let_go()
        after.write(10, 20)
        after.expect(10, 20)
        place.verify(program)


def test_what_the_tree_keeps_is_not_replaced(place: Place, tmp_path: Path) -> None:
    """Its other end would wait for it."""
    with running("sock_queues", directory=tmp_path) as program, ends("sockets") as there:
        program.watch.wait_beats()
        links = [name(program, int(fd)) for fd in os.listdir(f"/proc/{program.pid}/fd")]
        inodes = {each.inode for each in sockdiag.unix_sockets().values() if each.peer}
        kept = next(each for each in links if each in {f"socket:[{inode}]" for inode in inodes})
        before = set(leftovers())
        dumped(place, program, "--tcp-established")
        try:
            place.handed = (there.theirs[0],)
            assert place.run("restore", "--restore-detached", *inheriting({kept: there.theirs[0]})) == 1
            assert "is a connection that the tree has kept" in place.errors("restore")[0]
            gone(program.pid)
        finally:
            for table in set(leftovers()) - before:  # packets are held back until somebody restores it
                release_session(table.removeprefix("lazyproc_").removesuffix("_kept"))
