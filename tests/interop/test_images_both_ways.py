"""CRIU restores what lazyproc dumps, lazyproc what CRIU dumps, whole and lazily; what cannot be restored is refused."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.images.convert import from_images
from lazyproc.images.files import Folder
from tests import peer
from tests.interop.both_ways import (
    criu,
    dumped_by_criu,
    end,
    gone,
    lazyproc,
    restored_by_criu,
    restored_by_lazyproc,
    started,
)
from tests.live.programs import wait_until
from tests.needs import require, require_root

MIXED = ("mixed", "16", "3", "100")
# tree: zombies, sessions; aio_ring: what only CRIU reads of our pages; small_state: filters of all threads
CARGO = [
    MIXED,
    ("threads",),
    ("tree",),
    ("aio_ring",),
    ("shared_anon",),
    ("memory_static",),
    ("small_state",),
    ("file_locks",),
    ("netlink", "plain"),
    ("terminals", "plain"),
]
IDS = [words[0] for words in CARGO]
WAYS = [False, True]


@pytest.fixture(autouse=True)
def _as_root() -> None:
    require_root()


@pytest.mark.parametrize("lazy", WAYS, ids=["whole", "lazy"])
@pytest.mark.parametrize("words", CARGO, ids=IDS)
def test_lazyproc_restores_what_criu_dumped(words: tuple[str, ...], lazy: bool, tmp_path: Path) -> None:
    images = tmp_path / "images"
    with started(*words, directory=tmp_path) as program:
        dumped_by_criu(program, images)
        gone(program)
        assert str(program.pid) in lazyproc("show", images)
        end(restored_by_lazyproc(images, *(["--lazy"] if lazy else [])), program.watch)


@pytest.mark.parametrize("lazy", WAYS, ids=["whole", "lazy"])
@pytest.mark.parametrize("words", CARGO, ids=IDS)
def test_criu_restores_what_lazyproc_dumped(words: tuple[str, ...], lazy: bool, tmp_path: Path) -> None:
    images = tmp_path / "images"
    with started(*words, directory=tmp_path) as program:
        lazyproc("checkpoint", program.pid, "-D", images)
        gone(program)
        with restored_by_criu(program, images, lazy=lazy):
            end(program.pid, program.watch)


@pytest.mark.parametrize("lazy", WAYS, ids=["whole", "lazy"])
def test_the_terminal_of_a_session_that_criu_dumped(lazy: bool, tmp_path: Path) -> None:
    """CRIU itself gives it back to the leader alone."""
    test_lazyproc_restores_what_criu_dumped(("terminals", "session"), lazy, tmp_path)


def test_crit_explores_what_lazyproc_dumped(tmp_path: Path) -> None:
    with started(*MIXED, directory=tmp_path) as program:
        lazyproc("checkpoint", program.pid, "-D", tmp_path / "images")
    for what in ("ps", "fds", "mems", "rss"):
        seen = subprocess.run(
            [*peer.crit(), "x", str(tmp_path / "images"), what], capture_output=True, text=True, check=True
        )
        assert str(program.pid) in seen.stdout


# --- what CRIU carries over and we do not --------------------------------------------------------------------

_WAITS = "import os, sys, time; os.write(int(sys.argv[1]), b'x'); time.sleep(60)"


@contextmanager
def _dumped(code: str, directory: Path, *options: str, stdin: int = subprocess.DEVNULL) -> Iterator[Path]:
    """A Python program that has written a byte to the descriptor in argv[1], dumped by CRIU."""
    ready, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", code, str(theirs)],
        stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=[theirs],
        start_new_session=True, cwd="/",
    )  # fmt: skip
    images = directory / "images"
    images.mkdir()
    try:
        os.close(theirs)
        assert os.read(ready, 1) == b"x"
        criu("dump", images, "--tree", str(process.pid), *options)
        process.wait()
        yield images
    finally:
        os.close(ready)
        process.kill()
        process.wait()


def _restore_fails(images: Path, *words: str) -> None:
    """Before a single process is made."""
    for option in ("--detach", "--lazy"):
        said = lazyproc("restore", "-D", images, option, expected=1)
        assert all(word in said for word in words), said


def test_a_terminal_is_refused(tmp_path: Path) -> None:
    """criu dump --shell-job"""
    ours, theirs = pty.openpty()
    try:
        with _dumped(_WAITS, tmp_path, "--shell-job", stdin=theirs) as images:
            _restore_fails(images, "tty-info.img", "terminal")
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_name_outside_that_nobody_has_any_more(tmp_path: Path) -> None:
    """criu dump --ext-unix-sk: a datagram socket is connected to that name again."""
    name = tmp_path / "outside"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside:
        outside.bind(str(name))
        code = f"import socket; s = socket.socket(1, 2); s.connect({str(name)!r})\n{_WAITS}"
        with _dumped(code, tmp_path, "--ext-unix-sk") as images:
            name.unlink()
            said = lazyproc("restore", "-D", images, "--detach", expected=1)
            assert str(name) in said, said


@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_a_fifo_that_was_removed_is_nobody_elses(taken: bool, tmp_path: Path) -> None:
    """Not that of who has its name now."""
    fifo, said = tmp_path / "fifo", tmp_path / "said"
    code = (
        f"import os, sys; os.mkfifo({str(fifo)!r}); fd = os.open({str(fifo)!r}, os.O_RDWR); os.write(fd, b'kept')\n"
        f"os.unlink({str(fifo)!r}); os.write(int(sys.argv[1]), b'x'); os.close(int(sys.argv[1]))\n"
        "signal.sigwait([signal.SIGTERM]); os.write(fd, b' so')\n"
        f"open({str(said)!r}, 'wb').write(os.read(fd, 99)); os.rename({str(said)!r}, {str(said) + '.all'!r})\n"
    )
    code = f"import signal; signal.pthread_sigmask(0, [signal.SIGTERM])\n{code}"
    with _dumped(code, tmp_path) as images:
        if taken:
            os.mkfifo(fifo)
            other = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        root = restored_by_lazyproc(images)
        if taken:
            with pytest.raises(BlockingIOError):
                os.read(other, 99)
            os.close(other)
        os.kill(root, signal.SIGTERM)
        wait_until((tmp_path / "said.all").exists, "it has read what lay in its FIFO")
    assert (tmp_path / "said.all").read_bytes() == b"kept so"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ipcns-sem-5.img", "semaphores"),
        ("tty-data.img", "terminal"),
        ("tmpfs-dev-12.tar.gz.img", "kind that is not known"),
        ("brand-new.img", "kind that is not known"),
    ],
)
def test_images_of_other_kinds_are_refused(name: str, words: str, tmp_path: Path) -> None:
    with _dumped(_WAITS, tmp_path) as images:
        (images / name).write_bytes(bytes(64))
        _restore_fails(images, name, words)
        (images / name).write_bytes(
            bytes(8)
        )  # a header and no record, as CRIU leaves it for what does not occur
        from_images(Folder(images).read())


def test_fields_that_are_not_known_are_refused(tmp_path: Path) -> None:
    """The last byte of a process's mm is followed by a field 99 that no CRIU of today writes."""
    with _dumped(_WAITS, tmp_path) as images:
        (path,) = images.glob("mm-*.img")
        data = path.read_bytes()
        grown = int.from_bytes(data[8:12], "little") + 3
        path.write_bytes(data[:8] + grown.to_bytes(4, "little") + data[12:] + b"\x98\x06\x01")
        _restore_fails(images, path.name, "field 99 of mm_entry", "newer CRIU")


