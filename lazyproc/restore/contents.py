"""Files whose content has travelled: deleted ones, directories and devices too, and those of a tmpfs.

A deleted file is created under its old name and removed at once, so that /proc/PID/fd shows "<path>
(deleted)" as before. Where that name is taken by now it gets a private name in the same directory, where the
directory is gone too in the nearest one above it; only the name shown differs then. One of O_TMPFILE gets none.
"""

from __future__ import annotations

import errno
import os
import stat as st
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.errors import RestoreError
from lazyproc.model import FileContent, RegularFile
from lazyproc.restore.workshop import OpenPath, Workshop, words

_HERE = "make room there, or give the path to the user who restores"


def make_named_contents(workshop: Workshop) -> None:
    """Create what is missing of the files with a path, directories first. Undone when the restore fails. Raises
    RestoreError with all that are there and differ.
    """
    different = []
    open_already, wanted = _references(workshop)
    contents = workshop.checkpoint.contents.values()
    named = [content for content in contents if content.path and content.id not in open_already - wanted]
    for content in sorted(named, key=lambda content: content.path.count("/")):
        with parent_of(workshop.open_path, content.path) as (parent, name):
            try:
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                with (
                    words(f"file {content.path}", "cannot be created", _HERE),
                    workshop.users.creating(content),
                ):
                    _create(parent, name, content)
                workshop.stack.push(_Undo(os.dup(parent), name, st.S_ISDIR(content.mode)))
            else:
                if not _is_same(parent, name, content, found):
                    different.append((content.path, found))
    if different:
        raise _in_the_way(*different)


def _references(workshop: Workshop) -> tuple[set[int], set[int]]:
    """The contents of files that are open already, and of all others."""
    of_files: tuple[set[int], set[int]] = set(), set()
    for file in workshop.checkpoint.files.values():
        if isinstance(file.resource, RegularFile):
            of_files[file.id not in workshop.files].add(file.resource.content_id)
    return of_files


def ghost(workshop: Workshop, content_id: int, path: str) -> int:
    """The O_PATH descriptor of a deleted file that was at `path`."""
    if content_id not in workshop.ghosts:
        content = workshop.checkpoint.contents[content_id]
        with words(f"deleted file {path}", "cannot be created", _HERE), workshop.users.creating(content):
            workshop.ghosts[content_id] = workshop.keep(_make_ghost(workshop, content, path))
    return workshop.ghosts[content_id]


def _make_ghost(workshop: Workshop, content: FileContent, path: str) -> int:
    with _nearest(workshop, os.path.dirname(path)) as parent:
        if content.id in workshop.nameless and (found := _nameless(parent, content)) >= 0:
            return found
        name = os.path.basename(path)
        try:
            _create(parent, name, content)
        except FileExistsError:
            name = f".{name[:200]}.{os.urandom(8).hex()}"
            _create(parent, name, content)
        try:
            return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        finally:
            (os.rmdir if st.S_ISDIR(content.mode) else os.unlink)(name, dir_fd=parent)


def _nameless(parent: int, content: FileContent) -> int:
    """Its O_PATH descriptor; -1 where the file system has no O_TMPFILE."""
    try:
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=parent)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        return -1
    try:
        _fill(fd, content)
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _new_file(parent: int, name: str) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=parent)


def _create(parent: int, name: str, content: FileContent) -> None:
    if st.S_ISDIR(content.mode):
        os.mkdir(name, 0o700, dir_fd=parent)
        os.chown(name, content.uid, content.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(name, st.S_IMODE(content.mode), dir_fd=parent)
    elif st.S_ISFIFO(content.mode):
        os.mkfifo(name, 0o600, dir_fd=parent)
        os.chown(name, content.uid, content.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(name, st.S_IMODE(content.mode), dir_fd=parent)
    elif st.S_ISLNK(content.mode):
        os.symlink(b"".join(data for _, data in content.data), os.fsencode(name), dir_fd=parent)
        os.chown(name, content.uid, content.gid, dir_fd=parent, follow_symlinks=False)
    elif st.S_ISCHR(content.mode):
        os.mknod(name, st.S_IFCHR | 0o600, content.rdev, dir_fd=parent)
        os.chown(name, content.uid, content.gid, dir_fd=parent, follow_symlinks=False)
        os.chmod(name, st.S_IMODE(content.mode), dir_fd=parent)
    else:
        _create_regular(parent, name, content)


def _create_regular(parent: int, name: str, content: FileContent) -> None:
    fd = _new_file(parent, name)
    try:
        _fill(fd, content)
    except BaseException:
        os.unlink(name, dir_fd=parent)
        raise
    finally:
        os.close(fd)


def _fill(fd: int, content: FileContent) -> None:
    os.ftruncate(fd, content.size)
    for offset, data in content.data:
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written
    os.fchown(fd, content.uid, content.gid)
    os.fchmod(fd, st.S_IMODE(content.mode))  # after fchown, which clears set-id bits
    os.utime(fd, ns=(content.atime_ns, content.mtime_ns))


def _is_same(parent: int, name: str, content: FileContent, found: os.stat_result) -> bool:
    """A file that is there already is left alone; for a regular one that takes equal content."""
    if st.S_IFMT(found.st_mode) != st.S_IFMT(content.mode):
        return False
    if not st.S_ISREG(content.mode):
        return True
    return found.st_size == content.size and _has_content(parent, name, content)


def check_kind(path: str, mode: int, found: os.stat_result) -> None:
    """Raise RestoreError when something else is in the place of a file that comes with the tree."""
    if st.S_IFMT(found.st_mode) != st.S_IFMT(mode):
        raise _in_the_way((path, found))


def _in_the_way(*found: tuple[str, os.stat_result]) -> RestoreError:
    from lazyproc.restore.inway import in_the_way  # no start waits for it

    return in_the_way(found)


def _has_content(parent: int, name: str, content: FileContent) -> bool:
    expected = bytearray(content.size)
    for offset, data in content.data:
        expected[offset : offset + len(data)] = data
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    with open(fd, "rb") as file:
        return file.read() == expected


class _Undo:
    """Exit callback that takes a created file away again when the restore fails."""

    def __init__(self, parent: int, name: str, directory: bool) -> None:
        self._parent, self._name, self._directory = parent, name, directory

    def __call__(self, kind: object, _error: object, _traceback: object) -> bool:
        try:
            if kind is not None:
                (os.rmdir if self._directory else os.unlink)(self._name, dir_fd=self._parent)
        except OSError:
            pass  # somebody has used or removed it since: the first error is the one to report
        finally:
            os.close(self._parent)
        return False


@contextmanager
def parent_of(open_path: OpenPath, path: str) -> Iterator[tuple[int, str]]:
    """An O_PATH descriptor of the directory, and the name in it. Raises RestoreError."""
    directory, name = os.path.split(path)
    with words(f"directory {directory}", "is not on this host", f"create {directory}"):
        fd = open_path(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0)
    try:
        yield fd, name
    finally:
        os.close(fd)


@contextmanager
def _nearest(workshop: Workshop, directory: str) -> Iterator[int]:
    """The directory, or the nearest one above it that exists."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    while True:
        try:
            fd = workshop.open_path(directory, flags, 0)
            break
        except (FileNotFoundError, NotADirectoryError):
            if directory == "/":
                raise
            directory = os.path.dirname(directory)
    try:
        yield fd
    finally:
        os.close(fd)
