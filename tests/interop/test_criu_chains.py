"""Chains of parents, as CRIU's pre-dumps leave them: CRIU restores the folders that lazyproc restores and serves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.interop.both_ways import (
    LAZYPROC,
    dumped_by_criu,
    end,
    gone,
    lazyproc,
    restored_by_criu,
    restored_by_lazyproc,
    started,
)
from tests.interop.chains import chain, dedup
from tests.live.programs import Program
from tests.needs import require_root

_CARGO = ("mixed", "8", "2", "20000")  # so slow that most pages stay as they are between two dumps


@dataclass(frozen=True)
class Chain:
    """Three folders, the newest first: its parent, and the parent's parent."""

    program: Program
    folders: tuple[Path, Path, Path]

    @property
    def newest(self) -> Path:
        return self.folders[0]


@contextmanager
def chained(directory: Path, *words: str) -> Iterator[Chain]:
    require_root()
    oldest, middle, newest = (directory / name for name in ("1", "2", "3"))
    with started(*words, directory=directory) as program:
        for folder in (oldest, middle):
            dumped_by_criu(program, folder, "--leave-running")
            program.watch.wait_beats()
        dumped_by_criu(program, newest)
        gone(program)
        assert chain(newest, middle) > 50
        assert chain(middle, oldest) > 50
        yield Chain(program, (newest, middle, oldest))


@pytest.mark.parametrize("words", [_CARGO, ("shared_anon",)], ids=["mixed", "shared_anon"])
def test_criu_restores_these_chains(words: tuple[str, ...], tmp_path: Path) -> None:
    """Which proves that they are what CRIU writes."""
    with chained(tmp_path, *words) as made, restored_by_criu(made.program, made.newest):
        end(made.program.pid, made.program.watch)


@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
@pytest.mark.parametrize("words", [_CARGO, ("shared_anon",)], ids=["mixed", "shared_anon"])
def test_lazyproc_restores_them(words: tuple[str, ...], lazy: bool, tmp_path: Path) -> None:
    with chained(tmp_path, *words) as made:
        end(restored_by_lazyproc(made.newest, *(["--lazy"] if lazy else [])), made.program.watch)


def test_what_a_parent_has_in_vain_is_not_read(tmp_path: Path) -> None:
    """`criu dedup`, --auto-dedup: pages that the newer folder has itself are taken out of the older one."""
    with chained(tmp_path, *_CARGO) as made:
        newest, middle, oldest = made.folders
        assert dedup(middle, oldest) > 0
        dedup(newest, middle)
        end(restored_by_lazyproc(newest, "--lazy"), made.program.watch)


def test_pages_of_parents_are_lazy_too(tmp_path: Path) -> None:
    with chained(tmp_path, *_CARGO) as made:
        said = lazyproc("restore", "-D", made.newest, "--detach", "--lazy", "--json")
        report = json.loads(said.splitlines()[-1])
        assert report["pages_urgent"] + report["pages_bulk"] > 20 * report["pages_eager"], said
        end(report["root_pid"], made.program.watch)


def test_a_chain_that_is_broken_is_refused(tmp_path: Path) -> None:
    with chained(tmp_path, *_CARGO) as made:
        newest, middle, oldest = made.folders
        oldest.rename(tmp_path / "elsewhere")
        for words in (("restore", "-D", newest, "--detach"), ("show", newest)):
            said = lazyproc(*words, expected=1)
            assert "2/parent" in said, said
        (middle / "parent").unlink()
        for words in (("restore", "-D", newest, "--detach"), ("show", newest)):
            assert "is in no parent" in lazyproc(*words, expected=1)
        (newest / "parent").unlink()
        shutil.copytree(tmp_path / "elsewhere", oldest)
        (newest / "parent").symlink_to("../2")
        (middle / "parent").symlink_to("../1")
        end(restored_by_lazyproc(newest), made.program.watch)


@contextmanager
def served(images: Path) -> Iterator[str]:
    """`lazyproc serve` of a folder; its address."""
    command = [*LAZYPROC, "serve", "-D", str(images), "--listen", "127.0.0.1:0", "--insecure", "-v"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if port := re.search(r"listening on port (\d+)", line):
                yield f"127.0.0.1:{port[1]}"
                break
        else:
            pytest.fail("it does not listen")
    finally:
        process.terminate()
        process.communicate()


def test_they_are_served_to_lazyproc(tmp_path: Path) -> None:
    with chained(tmp_path, *_CARGO) as made, served(made.newest) as address:
        said = lazyproc("restore", "--from", address, "--insecure", "--detach", "--json")
        end(json.loads(said.splitlines()[-1])["root_pid"], made.program.watch)


def test_they_are_served_to_criu(tmp_path: Path) -> None:
    with chained(tmp_path, *_CARGO) as made, served(made.newest) as address:
        host, port = address.split(":")
        with restored_by_criu(
            made.program, made.newest, "--page-server", "--address", host, "--port", port, lazy=True
        ):
            end(made.program.pid, made.program.watch)
