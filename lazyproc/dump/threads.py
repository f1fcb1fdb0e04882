"""One thread: what it was doing when it was stopped, and everything that belongs to it alone."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import cast

from lazyproc.dump.question import Question
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.settle import Stopped, resumed
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import Credentials, Scheduling, SigAction, SignalStack, Thread

# include/uapi/linux/prctl.h
PR_GET_PDEATHSIG, PR_GET_SECUREBITS, PR_GET_TIMERSLACK, PR_GET_TID_ADDRESS = 2, 27, 30, 40
STACK_T = struct.Struct("<Qi4xQ")  # stack_t: ss_sp, ss_flags, ss_size
SS_DISABLE = 2


def thread_questions(bench: Bench) -> list[Question[object]]:
    """Asked of every thread, in the order `gather_thread` takes the answers."""
    altstack, tid_address, pdeath = bench.room(STACK_T.size), bench.room(8), bench.room(4)

    def stack(_: Sequence[int]) -> SignalStack | None:
        sp, flags, size = STACK_T.unpack(bench.read(altstack, STACK_T.size))
        return None if flags & SS_DISABLE else SignalStack(sp, flags, size)

    def word(addr: int, length: int) -> int:
        return int.from_bytes(bench.read(addr, length), "little")

    return [
        Question((Call("sigaltstack", (0, altstack)),), stack),
        Question((Call("prctl", (PR_GET_TID_ADDRESS, tid_address)),), lambda _: word(tid_address, 8)),
        Question((Call("prctl", (PR_GET_PDEATHSIG, pdeath)),), lambda _: word(pdeath, 4)),
        Question((Call("prctl", (PR_GET_SECUREBITS,)),), lambda results: results[0]),
        Question((Call("prctl", (PR_GET_TIMERSLACK,)),), lambda results: results[0]),
    ]


THREAD_ANSWERS = 5


def gather_thread(
    cpus: int,
    tracee: Tracee,
    stopped: Stopped,
    answers: Sequence[object],
    sigactions: Sequence[SigAction],
    memory: Memory,
) -> Thread:
    """The model of one frozen thread from its state, /proc and its own answers; this host has `cpus` processors."""
    altstack, clear_child_tid, pdeath, securebits, slack = answers
    state, status = stopped.state, stopped.status
    registers, restart = resumed(tracee, stopped, sigactions, memory)
    return Thread(
        tid=status.ns_pid[-1],
        comm=status.comm,
        registers=registers,
        xsave=state.xsave,
        blocked=state.blocked,
        pending=tracee.pending(shared=False),
        altstack=cast(SignalStack | None, altstack),
        clear_child_tid=cast(int, clear_child_tid),
        robust_list=state.robust_list,
        robust_list_len=state.robust_list_len,
        rseq=state.rseq,
        credentials=credentials(status, cast(int, securebits)),
        scheduling=_scheduling(tracee.tid, cpus),
        pdeath_signal=cast(int, pdeath),
        timer_slack_ns=cast(int, slack),
        seccomp_mode=status.seccomp,
        seccomp=tracee.seccomp_filters() if status.seccomp == 2 else (),
        restart=restart,
    )


def credentials(status: proc.Status, securebits: int) -> Credentials:
    return Credentials(
        *(status.uid.real, status.uid.effective, status.uid.saved, status.uid.fs),
        *(status.gid.real, status.gid.effective, status.gid.saved, status.gid.fs),
        groups=status.groups,
        cap_inheritable=status.cap_inheritable,
        cap_permitted=status.cap_permitted,
        cap_effective=status.cap_effective,
        cap_bounding=status.cap_bounding,
        cap_ambient=status.cap_ambient,
        securebits=securebits,
        no_new_privs=status.no_new_privs,
    )


def _scheduling(tid: int, cpus: int) -> Scheduling:
    allowed = os.sched_getaffinity(tid)
    return Scheduling(
        policy=os.sched_getscheduler(tid),
        priority=os.sched_getparam(tid).sched_priority,
        nice=os.getpriority(os.PRIO_PROCESS, tid),
        ioprio=kernel.ioprio_get(tid),
        cpus=() if len(allowed) >= cpus else tuple(sorted(allowed)),
    )
