"""Terminals of the tree's own are what they were, under their numbers; others, and bytes under way, are named."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazyproc.dump.descriptors import explain_descriptors, gather_descriptors
from lazyproc.errors import RestoreError
from lazyproc.hosts import Host, Pair
from lazyproc.kernel import terminal
from lazyproc.kernel.fds import SYS_UNSHARE
from lazyproc.kernel.nursery import CLONE_NEWNS
from lazyproc.kernel.sys import syscall
from lazyproc.model import TerminalMaster
from lazyproc.restore.terminals import made_masters
from tests.live.descriptors import at, gathered_from, obstacle_words, stopped
from tests.live.moving import checkpoint, look_at_tree, move, receiving, restore, run_cli
from tests.live.programs import running, wait_until
from tests.live.real import ending, move_now
from tests.live.sockets import words
from tests.needs import require

_HOLD = """
import os, sys
held = [os.openpty() for _ in range(int(sys.argv[1]))]
print("held", flush=True)
sys.stdin.read()
"""
_CANNOT = "is a terminal with unread bytes, which cannot be copied out and put back"
_UNREAD = f"{_CANNOT}; try again when the program has read them"
_OTHERS = "is a terminal of this host; start the program with input and output redirected"


@contextmanager
def held(host: Host, count: int) -> Iterator[None]:
    """The lowest numbers of the host's terminals."""
    process: subprocess.Popen[Any] = host.popen(
        ["python3", "-c", _HOLD, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.kill()


def pair_of_ends(master: int = 10, slave: int = 11) -> None:
    """In a child: under numbers that the test knows."""
    ours, theirs = os.openpty()
    at(master, ours)
    at(slave, theirs)


# --- moves --------------------------------------------------------------------------------------------------


def test_numbers_are_kept_where_lower_ones_are_free(pair: Pair) -> None:
    with (
        held(pair.source, 5),
        running("terminals", directory=pair.shared, host=pair.source, exclusive=True) as program,
    ):
        assert _numbers(program.pid) == {5, 6, 7}
        with receiving(pair.destination) as receiver:
            there = move(pair.source, receiver, program.pid)
            program.watch.wait_beats()
            assert _numbers(there.pid) == {5, 6, 7}
            assert _in_use(pair.destination) == ["5", "6", "7", "ptmx"]
            assert _in_use(pair.source) == ["0", "1", "2", "3", "4", "ptmx"]
            there.end(program.watch)
            assert _in_use(pair.destination) == ["ptmx"]  # nobody else has kept one


def _in_use(host: Host) -> list[str]:
    return str(host.run(["ls", "/dev/pts"], capture_output=True, text=True, check=True).stdout).split()


def _numbers(pid: int) -> set[int]:
    """Of the masters that it has."""
    lines = [
        Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
        for fd in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/ptmx"
    ]
    return {int(line.split()[1]) for each in lines for line in each if line.startswith("tty-index:")}


def test_numbers_that_somebody_has_there_are_known_before_the_freeze(pair: Pair) -> None:
    with (
        running("terminals", directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination) as receiver,
        held(pair.destination, 2),
    ):
        number = pair.source.vpid(program.pid)
        done = run_cli(pair.source, "migrate", number, receiver.address, *receiver.trust, expected=3)
        for taken in 0, 1:
            assert f"terminal /dev/pts/{taken}: its number is in use on this host" in done.stderr
        assert "/dev/pts/2" not in done.stderr
        assert "nothing has been stopped" in done.stderr
        program.watch.wait_beats()
        program.stop_and_verify()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "whole"])
def test_a_checkpoint_comes_back_where_it_was(lazy: bool, pair: Pair) -> None:
    """The numbers are free again when the tree has ended."""
    with running("terminals", directory=pair.shared, host=pair.source, exclusive=True) as program:
        before = look_at_tree(program.pid)
        images = pair.shared / "images"
        checkpoint(pair.source, program.pid, images)
        assert program.process.wait(5) != 0
        again = restore(pair.source, images, *(["--lazy"] if lazy else []))
        again.check_like(before)
        program.watch.wait_beats()
        again.end(program.watch)


