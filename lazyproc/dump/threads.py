"""One thread: what it was doing when it was stopped, and everything that belongs to it alone."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from lazyproc.dump.question import Question
from lazyproc.kernel import proc
from lazyproc.kernel.remote import Bench, Call
from lazyproc.kernel.settle import Stopped, resumed
from lazyproc.kernel.sys import scheduling
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import Credentials, SigAction, SignalStack, Thread

# include/uapi/linux/prctl.h
PR_GET_PDEATHSIG, PR_GET_SECUREBITS, PR_GET_TIMERSLACK, PR_GET_TID_ADDRESS = 2, 27, 30, 40
THREAD_ROOM = struct.Struct("<Qi4xQQi")  # stack_t (ss_sp, ss_flags, ss_size), the tid address, a signal
SS_DISABLE = 2


class ThreadAnswers(NamedTuple):
    """What only a thread itself can tell."""

    altstack: SignalStack | None
    clear_child_tid: int
    pdeath_signal: int
    securebits: int
    timer_slack_ns: int


def thread_question(bench: Bench) -> Question[ThreadAnswers]:
    """Asked of every thread, all at once."""
    room = bench.room(THREAD_ROOM.size)

    def answer(results: Sequence[int]) -> ThreadAnswers:
        sp, flags, size, tid_address, pdeath = THREAD_ROOM.unpack(bench.read(room, THREAD_ROOM.size))
        altstack = None if flags & SS_DISABLE else SignalStack(sp, flags, size)
        return ThreadAnswers(altstack, tid_address, pdeath, *results[3:])

    calls = (
        Call("sigaltstack", (0, room)),
        Call("prctl", (PR_GET_TID_ADDRESS, room + 24)),
        Call("prctl", (PR_GET_PDEATHSIG, room + 32)),
        Call("prctl", (PR_GET_SECUREBITS,)),
        Call("prctl", (PR_GET_TIMERSLACK,)),
    )
    return Question(calls, answer)


def gather_thread(
    cpus: int,
    tracee: Tracee,
    stopped: Stopped,
    answers: ThreadAnswers,
    sigactions: Sequence[SigAction],
    memory: Memory,
    shared: Sequence[bytes],
) -> Thread:
    """The model of one frozen thread from its state, /proc and its own answers; this host has `cpus` processors, and
    `shared` is pending for the whole process.
    """
    state, status = stopped.state, stopped.status
    pending = tracee.pending(status.sig_pending, shared=False)
    registers, restart = resumed(stopped, (*pending, *shared), sigactions, memory)
    return Thread(
        tid=status.ns_pid[-1],
        comm=status.comm,
        registers=registers,
        xsave=state.xsave,
        blocked=state.blocked,
        pending=pending,
        altstack=answers.altstack,
        clear_child_tid=answers.clear_child_tid,
        robust_list=state.robust_list,
        robust_list_len=state.robust_list_len,
        rseq=state.rseq,
        credentials=credentials(status, answers.securebits),
        scheduling=scheduling(tracee.tid, cpus),
        pdeath_signal=answers.pdeath_signal,
        timer_slack_ns=answers.timer_slack_ns,
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
