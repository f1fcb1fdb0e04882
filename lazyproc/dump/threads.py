"""One thread: what it was doing when it was stopped, and everything that belongs to it alone."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from typing import cast

from lazyproc.dump.question import Question
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel import proc
from lazyproc.kernel import sys as kernel
from lazyproc.kernel.remote import Bench, Call, Saved
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import Credentials, Registers, Restart, Rseq, Scheduling, SignalStack, Thread

# include/uapi/linux/prctl.h
PR_GET_PDEATHSIG, PR_GET_SECUREBITS, PR_GET_TIMERSLACK, PR_GET_TID_ADDRESS = 2, 27, 30, 40
RSEQ_CS_OFFSET = 8  # struct rseq: cpu_id_start, cpu_id, rseq_cs
RSEQ_CS = struct.Struct("<IIQQQ")  # version, flags, start_ip, post_commit_offset, abort_ip
STACK_T = struct.Struct("<QiIQ")  # stack_t: ss_sp, ss_flags, ss_size
SS_DISABLE = 2


def settle(tracee: Tracee, memory: Memory) -> Rseq | None:
    """Make a thread that was just stopped fit for remote calls; gives its rseq registration.

    A thread inside an rseq critical section goes to its abort address now: the kernel forgets the section at the
    first remote call, and the abort would be lost with the registers put back (tried: silent corruption).
    An epoll_wait that the stop ended with EINTR is made again, unless a signal is there to end it.
    """
    registers = tracee.registers()
    rseq = tracee.rseq()
    if rseq is not None:
        registers = _aborted(registers, rseq, memory)
    if arch.interrupted_epoll(registers) and not _signal_waits(tracee):
        registers = arch.rewind(registers)
    if registers != tracee.registers():
        tracee.set_registers(registers)
    return rseq


def _aborted(registers: Registers, rseq: Rseq, memory: Memory) -> Registers:
    (pointer,) = struct.unpack("<Q", memory.read(rseq.addr + RSEQ_CS_OFFSET, 8))
    if not pointer:
        return registers
    _, _, start, length, abort = RSEQ_CS.unpack(memory.read(pointer, RSEQ_CS.size))
    inside = (registers.ip - start) & arch.MASK64 < length
    return registers._replace(ip=abort) if inside else registers


def _signal_waits(tracee: Tracee) -> bool:
    pending = (*tracee.pending(shared=False), *tracee.pending(shared=True))
    blocked = tracee.blocked()
    return any(not blocked >> (struct.unpack_from("<i", info)[0] - 1) & 1 for info in pending)


def resumed(registers: Registers) -> Registers:
    """The registers with which a copy of the thread makes an interrupted system call again."""
    return arch.rewind(registers) if arch.restart_code(registers) else registers


def thread_questions(bench: Bench) -> list[Question[object]]:
    """Asked in the order of `_Answers` below."""
    altstack, tid_address, pdeath = bench.room(STACK_T.size), bench.room(8), bench.room(8)

    def stack(_: Sequence[int], memory: Memory) -> SignalStack | None:
        sp, flags, _pad, size = STACK_T.unpack(memory.read(altstack, STACK_T.size))
        return None if flags & SS_DISABLE else SignalStack(sp, flags, size)

    def word(addr: int, layout: str) -> Question[int]:
        nr = PR_GET_TID_ADDRESS if layout == "<Q" else PR_GET_PDEATHSIG
        return Question(
            (Call("prctl", (nr, addr)),),
            lambda _, memory: int(struct.unpack(layout, memory.read(addr, struct.calcsize(layout)))[0]),
        )

    return [
        cast(Question[object], question)
        for question in (
            Question((Call("sigaltstack", (0, altstack)),), stack),
            word(tid_address, "<Q"),
            word(pdeath, "<i"),
            Question((Call("prctl", (PR_GET_SECUREBITS,)),), lambda results, _: results[0]),
            Question((Call("prctl", (PR_GET_TIMERSLACK,)),), lambda results, _: results[0]),
        )
    ]


def gather_thread(
    pid: int,
    tracee: Tracee,
    saved: Saved,
    rseq: Rseq | None,
    answers: Sequence[object],
    restart: Restart | None,
) -> Thread:
    """The model of one frozen thread from its saved state, /proc and its own answers."""
    altstack, clear_child_tid, pdeath, securebits, slack = answers
    status = proc.status(proc.read(pid, f"task/{tracee.tid}/status"))
    stat = proc.stat(proc.read(pid, f"task/{tracee.tid}/stat"))
    robust_list, robust_len = kernel.get_robust_list(tracee.tid)
    return Thread(
        tid=status.ns_pid[-1],
        comm=stat.comm,
        registers=resumed(saved.registers),
        xsave=saved.xsave,
        blocked=saved.blocked,
        pending=tracee.pending(shared=False),
        altstack=cast(SignalStack | None, altstack),
        clear_child_tid=cast(int, clear_child_tid),
        robust_list=robust_list,
        robust_list_len=robust_len,
        rseq=rseq,
        credentials=credentials(status, cast(int, securebits)),
        scheduling=_scheduling(tracee.tid, stat),
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


def _scheduling(tid: int, stat: proc.Stat) -> Scheduling:
    return Scheduling(
        policy=os.sched_getscheduler(tid), priority=os.sched_getparam(tid).sched_priority, nice=stat.nice
    )


def tids_of(pids: Mapping[int, Sequence[Tracee]]) -> dict[int, int]:
    """Our number of every thread -> its own innermost number."""
    return {
        tracee.tid: proc.status(proc.read(pid, f"task/{tracee.tid}/status")).ns_pid[-1]
        for pid, tracees in pids.items()
        for tracee in tracees
    }