@pytest.mark.parametrize("pidns", ["host", "new"])
def test_sessions_have_their_terminals_in_either_pid_namespace(pidns: str, pair: Pair) -> None:
    pair.source.run(["sh", "-c", "echo 20000 > /proc/sys/kernel/ns_last_pid"], check=True)
    with (
        running("terminals", directory=pair.shared, host=pair.source, exclusive=True) as program,
        receiving(pair.destination, "--pidns", pidns) as receiver,
    ):
        there = move(pair.source, receiver, program.pid)
        program.watch.wait_beats()
        there.end(program.watch)


_NOBODY_IN_FRONT = """
import fcntl, os, signal, struct, sys
ours, theirs = os.openpty()
fcntl.ioctl(theirs, 0x540E, 0)  # TIOCSCTTY
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if child == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(theirs, os.getpid())
    os._exit(0)
if sys.argv[2] == "reaped":
    os.waitpid(child, 0)
else:
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
with open(sys.argv[1], "w") as ready:
    ready.write(f"{child}\\n")
signal.pause()
"""


@pytest.mark.parametrize("left", ["reaped", "zombie"])
def test_a_foreground_that_has_ended(left: str, pair: Pair) -> None:
    """So it is between two commands of a shell."""
    ready = pair.shared / "ready"
    os.mkfifo(ready)
    pair.source.run(["sh", "-c", "echo 20000 > /proc/sys/kernel/ns_last_pid"], check=True)
    argv = ["python3", "-c", _NOBODY_IN_FRONT, str(ready), left]
    with pair.source.popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            group = int(ready.read_text())
            with receiving(pair.destination, "--pidns", "host") as receiver:
                there, report = move_now(pair.source, receiver, process.pid)
            with ending(there):
                command = ["cat", f"/proc/{report['root_pid']}/stat"]
                stat = pair.destination.run(command, capture_output=True, text=True, check=True).stdout
                assert int(stat.rpartition(")")[2].split()[5]) == group  # tpgid
        finally:
            process.kill()


_COUNTS = """
import os, pty, sys
pid, master = pty.fork()
if pid == 0:
    number = 0
    while True:
        number += 1
        print(number, flush=True)  # which goes on after a short write
out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
while True:
    os.write(out, os.read(master, 4096))
"""


def test_output_that_never_rests(pair: Pair) -> None:
    """Who reads it is stopped last; of what goes through nothing is lost, and nothing comes twice."""
    out = pair.shared / "out"
    out.touch()
    process = pair.source.popen(["python3", "-c", _COUNTS, str(out)], stdin=subprocess.DEVNULL)
    pid = process.pid
    try:
        here, there = pair.source, pair.destination
        for _ in range(4):
            before = out.stat().st_size
            wait_until(lambda size=before: out.stat().st_size > size, "it writes")  # type: ignore[misc]
            with receiving(there) as receiver:
                pid, _ = move_now(here, receiver, pid)
            here, there = there, here
    finally:
        with ending(pid):
            pass
        process.wait()
    *lines, _ = out.read_bytes().split(b"\r\n")
    assert list(map(int, lines)) == list(range(1, len(lines) + 1))


# --- what stands in the way ---------------------------------------------------------------------------------


def test_both_ends_have_no_obstacle() -> None:
    with gathered_from(pair_of_ends) as gathered:
        assert not gathered.obstacles


@pytest.mark.parametrize(("writing", "reading"), [(10, 11), (11, 10)], ids=["input", "output"])
def test_unread_bytes_are_under_way(writing: int, reading: int) -> None:
    """They are read in a moment, so that only a dump minds them."""

    def body() -> None:
        pair_of_ends()
        _no_echo(11)
        os.write(writing, b"line\n")

    with stopped(body) as tasks:
        assert not explain_descriptors(tasks)
        gathered = gather_descriptors(tasks)
        with gathered.sockets:
            assert words(gathered) == [f"fd {reading}: {_UNREAD}"]


def test_fewer_bytes_than_a_read_waits_for() -> None:
    def body() -> None:
        pair_of_ends()
        _no_echo(11)
        modes = list(terminal.TERMIOS2.unpack(fcntl.ioctl(11, terminal.TCGETS2, bytes(44))))
        modes[3] &= ~2  # ICANON
        modes[5] = modes[5][:6] + bytes([9]) + modes[5][7:]  # VMIN
        fcntl.ioctl(11, terminal.TCSETS2, terminal.TERMIOS2.pack(*modes))
        os.write(10, b"some")

    assert _after_the_freeze(body) == [f"fd 11: {_UNREAD}"]


