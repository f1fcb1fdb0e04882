"""A real `criu restore --lazy-pages` hands its userfaultfds to lazyproc's pager."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.lazily import dumped, lazy_pages
from tests.needs import require_root

pytestmark = pytest.mark.usefixtures("root")


@pytest.fixture
def root() -> None:
    require_root()


def test_threads_whose_memory_comes_later(tmp_path: Path) -> None:
    with dumped("memory_random", 64, 4, 100, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            cargo.restored()
            cargo.watch.wait_beats()
            report = pager.finish()
        assert report["pages_total"] > 14000
        assert report["pages_bulk"] > 0
        cargo.stop_and_verify()
