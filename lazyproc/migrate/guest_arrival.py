"""The destination's side of a guest's hand-over, in order: start an empty QEMU, load, commit, run. Pages come from the
moment on in which the state of the devices is loaded, which touches them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from lazyproc.errors import ConnectionLost, LazyprocError, Obstacle, ProtocolError
from lazyproc.events import Later, Note, StateChanged
from lazyproc.images.files import unpack
from lazyproc.kernel.ready import readable
from lazyproc.migrate.answering import heard, obstacles_to_guest
from lazyproc.migrate.arrival import FREEZE_S, PREPARE_S, Arrival, Wishes
from lazyproc.migrate.drafting import Drafting
from lazyproc.migrate.journal import ARRIVING, one_at_a_time
from lazyproc.migrate.talk import Unfit, expect
from lazyproc.qemu import devices
from lazyproc.qemu.guest import Plugged, plugged_of
from lazyproc.qemu.ram import Block
from lazyproc.qemu.shell import Shell, empty_shell
from lazyproc.restore.lazytree import LazyTree, to_facts
from lazyproc.steps import Steps
from lazyproc.uffd.pager import Pager
from lazyproc.wire.jsonobject import JsonValue
from lazyproc.wire.native import Committed, Images, Running


class GuestArrival(Arrival):
    """One guest on its way into the QEMU that `receive` was given the command line of. `outputs` are descriptors for
    what that says. `noted` is called when the record says what there is: the pager sees by it whether anybody is left.
    `runs` is called when the guest is about to run: only then may pages come that nobody waits for.
    """

    outputs: Sequence[int] = ()
    noted: Callable[[], object] = staticmethod(lambda: None)
    runs: Callable[[], object] = staticmethod(lambda: None)

    def _begin(self, pager: Pager, serve: Callable[[], None]) -> LazyTree:
        control = self._link.control
        with ExitStack() as stack:
            # Before it is asked: QEMU starts while the source looks for the RAM of its guest, and this host at itself.
            terms = self._terms
            try:
                ready = stack.enter_context(
                    empty_shell(terms.command, terms.cgroup, self.outputs, self._listener)
                )
            except LazyprocError:
                heard(control, PREPARE_S)  # who sends into a connection that is closed does not read why
                raise
            order = heard(control, PREPARE_S).order
            with one_at_a_time():
                self._admit_guest(order)
            shell = ready()
            wishes = Wishes.of(order, traced=self._trace is None and order.get("trace") is True)
            machine, running, theirs, files, plugged = _offered(order)
            if unlike := shell.compare(machine, theirs, files, plugged):
                raise Unfit(unlike)
            tree = shell.arm(pager, self._listener)
            facts = {
                "tree": to_facts(tree),
                "wishes": wishes.fields(),
                "ledger": pager.ledger,
                "identity": {},
                **({"monitor": shell.qmp.fileno()} if running else {}),  # for a guard, who lets it run
            }
            self._journal.write(ARRIVING, durable=False, **facts)
            self.noted()
            drafting = stack.enter_context(closing(Drafting(self._journal)))
            drafting.begin(facts)
            self._say_prepared(wishes)
            data = expect(control, Images, FREEZE_S).data
            later = Later(self._listener)
            stack.callback(later.tell)
            steps = Steps(later, "arrival: ", began=control.began)
            steps.done("receive")
            self.described = True
            serve()
            self._load(shell, unpack(data))
            steps.done("load")
            self._commit(shell, drafting, steps)
            self._run(shell, tree, running, steps)
            return tree

    def _load(self, shell: Shell, images: Mapping[str, bytes]) -> None:
        if devices.NAME not in images:
            raise ProtocolError("the source sends no state of devices")
        control = self._link.control
        # Until it has heard that all is built the source has nothing to say: it has called it off, or is gone.
        shell.load(images[devices.NAME], lambda: bool(readable([control.fileno()], 0)))

    def _run(self, shell: Shell, tree: LazyTree, running: bool, steps: Steps) -> None:
        committed = StateChanged("committed", time.monotonic())
        standing = self._let_run(shell) if running else {}
        self.runs()
        steps.done("release")
        with suppress(ConnectionLost):  # whoever drains notices
            self._link.control.send(Committed())
            there: dict[str, JsonValue] = {"root_pid": tree.root_pid, "steps_ms": {**steps.ms()}}
            self._link.control.send(Running({**there, **standing}))
        self._listener(committed)
        self._listener(StateChanged("running", time.monotonic()))

    def _let_run(self, shell: Shell) -> dict[str, str]:
        """It is committed: whatever is wrong, it is wrong here, and said at both ends."""
        try:
            shell.run()
        except (LazyprocError, TimeoutError) as error:
            self._listener(stands(shell.pid, error))
            return {"stands": str(error)}
        return {}

    def _admit_guest(self, order: Mapping[str, Any]) -> None:
        """Raises Unfit."""
        obstacles: tuple[Obstacle, ...] = tuple(obstacles_to_guest(order, overcommit=self._terms.overcommit))
        if obstacles:
            raise Unfit(obstacles)
        self._journal.write(ARRIVING, durable=False, pages=order["pages"], groups={})


def stands(pid: int, error: LazyprocError | TimeoutError) -> Note:
    return Note(f"pid {pid}: the guest is here and does not run: {error}; see `cont` in its monitor")


def _offered(order: Mapping[str, Any]) -> tuple[str, bool, tuple[Block, ...], Mapping[str, Any], Plugged]:
    """The guest's machine, whether it ran, its RAM blocks, which files are some, and where what was plugged is. Raises
    ProtocolError.
    """
    try:
        guest = order["guest"]
        blocks = tuple(Block.of(number, row) for number, row in enumerate(guest["blocks"]))
        running, files = guest["running"] is True, dict(guest.get("files", {}))
        return str(guest["machine"]), running, blocks, files, plugged_of(guest)
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"PREPARE does not describe a guest ({error!r})") from error
