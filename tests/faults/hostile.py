"""A crowd of strangers at each listener: no process changes, the listener does not grow, the next peer is served."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.hosts import Host, Pair
from lazyproc.kernel.sys import syscall
from lazyproc.migrate.link import MAX_INCOMPLETE
from lazyproc.migrate.order import Order
from lazyproc.migrate.prepare import Offer, vdso_build_id
from lazyproc.pages.door import HANDSHAKE_S, MAX_STRANGERS
from lazyproc.pages.session import Session
from lazyproc.wire import native
from lazyproc.wire.native import Party
from tests.faults.desks import packets
from tests.faults.helpers import DESTINATION, SOURCE, helper, journal, journals
from tests.faults.strangers import (
    ALONE,
    Behaviour,
    Crowd,
    Dial,
    Script,
    mutated_session,
    prepared_session,
    silent_session,
)
from tests.fuzz.targets import packed
from tests.live.bad_luck import PACED, unchanged, unharmed
from tests.live.moving import CLI, checkpoint, receiving, run_cli
from tests.live.programs import Program, Watch, running, wait_until
from tests.live.real import ending, migrating, move_now, network_of, processes_of

NOBODY, SYS_SETFSUID = 65534, 122
COLD = ("memory_random", 8, 1, 1_000_000)  # touches a page now and then, and all of them in its last check
WHOLE = 0.05  # of the connections, in sessions that come to life: each costs `receive` a fork
# Who has begun a session and does not go on keeps two connections, until others need the room.
MAX_OPEN = MAX_STRANGERS + 2 * MAX_INCOMPLETE
# What the allocator may keep besides, twice what was seen: 0.1 KiB a connection shows in the soak, 1 KiB in a tenth.
MAX_GROWTH_KIB = 1024


@dataclass(frozen=True, slots=True)
class Held:
    """What a process has of the host."""

    kib: int  # anonymous memory
    descriptors: int
    threads: int

    @classmethod
    def by(cls, pid: int) -> Held:
        status = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"^(RssAnon|Threads):\s+(\d+)", status, re.MULTILINE))
        assert "RssAnon" in found, f"pid {pid} has ended"
        return cls(int(found["RssAnon"]), len(os.listdir(f"/proc/{pid}/fd")), int(found["Threads"]))

    def check(self, pid: int, settle_s: float = HANDSHAKE_S + 5) -> Held:
        """What it has now, once strangers have had their time, is not more than then."""
        most = self.descriptors + MAX_OPEN
        wait_until(
            lambda: Held.by(pid).descriptors <= most and Held.by(pid).threads <= self.threads,
            f"pid {pid} had {self}, lets go of what it has",
            settle_s,
        )
        now = Held.by(pid)
        assert now.kib - self.kib < MAX_GROWTH_KIB, f"{self} -> {now}"
        return now


@dataclass(slots=True)
class Listener:
    """A running command of lazyproc that listens."""

    process: subprocess.Popen[Any]
    log: Path
    address: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def notes(self) -> list[str]:
        return self.log.read_text().splitlines()

    def dial_from(self, host: Host) -> Dial:
        """Connects from that host."""
        name, _, port = self.address.rpartition(":")

        def dial() -> socket.socket:
            with network_of(host):
                return socket.create_connection((name, int(port)), 20)

        return dial


@contextmanager
def listening(host: Host, *words: object) -> Iterator[Listener]:
    """`lazyproc WORDS --listen` on a port of its own choice. Killed at the end."""
    log = host.outside / f"{words[0]}.log"
    argv = [*CLI, *map(str, words), "--listen", f"{host.address}:0", "-v"]
    with log.open("w") as file:
        process = host.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        listener = Listener(process, log)
        wait_until(lambda: process.poll() is not None or "listening on port" in log.read_text(), "it listens")
        listener.address = f"{host.address}:{listener.notes()[0].split()[-1]}"
        yield listener
    finally:
        process.kill()
        process.wait()


def as_nobody(dial: Dial) -> Dial:
    """The same by another user of the host: a socket's owner is the file system uid of the thread (sock_alloc)."""

    def dial_as_nobody() -> socket.socket:
        before = syscall(SYS_SETFSUID, NOBODY)
        try:
            return dial()
        finally:
            syscall(SYS_SETFSUID, before)

    return dial_as_nobody


