"""Tasks: what core-<leader>.img holds for the whole process, and cgroups (CRIU 4.2: images/core.proto)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lazyproc.images.files import garbled, to_bytes, to_text
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.images.threads import read_signals, write_signals
from lazyproc.model import IntervalTimer, Limit, PosixTimer, SigAction, Task, TaskState

_STATES = {TaskState.ALIVE: 1, TaskState.ZOMBIE: 2, TaskState.STOPPED: 3}  # TASK_* of criu/include/pstree.h
_STATE_OF = {number: state for state, number in _STATES.items()}
# sigactions are written by position; SIGKILL and SIGSTOP have no place (criu/cr-dump.c, dump_sigacts).
_CATCHABLE = [signal for signal in range(1, 65) if signal not in (9, 19)]
_SECOND_US = 1_000_000
SECOND_NS = 1_000_000_000


def state_of(entry: pb.task_core_entry, name: str) -> TaskState:
    if entry.task_state not in _STATE_OF:
        raise garbled(name, f"task state {entry.task_state}")
    return _STATE_OF[entry.task_state]


class CgroupTable:
    """cgroup.img: the distinct sets of (controllers, path); tasks name theirs by number from 1."""

    def __init__(self) -> None:
        self.message = pb.cgroup_entry()
        self._ids: dict[tuple[tuple[str, str], ...], int] = {}

    def add(self, cgroups: Mapping[str, str]) -> int:
        """The number of this set, 0 for the empty one."""
        key = tuple(cgroups.items())
        if not key:
            return 0
        if key not in self._ids:
            self._ids[key] = len(self._ids) + 1
            entry = self.message.sets.add(id=self._ids[key])
            for controllers, path in key:
                entry.ctls.add(name=to_bytes(controllers), path=to_bytes(path))
        return self._ids[key]


def read_cgroups(message: pb.cgroup_entry) -> dict[int, dict[str, str]]:
    """The sets by number; 0 is the empty set."""
    sets: dict[int, dict[str, str]] = {0: {}}
    for entry in message.sets:
        sets[entry.id] = {
            to_text(member.name, "cgroup.img"): to_text(member.path, "cgroup.img") for member in entry.ctls
        }
    return sets


# --- writing ------------------------------------------------------------------------------------------------


def write_task(task: Task, core: pb.core_entry) -> None:
    """Fills `tc` of the leader's core, or of the only core of a zombie."""
    core.mtype = pb.core_entry.X86_64
    entry = core.tc
    entry.task_state = _STATES[task.state]
    entry.exit_code = task.exit_code
    entry.personality = task.personality
    entry.flags = 0
    entry.blk_sigset = task.threads[0].blocked if task.threads else 0
    entry.comm = to_bytes(task.comm)
    entry.loginuid = task.loginuid
    entry.oom_score_adj = task.oom_score_adj
    entry.child_subreaper = task.child_subreaper
    if task.membarriers:
        entry.membarrier_registration_mask = task.membarriers
    if task.stop_signal:
        entry.stop_signo = task.stop_signal
    if task.state is TaskState.ZOMBIE:
        return
    write_signals(entry.signals_s, task.pending)
    _write_sigactions(task.sigactions, entry)
    _write_timers(task, entry.timers)
    _write_limits(task, entry.rlimits)


def _write_sigactions(actions: Iterable[SigAction], entry: pb.task_core_entry) -> None:
    by_signal = {action.signal: action for action in actions}
    for signal in _CATCHABLE:
        action = by_signal.get(signal, SigAction(signal, 0, 0, 0, 0))
        entry.sigactions.add(
            sigaction=action.handler,
            flags=action.flags,
            restorer=action.restorer,
            mask=action.mask,
            compat_sigaction=False,
        )


def _write_timers(task: Task, entry: pb.task_timers_entry) -> None:
    armed = {timer.which: timer for timer in task.itimers}
    for which, message in enumerate((entry.real, entry.virt, entry.prof)):
        timer = armed.get(which, IntervalTimer(which, 0, 0))
        message.vsec, message.vusec = divmod(timer.value_us, _SECOND_US)
        message.isec, message.iusec = divmod(timer.interval_us, _SECOND_US)
    for posix in task.posix_timers:
        stored = entry.posix.add(
            it_id=posix.id,
            clock_id=posix.clock & 0xFFFFFFFF,
            si_signo=posix.signal,
            it_sigev_notify=posix.notify,
            sival_ptr=posix.value,
            overrun=posix.overrun,
        )
        stored.vsec, stored.vnsec = divmod(posix.value_ns, SECOND_NS)
        stored.isec, stored.insec = divmod(posix.interval_ns, SECOND_NS)
        if posix.tid:
            stored.notify_thread_id = posix.tid


def _write_limits(task: Task, entry: pb.task_rlimits_entry) -> None:
    # CRIU numbers the limits by position.
    if [limit.resource for limit in task.limits] != list(range(len(task.limits))):
        raise garbled(f"core-{task.vpid}.img", "the resource limits are not complete from RLIMIT_CPU on")
    entry.SetInParent()
    for limit in task.limits:
        entry.rlimits.add(cur=limit.soft, max=limit.hard)


# --- reading ------------------------------------------------------------------------------------------------


def read_sigactions(entry: pb.task_core_entry, name: str) -> tuple[SigAction, ...]:
    """Every disposition that is not the default, by signal."""
    if len(entry.sigactions) > len(_CATCHABLE):
        raise garbled(name, f"{len(entry.sigactions)} sigactions")
    actions = []
    for signal, message in zip(_CATCHABLE, entry.sigactions, strict=False):
        if message.compat_sigaction:
            raise garbled(name, f"signal {signal} has a 32-bit handler")
        action = (message.sigaction, message.flags, message.restorer, message.mask)
        if any(action):
            actions.append(SigAction(signal, *action))
    return tuple(actions)


def read_itimers(entry: pb.task_timers_entry) -> tuple[IntervalTimer, ...]:
    """The armed ones."""
    timers = (
        IntervalTimer(which, timer.vsec * _SECOND_US + timer.vusec, timer.isec * _SECOND_US + timer.iusec)
        for which, timer in enumerate((entry.real, entry.virt, entry.prof))
    )
    return tuple(timer for timer in timers if timer.value_us or timer.interval_us)


def read_posix_timers(entry: pb.task_timers_entry) -> tuple[PosixTimer, ...]:
    return tuple(
        PosixTimer(
            id=timer.it_id,
            clock=timer.clock_id - (1 << 32) if timer.clock_id >> 31 else timer.clock_id,
            signal=timer.si_signo,
            notify=timer.it_sigev_notify,
            value=timer.sival_ptr,
            tid=timer.notify_thread_id,
            overrun=timer.overrun,
            value_ns=timer.vsec * SECOND_NS + timer.vnsec,
            interval_ns=timer.isec * SECOND_NS + timer.insec,
        )
        for timer in entry.posix
    )


def read_limits(entry: pb.task_rlimits_entry) -> tuple[Limit, ...]:
    return tuple(Limit(resource, limit.cur, limit.max) for resource, limit in enumerate(entry.rlimits))


def read_pending(entry: pb.task_core_entry) -> tuple[bytes, ...]:
    return read_signals(entry.signals_s)


def cgroup_set(leader: pb.core_entry) -> int:
    """The number of the leader's cgroup set; CRIU <= 3.18 wrote it for the task, not for the thread."""
    if leader.thread_core.HasField("cg_set"):
        return leader.thread_core.cg_set
    return leader.tc.cg_set
