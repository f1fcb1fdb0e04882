"""What has to be true after a command has failed: one clear sentence, and nothing changed on either host."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from lazyproc.errors import LazyprocError
from lazyproc.hosts import PRIVATE, Host, Pair
from lazyproc.kernel import proc
from lazyproc.migrate.link import ROLES, Gathering, Link
from lazyproc.migrate.order import Order
from lazyproc.migrate.prepare import Offer, vdso_build_id
from lazyproc.pages.channel import Channel
from lazyproc.pages.dial import dial
from lazyproc.pages.peer import Trust
from lazyproc.pages.session import Session
from lazyproc.wire.native import Abort, Images, Needs, Party, Prepare, Prepared
from tests.live.moving import CLI, Receiver, look_at_tree, tree_of
from tests.live.programs import Program, wait_until
from tests.live.real import ending, move_now, network_of, processes_of

PACED = ("memory_random", 8, 2, 1000)  # a guest on a machine with few cores
CHECKPOINT = ("checkpoint", "-D", "/tmp/images")
MIGRATE = ("migrate", "127.0.0.1:1", "--insecure")
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
COMMAND_S = 30
REPOSITORY = Path(__file__).parents[2]
REACH_S = 2


def lazyproc(host: Host, *argv: object, by: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """A command on `host`, run by another one: env(1), setpriv(1), …"""
    words = [*by, *CLI, *map(str, argv)]
    return host.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S)


def started(host: Host, *argv: object) -> subprocess.Popen[str]:
    """The same, under way."""
    pipe = subprocess.PIPE
    return host.popen([*CLI, *map(str, argv)], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def migrated(pair: Pair, receiver: Receiver, pid: int) -> subprocess.CompletedProcess[str]:
    """`lazyproc migrate` of a process whose pid the caller knows, however it ends."""
    return lazyproc(pair.source, "migrate", pair.source.vpid(pid), receiver.address, "--insecure")


def without(name: str) -> tuple[str, ...]:
    """A kernel without that system call, for `by`."""
    return (sys.executable, "-m", "tests.live.without", name)


def moves(pair: Pair, receiver: Receiver, program: Program) -> None:
    """After all that went wrong the next move works, and every page is right."""
    new, _ = move_now(pair.source, receiver, program.pid)
    with ending(new):
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


def says(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """Exit `code` and one sentence with these words in it: no traceback, no fault of ours."""
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    assert "fault of lazyproc" not in done.stderr, done.stderr
    assert done.stderr.count("lazyproc: ") == 1, done.stderr
    *_, sentence = done.stderr.partition("lazyproc: ")
    missing = [word for word in words if word not in sentence]
    assert not missing, f"{missing} not in {sentence!r}"


@contextmanager
def unharmed(program: Program) -> Iterator[None]:
    """Whatever happens in the block, the program runs on afterwards with all that it had."""
    program.watch.wait_beats()
    before = look_at_tree(program.pid)
    yield
    wait_until(lambda: _free(program.pid), "it runs and nobody traces it")
    program.watch.wait_beats()
    assert look_at_tree(program.pid) == before


def _free(root: int) -> bool:
    statuses = [proc.status(proc.read(pid, "status")) for pid in tree_of(root).values()]
    return all(status.tracer_pid == 0 and status.state not in "tT" for status in statuses)


@contextmanager
def unchanged(*hosts: Host) -> Iterator[None]:
    """After the block there are the same processes, files and nftables on these hosts as before."""
    before = [_inventory(host) for host in hosts]
    yield
    for host, old in zip(hosts, before, strict=True):
        wait_until(
            lambda host=host, old=old: processes_of(host) == old[0],  # type: ignore[misc]
            f"{host.name} has the processes {old[0]}, not {processes_of(host)}",
        )
        now = _inventory(host)
        assert now == old, f"{host.name}: {old} became {now}"


def _inventory(host: Host) -> tuple[dict[int, str], list[Path], str]:
    root = Path(f"/proc/{host.init_pid}/root")
    places = [*(root / place[1:] for place in PRIVATE), host.outside / "state"]
    files = sorted(
        Path(folder, name) for place in places for folder, _, names in os.walk(place) for name in names
    )
    ours = Path(f"{root}{REPOSITORY}")  # where the tree lies in /tmp, Python adds to it what it compiles
    files = [path for path in files if not _is_tombstone(path) and not path.is_relative_to(ours)]
    tables = host.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
    return processes_of(host), files, tables


def _is_tombstone(path: Path) -> bool:
    """What a source in doubt is told when it asks: that the tree was given up here before it ran."""
    return path.name.endswith("-destination.json") and json.loads(path.read_text())["state"] == "aborted"


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """Killed at the end when it still runs."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# --- peers --------------------------------------------------------------------------------------------------


