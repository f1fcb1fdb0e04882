"""A QEMU with a TCG guest is a process as any other: it moves, and is restored from images, its memory following."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.dump.explain import explain
from lazyproc.facts import dataclass
from lazyproc.hosts import Host, Pair
from lazyproc.kernel import proc
from lazyproc.qemu.qmp import Qmp
from tests.live.lockers import is_free
from tests.live.moving import Moved, Seen, checkpoint, look_at_tree, receiving, restore
from tests.live.programs import wait_until
from tests.live.real import ending, migrating
from tests.qemu.guests import Guest, Serial, Shape, beating, empty_disk, monitor, needs_kvm, started

CODE, GUEST = (
    "rwxp",
    "dc",
)  # the buffer in which translated code runs; memory that no child is to have (MADV_DONTFORK)
ADVISED = {"dc", "hg", "mg", "nh"}  # of VmFlags: what madvise(2) has set


@dataclass(frozen=True, slots=True)
class Inside:
    """What of a QEMU must be the same before and after; `masks`: the signals that each thread blocks, by number."""

    tree: dict[int, Seen]
    memory: dict[int, tuple[int, str, frozenset[str]]]
    masks: dict[int, int]

    @classmethod
    def of(cls, pid: int) -> Inside:
        memory = {
            each.entry.start: (each.entry.end, each.entry.perms, frozenset(ADVISED & each.vm_flags))
            for each in proc.smaps(proc.read(pid, "smaps"))
            if each.entry.perms == CODE or GUEST in each.vm_flags
        }
        threads = [proc.status(proc.read(pid, f"task/{tid}/status")) for tid in proc.task_ids(pid)]
        return cls(look_at_tree(pid), memory, {each.ns_pid[-1]: each.sig_blocked for each in threads})


def check_arrived(moved: Moved, before: Inside, guest: Guest, there: Host) -> None:
    """It beats on, no page is wrong, and whoever goes to its monitor finds it."""
    moved.check_like(before.tree, same_maps=False)  # its arenas grow at any time
    now = Inside.of(moved.pid)
    assert now.memory == before.memory
    lasting = before.masks.keys() & now.masks.keys()  # those that do a disk's work come and go
    assert len(lasting) > guest.shape.cpus
    assert [now.masks[tid] for tid in lasting] == [before.masks[tid] for tid in lasting]
    guest.serial.wait(20)
    guest.serial.check()
    with Qmp(str(there.outside / "qmp")) as qmp:
        assert qmp.execute("query-status")["running"]


@pytest.mark.long
def test_moves_while_it_beats(pair: Pair) -> None:
    """With a disk on which it holds locks."""
    disk = empty_disk(pair.shared)
    shape = Shape(cpus=2, disk=disk, net=True)
    with beating(shape, pair.shared, host=pair.source) as guest, receiving(pair.destination) as receiver:
        before = Inside.of(guest.pid)
        assert {perms for _, perms, _ in before.memory.values()} == {"rw-p", CODE}
        with migrating(pair.source, receiver, guest.pid, "--max-rate", "120000000") as journey:
            journey.wait_running()
            guest.serial.wait(20)
            assert journey.still_lazy()
            pid, report = journey.arrive()
        with ending(pid):
            assert report["pages_urgent"] > 0
            check_arrived(Moved(pid, report, ""), before, guest, pair.destination)
            assert not is_free(disk)
        wait_until(lambda: is_free(disk), "nothing here has it locked")


@pytest.mark.long
def test_is_restored_lazily_from_images(pair: Pair) -> None:
    """With memory in a memfd and a disk on which it holds locks."""
    shape = Shape("q35", cpus=2, shared=True, disk=empty_disk(pair.shared), net=True)
    with beating(shape, pair.shared, host=pair.source) as guest:
        before = Inside.of(guest.pid)
        images = pair.shared / "images"
        checkpoint(pair.source, guest.pid, images)
        moved = restore(pair.destination, images, "--lazy")
        with ending(moved.pid):
            check_arrived(moved, before, guest, pair.destination)


@needs_kvm
def test_what_only_moves_as_a_guest_is_named(tmp_path: Path) -> None:
    ring = f"if=none,id=ring,file={empty_disk(tmp_path)},format=raw,cache=none,aio=io_uring"
    with (
        Serial(tmp_path / "serial") as serial,
        started(Shape(kvm=True), serial, tmp_path, "-S", "-drive", ring) as guest,
        monitor(guest),
    ):
        found = explain(guest.pid)
    assert all("--qemu" in each.remedy for each in found), found
    for why in (
        "/dev/kvm is KVM",
        "is a KVM virtual machine",
        "is a KVM virtual CPU",
        "is an io_uring",
        "is connected to an unnamed socket outside of the process tree",
    ):
        assert [each for each in found if why in each.why], f"{why} is not among {found}"
