"""redis-server and a client that goes on writing and reading: a tiny RESP client of its own."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lazyproc.hosts import Host
from tests.live.real import dialled
from tests.needs import require

PORT = 7999
BATCH = 20
Reply = int | str | bytes | None | list["Reply"]


class Connection:
    """RESP 2 over one TCP connection, pipelined."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._in = sock.makefile("rb")

    def ask(self, commands: Sequence[Sequence[object]]) -> list[Reply]:
        """The replies to all the commands, which are sent at once."""
        words = [[str(word).encode() for word in command] for command in commands]
        self.sock.sendall(
            b"".join(
                b"*%d\r\n%s" % (len(row), b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in row))
                for row in words
            )
        )
        return [self._reply() for _ in commands]

    def call(self, *command: object) -> Reply:
        return self.ask([command])[0]

    def close(self) -> None:
        self._in.close()
        self.sock.close()

    def _reply(self) -> Reply:
        line = self._in.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise AssertionError(f"redis answered {rest.decode()}")
        if kind == b"+":
            return rest.decode()
        number = int(rest)
        if kind == b":":
            return number
        if kind == b"*":
            return [self._reply() for _ in range(number)]
        return self._in.read(number + 2)[:-2] if number >= 0 else None


@dataclass(slots=True)
class Load:
    """A client in a thread. Every write is numbered; what was acknowledged is known and read again all the time."""

    connection: Connection
    acknowledged: int = 0  # batches
    longest_s: float = 0.0  # the longest wait for the replies to a batch
    failure: BaseException | None = None
    _enough: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            while not self._enough.is_set():
                started = time.monotonic()
                self._one_batch(self.acknowledged)
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                self.acknowledged += 1
        except BaseException as error:
            self.failure = error

    def _one_batch(self, batch: int) -> None:
        """Twenty numbers, the batch's own number at the end of a list, and what some earlier batch wrote."""
        numbers = range(batch * BATCH, (batch + 1) * BATCH)
        earlier = random.randrange(batch * BATCH + 1) if batch else None
        commands: list[tuple[object, ...]] = [("SET", f"c:{number}", number) for number in numbers]
        commands += [("RPUSH", "batches", batch), ("GET", f"c:{earlier}")]
        *stored, length, found = self.connection.ask(commands)
        assert stored == ["OK"] * BATCH
        assert length == batch + 1, "a write was done twice, or not at all"
        if earlier is not None and earlier < batch * BATCH:
            assert found == str(earlier).encode()

    def stop(self) -> None:
        self._enough.set()

    def check_all(self) -> None:
        """Every acknowledged write is there, once; afterwards nothing of ours is."""
        total = self.acknowledged * BATCH
        keys = [f"c:{number}" for number in range(total)]
        for start in range(0, total, 1000):
            part = self.connection.call("MGET", *keys[start : start + 1000])
            assert part == [str(number).encode() for number in range(start, min(start + 1000, total))]
        batches = self.connection.call("LRANGE", "batches", 0, -1)
        assert batches == [str(batch).encode() for batch in range(self.acknowledged)]
        assert self.connection.call("DEL", "batches", *keys) == total + 1


@contextmanager
def loaded(connection: Connection) -> Iterator[Load]:
    """A client that works until the end of the block, where it must have met nothing wrong."""
    load = Load(connection)
    thread = threading.Thread(target=load.run, name="redis client")
    thread.start()
    try:
        yield load
    finally:
        load.stop()
        thread.join()
    if load.failure is not None:
        raise load.failure


@contextmanager
def redis_server(host: Host, keys: int) -> Iterator[tuple[subprocess.Popen[bytes], Reply]]:
    """A server in memory only, filled with `keys` keys of 100 bytes; the process, and the digest of its content."""
    argv = [str(require("redis-server")), "--port", str(PORT), "--save", "", "--protected-mode", "no"]
    argv += ["--enable-debug-command", "yes", "--dir", str(host.scratch)]
    with (host.outside / "redis.log").open("w") as log:
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process, _filled(host, keys)
    finally:
        process.kill()
        process.wait()


def _filled(host: Host, keys: int) -> Reply:
    with asking(host) as redis:
        assert redis.call("DEBUG", "POPULATE", keys, "k", 100) == "OK"
        return redis.call("DEBUG", "DIGEST")


@contextmanager
def asking(host: Host, address: str = "127.0.0.1") -> Iterator[Connection]:
    """A connection from the host for a few questions."""
    connection = Connection(dialled(host, address, PORT))
    try:
        yield connection
    finally:
        connection.close()
