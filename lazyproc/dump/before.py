"""What is learned of a tree while it still runs, so that the freeze is short."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress

from lazyproc.dump.descriptors import early_flows
from lazyproc.dump.explain import Examined
from lazyproc.dump.foresee import forecast_of
from lazyproc.dump.registry import TaskRef
from lazyproc.dump.space import Seen
from lazyproc.dump.walk import thread_ids, tree_of
from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.images.forecast import Forecast
from lazyproc.images.memory import Behind, WrittenMappings, access_modes, write_mappings
from lazyproc.kernel import proc, sleeps
from lazyproc.kernel.netfilter import Flow
from lazyproc.kernel.sys import pidfd_open
from lazyproc.needs import Wanted


@dataclass(frozen=True, slots=True)
class Before:
    """`smaps` by pid, and what a dump takes over, `seen`; `written` are the mappings as its images will have them, and
    `forecast` what can be said of the tree with them, unless it has processes that have ended.

    `flows` are the packets that will have to be held back, `wanted` what the tree needs of the host that takes it in.
    """

    smaps: Mapping[int, tuple[proc.SmapsEntry, ...]]
    flows: tuple[Flow, ...]
    wanted: tuple[Wanted, ...]
    seen: Seen
    written: tuple[WrittenMappings, ...]
    forecast: Forecast | None


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
    written = dict(_written(examined.seen))
    return Before(
        examined.smaps,
        _flows(examined.smaps, tcp_close),
        examined.wanted,
        examined.seen,
        tuple(written.values()),
        forecast_of(next(iter(examined.smaps)), written, examined.seen.opened),
    )


def _written(seen: Seen) -> Iterator[tuple[int, WrittenMappings]]:
    """By pid, of those who share no memory: the numbers of its objects are not known yet."""
    behind = Behind(access_modes(seen.opened), {}, {})
    for pid, space in seen.spaces.items():
        if space.objects or any(not number for _, number in space.files):  # the latter are obstacles
            continue
        with suppress(NoSuchProcess):
            stack = proc.stat(proc.read(pid, "stat")).start_stack
            yield pid, write_mappings(space.vmas, stack, behind)


def _flows(pids: Iterable[int], tcp_close: bool) -> tuple[Flow, ...]:
    with ExitStack() as stack:
        refs = []
        for pid in pids:
            with suppress(ProcessLookupError):
                pidfd = pidfd_open(pid)
                stack.callback(os.close, pidfd)
                refs.append(TaskRef(pid, pid, pidfd))
        return tuple(early_flows(refs, tcp_close=tcp_close))
