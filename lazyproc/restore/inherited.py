"""What every process and thread of a tree has from its nursery: what it is to have of that need not be set."""

from __future__ import annotations

import os
import signal

from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.nursery import Nursery
from lazyproc.kernel.remote import Call
from lazyproc.kernel.sys import scheduling
from lazyproc.model import Credentials, Scheduling

PR_GET_SECUREBITS = 27


@dataclass(frozen=True, slots=True)
class Inherited:
    credentials: Credentials
    scheduling: Scheduling

    @classmethod
    def of(cls, nursery: Nursery) -> Inherited:
        """One that stands still."""
        status = proc.status(proc.read(nursery.pid, "status"))
        bench = nursery.bench(nursery.memory, signal.SIGURG)
        (securebits,) = bench.run(nursery.tracee, [Call("prctl", (PR_GET_SECUREBITS,))])
        credentials = Credentials(
            *status.uid, *status.gid, status.groups,
            status.cap_inheritable, status.cap_permitted, status.cap_effective, status.cap_bounding,
            status.cap_ambient, securebits, status.no_new_privs,
        )  # fmt: skip
        return cls(credentials, scheduling(nursery.pid, os.cpu_count() or 1))