def test_a_change_that_packet_mode_has_to_tell() -> None:
    def body() -> None:
        pair_of_ends()
        terminal.tell(10, terminal.TIOCPKT, 1)
        fcntl.ioctl(11, 0x540B, 2)  # TCFLSH, TCIOFLUSH

    assert _after_the_freeze(body) == [f"fd 10: {_UNREAD}"]


def test_output_that_is_stopped() -> None:
    def body() -> None:
        pair_of_ends()
        os.write(10, b"\x13")  # Ctrl-S
        terminal.events(11)

    assert _after_the_freeze(body) == ["fd 11: is a terminal whose output is stopped; let it go on (Ctrl-Q)"]


def _after_the_freeze(body: Any) -> list[str]:
    with gathered_from(body) as gathered:
        return words(gathered)


def _no_echo(slave: int) -> None:
    modes = list(terminal.TERMIOS2.unpack(fcntl.ioctl(slave, terminal.TCGETS2, bytes(44))))
    modes[3] &= ~8
    fcntl.ioctl(slave, terminal.TCSETS2, terminal.TERMIOS2.pack(*modes))


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """The name of a terminal whose master is ours."""
    ours, theirs = os.openpty()
    yield os.ttyname(theirs)
    os.close(ours)
    os.close(theirs)


def test_the_master_of_a_slave_is_elsewhere(elsewhere: str, tmp_path: Path) -> None:
    """Also where the tree has one with the same number, of another mount of devpts."""
    number = int(elsewhere.split("/")[-1])

    def body() -> None:
        at(11, os.open(elsewhere, os.O_RDWR | os.O_NOCTTY))

    def both() -> None:
        body()
        syscall(SYS_UNSHARE, CLONE_NEWNS)
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "devpts", "pts", str(tmp_path)], check=True)
        at(
            10,
            terminal.new_masters(lambda: os.open(tmp_path / "ptmx", os.O_RDWR | os.O_NOCTTY), [number])[
                number
            ],
        )

    for each in body, both:
        (row,) = obstacle_words(each)
        assert row.startswith(f"fd 11: {elsewhere} {_OTHERS}")


def test_a_session_whose_master_is_elsewhere(elsewhere: str) -> None:
    def take() -> None:
        os.setsid()
        at(11, os.open(elsewhere, os.O_RDWR | os.O_NOCTTY))
        fcntl.ioctl(11, terminal.TIOCSCTTY, 0)

    terminal_row, process_row = obstacle_words(take)
    assert terminal_row.startswith(f"fd 11: {elsewhere} {_OTHERS}")
    assert process_row.startswith("process: has a controlling terminal (136:")


def test_who_has_given_up_the_terminal_of_his_session() -> None:
    def leader() -> None:
        os.setsid()
        pair_of_ends()
        fcntl.ioctl(11, terminal.TIOCSCTTY, 0)

    def member() -> None:
        fcntl.ioctl(11, 0x5422)  # TIOCNOTTY

    (row,) = obstacle_words(leader, member)
    assert "has given up the terminal of its session, /dev/pts/" in row


def test_a_slave_whose_close_on_exec_cannot_be_seen() -> None:
    def body() -> None:
        pair_of_ends()
        at(12, fcntl.ioctl(10, terminal.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))

    (row,) = obstacle_words(body)
    assert row.startswith("fd 12: was opened by TIOCGPTPEER with O_CLOEXEC"), row


# --- what is made again -------------------------------------------------------------------------------------


def test_a_slave_that_was_closed_is_closed_again() -> None:
    """Then the master reads EIO, and before it was opened it waits."""

    def left() -> None:
        pair_of_ends()
        os.close(11)

    def never_opened() -> None:
        at(10, os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))

    for body, closed in (left, True), (never_opened, False):
        with gathered_from(body) as gathered:
            assert not gathered.obstacles
            (file,) = [f for f in gathered.files.values() if isinstance(f.resource, TerminalMaster)]
        with made_masters({file.id: file}, os.open) as made:
            assert bool(terminal.events(made[file.id]) & 16) == closed  # POLLHUP


