"""What Python does for the first time takes long: imports, methods of our dataclasses, parsers of messages; and in a
fresh fork every page that is written to is copied. So before a tree is stopped for us we decode and build one of our
own making, which never runs (docs/adr/0020-rehearsal.md).
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module

from lazyproc.errors import LazyprocError
from lazyproc.events import Listener, Note, ignore
from lazyproc.images.convert import from_images, to_images
from lazyproc.images.files import pack, unpack
from lazyproc.kernel.netfilter import Flow, held
from lazyproc.model import PAGE, Checkpoint, Extent, MemoryObject
from lazyproc.pages import PageSource
from lazyproc.pages.bundle import NAME, BundledPages, pack_bundle
from lazyproc.restore.lazy import introduce
from lazyproc.restore.lazytree import to_facts
from lazyproc.restore.tree import built_tree, ungrouped
from lazyproc.restore.understudy import understudy
from lazyproc.uffd.pager import Pager

ROOMS = (
    "restore.inet",
    "restore.peercred",
    "restore.unix",
)  # a restore enters when the tree has what they make
NOBODY = bytes((127, 108, 0, 0)), 1  # an address and a port without packets


class _Zeros:
    """A PageSource."""

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return {}

    def read(self, _obj: MemoryObject, _addr: int, count: int) -> bytes:
        return bytes(count * PAGE)


def rehearse(
    listener: Listener, also: Callable[[Checkpoint, PageSource], object], *, connected: bool
) -> None:
    """Everything that can be done without the tree, up to what is done with a checkpoint that was built: `also`. With
    `connected` what takes the rights to make TCP connections. Where that fails the blackout is longer.
    """
    try:
        for room in ROOMS:
            import_module(f"lazyproc.{room}")
        checkpoint = understudy(connected=connected)
        images = {**to_images(checkpoint, for_criu=False), NAME: pack_bundle(checkpoint.memory, _Zeros())}
        _build(pack(images), also)
        if connected:
            with held(f"try_{os.getpid()}", [Flow(socket.IPPROTO_TCP, NOBODY, NOBODY)]):
                pass
    except (LazyprocError, OSError) as error:
        listener(Note(f"what restores could not be rehearsed, and will take longer: {error}"))


def _build(data: bytes, also: Callable[[Checkpoint, PageSource], object]) -> None:
    images = unpack(data)
    source = BundledPages(images.pop(NAME), _Zeros())
    checkpoint = from_images(images)
    pager = Pager()
    try:
        with (
            ungrouped() as birth,
            built_tree(checkpoint, source, ignore, pager=pager, pidns="new", birth=birth) as tree,
        ):
            introduce(pager, tree, ignore)
            to_facts(tree.lazy_tree)
            also(checkpoint, source)
    finally:
        pager.abandon()


@contextmanager
def no_collections() -> Iterator[None]:
    """What is there now is not looked through for garbage any more, and what comes inside not before the end."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
