"""What stands in the way of a QEMU as a process need not stand in the way of its guest, which moves without it."""

from __future__ import annotations

import os
from collections.abc import Iterable

from lazyproc.errors import Obstacle
from lazyproc.facts import replace

_OPTION = "--qemu"
_INSTEAD = f"or name its QMP socket in place of the pid: {_OPTION} PATH"


def point_to_guests(obstacles: Iterable[Obstacle], qemus: frozenset[int]) -> tuple[Obstacle, ...]:
    """The obstacles, with another way out for those of the processes `qemus`. Pure."""
    return tuple(
        replace(each, remedy=f"{each.remedy}; {_INSTEAD}")
        if each.pid in qemus and _OPTION not in each.remedy
        else each
        for each in obstacles
    )


def qemus_of(pids: Iterable[int]) -> frozenset[int]:
    return frozenset(pid for pid in pids if _is_qemu(pid))


def _is_qemu(pid: int) -> bool:
    """By its executable: distributions have qemu-system-ARCH, some qemu-kvm."""
    try:
        name = os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    except OSError:  # it has ended, or may not be looked at
        return False
    return name.startswith("qemu-system-") or name == "qemu-kvm"
