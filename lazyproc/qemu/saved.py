"""A saved guest: its RAM in pagemaps and pages as every checkpoint, its devices, and what QEMU it needs.

`lazyproc-guest.img` is JSON, `devices.img` the stream that "migrate-incoming" takes. The objects of the pagemaps are
the RAM blocks (Block.object), their addresses offsets into them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass
from lazyproc.images.convert import pagemap_name
from lazyproc.images.draft import Draft
from lazyproc.images.files import GUEST, ImageWriter, demand
from lazyproc.images.pagemap import write_pagemap
from lazyproc.model import Extent, MemoryObject
from lazyproc.pages import PageSource
from lazyproc.pages.images import write_content
from lazyproc.qemu.devices import NAME
from lazyproc.qemu.guest import Guest
from lazyproc.qemu.ram import Block

VERSION = 1


@dataclass(frozen=True, slots=True)
class Saved:
    """What a folder says of its guest. `devices` is the whole stream."""

    machine: str
    version: str  # of QEMU
    running: bool
    blocks: tuple[Block, ...]
    devices: bytes


def write(
    draft: Draft,
    guest: Guest,
    devices: bytes,
    extents: Mapping[MemoryObject, Sequence[Extent]],
    source: PageSource,
) -> int:
    """All of it; how many pages that were. Of zeros are many, which a guest has freed. Raises ImageError."""
    objects = [block.object for block in guest.blocks]
    written = write_content(draft, objects, extents, source)
    writer = ImageWriter()
    for pages_id, obj in enumerate(objects, start=1):
        write_pagemap(writer, pagemap_name(obj), pages_id, written[obj])
    facts = json.dumps({"format": VERSION, **guest.offer()}).encode()
    draft.write({**writer.finish(), NAME: devices, GUEST: facts})
    return sum(extent.count for runs in written.values() for extent in runs)


def read(images: Mapping[str, bytes]) -> Saved:
    """From the images of a folder (Folder.read). Raises ImageError, also when no guest is in them."""
    if GUEST not in images:
        raise ImageError("holds no guest of a QEMU", where=GUEST, remedy="name a folder of checkpoint --qemu")
    try:
        facts: dict[str, Any] = json.loads(images[GUEST])
        if facts["format"] != VERSION:
            raise ImageError(f"has format {facts['format']}", where=GUEST, remedy="use a newer lazyproc")
        blocks = tuple(Block.of(number, row) for number, row in enumerate(facts["blocks"]))
        return Saved(
            str(facts["machine"]),
            str(facts["version"]),
            facts["running"] is True,
            blocks,
            demand(images, NAME),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(
            f"is garbled ({error!r:.100})", where=GUEST, remedy="copy the whole folder again"
        ) from error
