"""How a migration has ended after something was done to it, by what anybody could see; orphans are resumed once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from lazyproc.errors import NoSuchProcess
from lazyproc.hosts import Host, Pair
from lazyproc.kernel import proc
from lazyproc.migrate.desk import is_staffed
from tests.faults.helpers import DESTINATION, SOURCE, gone, journals
from tests.live.moving import CLI, Receiver
from tests.live.programs import Program, wait_until
from tests.live.real import Journey, check_clean, network_of, processes_of

POLL_S = 0.05
SETTLE_S = 40.0
EXIT_S = 15.0
UNBORN = ("aborted", "arriving", "committed")  # at the destination, when nobody is left there


class Outcome(StrEnum):
    COMPLETED = "completed by itself"
    RESUMED = "completed by one resume"
    STAYED = "documented exit code, the source runs"
    DECIDED = "in doubt, exit 4; let run here by the operator"
    UNDISTURBED = "over before the moment came"


class Fault(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Scene:
    """One migration and everybody who has to do with it."""

    pair: Pair
    program: Program
    comm: str
    receiver: Receiver
    journey: Journey
    killed: frozenset[str] = frozenset()
    resumes: list[tuple[str, subprocess.Popen[str]]] = field(
        default_factory=list
    )  # the side, and the command
    receivers: list[subprocess.Popen[str]] = field(default_factory=list)  # started in place of a dead one
    aborts: list[subprocess.Popen[str]] = field(default_factory=list)  # of a tree that ended before it ran
    forced: bool = False

    def copies(self, host: Host) -> list[int]:
        return [pid for pid, comm in processes_of(host).items() if comm == self.comm and not gone(pid)]

    def orphans(self) -> list[tuple[Host, str, str]]:
        """Sessions that nobody works on: host, side and id."""
        found = []
        for host, role in ((self.pair.source, SOURCE), (self.pair.destination, DESTINATION)):
            for record in journals(host, role):
                if role == DESTINATION and record["state"] in (*UNBORN, "drained"):
                    continue  # kept for the source
                with network_of(host):
                    staffed = is_staffed(record["id"], role)
                if not staffed and any(each["id"] == record["id"] for each in journals(host, role)):
                    found.append((host, role, str(record["id"])))
        return found

    def arrived(self) -> bool:
        """All of it is there, and the source is done with it."""
        there = [
            record for record in journals(self.pair.destination, DESTINATION) if record["state"] != "drained"
        ]
        return (
            not journals(self.pair.source, SOURCE)
            and not there
            and gone(self.program.pid)
            and bool(self.copies(self.pair.destination))
        )

    def stayed(self) -> bool:
        return (
            self.journey.process.poll() is not None
            and not journals(self.pair.source, SOURCE)
            and bool(self.copies(self.pair.source))
            and not self.copies(self.pair.destination)
        )

    def close(self) -> None:
        for process in [each for _, each in self.resumes] + self.receivers + self.aborts:
            process.kill()
            process.communicate()

    def __str__(self) -> str:
        """Everything for whoever has to find out."""
        return "\n".join(
            (
                f"copies here {self.copies(self.pair.source)}, there {self.copies(self.pair.destination)}",
                f"status {self.program.watch.read()}",
                f"journals {[_brief(r) for r in journals(self.pair.source, SOURCE)]}"
                f" {[_brief(r) for r in journals(self.pair.destination, DESTINATION)]}",
                f"orphans {[(role, name) for _, role, name in self.orphans()]}",
                f"here {processes_of(self.pair.source)}, there {processes_of(self.pair.destination)}",
                f"migrate ({self.journey.process.poll()}): {_tail(self.journey.log())}",
                f"receive ({self.receiver.process.poll()}): {_tail(self.receiver.notes())}",
                *(f"resume at the {side} ({each.poll()})" for side, each in self.resumes),
            )
        )


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in ("id", "state", "reason")}


def _tail(text: str) -> str:
    return " | ".join(text.splitlines()[-30:])


def judged(scene: Scene) -> Outcome:
    """Raises Fault."""
    outcome = settle(scene)
    _check_exits(scene, outcome)
    return outcome


def settle(scene: Scene) -> Outcome:
    """Until it runs in one place and nobody has anything left to do."""
    until = time.monotonic() + SETTLE_S
    while True:
        _check_never(scene)
        if scene.arrived():
            return Outcome.RESUMED if scene.resumes else Outcome.COMPLETED
        if scene.stayed():
            return Outcome.DECIDED if scene.forced else Outcome.STAYED
        if time.monotonic() > until:
            raise Fault(f"not settled within {SETTLE_S:.0f} s\n{scene}")
        _help(scene)
        time.sleep(POLL_S)


def _check_never(scene: Scene) -> None:
    if scene.program.watch.read().errors:
        raise Fault(f"wrong pages, or it ran twice: {scene.program.watch.read()}\n{scene}")
    if gone(scene.program.pid) and not scene.copies(scene.pair.destination):
        raise Fault(f"lost\n{scene}")


def _help(scene: Scene) -> None:
    """What an operator would do: one resume of each orphan; a receiver in place of one that was killed."""
    running = {side for side, each in scene.resumes if each.poll() is None}
    done = {side for side, each in scene.resumes if each.poll() is not None}
    for host, side, session in scene.orphans():
        if side in running:
            continue
        if side not in done:
            scene.resumes.append((side, _start(host, "resume", session, "--json")))
        elif side == SOURCE and not scene.forced and _nothing_there(scene):
            scene.forced = True
            scene.resumes.append((side, _start(host, "resume", session, "--here", "--force")))
        elif side == DESTINATION and not scene.copies(host) and not any(each.poll() for each in scene.aborts):
            if not scene.aborts:  # docs/reliability.md, what is not promised
                scene.aborts.append(_start(host, "abort", session))
        else:
            raise Fault(f"the {side}'s side is orphaned again after a resume\n{_words(scene)}\n{scene}")
    if scene.receiver.process.poll() is not None and not scene.receivers and _only_kept_there(scene):
        argv = ("receive", "--listen", scene.receiver.address, "--insecure")
        scene.receivers.append(_start(scene.pair.destination, *argv))


def _nothing_there(scene: Scene) -> bool:
    known = [each for each in journals(scene.pair.destination, DESTINATION) if each["state"] not in UNBORN]
    return not known and not scene.copies(scene.pair.destination)


def _only_kept_there(scene: Scene) -> bool:
    """Nobody is left at the destination, and what is recorded there waits for the source to ask."""
    left = journals(scene.pair.destination, DESTINATION)
    with network_of(scene.pair.destination):
        if any(is_staffed(each["id"], DESTINATION) for each in left):
            return False
    return _nothing_there(scene) or {each["state"] for each in left} == {"drained"}


def _start(host: Host, *words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return host.popen([*CLI, *words], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _words(scene: Scene) -> str:
    """What the resumes said that have ended."""
    return "\n".join(
        f"resume at the {side}: {each.communicate()}"
        for side, each in scene.resumes
        if each.poll() is not None
    )


def _check_exits(scene: Scene, outcome: Outcome) -> None:
    """Each command tells how it has ended by its exit code (docs/cli.md)."""
    there = outcome in (Outcome.COMPLETED, Outcome.RESUMED)
    if "migrate" not in scene.killed:
        code = _code(scene, scene.journey.process)
        if code not in ((0, 4) if there else (1, 4)):
            raise Fault(f"migrate: exit {code}, but {outcome}\n{scene}")
        if code == 4 and outcome in (Outcome.COMPLETED, Outcome.STAYED) and not scene.resumes:
            raise Fault(f"migrate: exit 4, and nothing was left to resume\n{scene}")
    for side, process in scene.resumes:
        code = _code(scene, process)
        good = (0,) if side == DESTINATION or there else (0, 1, 4)
        if side == DESTINATION and scene.aborts:
            good = (5,)
        if code not in good:
            raise Fault(f"resume at the {side}: exit {code}, but {outcome}\n{process.communicate()}\n{scene}")


def _code(scene: Scene, process: subprocess.Popen[Any]) -> int:
    try:
        return process.wait(EXIT_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"{process.args!r} does not end\n{scene}") from None


def end(scene: Scene, outcome: Outcome) -> None:
    """It runs well, does its last check well, and nothing is left behind. Raises Fault, AssertionError."""
    pair, watch = scene.pair, scene.program.watch
    there = outcome in (Outcome.COMPLETED, Outcome.RESUMED, Outcome.UNDISTURBED)
    host = pair.destination if there else pair.source
    root = _root(scene, host)
    if there:
        check_clean(root)
    else:
        wait_until(lambda: proc.status(proc.read(root, "status")).tracer_pid == 0, "nobody traces it")
    watch.wait_beats()
    os.kill(root, signal.SIGTERM)
    watch.wait_ended()
    wait_until(lambda: not scene.copies(host), "it has ended")
    _check_nothing_left(scene)


def _root(scene: Scene, host: Host) -> int:
    """The copy that is no child of another."""
    parents: dict[int, int] = {}
    for pid in scene.copies(host):
        with suppress(NoSuchProcess):  # a child has ended meanwhile
            parents[pid] = proc.status(proc.read(pid, "status")).ppid
    roots = [pid for pid, parent in parents.items() if parent not in parents]
    if len(roots) != 1:
        raise Fault(f"it runs {len(roots)} times at the {host.name}\n{scene}")
    return roots[0]


def _check_nothing_left(scene: Scene) -> None:
    """But what one side still keeps for the other, who will never ask."""
    pair = scene.pair
    kept = journals(pair.destination, DESTINATION)
    if journals(pair.source, SOURCE) or any(record["state"] not in (*UNBORN, "drained") for record in kept):
        raise Fault(f"a journal is left\n{scene}")
    for host in (pair.source, pair.destination):
        tables = host.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        if "lazyproc" in tables:
            raise Fault(f"{host.name} has {tables}")
    if not any(record["state"] == "drained" for record in kept):  # its crew waits a minute for the source
        _wait_idle(scene)


def _wait_idle(scene: Scene) -> None:
    def idle(host: Host) -> Callable[[], bool]:
        return lambda: not any(comm.startswith("lazyproc") for comm in processes_of(host).values())

    for host in (scene.pair.source, scene.pair.destination):
        try:
            wait_until(idle(host), f"nothing of lazyproc is left at the {host.name}")
        except AssertionError as error:
            raise Fault(f"{error}\n{scene}") from None
