"""What happens to a tree while it stands still, after it was described: signals that other processes send it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from lazyproc.facts import dataclass, field, replace
from lazyproc.model import Checkpoint, Registers, Task

_HEAD = struct.Struct("<iii")  # si_signo, si_errno, si_code begin a siginfo
SI_USER, SI_QUEUE, SI_TKILL = 0, -1, -6  # kill, sigqueue, tgkill (include/uapi/asm-generic/siginfo.h)


@dataclass(frozen=True, slots=True)
class LateSignal:
    """A signal for a thread, or with `tid` 0 for the whole process; numbers as the tree sees them."""

    vpid: int
    tid: int
    siginfo: bytes  # 128

    @property
    def number(self) -> int:
        return int(_HEAD.unpack_from(self.siginfo)[0])

    @property
    def code(self) -> int:
        """SI_*: how it was sent."""
        return int(_HEAD.unpack_from(self.siginfo)[2])


@dataclass(frozen=True, slots=True)
class Late:
    """`signals`, oldest first in each queue. `registers` are those of threads, by tid, whose call they end."""

    signals: tuple[LateSignal, ...] = ()
    registers: Mapping[int, Registers] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """What `of` takes; JSON has it as it is. Empty when nothing has come."""
        if not self.signals:
            return {}
        return {
            "signals": [[each.vpid, each.tid, each.siginfo.hex()] for each in self.signals],
            "registers": [[tid, *registers] for tid, registers in self.registers.items()],
        }

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Late:
        """Raises KeyError, TypeError, ValueError for what it is not."""
        if "signals" not in fields:
            return cls()
        return cls(
            tuple(LateSignal(int(vpid), int(tid), _siginfo(info)) for vpid, tid, info in fields["signals"]),
            {int(tid): Registers(*map(_word, registers)) for tid, *registers in fields["registers"]},
        )

    def added_to(self, checkpoint: Checkpoint) -> Checkpoint:
        """The tree as it is with them. Pure."""
        return replace(checkpoint, tasks=tuple(self._task(task) for task in checkpoint.tasks))

    def _task(self, task: Task) -> Task:
        def of(tid: int) -> tuple[bytes, ...]:
            return tuple(s.siginfo for s in self.signals if (s.vpid, s.tid) == (task.vpid, tid))

        threads = [replace(thread, pending=thread.pending + of(thread.tid)) for thread in task.threads]
        ended = [
            replace(thread, registers=self.registers[thread.tid], restart=None)
            if thread.tid in self.registers
            else thread
            for thread in threads
        ]
        return replace(task, threads=tuple(ended), pending=task.pending + of(0))


def _siginfo(text: str) -> bytes:
    if len(info := bytes.fromhex(text)) != 128:
        raise ValueError(f"a siginfo of {len(info)} bytes")
    return info


def _word(value: int) -> int:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{value} is no register")
    return value
