"""Vector state: room for what a process gets on request only (kernel/xfeatures.py), before registers are set; and the
places of this processor.
"""

from __future__ import annotations

import os

from lazyproc.errors import RestoreError
from lazyproc.images.xsave import relaid
from lazyproc.kernel import xfeatures
from lazyproc.kernel.remote import XRSTOR, Call
from lazyproc.kernel.tracee import xsave_size
from lazyproc.model import Task
from lazyproc.restore.site import Site


def make_room(site: Site) -> None:
    """Permission for the process, as it had asked for it; then every thread uses the state once.

    Also a thread that has none in its registers: it may be in a signal handler and have some in the frame, and without
    room it never returns from there. Before the alternate stacks are set: the kernel takes smaller ones from a
    process that has its permission than it lets ask for one (sigaltstack_size_valid and validate_sigaltstack,
    arch/x86/kernel). Raises RestoreError.
    """
    wanted = site.task.xfeatures
    if not wanted:
        return
    _ask(site, [bit for bit in range(64) if wanted >> bit & 1])
    use = Call(XRSTOR, (site.bench.place(xfeatures.blank_area(wanted), align=64), wanted, wanted >> 32))
    site.bench.run_all([(tracee, [use]) for tracee in site.threads.values()])


def areas(task: Task) -> list[bytes]:
    """Of the threads, as this processor has them; one of its own size is so (CPUID takes milliseconds in a guest)."""
    found = [thread.xsave for thread in task.threads]
    if all(len(area) == xsave_size() for area in found):
        return found
    return [relaid(area, xfeatures.offsets()) for area in found]


def _ask(site: Site, bits: list[int]) -> None:
    calls = (Call("arch_prctl", (xfeatures.ARCH_REQ_XCOMP_PERM, bit), may_fail=True) for bit in bits)
    for bit, result in zip(bits, site.run(*calls), strict=True):
        if result < 0:
            raise RestoreError(
                f"is not given the vector state that it had asked for (component {bit}: {os.strerror(-result)})",
                where=f"pid {site.task.vpid}",
                remedy="restore it on a host with the same kind of processor",
            )
