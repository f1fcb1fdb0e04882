"""Images that cannot be written, and images that are not what was written: the file is named, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.images.files import EXTRAS, SUMS
from tests.live.bad_luck import lazyproc, says, unchanged, unharmed
from tests.live.many import Done
from tests.live.programs import Program, running
from tests.live.real import processes_of

SEED = 20
FLIPS = 12  # a file
OPTIONAL = {"fdinfo-2.img": 8}  # cut there the list is empty, which is a list as well
# Missed elsewhere: between two records the end of a list looks like any other, and CRIU writes no lazyproc.img.
NAMED_ELSEWHERE = {"files.img", "lazyproc.img"}

Change = Callable[[Path], None]


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", 4, 2, 1000, directory=pair.shared, host=pair.source) as started:
        yield started


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["size=1m", "nr_inodes=3", "nr_inodes=9"])
def test_a_full_disk(pair: Pair, program: Program, options: str) -> None:
    """At the first page, at the first image, among the images."""
    source, disk = pair.source, pair.source.scratch / "disk"
    (source.outside / "disk").mkdir()
    source.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    with unchanged(source), unharmed(program):
        done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", disk / "images")
        says(done, 1, f"{disk}/images", "no space left on device", "make room there")
    assert source.run(["ls", "-A", disk], capture_output=True, text=True).stdout == ""
    done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", source.scratch / "images")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("read-only", "read-only file system"),
        ("file", "name a folder"),
        ("absent/images", "the folder for it is missing; make "),
        ("file/images", "not a directory"),
    ],
)
def test_a_place_where_nothing_can_be_written(pair: Pair, program: Program, folder: str, words: str) -> None:
    source = pair.source
    (source.outside / "read-only").mkdir()
    (source.outside / "file").write_text("mine")
    source.run(["mount", "-t", "tmpfs", "-o", "ro", "none", source.scratch / "read-only"], check=True)
    with unchanged(source), unharmed(program):
        done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", source.scratch / folder)
        says(done, 1, str(source.scratch / folder), words, "; ")
    assert (source.outside / "file").read_text() == "mine"


def test_images_of_another_checkpoint_are_never_mixed_with(pair: Pair, program: Program) -> None:
    source, images = pair.source, pair.source.scratch / "images"
    argv = ("checkpoint", source.vpid(program.pid), "-D", images, "--leave-running")
    assert lazyproc(source, *argv).returncode == 0
    before = {path.name: path.read_bytes() for path in (source.outside / "images").iterdir()}
    with unchanged(source), unharmed(program):
        says(lazyproc(source, *argv), 1, f"{images}: holds images already", "choose another folder")
    assert {path.name: path.read_bytes() for path in (source.outside / "images").iterdir()} == before


def test_other_files_in_the_folder_stay_there(pair: Pair, program: Program) -> None:
    source = pair.source
    (source.outside / "images").mkdir()
    (source.outside / "images" / "notes.txt").write_text("mine")
    done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", source.scratch / "images")
    assert done.returncode == 0, done.stderr
    assert (source.outside / "images" / "notes.txt").read_text() == "mine"


# --- reading ----------------------------------------------------------------------------------------------


def without_it(path: Path) -> None:
    path.unlink()


def cut_at(length: int) -> Change:
    return lambda path: os.truncate(path, length)


def flipped(at: int, bit: int) -> Change:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << bit
        path.write_bytes(data)

    return change


@pytest.fixture
def images(pair: Pair, program: Program) -> Path:
    """A checkpoint of the program, which is gone."""
    source = pair.source
    done = lazyproc(source, "checkpoint", source.vpid(program.pid), "-D", source.scratch / "images")
    assert done.returncode == 0, done.stderr
    program.process.wait(10)
    return source.outside / "images"


def restored(pair: Pair, images: Path, name: str, changes: list[Change], *, sums: bool = False) -> list[Done]:
    """What `restore` and `restore --lazy` in turn make of copies of the images in which one file is changed.

    Without the checksums, as CRIU would have left them, it is for the format to see that something is wrong.
    """
    lines = []
    for number, change in enumerate(changes):
        copy = pair.source.outside / f"{name}-{number}"
        shutil.copytree(images, copy, copy_function=os.link)
        shutil.copy(images / name, copy / "changed")
        (copy / "changed").replace(copy / name)
        change(copy / name)
        if not sums:
            (copy / SUMS).unlink(missing_ok=True)
        lazy = ["--lazy"] if number % 2 else []
        lines.append(["restore", "-D", str(pair.source.scratch / copy.name), "--detach", "--json", *lazy])
    done = pair.source.run(
        [sys.executable, "-m", "tests.live.many"], input=json.dumps(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results: list[Done] = json.loads(done.stdout)
    return results


@pytest.mark.long
def test_files_that_are_missing_or_cut_short(pair: Pair, images: Path) -> None:
    with unchanged(pair.source):
        for path in without_sums(images):
            size = path.stat().st_size
            lengths = sorted({0, 3, 4, 8, size // 2, size - 4, size - 1} - {OPTIONAL.get(path.name, -1)})
            # Twice each: at once and lazily.
            changes = [change for length in lengths for change in [cut_at(length)] * 2]
            missing: list[Change] = [without_it] * 2
            # Without lazyproc.img it is a dump of CRIU's, but for the checksums.
            for tried, sums in ((missing, path.name == EXTRAS), (changes, False)):
                for done in restored(pair, images, path.name, tried, sums=sums):
                    assert done["code"] == 1, (path.name, done)
                    assert path.name in done["err"] or path.name in NAMED_ELSEWHERE, done
                    check_sentence(done)
                for copy in pair.source.outside.glob(f"{path.name}-*"):
                    shutil.rmtree(copy)


@pytest.mark.long
def test_files_with_a_flipped_bit(pair: Pair, images: Path) -> None:
    """Each is refused in a sentence, or the tree is built: another value that can be, which the format cannot know."""
    chance = random.Random(SEED)
    for path in without_sums(images):
        size = path.stat().st_size
        changes = [flipped(chance.randrange(size), chance.randrange(8)) for _ in range(FLIPS)]
        for done in restored(pair, images, path.name, changes):
            assert done["code"] in (0, 1, 3), (path.name, done)
            if done["code"]:
                check_sentence(done)
        for copy in pair.source.outside.glob(f"{path.name}-*"):
            shutil.rmtree(copy)
    assert set(processes_of(pair.source).values()) <= {"unshare", "cat"}


@pytest.mark.long
def test_the_checksums_find_every_flipped_bit(pair: Pair, images: Path) -> None:
    chance = random.Random(SEED)
    with unchanged(pair.source):
        for path in without_sums(images):
            if path.name.startswith("pages-"):
                continue
            size = path.stat().st_size
            changes = [flipped(chance.randrange(size), chance.randrange(8)) for _ in range(2)]
            for done in restored(pair, images, path.name, changes, sums=True):
                assert done["code"] == 1, (path.name, done)
                assert f"{path.name}: is not what was written" in done["err"], done
                check_sentence(done)
            show = lazyproc(pair.source, "show", pair.source.scratch / f"{path.name}-0")
            says(show, 1, f"{path.name}: is not what was written", f"remove {SUMS}")
            serve = ("serve", "-D", pair.source.scratch / f"{path.name}-0", "--listen", "127.0.0.1:0")
            says(lazyproc(pair.source, *serve), 1, f"{path.name}: is not what was written")
            for copy in pair.source.outside.glob(f"{path.name}-*"):
                shutil.rmtree(copy)


def without_sums(images: Path) -> list[Path]:
    return sorted(path for path in images.iterdir() if path.name != SUMS)


def check_sentence(done: Done) -> None:
    assert done["err"].startswith("lazyproc: "), done
    assert "Traceback" not in done["err"], done
    assert "fault of lazyproc" not in done["err"], done
    assert "; " in done["err"], done
    failure = json.loads(done["out"])
    assert failure["exit_code"] == done["code"]
