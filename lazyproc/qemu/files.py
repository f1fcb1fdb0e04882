"""Files that are the RAM of a guest, told from one another across hosts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lazyproc.errors import Obstacle
from lazyproc.kernel import proc
from lazyproc.qemu.ram import Block

Identity = list[str | int]  # boot id of the kernel that has it open, device, inode


def files(pid: int, blocks: Iterable[Block]) -> dict[str, Identity]:
    """Those of the shared blocks, by the names of these."""
    shared = {each.addr: each.name for each in blocks if each.shared}
    if not shared:
        return {}
    boot, maps = proc.boot_id(), proc.maps(proc.read(pid, "maps"))
    return {shared[each.start]: [boot, *each.dev, each.inode] for each in maps if each.start in shared}


def in_common(ours: Mapping[str, Identity], theirs: Mapping[str, Sequence[object]]) -> Iterator[Obstacle]:
    """What must not be emptied here: it is the RAM of the guest that runs there."""
    for name, identity in ours.items():
        if identity in theirs.values():
            yield Obstacle(
                0,
                f"RAM block {name}",
                "is the same file in both QEMUs",
                "give the QEMU that is to take the guest in another mem-path",
            )
