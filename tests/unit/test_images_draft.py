"""Folders of images as they are written: whole and private, or empty again."""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.errors import ImageError
from lazyproc.images.draft import filled
from lazyproc.images.files import SUMS, Folder
from lazyproc.images.sums import check_sums
from tests.forked import ending

LARGE = 20 << 20  # bytes: some stretches that the disk gets early, and a rest


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("early", [True, False])
def test_a_folder_gives_back_its_images_and_is_private(tmp_path: Path, early: bool) -> None:
    folder = Folder(tmp_path / "new")
    pieces = [os.urandom(LARGE // 16) for _ in range(16)] + [b"the end"]
    with filled(folder, early=early) as draft:
        draft.write_file("pages-1.img", iter(pieces))
        draft.write({"pstree.img": b"p", "core-1.img": b"c"})
    images = folder.read()
    check_sums(images)
    del images[SUMS]
    assert images == {"core-1.img": b"c", "pstree.img": b"p"}
    assert (folder.path / "pages-1.img").read_bytes() == b"".join(pieces)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.path / "pages-1.img").stat().st_mode) == 0o600


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with filled(Folder(tmp_path / "new"), early=True) as draft:
        draft.write({"pstree.img": b"p", "core-1.img": b"c"})
    with pytest.raises(ZeroDivisionError), filled(Folder(tmp_path / "other"), early=True) as draft:
        draft.write_file("pages-1.img", (bytes(1 // count) for count in (1, 0)))
    assert os.listdir("/proc/self/fd") == before


def test_what_cannot_be_written_whole_is_removed_with_all_others(tmp_path: Path) -> None:
    with (
        no_file_longer_than(4096),
        pytest.raises(ImageError, match=r"files\.img"),
        filled(Folder(tmp_path / "new"), early=False) as draft,
    ):
        draft.write({"pstree.img": b"p", "files.img": bytes(8192)})
    assert not list(tmp_path.iterdir())


def test_what_lay_in_the_folder_before_stays_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ImageError, match="not a name"), filled(Folder(tmp_path), early=False) as draft:
        draft.write({"pstree.img": b"p", "../core-1.img": b"c"})
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_left_of_a_killed_one_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    """Nor for images of CRIU's, of which one that is not there has nothing in it."""
    folder = Folder(tmp_path)
    if not (child := os.fork()):
        with ending(), filled(folder, early=False) as draft:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            draft.write(
                {"inventory.img": b"i", "pstree.img": b"p", "files.img": bytes(8192), "mm-1.img": b"m"}
            )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGXFSZ
    assert "pstree.img" in folder.images()
    with pytest.raises(ImageError, match=r"files\.img|mm-1\.img"):
        check_sums(folder.read())


def test_a_folder_that_was_there_stays_there(tmp_path: Path) -> None:
    """Somebody has made it, with an owner and a label maybe, and tries again."""
    with pytest.raises(ZeroDivisionError), filled(Folder(tmp_path), early=False) as draft:
        draft.write_file("pages-1.img", (bytes(1 // count) for count in (1, 0)))
    assert not list(tmp_path.iterdir())


def test_of_two_at_once_the_later_one_takes_nothing_away(tmp_path: Path) -> None:
    """Both have found the folder empty."""
    folder = Folder(tmp_path / "new")

    def twice() -> None:
        with filled(folder, early=False) as other:
            first.write_file("pages-1.img", [b"first"])
            other.write({"core-2.img": b"other"})
            other.write_file("pages-1.img", [b"other"])

    with filled(folder, early=False) as first:
        with pytest.raises(ImageError, match=r"pages-1\.img: file exists"):
            twice()
        first.write({"core-1.img": b"first"})
    assert sorted(folder.images()) == ["core-1.img", SUMS, "pages-1.img"]
    assert (folder.path / "pages-1.img").read_bytes() == b"first"
    check_sums(folder.read())


def test_the_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    above = tmp_path / "absent"
    with (
        pytest.raises(ImageError, match=rf"{above}/new: the folder for it is missing; make {above} first"),
        filled(Folder(above / "new"), early=False),
    ):
        pass
    assert not above.exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ImageError, match=r"file: file exists; name a folder"),
        filled(Folder(tmp_path / "file"), early=False),
    ):
        pass