# --- what the strangers say --------------------------------------------------------------------------------------


def source_script(pair: Pair) -> Script:
    """What a source says, up to the images of a real process. Nobody says COMMIT."""
    images = pair.shared / "script"
    with running("steady", directory=pair.shared, host=pair.source) as it:
        checkpoint(pair.source, it.pid, images, "--leave-running")
    prepare = native.Prepare({**Offer(1, 1, 0, {}, vdso_build_id().hex()).fields(), **Order().fields()})
    control = (native.Needs({"needs": []}), native.Ask(), prepare, native.Images(packed(images)))
    return Script(Party.SOURCE, control)


def destination_script() -> Script:
    """What a destination says that takes no tree: a PREPARED would have it frozen, and rightly so."""
    pages = [native.Get(1 << 8 | 1, 0x1000 * n, 1, n) for n in range(1, 8)]
    control = (native.Host({"kernel": "6"}), native.Obstacles({"obstacles": [], "more": 0}), native.Built())
    return Script(Party.DESTINATION, control, (*pages, native.Close()))


# --- the crowd ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Siege:
    """How many come, and what decides what each of them does."""

    count: int
    seed: int
    limit_s: float

    def crowd(self, dial: Dial, script: Script, sessions: Sequence[Session] = ()) -> Crowd:
        return Crowd(dial, script, random.Random(self.seed), sessions)


