"""A frozen tree as it travels: its images, and the pages that must be there at once, in one piece."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lazyproc.dump.source import DumpPages
from lazyproc.images.convert import to_images
from lazyproc.images.files import pack
from lazyproc.images.memory import WrittenMappings
from lazyproc.model import Checkpoint
from lazyproc.pages.bundle import NAME, pack_bundle
from lazyproc.steps import Steps


def description(
    checkpoint: Checkpoint,
    pages: DumpPages,
    steps: Steps,
    written: Iterable[WrittenMappings] = (),
    foreseen: Collection[int] = (),
) -> bytes:
    """What `arrival` unpacks; `written` and `foreseen` are as for to_images. Raises ImageError, NoSuchProcess when a
    page is gone.
    """
    images = to_images(checkpoint, written=written, foreseen=foreseen)
    steps.done("encode")
    images[NAME] = pack_bundle(checkpoint.memory, pages)
    packed = pack(images)
    steps.done("pages")
    return packed
