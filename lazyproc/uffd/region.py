"""Lazy memory inside one's own process: a mapping whose pages are made the first time somebody touches them.

    with LazyRegion(1 << 30, lambda offset, length: download(offset, length)) as memory:
        header = memory[:64]

The function runs in a process of its own. It cannot be a thread of this one: who touches missing memory from Python
holds the GIL while it waits for the page.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO, Self

from lazyproc.errors import UsageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.uffd._pager import ffi, lib
from lazyproc.uffd.device import PAGER_FEATURES, Feature, Userfaultfd
from lazyproc.uffd.pager import Counters, Pager

Source = Callable[[int, int], bytes]
"""`source(offset, length)`: exactly `length` bytes of the region from `offset`, both multiples of 4096."""

_OBJECT = MemoryObject(ObjectKind.TASK, 1)
_FRAME = struct.Struct("<BBHIQQII")  # docs/protocol.md: type, flags, reserved, pages, object, addr, tag, crc
_PAGES, _LAST = 2, 2
# A fork of this process would inherit the mapping, and its missing pages would read as zeros in there without EVENT_FORK.
_FEATURES = PAGER_FEATURES & ~Feature.MISSING_SHMEM


def _answer(source: Source, stream: BinaryIO, out: socket.socket) -> None:
    """Answers requests for pages until the other end hangs up."""
    while len(header := stream.read(_FRAME.size)) == _FRAME.size:
        _, _, _, count, key, addr, tag, _ = _FRAME.unpack(header)
        data = source(addr, count * PAGE)
        if len(data) != count * PAGE:
            raise UsageError(f"the source gave {len(data)} bytes for {count * PAGE}", where=f"offset {addr:#x}")
        crc = lib.pager_crc32c(ffi.from_buffer(data), count)
        out.sendall(_FRAME.pack(_PAGES, _LAST, 0, count, key, addr, tag, crc) + data)


class LazyRegion:
    """`length` bytes of private memory, in whole pages, filled by `source` as they are touched.

    A context manager that gives the memory, a writable memoryview; release views of it before the end. Pages come one
    at a time on demand, or with `bulk=True` in the background as well. When the source raises or dies, `lost` says
    so, and whoever touches a missing page waits. Raises UsageError, PermissionDenied or HostLacks.
    """

    def __init__(self, length: int, source: Source, *, bulk: bool = False) -> None:
        if length <= 0 or length % PAGE:
            raise UsageError(f"a lazy region of {length} bytes", remedy=f"use a multiple of {PAGE}")
        self._length = length
        self._source = source
        self._bulk = bulk

    def __enter__(self) -> memoryview:
        self._server, sockets = self._fork_server()
        self._map = mmap.mmap(-1, self._length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)
        addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self._view)))
        self._pager = Pager()
        with Userfaultfd.open() as uffd:
            uffd.api(_FEATURES)
            uffd.register(addr, self._length)
            space = self._pager.add_space(uffd.detach())
        self._pager.add_region(space, addr, self._length, _OBJECT, 0)
        self._pager.serve_remote(*sockets)
        self._pager.apply_map({_OBJECT: [Extent(0, self._length // PAGE, lazy=True)]})
        self._pager.start(bulk=self._bulk)
        return self._view