def besieged(
    order: Siege,
    crowd: Crowd,
    pid: int,
    whole: Sequence[Behaviour] = (mutated_session,),
    log: Path | None = None,
) -> dict[str, object]:
    """The crowd comes to the listener with that pid; a tenth of it first, since who has seen one of each has grown."""
    started = time.monotonic()
    try:
        with closing(_Leaving(crowd)):
            _come(order, crowd, order.count // 10, whole)
            warm = Held.by(pid)
            _come(order, crowd, order.count - order.count // 10, whole)
        settled = warm.check(pid)
    except AssertionError as error:
        said = log.read_text()[-3000:] if log else ""
        raise AssertionError(f"{error}\n{dict(crowd.counts)}\n{said}") from error
    return {
        "connections": crowd.connections,
        "seconds": round(time.monotonic() - started, 1),
        "kinds": dict(sorted(crowd.counts.items())),
        "kib": [warm.kib, settled.kib],
        "descriptors": [warm.descriptors, settled.descriptors],
    }


@dataclass(frozen=True, slots=True)
class _Leaving:
    crowd: Crowd

    def close(self) -> None:
        self.crowd.leave()


def _come(order: Siege, crowd: Crowd, count: int, whole: Sequence[Behaviour]) -> None:
    crowd.come(count - (int(count * WHOLE) if whole else 0), ALONE, order.limit_s)
    if whole:
        crowd.come(int(count * WHOLE), whole, order.limit_s)


def check_notes(listener: Listener, wanted: str) -> None:
    """One line for a refusal, in words; nothing that is a fault of ours."""
    notes = listener.notes()
    faults = [line for line in notes if "Traceback" in line or "fault of lazyproc" in line]
    assert not faults, faults
    assert any(wanted in line for line in notes), f"{wanted!r} is not among {notes[-5:]}"
    assert listener.process.poll() is None, notes[-5:]


# --- the listeners -----------------------------------------------------------------------------------------------


def receive(pair: Pair, order: Siege) -> dict[str, object]:
    script = source_script(pair)
    with (
        receiving(pair.destination) as receiver,
        running(*PACED, directory=pair.shared, host=pair.source) as program,
    ):
        it = Listener(receiver.process, receiver.log, receiver.address)
        with unchanged(pair.destination), unharmed(program):
            crowd = order.crowd(it.dial_from(pair.source), script)
            facts = besieged(order, crowd, it.pid, (mutated_session, silent_session), it.log)
            forget_aborted(pair.destination)
        check_notes(it, "ended a connection: ")
        new, _ = move_now(pair.source, receiver, program.pid)
        finish(new, program.watch)
    return facts


def receive_for_the_few(pair: Pair, order: Siege) -> dict[str, object]:
    """Without --insecure: from another host, and as another user of this one. Not a byte of theirs is read."""
    here = pair.destination
    with (
        listening(here, "receive") as it,
        running(*PACED, directory=pair.shared, host=here) as program,
    ):
        with unchanged(here), unharmed(program):
            facts = refused(pair, order, it, source_script(pair))
        done = run_cli(here, "migrate", here.vpid(program.pid), it.address, "--json")
        finish(here.pid(json.loads(done.stdout)["root_pid"]), program.watch)
    return facts


def forget_aborted(host: Host) -> None:
    """Whose tree stood here when he left may ask once more what became of it, until an operator says otherwise."""
    wait_until(
        lambda: not any(name.startswith("lazyproc-") for name in processes_of(host).values()),
        "nobody is on his way in",
        90,
    )
    for each in journals(host, DESTINATION):
        run_cli(host, "abort", each["id"])


def serve_process(pair: Pair, order: Siege) -> dict[str, object]:
    here = pair.source
    with (
        running(*PACED, directory=pair.shared, host=here) as program,
        listening(here, "serve", here.vpid(program.pid), "--insecure") as it,
    ):
        with unchanged(here, pair.destination), unharmed(program):
            crowd = order.crowd(it.dial_from(pair.destination), destination_script())
            facts = besieged(order, crowd, it.pid, log=it.log)
        check_notes(it, "ended a connection: ")
        assert "frozen" not in it.notes()
        fetched(pair, it, program.watch, "--insecure")
    return facts


def serve_process_for_the_few(pair: Pair, order: Siege) -> dict[str, object]:
    here = pair.source
    with (
        running(*PACED, directory=pair.shared, host=here) as program,
        listening(here, "serve", here.vpid(program.pid)) as it,
    ):
        with unchanged(here), unharmed(program):
            facts = refused(pair, order, it, destination_script())
        assert "frozen" not in it.notes()
        fetched(Pair(pair.destination, here), it, program.watch)
    return facts


def serve_folder(pair: Pair, order: Siege) -> dict[str, object]:
    here, images = pair.source, pair.shared / "images"
    with running(*PACED, directory=pair.shared, host=here) as program:
        checkpoint(here, program.pid, images)
    with listening(here, "serve", "-D", images, "--insecure") as it:
        with unchanged(here):
            crowd = order.crowd(it.dial_from(pair.destination), destination_script())
            facts = besieged(order, crowd, it.pid, (mutated_session, prepared_session), it.log)
        check_notes(it, "ended a connection: ")
        fetched(pair, it, program.watch, "--insecure")
    return facts


def serve_folder_for_the_few(pair: Pair, order: Siege) -> dict[str, object]:
    here, images = pair.source, pair.shared / "images"
    with running(*PACED, directory=pair.shared, host=here) as program:
        checkpoint(here, program.pid, images)
    with listening(here, "serve", "-D", images) as it:
        with unchanged(here):
            facts = refused(pair, order, it, destination_script())
        fetched(Pair(pair.destination, here), it, program.watch)
    return facts


def door(pair: Pair, order: Siege) -> dict[str, object]:
    """The keeper's, who listens himself when `receive` is gone; its tree runs and misses most of its memory."""
    with _kept(pair) as (it, session, program, finish_it):
        keeper = helper(pair.destination, DESTINATION, "keeper")
        crowd = order.crowd(it.dial_from(pair.source), source_script(pair), [session])
        wait_until(lambda: _is_open(crowd.dial), "the keeper listens")
        facts = besieged(order, crowd, keeper, ())
        assert helper(pair.destination, DESTINATION, "keeper") == keeper
        program.watch.wait_beats(1)
        finish_it()
    return facts


def desk(pair: Pair, order: Siege) -> dict[str, object]:
    """The keeper's: root may say what he likes, others nothing."""
    with _kept(pair) as (_, session, program, finish_it):
        keeper = helper(pair.destination, DESTINATION, "keeper")
        dial = _to_desk(pair.destination, session)
        crowd = order.crowd(dial, source_script(pair), [session])
        nobody = order.crowd(as_nobody(dial), crowd.script, [session])
        strange = packets(session)
        for each in (crowd, nobody):
            each.come(order.count // 20, strange, order.limit_s)
        warm = Held.by(keeper)
        for each in (crowd, nobody):
            each.come(order.count // 2, strange, order.limit_s)
            each.leave()
        settled = warm.check(keeper)
        assert helper(pair.destination, DESTINATION, "keeper") == keeper
        program.watch.wait_beats(1)
        finish_it()
    return {
        "connections": crowd.connections + nobody.connections,
        "kinds": dict(sorted((crowd.counts + nobody.counts).items())),
        "kib": [warm.kib, settled.kib],
        "descriptors": [warm.descriptors, settled.descriptors],
    }


LISTENERS: dict[str, Callable[[Pair, Siege], dict[str, object]]] = {
    "receive --insecure": receive,
    "receive": receive_for_the_few,
    "serve PID --insecure": serve_process,
    "serve PID": serve_process_for_the_few,
    "serve -D --insecure": serve_folder,
    "serve -D": serve_folder_for_the_few,
    "keeper's door": door,
    "keeper's desk": desk,
}


# --- steps -------------------------------------------------------------------------------------------------------


def refused(pair: Pair, order: Siege, it: Listener, script: Script) -> dict[str, object]:
    """Half of the crowd from the other host, half from this one by a user who is not let in."""
    there = pair.source if it.address.startswith(str(pair.destination.address)) else pair.destination
    here = pair.destination if there is pair.source else pair.source
    dials = (it.dial_from(there), as_nobody(it.dial_from(here)))
    rng = random.Random(order.seed)
    facts = besieged(order, order.crowd(lambda: rng.choice(dials)(), script), it.pid, (), it.log)
    check_notes(it, "refused a connection: ")
    assert not [line for line in it.notes() if "ended a connection" in line]
    for words in ("is not a process of this host that can be identified", f"the peer is uid {NOBODY}"):
        assert any(words in line for line in it.notes()), words
    return facts


def finish(new: int, watch: Watch) -> None:
    """Every page is right where it runs now."""
    with ending(new):
        watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        watch.wait_ended()


def fetched(pair: Pair, it: Listener, watch: Watch, *options: str) -> None:
    """A peer who wants the tree gets it."""
    done = run_cli(pair.destination, "restore", "--from", it.address, "--detach", "--json", *options)
    finish(pair.destination.pid(json.loads(done.stdout)["root_pid"]), watch)


@contextmanager
def _kept(pair: Pair) -> Iterator[tuple[Listener, Session, Program, Callable[[], None]]]:
    """A tree at the destination whose memory comes page by page, and no `receive` any more. What is called at the end
    lets it do its last check, for which all of it has to come.
    """
    with ExitStack() as stack:
        program = stack.enter_context(running(*COLD, directory=pair.shared, host=pair.source))
        it = stack.enter_context(listening(pair.destination, "receive", "--insecure"))
        receiver = _as_receiver(pair.destination, it)
        journey = stack.enter_context(migrating(pair.source, receiver, program.pid, "--no-bulk"))
        stack.enter_context(_aborted_on_failure(pair))
        journey.wait_running()
        it.process.kill()
        it.process.wait()
        record = journal(pair.destination, DESTINATION)

        def finish_it() -> None:
            root = pair.destination.pid(record["tree"]["root_pid"])
            with ending(root):
                os.kill(root, signal.SIGTERM)
                program.watch.wait_ended()
            journey.finish()
            wait_until(lambda: not journals(pair.destination, DESTINATION), "the journal is closed")

        yield it, Session(record["id"], "0" * 32), program, finish_it


def _as_receiver(host: Host, it: Listener) -> Any:
    from tests.live.moving import Receiver

    return Receiver(host, it.process, it.log, it.address)


def _is_open(dial: Dial) -> bool:
    try:
        dial().close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def _aborted_on_failure(pair: Pair) -> Iterator[None]:
    """Who traces a program keeps its parent from seeing its end."""
    try:
        yield
    except BaseException:
        for each in journals(pair.source, SOURCE):
            run_cli(pair.source, "abort", each["id"])
        raise


def _to_desk(host: Host, session: Session) -> Dial:
    name = f"\0lazyproc/{DESTINATION}/{session.id}"

    def dial() -> socket.socket:
        with network_of(host):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.settimeout(20)
            sock.connect(name)
            return sock

    return dial
