"""A frozen tree as it travels: its images, and the pages that must be there at once, in one piece."""

from __future__ import annotations

from collections.abc import Collection

from lazyproc.dump.source import DumpPages
from lazyproc.facts import dataclass
from lazyproc.images.convert import to_images
from lazyproc.images.files import pack
from lazyproc.images.memory import WrittenMappings
from lazyproc.model import Checkpoint
from lazyproc.pages.bundle import NAME, pack_bundle
from lazyproc.steps import Steps
from lazyproc.wire.native import FORESEES, REVISION


@dataclass(frozen=True, slots=True)
class Reader:
    """For whom a tree is described: the protocol's revision there, the mappings that were written beforehand, and the
    processes (vpids) of which he has had them.
    """

    revision: int
    written: tuple[WrittenMappings, ...] = ()
    foreseen: Collection[int] = ()


BRIEFED = Reader(REVISION)


def description(checkpoint: Checkpoint, pages: DumpPages, steps: Steps, reader: Reader = BRIEFED) -> bytes:
    """What `arrival` unpacks. Raises ImageError, NoSuchProcess when a page is gone."""
    images = to_images(
        checkpoint,
        written=reader.written,
        foreseen=reader.foreseen,
        for_criu=reader.revision < FORESEES,
    )
    steps.done("encode")
    images[NAME] = pack_bundle(checkpoint.memory, pages)
    packed = pack(images)
    steps.done("pages")
    return packed
