"""Pages written to a folder and read back, through parents, and a disk that fills."""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from lazyproc.errors import ImageError
from lazyproc.images.convert import pagemap_images
from lazyproc.images.draft import filled
from lazyproc.images.files import Folder
from lazyproc.model import (
    PAGE,
    Checkpoint,
    Clocks,
    Extent,
    MemoryObject,
    ObjectKind,
    SharedKind,
    SharedMemory,
)
from lazyproc.pages.images import ImagePages, write_content, write_pages

SHARED = MemoryObject(ObjectKind.SHARED, 5)
OTHER = MemoryObject(ObjectKind.SHARED, 6)


class MadePages:
    """A PageSource whose every page begins with the object, the address and a seed."""

    def __init__(self, extents: Mapping[MemoryObject, tuple[Extent, ...]], seed: int = 0) -> None:
        self._extents = extents
        self._seed = seed

    def extents(self) -> Mapping[MemoryObject, tuple[Extent, ...]]:
        return self._extents

    def page(self, obj: MemoryObject, addr: int) -> bytes:
        return f"{obj.key} {addr} {self._seed}".encode().ljust(PAGE, b"-")

    def read(self, obj: MemoryObject, addr: int, count: int) -> bytes:
        assert count <= 256
        return b"".join(self.page(obj, addr + index * PAGE) for index in range(count))


def checkpoint_of(memory: Mapping[MemoryObject, tuple[Extent, ...]]) -> Checkpoint:
    """A checkpoint that has nothing but shared memory; enough for a folder of pages."""
    shared = {obj.id: SharedMemory(obj.id, SharedKind.MEMFD, 1 << 30) for obj in memory}
    return Checkpoint((), {}, {}, shared, {}, memory, Clocks(0, 0, 0))


def folder_with(
    path: Path, memory: Mapping[MemoryObject, tuple[Extent, ...]], *, lazy: bool = True, seed: int = 0
) -> Folder:
    folder, checkpoint = Folder(path), checkpoint_of(memory)
    with filled(folder, early=True) as draft:
        write_pages(draft, checkpoint, MadePages(memory, seed), lazy=lazy)
        draft.write(pagemap_images(checkpoint, lazy_elsewhere=not lazy))
    return folder


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    memory = {
        SHARED: (Extent(PAGE, 700, False), Extent(9000 * PAGE, 3, True)),
        OTHER: (),
    }
    made = MadePages(memory)
    folder = folder_with(tmp_path, memory)
    assert (tmp_path / "pages-1.img").stat().st_size == 703 * PAGE
    assert (tmp_path / "pages-2.img").stat().st_size == 0
    with ImagePages(folder, [SHARED, OTHER]) as pages:
        assert pages.extents() == memory
        assert pages.read(SHARED, 0, 2) == bytes(PAGE) + made.page(SHARED, PAGE)
        assert pages.read(SHARED, 8999 * PAGE, 5) == bytes(PAGE) + made.read(SHARED, 9000 * PAGE, 3) + bytes(
            PAGE
        )
        assert pages.read(OTHER, 0, 1) == bytes(PAGE)
        generator = random.Random(1)
        for _ in range(100):
            first, count = generator.randrange(1, 700), generator.randrange(1, 200)
            count = min(count, 701 - first)
            assert pages.read(SHARED, first * PAGE, count) == made.read(SHARED, first * PAGE, count)


class Dotted(MadePages):
    """Only these pages are no zeros."""

    def __init__(self, extents: Mapping[MemoryObject, tuple[Extent, ...]], content: set[int]) -> None:
        super().__init__(extents)
        self._content = content

    def page(self, obj: MemoryObject, addr: int) -> bytes:
        return super().page(obj, addr) if addr // PAGE in self._content else bytes(PAGE)


