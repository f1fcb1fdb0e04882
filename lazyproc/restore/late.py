"""Signals that came to a tree at its source when its copy was built already."""

from __future__ import annotations

import os
from collections.abc import Mapping

from lazyproc.errors import ProtocolError
from lazyproc.kernel import sys as kernel
from lazyproc.late import SI_QUEUE, Late, LateSignal
from lazyproc.restore.site import Site


def give(late: Late, sites: Mapping[int, Site]) -> None:
    """Before the stopped tree runs. Nobody may say for another process who has called kill(2) or tgkill(2)
    (rt_sigqueueinfo(2)): these come from us. Raises ProtocolError for who is not there, OSError.
    """
    threads = {tid: tracee for site in sites.values() for tid, tracee in site.threads.items()}
    named = {*late.registers, *(each.tid for each in late.signals if each.tid)}
    if named - threads.keys() or {each.vpid for each in late.signals} - sites.keys():
        raise ProtocolError("a signal is for a process or thread that the tree has not")
    for tid, registers in late.registers.items():
        threads[tid].set_registers(registers)
    for each in late.signals:
        _send(each, sites[each.vpid].pid, threads[each.tid].tid if each.tid else None)


def _send(signal: LateSignal, pid: int, tid: int | None) -> None:
    if signal.code == SI_QUEUE:
        kernel.queue_signal(pid, tid, signal.number, signal.siginfo)
    elif tid is None:
        os.kill(pid, signal.number)
    else:
        kernel.tgkill(pid, tid, signal.number)