# --- connections ----------------------------------------------------------------------------------------------


@contextmanager
def _answering(directory: Path, *options: str) -> Iterator[tuple[socket.socket, Path]]:
    """Our end of a TCP connection to a program dumped with `options` that echoes what it reads, and the images."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        code = (
            f"import os, socket, sys; s = socket.create_connection(('127.0.0.1', {port}))\n"
            "os.write(int(sys.argv[1]), b'x'); os.close(int(sys.argv[1]))\n"
            "while data := s.recv(99): s.sendall(data)\n"
            f"open({str(directory / 'ended')!r}, 'w').close()\n"
        )
        with _dumped(code, directory, *options) as images, listener.accept()[0] as ours:
            ours.settimeout(10)
            yield ours, images


@pytest.mark.parametrize("lock", ["iptables", "nftables", "skip"])
def test_an_established_connection_goes_on(lock: str, tmp_path: Path) -> None:
    """criu dump --tcp-established: the rules that hold its packets back are taken away."""
    require("nft")
    rules = _rules()
    with _answering(tmp_path, "--tcp-established", "--network-lock", lock) as (ours, images):
        ours.sendall(b"while nobody is there") if lock != "skip" else None
        restored_by_lazyproc(images)
        ours.sendall(b".")
        expected = b"." if lock == "skip" else b"while nobody is there."
        heard = b""
        while len(heard) < len(expected):
            heard += ours.recv(99)
        assert heard == expected
        assert _rules() == rules
        ours.shutdown(socket.SHUT_WR)
        wait_until((tmp_path / "ended").exists, "it has read the end")


def test_a_restore_that_fails_leaves_the_rules(tmp_path: Path) -> None:
    """Otherwise the peer's next packet would end the connection, and with it a restore that could have worked."""
    require("nft")
    before = _rules()
    for lock in ("iptables", "nftables"):
        (tmp_path / lock).mkdir()
        with _answering(tmp_path / lock, "--tcp-established", "--network-lock", lock) as (_ours, images):
            locked = _rules()
            assert locked != before
            (images / "taken.img").write_bytes(bytes(64))
            _restore_fails(images, "taken.img")
            assert _rules() == locked
            (images / "taken.img").unlink()
            os.kill(restored_by_lazyproc(images), 9)
            assert _rules() == before


def test_a_connection_that_was_given_up_has_ended(tmp_path: Path) -> None:
    """criu dump --tcp-close"""
    with _answering(tmp_path, "--tcp-close") as (_ours, images):
        restored_by_lazyproc(images)
        wait_until((tmp_path / "ended").exists, "it has read the end")


def _rules() -> str:
    done = subprocess.run(["nft", "-s", "list", "ruleset"], capture_output=True, text=True, check=True)
    return "".join(line for line in done.stdout.splitlines(True) if "drop" in line or "CRIU" in line)
