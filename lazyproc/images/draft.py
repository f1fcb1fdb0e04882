"""A checkpoint on its way into a folder: all of it gets to the disk, or nothing stays."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyproc.errors import ImageError
from lazyproc.images.files import Folder
from lazyproc.images.sums import sums_of

_STRETCH = 8 << 20  # bytes after which the disk is given something to do


class Draft:
    """The files of a checkpoint, each open until it is known to be on the disk.

    A disk's error is told to whoever has the file open and is forgotten with its inode (fsync(2)): a file that was
    closed and opened again may look well.
    """

    def __init__(self, folder: Folder, *, made: bool, early: bool) -> None:
        self._folder = folder
        self._made = made
        self._early = early
        self._open: dict[Path, int] = {}
        self._names: list[str] = []
        self._images: Mapping[str, bytes] = {}
        self._at_once = (
            resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8
        )  # each shared object has one of its own

    def write(self, images: Mapping[str, bytes]) -> None:
        """Writes every image, all that are not pages in one call, and their checksums. Raises ImageError."""
        # The checksums first: by them it is seen what is missing if we are killed on the way. CRIU's images have none.
        self._images = images
        for name, data in {**sums_of(images), **images}.items():
            self.write_file(name, [data])

    def rewrite(self, changed: Mapping[str, bytes]) -> None:
        """Images of the last `write`, which is on the disk, as they are by now. Raises ImageError."""
        self._images = {**self._images, **changed}
        again = {**sums_of(self._images), **changed}
        for name in reversed(again):
            self._folder.remove(name)
            self._names.remove(name)
        for name, data in again.items():
            self.write_file(name, [data])
        self.sync()

    def write_file(self, name: str, pieces: Iterable[bytes]) -> None:
        """Writes the file `name`, one piece after the other. Raises ImageError, and what `pieces` raises."""
        path = self._folder.path / name
        if len(self._open) >= self._at_once:
            self._sync_open()
        self._names.append(name)  # first: an interrupt may come before it is open
        try:
            fd = self._open[path] = self._folder.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except ImageError:  # it was not made, or by somebody else
            self._names.remove(name)
            raise
        started = size = 0
        for piece in pieces:
            with _blamed(path):
                size += _write(fd, piece)
                if self._early and size - started >= _STRETCH:
                    _start(fd, started, size)
                    started = size
        if self._early:
            _start(fd, started, size)

    def sync(self) -> None:
        """Waits until every file and every name is on the disk, that of a new folder too. Raises ImageError."""
        if not self._open:
            return
        self._sync_open()
        _sync_names(self._folder.path)
        if self._made:
            _sync_names(self._folder.path / "..")

    def _sync_open(self) -> None:
        for path, fd in self._open.items():
            with _blamed(path):
                os.fsync(fd)
        self.close()

    def remove(self) -> None:
        """All that it has made: what somebody else writes there at the same time is his."""
        for name in reversed(self._names):
            self._folder.remove(name)
        if self._made:
            with suppress(OSError):
                self._folder.path.rmdir()

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()


@contextmanager
def filled(folder: Folder, *, early: bool) -> Iterator[Draft]:
    """A block that writes a whole checkpoint. After it all is on the disk; when the block or the disk fails no image
    of it stays, nor the folder if it was made for them.

    `early`: the disk gets to work at once, so that the end of the block waits less and the writing takes longer.
    Raises ImageError, also when there are images already: those of two checkpoints are never mixed.
    """
    made = _make(folder)
    if folder.images():
        raise ImageError(
            "holds images already",
            where=str(folder.path),
            remedy="choose another folder with -D, or empty it",
        )
    draft = Draft(folder, made=made, early=early)
    try:
        yield draft
        draft.sync()
    except BaseException:
        draft.remove()
        raise
    finally:
        draft.close()


def _make(folder: Folder) -> bool:
    """Makes the folder (0700) unless it is there; whether it did."""
    with _blamed(folder.path):
        try:
            folder.path.mkdir(mode=0o700)
        except FileNotFoundError:
            raise ImageError(
                "the folder for it is missing",
                where=str(folder.path),
                remedy=f"make {folder.path.parent} first",
            ) from None
        except FileExistsError:
            if not folder.path.is_dir():
                raise
            return False
    return True


def _write(fd: int, data: bytes) -> int:
    """All of it; its length."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    return len(data)


def _start(fd: int, start: int, end: int) -> None:
    """Bytes `start` to `end` go to the disk without being waited for (mm/fadvise.c); on their way they stay cached."""
    os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)


def _sync_names(directory: Path) -> None:
    with _blamed(directory):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system cannot do more for its names
                raise
        finally:
            os.close(fd)


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes the ImageError of `path`."""
    try:
        yield
    except OSError as error:
        raise Folder.failed(error, path) from None
