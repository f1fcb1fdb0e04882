"""Compressed pages of CRIU's development branch. No release writes them, so real dumps are compressed by the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyproc.errors import ImageError
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.pages.images import ImagePages
from tests.interop.both_ways import dumped_by_criu, end, gone, lazyproc, restored_by_lazyproc, started
from tests.interop.chains import chain
from tests.interop.compressed import Layout, compress
from tests.needs import require_root


@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
@pytest.mark.parametrize("layout", Layout, ids=lambda layout: str(layout.name.lower()))
def test_compressed_pages_are_restored(layout: Layout, lazy: bool, tmp_path: Path) -> None:
    require_root()
    images = tmp_path / "images"
    with started("mixed", "8", "2", "1000", directory=tmp_path) as program:
        dumped_by_criu(program, images)
        gone(program)
        assert compress(images, layout) > 0
        lazyproc("show", images)
        names = sorted(path.name for path in images.iterdir())
        end(restored_by_lazyproc(images, *(["--lazy"] if lazy else [])), program.watch)
        assert sorted(path.name for path in images.iterdir()) == names


def test_a_chain_may_be_compressed(tmp_path: Path) -> None:
    require_root()
    older, newer = tmp_path / "1", tmp_path / "2"
    with started("mixed", "8", "2", "20000", directory=tmp_path) as program:
        dumped_by_criu(program, older, "--leave-running")
        program.watch.wait_beats()
        dumped_by_criu(program, newer)
        gone(program)
        chain(newer, older)
        compress(older, Layout.BLOCKS)
        compress(newer, Layout.REGIONS)
        end(restored_by_lazyproc(newer, "--lazy"), program.watch)


def test_garbled_blocks_are_refused(tmp_path: Path) -> None:
    require_root()
    images = tmp_path / "images"
    with started("threads", directory=tmp_path) as program:
        dumped_by_criu(program, images)
        gone(program)
        compress(images, Layout.BLOCKS)
        pages = images / "pages-1.img"
        content = pages.read_bytes()
        pages.write_bytes(content[: len(content) // 2])
        _demand_refused(images, "truncated")
        pages.write_bytes(bytes(len(content)))
        _demand_refused(images, "block is garbled")
        lazyproc("restore", "-D", images, "--detach", expected=1)
        pages.write_bytes(content)
        end(restored_by_lazyproc(images), program.watch)


def _demand_refused(images: Path, why: str) -> None:
    folder = Folder(images)
    objects = memory_objects(from_images(folder.read()))
    with pytest.raises(ImageError, match=why):
        ImagePages(folder, objects).close()
