"""What this host has recorded of a guest; and the record of one that `qemu-serve` has let go on elsewhere.

A QEMU whose guest has gone looks like one whose guest is paused, and has what is missing there. After `qemu-serve`
nobody of ours is at the other end: only the QEMU there can say whether the guest runs, so here it is `parked` until the
end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager

from lazyproc.facts import replace
from lazyproc.migrate.desk import Desk
from lazyproc.migrate.journal import ENDED, SOURCE, Journal, Record, records
from lazyproc.qemu.guest import Guest, to_facts

ALONE = "qemu-serve"  # in the fact "way": nobody of ours is at the other end
SESSION_BYTES = 8


def begun(guest: Guest) -> Iterator[Record]:
    """The records of this very QEMU as a source."""
    for record in records():
        held = record.facts.get("held")
        if record.role != SOURCE or record.state in ENDED or record.rebooted or not isinstance(held, dict):
            continue
        if (held.get("pid"), held.get("started")) == (guest.pid, guest.started):
            yield record


def went_alone(record: Record) -> bool:
    return record.facts.get("way") == ALONE


def ways_of(record: Record) -> str:
    return ways_on(record.session, str(record.facts["held"]["qmp"]))


def ways_on(session: str, qmp: str) -> str:
    """The two that an operator has."""
    return (
        "let QEMU there wait for it (migrate-recover in its monitor) and give it the rest with lazyproc qemu-serve "
        f"{qmp} --to ... --recover; or, when it is certain that it does not run there, "
        f"lazyproc resume {session} --here --force"
    )


@contextmanager
def desk_for(guest: Guest, target: str) -> Iterator[Journal]:
    """Inside, this process works on it. Nothing is recorded yet; what an earlier `qemu-serve` has recorded is gone on
    with. Raises UsageError when that is still at work.
    """
    earlier = [record.session for record in begun(guest) if went_alone(record)]
    session = earlier[0] if earlier else os.urandom(SESSION_BYTES).hex()
    facts = {
        "kind": "guest",
        "way": ALONE,
        "peer": target,
        "held": to_facts(replace(guest, running=True)),  # as it was before: a paused one is not taken
        "root_pid": guest.pid,
        "server_pid": os.getpid(),
    }
    with closing(Desk(session, SOURCE)):
        yield Journal(session, SOURCE, facts)
