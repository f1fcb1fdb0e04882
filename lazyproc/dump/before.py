"""What is learned of a tree while it still runs, so that the freeze is short."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress

from lazyproc.dump.descriptors import early_flows
from lazyproc.dump.explain import Examined
from lazyproc.dump.registry import TaskRef
from lazyproc.dump.space import Seen
from lazyproc.dump.walk import thread_ids, tree_of
from lazyproc.facts import dataclass
from lazyproc.kernel import proc, sleeps
from lazyproc.kernel.netfilter import Flow
from lazyproc.kernel.sys import pidfd_open
from lazyproc.needs import Wanted


@dataclass(frozen=True, slots=True)
class Before:
    """`smaps` by pid, and what of it a dump takes over: `seen`.

    `flows` are the packets that will have to be held back, `wanted` what the tree needs of the host that takes it in.
    """

    smaps: Mapping[int, tuple[proc.SmapsEntry, ...]]
    flows: tuple[Flow, ...]
    wanted: tuple[Wanted, ...]
    seen: Seen


def observed_sleeps(pid: int) -> dict[int, sleeps.SleepBefore]:
    """What the threads of the running tree sleep in, by our tid: for `frozen_tree`, and right before it."""
    seen: dict[int, sleeps.SleepBefore] = {}
    for member in tree_of(pid):
        seen |= sleeps.observe(member, thread_ids(member))
    return seen


def look_before(examined: Examined, *, tcp_close: bool = False) -> Before:
    """What `examine` has not seen yet; processes may come and go. With `tcp_close` no TCP with the outside has to be
    held back.
    """
    flows = _flows(examined.smaps, tcp_close)
    return Before(examined.smaps, flows, examined.wanted, examined.seen)


def _flows(pids: Iterable[int], tcp_close: bool) -> tuple[Flow, ...]:
    with ExitStack() as stack:
        refs = []
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfd = pidfd_open(pid)
                stack.callback(os.close, pidfd)
                refs.append(TaskRef(pid, pid, pidfd))
        return tuple(early_flows(refs, tcp_close=tcp_close))