def test_a_number_that_was_taken_meanwhile_is_named() -> None:
    ours, theirs = os.openpty()
    try:
        with gathered_from(pair_of_ends) as gathered:
            (file,) = [f for f in gathered.files.values() if isinstance(f.resource, TerminalMaster)]
            assert isinstance(file.resource, TerminalMaster)
            number = file.resource.number
            taken = pytest.raises(RestoreError, match="its number is in use")
            with held_here(number), taken, made_masters({file.id: file}, os.open):
                pass
            with made_masters({file.id: file}, os.open) as made:
                assert terminal.ask(made[file.id], terminal.TIOCGPTN) == number
    finally:
        os.close(ours)
        os.close(theirs)


@contextmanager
def held_here(number: int) -> Iterator[None]:
    masters = terminal.new_masters(lambda: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY), [number])
    try:
        yield
    finally:
        os.close(masters[number])


# --- a real program -----------------------------------------------------------------------------------------

_SOCKET = "/tmp/tmux"  # each host has its own


def test_tmux(pair: Pair) -> None:
    """A server with a shell and an editor goes there and back; keys reach both, and both write to their screens."""
    server: list[str | Path] = [require("tmux"), "-S", _SOCKET, "-f", "/dev/null", "-D"]
    require("vim")
    text = pair.shared / "text"
    process = pair.source.popen(
        server, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pid = process.pid
    try:
        _tmux_when_it_listens(pair.source)
        _tmux(pair.source, "set", "-g", "exit-empty", "off")
        _tmux(
            pair.source, "new-session", "-d", "-s", "work", "-x", "70", "-y", "20", "bash --norc --noprofile"
        )
        _tmux(pair.source, "new-window", "-t", "work", "-c", str(text.parent), "vim -u NONE -N -n text")
        _until_shown(pair.source, "work:0", "bash-")
        _until_shown(pair.source, "work:1", "[New")
        _type(pair.source, "work:0", "typed=3")
        _until_shown(pair.source, "work:0", "typed=3\nbash-")
        here, there = pair.source, pair.destination
        for hop in range(2):
            with receiving(there) as receiver:
                pid, _ = move_now(here, receiver, pid)
            _type(there, "work:0", f"echo $((typed + {hop} + 40)) $(stty size) $(tty)")
            _until_shown(there, "work:0", f"\n{43 + hop} 20 70 /dev/pts/0\nbash-")
            _type(there, "work:0", "sleep 100")
            _until_runs(there, "work:0", "sleep")
            _tmux(there, "send-keys", "-t", "work:0", "C-c")
            _until_runs(there, "work:0", "bash")
            _tmux(there, "send-keys", "-t", "work:1", f"oline {hop}", "Escape", ":w!", "Enter")
            _until_shown(there, "work:1", f"{hop + 2}L, ")
            here, there = there, here
        assert text.read_text().split() == ["line", "0", "line", "1"]
    finally:
        with ending(pid):
            pass
        process.wait()


def _tmux(host: Host, *words_of: str) -> str:
    done = host.run(["tmux", "-S", _SOCKET, *words_of], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def _tmux_when_it_listens(host: Host) -> None:
    def listens() -> bool:
        done = host.run(
            ["tmux", "-S", _SOCKET, "-N", "show", "-g", "status"], capture_output=True, timeout=20
        )
        return done.returncode == 0

    wait_until(listens, "tmux listens")


def _type(host: Host, window: str, line: str) -> None:
    _tmux(host, "send-keys", "-t", window, line, "Enter")


def _until_shown(host: Host, window: str, text: str) -> None:
    def screen() -> str:
        return _tmux(host, "capture-pane", "-p", "-t", window)

    try:
        wait_until(lambda: text in screen(), f"{window} shows {text}")
    except AssertionError as error:
        raise AssertionError(f"{error}, not\n{screen()}") from None


def _until_runs(host: Host, window: str, command: str) -> None:
    asked = ("display", "-p", "-t", window, "#{pane_current_command}")
    wait_until(lambda: _tmux(host, *asked) == f"{command}\n", f"{window} runs {command}")
