"""Which pages a guest has: a page that is overlooked is zeros where the guest goes on."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from lazyproc.events import ignore
from lazyproc.facts import replace
from lazyproc.images.files import Folder
from lazyproc.kernel import proc
from lazyproc.migrate.guest_checkpoint import checkpoint_guest
from lazyproc.migrate.held_guest import HeldGuest
from lazyproc.model import PAGE, Extent
from lazyproc.pages.images import ImagePages
from lazyproc.qemu import ram, saved
from lazyproc.qemu.guest import Guest
from tests.qemu.guests import Serial, Shape, monitor, started

SMALL = Shape(memory=96, visited=4)
SKIPPED = 4  # pages of a file that are in no block


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "private"])
def test_a_block_may_be_a_part_of_a_file(shared: bool, tmp_path: Path) -> None:
    """The file has pages before and behind it, and a private one pages that the file has not."""
    path = tmp_path / "ram"
    with path.open("wb+") as file:
        file.truncate((SKIPPED + 64) * PAGE)
        for number in (0, SKIPPED + 1, SKIPPED + 2, SKIPPED + 7, SKIPPED + 40):
            os.pwrite(file.fileno(), b"x" * PAGE, number * PAGE)
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        with mmap.mmap(file.fileno(), 32 * PAGE, flags=flags, offset=SKIPPED * PAGE) as memory:
            memory[3 * PAGE] = memory[16 * PAGE] = 1
            where = ctypes.c_char.from_buffer(memory)
            found = extents(ctypes.addressof(where), 32, shared)
            del where
    assert found == [
        Extent(PAGE, 3, lazy=True),
        Extent(7 * PAGE, 1, lazy=True),
        Extent(16 * PAGE, 1, lazy=True),
    ]


def extents(addr: int, pages: int, shared: bool) -> list[Extent]:
    """Of a block in this process."""
    pid = os.getpid()
    block = ram.Block("ram", pages * PAGE, pages * PAGE, PAGE, shared, addr, 0)
    started_at = proc.stat(proc.read(pid, "stat")).start_time
    held = HeldGuest(Guest("", pid, started_at, "pc", "7.2.0", False, (block,)))
    return list(held.extents()[block.object])


def test_what_the_guest_has_from_a_file_is_saved(tmp_path: Path) -> None:
    """Its RAM is a private mapping of a file that is not empty, of which nothing that runs has touched that part."""
    file, first, count = tmp_path / "ram", SMALL.memory << 19, 256 * PAGE
    content = b"".join(number.to_bytes(8, "little") * (PAGE // 8) for number in range(1, 257))
    with file.open("wb") as out:
        os.pwrite(out.fileno(), content, first)
        out.truncate(SMALL.memory << 20)
    backend = f"memory-backend-file,id=ram,size={SMALL.memory}M,mem-path={file},share=off"
    shape = replace(SMALL, machine="pc,memory-backend=ram", options=("-object", backend))
    with Serial(tmp_path / "serial") as serial, started(shape, serial, tmp_path, "-S") as guest:
        with monitor(guest) as qmp:
            qmp.execute("cont")
            qmp.execute("stop")
        checkpoint_guest(str(guest.qmp), tmp_path / "images", leave_running=True, listener=ignore)
    folder = Folder(tmp_path / "images")
    (block,) = (each for each in saved.read(folder.read()).blocks if each.used == SMALL.memory << 20)
    with ImagePages(folder, [block.object]) as pages:
        assert pages.read(block.object, first, count // PAGE) == content


def test_a_private_file_there_is_refused() -> None:
    """What is in it would be taken for what has come."""
    ours = ram.Block("ram", PAGE, PAGE, PAGE, False, 1 << 30, 0, of_file=True)
    (obstacle,) = ram.differences([ours], [replace(ours, of_file=False)])
    assert "privately" in obstacle.why
