"""CRIU restores what lazyproc dumps, lazyproc what CRIU dumps, whole and lazily; what cannot be restored is refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import peer
from tests.interop.both_ways import (
    dumped_by_criu,
    end,
    gone,
    lazyproc,
    restored_by_criu,
    restored_by_lazyproc,
    started,
)
from tests.needs import require_root

MIXED = ("mixed", "16", "3", "100")
# tree: zombies, stopped children, sessions; aio_ring: what only CRIU reads of our pages, and only we of its
CARGO = [MIXED, ("threads",), ("tree",), ("aio_ring",), ("shared_anon",), ("memory_static",)]
IDS = [words[0] for words in CARGO]
WAYS = [False, True]


@pytest.fixture(autouse=True)
def _as_root() -> None:
    require_root()


@pytest.mark.parametrize("lazy", WAYS, ids=["whole", "lazy"])
@pytest.mark.parametrize("words", CARGO, ids=IDS)
def test_lazyproc_restores_what_criu_dumped(words: tuple[str, ...], lazy: bool, tmp_path: Path) -> None:
    images = tmp_path / "images"
    with started(*words, directory=tmp_path) as program:
        dumped_by_criu(program, images)
        gone(program)
        assert str(program.pid) in lazyproc("show", images)
        end(restored_by_lazyproc(images, *(["--lazy"] if lazy else [])), program.watch)


@pytest.mark.parametrize("lazy", WAYS, ids=["whole", "lazy"])
@pytest.mark.parametrize("words", CARGO, ids=IDS)
def test_criu_restores_what_lazyproc_dumped(words: tuple[str, ...], lazy: bool, tmp_path: Path) -> None:
    images = tmp_path / "images"
    with started(*words, directory=tmp_path) as program:
        lazyproc("checkpoint", program.pid, "-D", images)
        gone(program)
        with restored_by_criu(program, images, lazy=lazy):
            end(program.pid, program.watch)


def test_crit_explores_what_lazyproc_dumped(tmp_path: Path) -> None:
    with started(*MIXED, directory=tmp_path) as program:
        lazyproc("checkpoint", program.pid, "-D", tmp_path / "images")
    for what in ("ps", "fds", "mems", "rss"):
        seen = subprocess.run(
            [*peer.crit(), "x", str(tmp_path / "images"), what], capture_output=True, text=True, check=True
        )
        assert str(program.pid) in seen.stdout
