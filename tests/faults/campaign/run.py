"""One case, from two fresh hosts to its verdict."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lazyproc.hosts import Host, Pair, pair_of_hosts
from lazyproc.kernel import proc
from lazyproc.kernel.sys import pidfd_open
from tests.faults.campaign import cases
from tests.faults.campaign.cases import AtFrame, AtJournal, Case
from tests.faults.campaign.judge import Fault, Outcome, Scene, end, judged
from tests.faults.campaign.moments import Trap, await_bytes, await_journal, frame_trap
from tests.faults.helpers import gone
from tests.faults.test_links_cut import cut
from tests.live.moving import Receiver, receiving
from tests.live.programs import running, wait_until
from tests.live.real import Journey, migrating, processes_of

COMMS = {
    cases.KEEPER_THERE: "lazyproc-keeper",
    cases.PAGER: "lazyproc-pager",
    cases.GUARD: "lazyproc-guard",
}
SOURCE_COMM = "lazyproc-source"
MOMENT_S = 30.0


def run(case: Case) -> Outcome:
    """Raises Fault, with all that is known, when a promise was broken."""
    with pair_of_hosts() as pair:
        try:
            return _run(case, pair)
        except Exception as error:
            raise Fault(f"LAZYPROC_SEED={case.seed} case {case.number}: {case}: {error}") from error


def _run(case: Case, pair: Pair) -> Outcome:
    with ExitStack() as stack:
        program = stack.enter_context(
            running(
                case.program,
                *case.arguments,
                directory=pair.shared,
                host=pair.source,
                exclusive=case.program != "fork_lazy",
            )
        )
        program.watch.wait_beats(1)
        expected = -signal.SIGKILL if cases.RECEIVER in case.victims else 0
        receiver = stack.enter_context(receiving(pair.destination, expected=expected))
        journeys: list[Journey] = []
        cuts = stack.enter_context(_cuts(pair.destination))

        def act() -> None:
            if case.victims:
                kill(pair, receiver, journeys[0].process, case.victims)
            else:
                cuts.append(case.cut_s)

        trap = Trap(act)
        target = None
        if isinstance(case.moment, AtFrame):
            target = stack.enter_context(frame_trap(pair, receiver, case.moment, trap))
        options = ("--max-rate", str(case.max_rate))
        journey = stack.enter_context(migrating(pair.source, receiver, program.pid, *options, by=target))
        journeys.append(journey)
        scene = Scene(pair, program, case.program[:15], receiver, journey, frozenset(case.victims))
        stack.callback(scene.close)
        stack.callback(_end_source, pair)
        came = _await(case, pair, journey, trap)
        if trap.error is not None:
            raise trap.error
        outcome = judged(scene)
        if not came:
            outcome = Outcome.UNDISTURBED
            if cases.RECEIVER in case.victims:
                receiver.process.kill()
        end(scene, outcome)
        return outcome


def _await(case: Case, pair: Pair, journey: Journey, trap: Trap) -> bool:
    """Whether the moment came, and what was to be done is done."""
    until = time.monotonic() + MOMENT_S

    def over() -> bool:
        return journey.process.poll() is not None or time.monotonic() > until

    if isinstance(case.moment, AtFrame):
        while not trap.begun.wait(0.05) and not over():
            continue
        return trap.begun.is_set() and trap.sprung.wait(MOMENT_S)
    if isinstance(case.moment, AtJournal):
        came = await_journal(pair, case.moment, over)
    else:
        came = await_bytes(pair.destination, case.moment, over)
    if came:
        trap.spring()
    return came


class _Cuts:
    """Cuts are made at once and mended by a thread: whoever makes one may be in the way of what goes on meanwhile."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._threads: list[threading.Thread] = []

    def append(self, seconds: float) -> None:
        made = threading.Event()
        self._threads.append(threading.Thread(target=self._cut, args=(seconds, made)))
        self._threads[-1].start()
        made.wait()

    def _cut(self, seconds: float, made: threading.Event) -> None:
        with cut(self._host):
            made.set()
            time.sleep(seconds)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@contextmanager
def _cuts(host: Host) -> Iterator[_Cuts]:
    cuts = _Cuts(host)
    try:
        yield cuts
    finally:
        cuts.join()


# --- kills ------------------------------------------------------------------------------------------------------


def kill(pair: Pair, receiver: Receiver, command: subprocess.Popen[bytes], victims: tuple[str, ...]) -> None:
    """SIGKILL to all of them before anybody can notice the first. Who is not there any more needs none."""
    pids: list[int] = []

    def found() -> bool:
        pids[:] = []
        for victim in victims:
            pids.extend(pids_of(pair, receiver, command, victim))
        return len(pids) >= len(victims)

    until = time.monotonic() + 1.0
    while not found() and time.monotonic() < until:
        time.sleep(0.001)
    pidfds = []
    for pid in pids:
        with suppress(ProcessLookupError):
            pidfds.append(pidfd_open(pid))
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pidfd in pidfds:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
    for pidfd in pidfds:
        os.close(pidfd)
    wait_until(lambda: all(map(gone, pids)), "they have ended")


def pids_of(pair: Pair, receiver: Receiver, command: subprocess.Popen[bytes], victim: str) -> list[int]:
    """Those of this migration alone: the hosts are its own."""
    match victim:
        case cases.COMMAND:
            return [command.pid]
        case cases.RECEIVER:
            return [receiver.process.pid]
        case cases.SERVER | cases.KEEPER:
            crew = [pid for pid, comm in processes_of(pair.source).items() if comm == SOURCE_COMM]
            return [pid for pid in crew if (_parent(pid) in crew) is (victim == cases.SERVER)]
    comm = COMMS[victim]
    return [pid for pid, name in processes_of(pair.destination).items() if name == comm]


def _end_source(pair: Pair) -> None:
    """Whoever still traces the program would keep it from ending."""
    for pid, comm in processes_of(pair.source).items():
        if comm == SOURCE_COMM:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    try:
        return proc.status(Path(f"/proc/{pid}/status").read_bytes()).ppid
    except FileNotFoundError:
        return 0
