"""QEMU's own stream, read as ours is, beside what is saved of the same guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.events import ignore
from lazyproc.images.files import Folder
from lazyproc.migrate.guest_checkpoint import checkpoint_guest
from lazyproc.model import PAGE
from lazyproc.pages.images import ImagePages
from lazyproc.qemu import saved, stream
from tests.live.programs import wait_until
from tests.qemu import streams
from tests.qemu.guests import Guest, Shape, beating, monitor
from tests.qemu.streams import Devices, Ends, Item, Machine, Page, Sizes


def saved_by_qemu(guest: Guest, path: Path) -> list[Item]:
    with monitor(guest) as qmp:
        qmp.execute("migrate", {"uri": f"exec:cat > {path}"})
        wait_until(lambda: qmp.execute("query-migrate")["status"] == "completed", "it is saved")
    with path.open("rb") as file:
        return list(streams.items(file))


@pytest.mark.long
def test_a_guest_is_saved_as_qemu_itself_does(tmp_path: Path) -> None:
    """Every page of every block, the machine, and the beginning of the stream."""
    images = tmp_path / "images"
    with beating(Shape(memory=96, visited=16), tmp_path) as guest:
        with monitor(guest) as qmp:
            qmp.execute("stop")
        checkpoint_guest(str(guest.qmp), images, leave_running=True, listener=ignore)
        theirs = saved_by_qemu(guest, tmp_path / "stream")
    folder = Folder(images)
    ours = saved.read(folder.read())
    assert theirs[0] == Machine(ours.machine)
    assert ours.devices.startswith(stream.HEADER + stream.configuration(ours.machine))
    assert theirs[1] == Sizes({block.name: block.used for block in ours.blocks})
    assert theirs[-2:] == [Ends(), Devices()]
    pages = {(each.block, each.addr): each.data for each in theirs if isinstance(each, Page)}
    with ImagePages(folder, [block.object for block in ours.blocks]) as source:
        held = {
            (block.name, addr): source.read(block.object, addr, 1)
            for block in ours.blocks
            for addr in range(0, block.used, PAGE)
        }
    assert pages.keys() == held.keys()
    assert [place for place, data in pages.items() if held[place] != data] == []
