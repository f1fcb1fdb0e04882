"""Pipes and FIFOs: their contents are copied, not taken, and arrive in order."""

from __future__ import annotations

import fcntl
import os
import select
import socket
from pathlib import Path

import pytest

from lazyproc.dump.descriptors import gather_descriptors
from lazyproc.errors import RestoreError
from tests.live.descriptors import at, checkpoint_of, gathered_from, made, made_from, obstacle_words, stopped


def _pipe(flags: int = 0) -> None:
    reading, writing = os.pipe2(flags)
    at(10, reading)
    at(11, writing)


def _filled_pipe() -> None:
    _pipe()
    fcntl.fcntl(11, fcntl.F_SETPIPE_SZ, 1 << 17)
    os.write(11, b"x" * 100_000)
    os.read(10, 10)
    os.write(11, b"the end")


def test_contents_and_capacity() -> None:
    with made_from(_filled_pipe) as fds:
        assert fcntl.fcntl(fds[10], fcntl.F_GETPIPE_SZ) == 1 << 17
        assert os.read(fds[10], 1 << 20) == b"x" * 99_990 + b"the end"
        os.write(fds[11], b"more")
        assert os.read(fds[10], 9) == b"more"


def test_the_source_keeps_its_contents() -> None:
    with stopped(_filled_pipe) as tasks:
        first, second = gather_descriptors(tasks), gather_descriptors(tasks)
        assert first.pipes == second.pipes
        (pipe,) = first.pipes.values()
        assert pipe.data == b"x" * 99_990 + b"the end"
        assert pipe.id == os.stat(f"/proc/{tasks[0].pid}/fd/10").st_ino
        with first.sockets, second.sockets:
            pass


def test_more_than_its_capacity_spliced_from_a_socket() -> None:
    sent = bytes(range(250)) * 400

    def body() -> None:
        _pipe()
        with socket.create_server(("127.0.0.1", 0)) as server:
            sending = socket.create_connection(server.getsockname())
            receiving, _ = server.accept()
        with sending, receiving:
            sending.sendall(sent)
            left = len(sent)
            while left:
                left -= os.splice(receiving.fileno(), 11, left)

    with made_from(body) as fds:
        os.set_blocking(fds[10], False)
        assert os.read(fds[10], len(sent) + 1) == sent


def test_an_empty_pipe_blocks_or_not_as_before() -> None:
    def body() -> None:
        _pipe()
        os.set_blocking(10, False)

    with made_from(body) as fds:
        assert not os.get_blocking(fds[10])
        assert os.get_blocking(fds[11])
        with pytest.raises(BlockingIOError):
            os.read(fds[10], 1)


@pytest.mark.parametrize("packets", [(b"abc", b"d", b"efgh"), (b"single",)])
def test_packets_stay_packets(packets: tuple[bytes, ...]) -> None:
    def body() -> None:
        _pipe(os.O_DIRECT)
        for packet in packets:
            os.write(11, packet)

    with made_from(body) as fds:
        assert tuple(os.read(fds[10], 4096) for _ in packets) == packets
        os.write(fds[11], b"1")
        os.write(fds[11], b"2")
        assert os.read(fds[10], 99) == b"1"


def test_end_of_file_and_broken_pipe() -> None:
    def body() -> None:
        _pipe()
        os.write(11, b"last words")
        os.close(11)
        reading, writing = os.pipe()
        at(12, writing)
        os.close(reading)

    with made_from(body) as fds:
        reading, writing = os.dup(fds[10]), os.dup(fds[12])
    assert os.read(reading, 99) == b"last words"
    assert os.read(reading, 99) == b""
    with pytest.raises(BrokenPipeError):
        os.write(writing, b"x")
    os.close(reading)
    os.close(writing)


def test_both_ends_in_one_description(tmp_path: Path) -> None:
    def body() -> None:
        _pipe()
        os.write(11, b"abc")
        at(12, os.open("/proc/self/fd/10", os.O_RDWR))

    with made_from(body) as fds:
        assert os.read(fds[12], 1) == b"a"
        os.write(fds[12], b"d")
        assert os.read(fds[10], 9) == b"bcd"


def test_fifo_by_name(tmp_path: Path) -> None:
    path = tmp_path / "fifo"

    def body() -> None:
        os.mkfifo(path)
        at(10, os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        at(11, os.open(path, os.O_WRONLY))
        os.write(11, b"in the fifo")

    with made_from(body) as fds:
        assert os.readlink(f"/proc/self/fd/{fds[10]}") == str(path)
        late = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        assert os.read(late, 3) == b"in "
        os.close(late)
        assert os.read(fds[10], 99) == b"the fifo"


def test_fifo_in_use_on_this_host(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with gathered_from(lambda: at(10, os.open(path, os.O_RDWR))) as gathered:
        fifo = os.open(path, os.O_RDWR)
        os.write(fifo, b"of others")
        with pytest.raises(RestoreError, match="fifo: is in use on this host"):
            made(checkpoint_of(gathered)).__enter__()
        os.close(fifo)
        path.unlink()
        path.touch()
        with pytest.raises(RestoreError, match=f"is no FIFO on this host; mkfifo {path}"):
            made(checkpoint_of(gathered)).__enter__()


def test_deleted_fifo_becomes_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "fifo"

    def body() -> None:
        os.mkfifo(path)
        at(10, os.open(path, os.O_RDWR))
        os.unlink(path)
        os.write(10, b"unseen")

    with made_from(body) as fds:
        assert os.read(fds[10], 99) == b"unseen"


def test_the_other_end_in_another_process_of_the_tree() -> None:
    def child() -> None:
        os.close(11)

    def parent() -> None:
        _pipe()
        os.write(11, b"to my child")

    with gathered_from(parent, child) as gathered:
        assert gathered.obstacles == []
        assert len(gathered.pipes) == 1


def test_the_other_end_outside_of_the_tree(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def held_by_us() -> None:
        for name in os.listdir(f"/proc/{os.getppid()}/fd"):
            try:
                if os.stat(f"/proc/{os.getppid()}/fd/{name}").st_ino == inode:
                    at(10, os.open(f"/proc/{os.getppid()}/fd/{name}", os.O_WRONLY))
                    return
            except FileNotFoundError:
                continue

    inode = os.fstat(reading).st_ino
    (words,) = obstacle_words(held_by_us)
    assert words.startswith(
        f"fd 10: the reading end of pipe:[{inode}] is open in a process outside the tree; "
    )
    assert "redirected to files" in words
    os.close(reading)
    os.close(writing)

    with stopped(lambda: at(10, os.open(fifo, os.O_RDWR))):
        (words,) = obstacle_words(lambda: at(10, os.open(fifo, os.O_WRONLY)))
        assert f"the reading end of {fifo} is open in a process outside the tree" in words


def test_writers_are_seen_after_the_restore() -> None:
    with made_from(_pipe) as fds:
        poll = select.poll()
        poll.register(fds[10], select.POLLIN)
        assert poll.poll(0) == []
        os.write(fds[11], b"1")
        assert poll.poll(0) == [(fds[10], select.POLLIN)]