@contextmanager
def listener_on(host: Host, serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """HOST:PORT on `host` where `serve` gets the listening socket, in a thread that ends when the socket is closed."""
    with network_of(host):
        sock = socket.create_server((str(host.address), 0))

    def work() -> None:
        with suppress(OSError, LazyprocError):
            serve(sock)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield f"{host.address}:{sock.getsockname()[1]}"
    finally:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()
        thread.join()


def linked(sock: socket.socket, side: Party, known: Session | None = None) -> Link:
    """The link of the first session that comes to a listening socket, or that goes on with a `known` one."""
    with closing(Gathering(known)) as gathering:
        while True:
            channel = Channel(sock.accept()[0], side)
            channel.receive(COMMAND_S)
            link = gathering.add(channel)
            if link is not None:
                return link


def images_sent(pair: Pair, receiver: Receiver, data: bytes) -> str:
    """Packed images are sent by a source that says it needs nothing; why they were not taken."""
    session = Session.new()
    offer = Offer(1, 1, 0, {}, vdso_build_id().hex())
    with network_of(pair.source):
        control, *pages = (
            dial(receiver.address, session.hello(role), Party.SOURCE, trust=Trust(insecure=True))
            for role in ROLES
        )
    try:
        control.send(Needs({"needs": []}))
        control.send(Prepare({**offer.fields(), **Order().fields()}))
        assert isinstance(control.receive(COMMAND_S), Prepared)
        control.send(Images(data))
        answer = control.receive(COMMAND_S)
        assert isinstance(answer, Abort), answer
        return str(answer.fields["reason"])
    finally:
        for channel in (control, *pages):
            channel.close()
        wait_until(lambda: f"session {session.id}: " in receiver.notes(), "it is noted")


Meddle = Callable[[int, bytes], bytes]


def _unchanged(_number: int, data: bytes) -> bytes:
    return data


@contextmanager
def way_to(
    receiver: Receiver, host: Host, *, there: Meddle = _unchanged, back: Meddle = _unchanged
) -> Iterator[str]:
    """An address on `host` that leads to the receiver. What goes there on connection N (0 control, 1 urgent, 2 bulk)
    becomes `there(N, data)`, what comes back `back(N, data)`; OSError hangs up.
    """
    name, _, port = receiver.address.rpartition(":")

    def serve(sock: socket.socket) -> None:
        with ExitStack() as stack:
            pumps = []
            numbers = cycle(range(3))  # the second three are a link that was opened again
            while True:
                try:
                    near = stack.enter_context(sock.accept()[0])
                except OSError:  # nobody comes any more
                    break
                try:
                    with network_of(host):
                        far = stack.enter_context(socket.create_connection((name, int(port)), REACH_S))
                except OSError:  # nobody listens there now, or no packet gets there
                    near.close()
                    continue
                far.settimeout(None)
                number = next(numbers)
                for one, other, meddle in ((near, far, there), (far, near, back)):
                    change = partial(meddle, number)
                    pumps.append(threading.Thread(target=_pump, args=(one, other, change)))
                    pumps[-1].start()
            for pump in pumps:
                pump.join()

    with listener_on(host, serve) as address:
        yield address


def _pump(one: socket.socket, other: socket.socket, change: Callable[[bytes], bytes]) -> None:
    """Until one of them hangs up; then both are told."""
    with suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(change(data))
    for sock in (one, other):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
