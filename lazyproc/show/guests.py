"""What is in a folder with a saved guest."""

from __future__ import annotations

from pathlib import Path

from lazyproc.images.files import GUEST, Folder
from lazyproc.images.sums import check_sums
from lazyproc.qemu.saved import Saved, read
from lazyproc.show.text import size, table


def read_guest(directory: Path) -> Saved | None:
    """None when there is none. Raises ImageError."""
    folder = Folder(directory)
    if not (directory / GUEST).exists():
        return None
    images = folder.read()
    check_sums(images)
    return read(images)


def guest_fields(saved: Saved) -> dict[str, object]:
    """What `--json` prints; sizes in bytes."""
    return {
        "machine": saved.machine,
        "qemu": saved.version,
        "running": saved.running,
        "devices": len(saved.devices),
        "blocks": [
            {"name": b.name, "used": b.used, "total": b.total, "shared": b.shared} for b in saved.blocks
        ],
    }


def guest_text(saved: Saved) -> str:
    """A line about the whole, and one for each RAM block."""
    rows = [
        (f"  {block.name}", size(block.used), "shared" if block.shared else "private")
        for block in saved.blocks
    ]
    state = "ran" if saved.running else "was paused"
    return (
        f"a guest of QEMU {saved.version}, machine {saved.machine}, which {state}; {size(len(saved.devices))} of "
        f"devices, RAM:\n{table(rows)}"
    )
