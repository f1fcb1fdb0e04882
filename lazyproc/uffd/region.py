"""Lazy memory inside one's own process: a mapping whose pages are made the first time somebody touches them.

    with LazyRegion(1 << 30, lambda offset, length: download(offset, length)) as memory:
        header = bytes(memory[:64])

The function runs in a process of its own. It cannot be a thread of this one: who touches missing memory from Python
holds the GIL while it waits for the page.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Self

from lazyproc.errors import UsageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.pages import PageSource
from lazyproc.uffd._pager import ffi, lib
from lazyproc.uffd.device import Userfaultfd
from lazyproc.uffd.pager import Counters, Pager

Source = Callable[[int, int], bytes]
"""`source(offset, length)`: exactly `length` bytes of the region from `offset`, both multiples of 4096."""

_OBJECT = MemoryObject(ObjectKind.TASK, 1)
_FRAME = struct.Struct("<BBHIQQII")  # docs/protocol.md: type, flags, reserved, pages, object, addr, tag, crc
_PAGES, _LAST = 2, 2


def _answer(source: Source, channel: socket.socket) -> bool:
    """Answers one request for pages; False when the other end has hung up."""
    header = channel.recv(_FRAME.size, socket.MSG_WAITALL)
    if len(header) < _FRAME.size:
        return False
    _, _, _, count, key, addr, tag, _ = _FRAME.unpack(header)
    data = source(addr, count * PAGE)
    if len(data) != count * PAGE:
        raise UsageError(f"the source gave {len(data)} of {count * PAGE} bytes", where=f"offset {addr:#x}")
    crc = lib.pager_crc32c(ffi.from_buffer(data), count)
    channel.sendall(_FRAME.pack(_PAGES, _LAST, 0, count, key, addr, tag, crc) + data)
    return True


def _serve(source: Source, channels: Mapping[int, socket.socket]) -> None:
    poller = select.poll()
    for fd in channels:
        poller.register(fd, select.POLLIN)
    while all(_answer(source, channels[fd]) for fd, _ in poller.poll()):
        pass


def _fork_server(source: Source) -> tuple[int, int, int]:
    """A pidfd of the process that serves `source`, and our ends of its urgent and bulk connections.

    It ends when they are closed. Forked before the region exists, it holds none of it.
    """
    pairs = [socket.socketpair() for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()  # Ctrl-C is for whoever waits for a page, and that page still has to come
            for ours, _ in pairs:
                ours.close()
            _serve(source, {theirs.fileno(): theirs for _, theirs in pairs})
        finally:
            os._exit(0)
    for _, theirs in pairs:
        theirs.close()
    urgent, bulk = (ours.detach() for ours, _ in pairs)
    return os.pidfd_open(pid), urgent, bulk


class _Memory(mmap.mmap):
    """Brings its pages as long as it is mapped: munmap(2) waits until its event has been read, and without that whoever
    ends with a part of it in use would never end."""

    pager: Pager
    server: int  # pidfd
    owner: int  # pid

    def end(self) -> None:
        """The memory first: with the pager gone its missing pages would read as zeros. Raises BufferError."""
        self.close()
        if os.getpid() != self.owner:  # a fork, with a copy of the memory
            return
        self.pager.abandon()
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.server, signal.SIGKILL)
        with suppress(
            ChildProcessError
        ):  # somebody else of this program waits for all children, or SIGCHLD is ignored
            os.waitid(os.P_PIDFD, self.server, os.WEXITED)
        os.close(self.server)

    def __del__(self) -> None:
        if not self.closed:
            self.end()


class LazyRegion:
    """`length` bytes of private memory, in whole pages, filled by `source` as they are touched.

    A context manager that gives the memory, a writable memoryview; slices of it have to be released before the end
    (BufferError). Pages come on demand, one at a time, and with `bulk=True` in the background as well. When the
    source raises or ends, `lost` tells, and whoever touches a missing page waits.
    Raises UsageError, PermissionDenied or HostLacks.
    """

    def __init__(self, length: int, source: Source, *, bulk: bool = False) -> None:
        if length <= 0 or length % PAGE:
            raise UsageError(f"a lazy region of {length} bytes", remedy=f"use a multiple of {PAGE}")
        self._length = length
        self._source = source
        self._bulk = bulk

    @classmethod
    def of_pages(
        cls, source: PageSource, obj: MemoryObject, addr: int, count: int, *, bulk: bool = False
    ) -> Self:
        """`count` pages of an object from a PageSource: a checkpoint's memory, say, without restoring it."""
        return cls(
            count * PAGE, lambda offset, length: source.read(obj, addr + offset, length // PAGE), bulk=bulk
        )

    def __enter__(self) -> memoryview:
        self._pager = Pager()
        with Userfaultfd.open() as uffd:
            uffd.api()
            server, urgent, bulk = _fork_server(self._source)
            self._pager.serve_remote(urgent, bulk)
            self._map = _Memory(-1, self._length, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._map.pager, self._map.server, self._map.owner = self._pager, server, os.getpid()
            self._view = memoryview(self._map)
            addr = int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))
            uffd.register(addr, self._length)
            space = self._pager.add_space(uffd.detach(), os.getpid())
        self._pager.add_region(space, addr, self._length, _OBJECT, 0)
        self._pager.apply_map({_OBJECT: [Extent(0, self._length // PAGE, lazy=True)]})
        self._pager.start(bulk=self._bulk)
        return self._view

    def __exit__(self, *_exception: object) -> None:
        self._view.release()
        self._map.end()

    def wait(self, timeout: float | None = None) -> bool:
        """True when every page is there, False after `timeout` seconds or when the source is lost."""
        return self._pager.wait(timeout)

    @property
    def lost(self) -> str:
        """Why no more pages come; empty while they do."""
        return self._pager.reason

    def counters(self) -> Counters:
        return self._pager.counters()
