"""Threads: the model's Thread and the thread's part of core-<tid>.img (CRIU 4.2: images/core.proto)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence

from lazyproc.errors import ImageError
from lazyproc.facts import replace
from lazyproc.images import xsave
from lazyproc.images.extras import Extras
from lazyproc.images.files import garbled, to_bytes, to_text
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import (
    Credentials,
    Registers,
    Restart,
    Rseq,
    Scheduling,
    SeccompFilter,
    SignalStack,
    Thread,
)

_REGISTERS = operator.attrgetter(*Registers._fields)
_FOR_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC, which the kernel does not keep with a filter
_DEFAULT_TIMER_SLACK_NS = 50_000  # prctl(2) PR_SET_TIMERSLACK: the default of init, which everybody inherits


class SeccompTable:
    """seccomp.img: filters of all threads; each names the one installed before it, so threads share tails.

    Of a process whose threads have the same filters CRIU writes those of the leader, and that all threads get them at
    once: a filter can later be added to all of them only if they have the very same, not equal ones (criu/seccomp.c).
    With `shared` all processes are of that kind.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.shared = shared
        self.message = pb.seccomp_entry()
        self._index: dict[tuple[int | None, bytes, int], int] = {}

    def add(self, filters: Iterable[SeccompFilter]) -> int | None:
        """The number of the newest of these filters, None when there are none."""
        last: int | None = None
        for item in filters:
            key = (last, item.program, item.flags)
            if key not in self._index:
                self._index[key] = len(self.message.seccomp_filters)
                flags = item.flags | _FOR_ALL_THREADS * self.shared
                self.message.seccomp_filters.add(filter=item.program, prev=last, flags=flags)
            last = self._index[key]
        return last


def with_leaders_filters(
    threads: Sequence[Thread], leader: pb.core_entry, message: pb.seccomp_entry
) -> tuple[Thread, ...]:
    """The threads, with the filters that were written down for all of them with the first."""
    if leader.tc.HasField("old_seccomp_mode"):  # CRIU before 3.11: as those of the process
        newest = leader.tc.old_seccomp_filter if leader.tc.HasField("old_seccomp_filter") else None
        chain = () if newest is None else seccomp_chain(message, newest)
        return tuple(
            replace(each, seccomp=chain, seccomp_mode=leader.tc.old_seccomp_mode) for each in threads
        )
    entry = leader.thread_core
    filters = message.seccomp_filters
    if not entry.HasField("seccomp_filter") or not filters[entry.seccomp_filter].flags & _FOR_ALL_THREADS:
        return tuple(threads)
    first = threads[0]
    return tuple(
        each if each.seccomp else replace(each, seccomp=first.seccomp, seccomp_mode=first.seccomp_mode)
        for each in threads
    )


def seccomp_chain(message: pb.seccomp_entry, last: int) -> tuple[SeccompFilter, ...]:
    """The filters of a thread whose newest is number `last`, oldest first."""
    filters: list[SeccompFilter] = []
    index: int | None = last
    while index is not None:
        # A filter names an older one, so a chain that does not run towards 0 is a loop.
        if index >= len(message.seccomp_filters) or len(filters) > len(message.seccomp_filters):
            raise garbled("seccomp.img", f"no chain of filters ends with number {last}")
        entry = message.seccomp_filters[index]
        filters.append(SeccompFilter(entry.filter, entry.flags & ~_FOR_ALL_THREADS))
        index = entry.prev if entry.HasField("prev") else None
    return tuple(reversed(filters))


# --- writing ------------------------------------------------------------------------------------------------


def write_thread(
    thread: Thread,
    core: pb.core_entry,
    extra: own.ThreadExtra,
    seccomp: SeccompTable,
    *,
    leads: bool,
    for_criu: bool = True,
) -> None:
    """Fills thread_info and thread_core of `core`, and what they cannot hold into `extra`."""
    core.mtype = pb.core_entry.X86_64
    info = core.thread_info
    info.clear_tid_addr = thread.clear_child_tid
    info.gpregs.MergeFrom(pb.user_x86_regs_entry(mode=pb.NATIVE, **thread.registers._asdict()))
    write_xsave = xsave.to_entry if for_criu else xsave.to_extra
    write_xsave(thread.xsave, info.fpregs, extra)
    _write_thread_core(thread, core.thread_core, seccomp, leads)
    extra.timer_slack_ns = thread.timer_slack_ns
    extra.ioprio = thread.scheduling.ioprio
    extra.cpus.extend(thread.scheduling.cpus)
    if thread.restart is not None:
        extra.restart.nr, extra.restart.remaining_ns = thread.restart.nr, thread.restart.remaining_ns


def _write_thread_core(
    thread: Thread, entry: pb.thread_core_entry, seccomp: SeccompTable, leads: bool
) -> None:
    entry.comm = to_bytes(thread.comm)
    entry.futex_rla, entry.futex_rla_len = thread.robust_list, thread.robust_list_len
    entry.blk_sigset = thread.blocked
    write_signals(entry.signals_p, thread.pending)
    entry.sched_policy = thread.scheduling.policy
    entry.sched_prio = thread.scheduling.priority
    entry.sched_nice = thread.scheduling.nice
    entry.pdeath_sig = thread.pdeath_signal
    entry.creds.CopyFrom(_creds_entry(thread.credentials))
    if thread.altstack is not None:
        stack = thread.altstack
        entry.sas.ss_sp, entry.sas.ss_size, entry.sas.ss_flags = stack.sp, stack.size, stack.flags
    if thread.rseq is not None:
        entry.rseq_entry.rseq_abi_pointer = thread.rseq.addr
        entry.rseq_entry.rseq_abi_size = thread.rseq.size
        entry.rseq_entry.signature = thread.rseq.signature
    if thread.seccomp and seccomp.shared and not leads:
        return
    entry.seccomp_mode = pb.seccomp_mode.ValueType(thread.seccomp_mode)
    newest = seccomp.add(thread.seccomp)
    if newest is not None:
        entry.seccomp_filter = newest


