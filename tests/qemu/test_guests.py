"""The rig that the other tests of guests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.qemu.qmp import Qmp
from tests.qemu.guests import Beat, Shape, beating, empty_disk, needs_kvm


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_guest_beats_and_goes_on_after_a_stop(machine: str, tmp_path: Path) -> None:
    shape = Shape(machine, cpus=2, shared=machine == "q35", disk=empty_disk(tmp_path), net=True)
    before, after = stopped_and_continued(shape, tmp_path)
    assert after.blocks > before.blocks


@needs_kvm
@pytest.mark.long
def test_a_guest_under_kvm_beats(tmp_path: Path) -> None:
    stopped_and_continued(Shape(kvm=True, visited=16), tmp_path)


def stopped_and_continued(shape: Shape, folder: Path) -> tuple[Beat, Beat]:
    with beating(shape, folder) as guest, Qmp(str(guest.qmp)) as qmp:
        before = guest.serial.wait(20)
        qmp.execute("stop")
        assert not qmp.execute("query-status")["running"]
        qmp.execute("cont")
        after = guest.serial.wait(50)
        assert after.visits > before.visits
        guest.serial.check()
        return before, after
