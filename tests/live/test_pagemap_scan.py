"""PAGEMAP_SCAN against memory whose pages are known, page by page."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyproc.kernel import sys as kernel
from lazyproc.model import PAGE


@contextmanager
def touched(pages: int, period: int) -> Iterator[int]:
    """The address of anonymous memory in which every `period`-th page has never been touched."""
    with mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for page in range(pages):
            if page % period != period - 1:
                memory[page * PAGE] = 1
        view = ctypes.c_char.from_buffer(memory)
        yield ctypes.addressof(view)
        del view


@pytest.mark.parametrize(("pages", "period"), [(64, 4), (4096, 4), (8192, 2), (20000, 3)])
def test_every_run_comes_once_and_whole(pages: int, period: int) -> None:
    fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    try:
        with touched(pages, period) as start:
            scan = kernel.pagemap_scan(fd, [(start, start + pages * PAGE)], anyof=kernel.PAGE_IS_PRESENT)
            found = [
                page for low, high, _ in scan for page in range((low - start) // PAGE, (high - start) // PAGE)
            ]
    finally:
        os.close(fd)
    assert found == [page for page in range(pages) if page % period != period - 1]