@pytest.mark.parametrize(
    ("content", "runs"),
    [
        pytest.param(set(), (), id="none"),
        pytest.param({0, 1, 599}, ((0, 2), (599, 1)), id="first and last"),
        pytest.param({2, 255, 256, 300}, ((2, 1), (255, 2), (300, 1)), id="across what is read at once"),
        pytest.param(set(range(600)), ((0, 600),), id="all"),
    ],
)
def test_pages_of_zeros_are_left_out(
    content: set[int], runs: tuple[tuple[int, int], ...], tmp_path: Path
) -> None:
    made = Dotted({SHARED: (Extent(0, 600, False),), OTHER: ()}, content)
    folder = Folder(tmp_path)
    with filled(folder, early=True) as draft:
        written = write_content(draft, [SHARED, OTHER], made.extents(), made)
        draft.write(pagemap_images(checkpoint_of(written), lazy_elsewhere=False))
    assert written == {SHARED: tuple(Extent(at * PAGE, n, True) for at, n in runs), OTHER: ()}
    assert (tmp_path / "pages-1.img").stat().st_size == len(content) * PAGE
    with ImagePages(folder, [SHARED]) as pages:
        for at in range(0, 600, 200):
            assert pages.read(SHARED, at * PAGE, 200) == made.read(SHARED, at * PAGE, 200)


def test_segments_say_where_the_bytes_lie(tmp_path: Path) -> None:
    memory = {SHARED: (Extent(0, 1500, False),), OTHER: (Extent(4 * PAGE, 1, True),)}
    with ImagePages(folder_with(tmp_path, memory), [OTHER, SHARED]) as pages:
        segments = pages.segments()
        assert [segment.key for segment in segments] == [SHARED.key, SHARED.key, OTHER.key]
        assert sum(segment.end - segment.start for segment in segments) == 1501 * PAGE
        for segment in segments:
            obj = MemoryObject(ObjectKind.SHARED, segment.key >> 8)
            content = os.pread(segment.fd, segment.end - segment.start, segment.offset)
            assert content[:PAGE] == MadePages(memory).page(obj, segment.start)


def test_lazy_pages_at_a_server_are_not_in_the_folder(tmp_path: Path) -> None:
    memory = {SHARED: (Extent(0, 2, False), Extent(2 * PAGE, 2, True))}
    folder = folder_with(tmp_path, memory, lazy=False)
    assert (tmp_path / "pages-1.img").stat().st_size == 2 * PAGE
    with ImagePages(folder, [SHARED]) as pages:
        assert pages.extents() == {SHARED: (Extent(0, 2, False),)}
        assert pages.read(SHARED, PAGE, 1) == MadePages(memory).page(SHARED, PAGE)
        with pytest.raises(ImageError, match=r"0x2000.*--from"):
            pages.read(SHARED, PAGE, 2)


def test_pages_of_a_parent_are_read_from_the_parent(tmp_path: Path) -> None:
    before = {SHARED: (Extent(0, 4, True),)}
    after = {SHARED: (Extent(0, 1, True), Extent(PAGE, 2, True, in_parent=True), Extent(3 * PAGE, 1, True))}
    folder_with(tmp_path / "1", before, seed=1)
    folder = folder_with(tmp_path / "2", after, seed=2)
    assert (tmp_path / "2/pages-1.img").stat().st_size == 2 * PAGE
    with pytest.raises(ImageError, match="in no parent"):
        ImagePages(folder, [SHARED])
    (tmp_path / "2/parent").symlink_to("../1")
    with ImagePages(folder, [SHARED]) as pages:
        old, new = MadePages(before, 1), MadePages(after, 2)
        assert pages.read(SHARED, 0, 4) == b"".join(
            (new if page in (0, 3) else old).page(SHARED, page * PAGE) for page in range(4)
        )
        assert pages.extents() == {SHARED: (Extent(0, 4, True),)}


def test_a_pages_image_that_is_too_short_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {SHARED: (Extent(0, 4, True),)})
    with ImagePages(folder, [SHARED]) as pages:
        os.truncate(tmp_path / "pages-1.img", 2 * PAGE)
        with pytest.raises(ImageError, match="cut short"):
            pages.read(SHARED, 0, 4)
    with pytest.raises(ImageError, match=r"pages-1.img: truncated: 16384 bytes expected, 8192 there"):
        ImagePages(folder, [SHARED])


def test_a_full_disk_leaves_no_pages_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300 * PAGE, limits[1]))
    try:
        with pytest.raises(ImageError, match=r"pages-2\.img"):
            folder_with(tmp_path / "new", {SHARED: (Extent(0, 4, True),), OTHER: (Extent(0, 400, True),)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())
