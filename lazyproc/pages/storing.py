"""Where the images and pages of a checkpoint go: all into one folder, or without the pages that come later."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from lazyproc.facts import replace
from lazyproc.images.convert import to_images
from lazyproc.images.draft import Draft
from lazyproc.model import Checkpoint, ObjectKind, Vma
from lazyproc.pages import PageSource
from lazyproc.pages.images import write_pages
from lazyproc.runs import Extents


class Stored(NamedTuple):
    """`pages` were written within `pages_ms`, beside `image_bytes` of other images."""

    pages: int
    pages_ms: float
    image_bytes: int


Store: TypeAlias = Callable[[Draft, Checkpoint, PageSource], Stored]


def whole(draft: Draft, checkpoint: Checkpoint, source: PageSource) -> Stored:
    """A Store: everything is in the folder. Raises ImageError, and what `source` raises."""
    return _written(draft, checkpoint, source, lazy_elsewhere=False)


def without_lazy(draft: Draft, checkpoint: Checkpoint, source: PageSource) -> Stored:
    """A Store: lazy pages are said to be at a page server, as by `criu dump --lazy-pages`; the others are there."""
    return _written(draft, as_criu_marks(checkpoint), source, lazy_elsewhere=True)


def _written(draft: Draft, checkpoint: Checkpoint, source: PageSource, *, lazy_elsewhere: bool) -> Stored:
    images = to_images(checkpoint, lazy_elsewhere=lazy_elsewhere)
    began = time.monotonic()
    pages = write_pages(draft, checkpoint, source, lazy=not lazy_elsewhere)
    ended = time.monotonic()
    draft.write(images)
    return Stored(pages, (ended - began) * 1e3, sum(map(len, images.values())))


def as_criu_marks(checkpoint: Checkpoint) -> Checkpoint:
    """Lazy is only what CRIU leaves to userfaultfd, of processes alone; nothing is in a parent."""
    vmas = {task.vpid: task.mm.vmas for task in checkpoint.tasks if task.mm}
    found = ((obj, Extents.of(runs).without_parent()) for obj, runs in checkpoint.memory.items())
    memory = {
        obj: _as_criu_marks(pages, vmas[obj.id]) if obj.kind is ObjectKind.TASK else pages.as_eager()
        for obj, pages in found
    }
    return replace(checkpoint, memory=memory)


def _as_criu_marks(extents: Extents, vmas: Sequence[Vma]) -> Extents:
    """The vdso's pages are wanted as well."""
    inside = ((vma, extents.within(vma.start, vma.end)) for vma in vmas)
    return Extents.joined(
        part if vma.may_be_lazy and vma.flags & mmap.MAP_PRIVATE else part.as_eager() for vma, part in inside
    )