def write_signals(queue: pb.signal_queue_entry, pending: Iterable[bytes]) -> None:
    queue.SetInParent()  # CRIU expects a queue, if an empty one
    for siginfo in pending:
        queue.signals.add(siginfo=siginfo)


@functools.lru_cache(maxsize=16)  # those of most threads are the same
def _creds_entry(credentials: Credentials) -> pb.creds_entry:
    entry = pb.creds_entry()
    for name in ("uid", "euid", "suid", "fsuid", "gid", "egid", "sgid", "fsgid"):
        setattr(entry, name, getattr(credentials, name))
    entry.groups.extend(credentials.groups)
    for words, mask in (
        (entry.cap_inh, credentials.cap_inheritable),
        (entry.cap_prm, credentials.cap_permitted),
        (entry.cap_eff, credentials.cap_effective),
        (entry.cap_bnd, credentials.cap_bounding),
        (entry.cap_amb, credentials.cap_ambient),
    ):
        words.extend((mask & 0xFFFFFFFF, mask >> 32))
    entry.secbits = credentials.securebits
    entry.no_new_privs = int(credentials.no_new_privs)
    return entry


# --- reading ------------------------------------------------------------------------------------------------


def read_thread(
    tid: int, core: pb.core_entry, extras: Extras, seccomp: pb.seccomp_entry, name: str
) -> Thread:
    """The thread of core-<tid>.img; `name` is that image, for errors."""
    if core.mtype != pb.core_entry.X86_64 or not core.HasField("thread_info"):
        raise ImageError(
            "not a thread of an x86-64 machine", where=name, remedy="restore it on its own architecture"
        )
    if core.thread_info.gpregs.mode != pb.NATIVE:
        raise ImageError("a 32-bit thread", where=name, remedy="restore it with criu")
    if not core.HasField("thread_core") or not core.thread_core.HasField("creds"):
        raise garbled(name, "no thread_core with credentials; images of CRIU before 3.0 have none")
    entry, info, extra = core.thread_core, core.thread_info, extras.threads.get(tid)
    comm = entry.comm if entry.HasField("comm") else core.tc.comm
    return Thread(
        tid=tid,
        comm=to_text(comm, name),
        registers=Registers._make(_REGISTERS(info.gpregs)),
        xsave=xsave.from_entry(info.fpregs, extra, name),
        blocked=entry.blk_sigset if entry.HasField("blk_sigset") else core.tc.blk_sigset,
        pending=read_signals(entry.signals_p),
        altstack=_read_altstack(entry),
        clear_child_tid=info.clear_tid_addr,
        robust_list=entry.futex_rla,
        robust_list_len=entry.futex_rla_len,
        rseq=_read_rseq(entry),
        credentials=read_credentials(entry.creds, name),
        scheduling=Scheduling(
            entry.sched_policy,
            entry.sched_prio,
            entry.sched_nice,
            extra.ioprio if extra else 0,
            tuple(extra.cpus) if extra else (),
        ),
        pdeath_signal=entry.pdeath_sig,
        timer_slack_ns=extra.timer_slack_ns if extra else _DEFAULT_TIMER_SLACK_NS,
        seccomp_mode=entry.seccomp_mode,
        seccomp=seccomp_chain(seccomp, entry.seccomp_filter) if entry.HasField("seccomp_filter") else (),
        restart=Restart(extra.restart.nr, extra.restart.remaining_ns)
        if extra and extra.HasField("restart")
        else None,
    )


def _read_altstack(entry: pb.thread_core_entry) -> SignalStack | None:
    if not entry.HasField("sas"):
        return None
    return SignalStack(entry.sas.ss_sp, entry.sas.ss_flags, entry.sas.ss_size)


def _read_rseq(entry: pb.thread_core_entry) -> Rseq | None:
    if not entry.HasField("rseq_entry"):
        return None
    rseq = entry.rseq_entry
    return Rseq(rseq.rseq_abi_pointer, rseq.rseq_abi_size, rseq.signature)


def read_signals(queue: pb.signal_queue_entry) -> tuple[bytes, ...]:
    return tuple(entry.siginfo for entry in queue.signals)


def read_credentials(entry: pb.creds_entry, name: str) -> Credentials:
    if entry.lsm_profile or entry.lsm_sockcreate or entry.apparmor_data:
        raise ImageError("the thread has a security label", where=name, remedy="restore it with criu")
    return _credentials(entry.SerializeToString())


@functools.lru_cache(maxsize=16)  # those of most threads are the same
def _credentials(data: bytes) -> Credentials:
    entry = pb.creds_entry.FromString(data)
    return Credentials(
        uid=entry.uid, euid=entry.euid, suid=entry.suid, fsuid=entry.fsuid,
        gid=entry.gid, egid=entry.egid, sgid=entry.sgid, fsgid=entry.fsgid,
        groups=tuple(entry.groups),
        cap_inheritable=_mask(entry.cap_inh),
        cap_permitted=_mask(entry.cap_prm),
        cap_effective=_mask(entry.cap_eff),
        cap_bounding=_mask(entry.cap_bnd),
        cap_ambient=_mask(entry.cap_amb),
        securebits=entry.secbits,
        no_new_privs=bool(entry.no_new_privs),
    )  # fmt: skip


def _mask(words: Sequence[int]) -> int:
    low, high = (*words, 0, 0)[:2]
    return low | high << 32
