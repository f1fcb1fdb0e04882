"""Gatherers of what has a path: files, directories, devices; of memfds; and of mapped files.

A path is what the tree's root directory leads to. Where that does not name the file any more (deleted), or
names nothing on another host (tmpfs), its content travels.
"""

from __future__ import annotations

import functools
import mmap
import os
import stat as st
from collections.abc import Iterator
from fcntl import F_GET_SEALS, fcntl

from lazyproc.dump.look import Look, attempt, leads_to
from lazyproc.dump.permits import CONTENT_LIMIT
from lazyproc.dump.registry import Refused, Registry, file_seen
from lazyproc.facts import replace
from lazyproc.kernel import elf, fds
from lazyproc.kernel.proc import MapsEntry
from lazyproc.model import FileContent, MemFd, OpenFile, Owner, RegularFile, SharedKind, SharedMemory

LINKS = ("exe", "cwd", "root")  # of a process; before what it maps: numbers are the same in each look
DELETED = " (deleted)"

# Character devices that are the same on every host (Documentation/admin-guide/devices.txt).
COMMON_DEVICES = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)}  # null, zero, full, random, urandom
_TERMINAL_REMEDY = "start the program with input and output redirected: setsid prog </dev/null >log 2>&1"
TERMINAL_MAJORS = {4, 5, *range(136, 144)}  # ttys, /dev/tty and ptmx, pts
ZERO_DEVICE = os.makedev(1, 5)
F_SEAL_FUTURE_WRITE = 0x10  # include/uapi/linux/fcntl.h; the fcntl module has it since Python 3.13

_GHOSTS = (st.S_IFREG, st.S_IFDIR, st.S_IFLNK, st.S_IFCHR)  # what can be removed and travel all the same

_DEVICE_WORDS = {
    (10, 200): ("is a tun/tap interface of this host", "close it before the move and open it anew after it"),
    (10, 229): ("is a FUSE connection to this host's kernel", "unmount the FUSE file system first"),
    (10, 232): ("is KVM", "move a virtual machine with `lazyproc migrate --qemu`"),
}
_FILE_SYSTEM_WORDS = {
    fds.HUGETLBFS_MAGIC: ("is on hugetlbfs", "run the program without huge page files"),
    fds.MQUEUE_MAGIC: ("is a POSIX message queue", "let the program close the queue before the move"),
    fds.SECRETMEM_MAGIC: (
        "is secret memory, which nobody but the process can read",
        "run the program without memfd_secret",
    ),
}


def gather_file(registry: Registry, look: Look, taken: int) -> RegularFile:
    """A regular file or directory, and any kind of file that is only a path (O_PATH)."""
    return _path_resource(registry, look.link, taken)


def gather_device(registry: Registry, look: Look, taken: int) -> RegularFile:
    refuse_device(look.link, os.fstat(taken).st_rdev)
    return _path_resource(registry, look.link, taken)


def refuse_device(path: str, rdev: int) -> None:
    """Raise Refused unless a character device means the same on every host."""
    device = os.major(rdev), os.minor(rdev)
    if device in COMMON_DEVICES:
        return
    why, remedy = _DEVICE_WORDS.get(
        device, ("is a device of this host", "close it before the move, or stop using the device")
    )
    raise Refused(f"{path} {why} (character device {device[0]}:{device[1]})", remedy)


def terminal_of_host(path: str) -> Refused:
    return Refused(f"{path} is a terminal of this host", _TERMINAL_REMEDY)


def _path_resource(registry: Registry, link: str, taken: int) -> RegularFile:
    status = os.fstat(taken)
    file_system = fds.file_system(taken)
    _refuse_kernel_file(registry, registry.inside(link), file_system, status)
    path, present = _locate(registry, link, status)
    resource = RegularFile(
        path=path,
        mode=status.st_mode,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev,
    )
    if present and (file_system not in (fds.TMPFS_MAGIC, fds.RAMFS_MAGIC) or not _movable(status)):
        return resource
    if present and st.S_ISDIR(status.st_mode):
        return replace(resource, content_id=_directories(registry, path, status))
    if present:
        _directories(registry, os.path.dirname(path), status)
    return replace(resource, content_id=_content(registry, path if present else "", status, taken))


def fifo_path(registry: Registry, link: str, taken: int) -> str:
    """Path of a FIFO; "" when it was removed: nobody can come to it by name any more, so a pipe will do."""
    if os.fstat(taken).st_nlink == 0:
        return ""
    return _path_resource(registry, link, taken).path


def _movable(status: os.stat_result) -> bool:
    return st.S_ISREG(status.st_mode) or st.S_ISDIR(status.st_mode) or st.S_ISFIFO(status.st_mode)


def _refuse_kernel_file(registry: Registry, path: str, file_system: int, status: os.stat_result) -> None:
    """Files that are views of this host's kernel and not of a disk."""
    if file_system in _FILE_SYSTEM_WORDS:
        why, remedy = _FILE_SYSTEM_WORDS[file_system]
        raise Refused(f"{path} {why}", remedy)
    if status.st_dev == shmem_device():
        raise Refused(
            f"{path} is a handle on shared anonymous memory", "let the program close it before the move"
        )
    if file_system == fds.PROC_SUPER_MAGIC and not _is_of_tree(registry, path):
        raise Refused(f"{path} describes a process of this host", "let the program close it before the move")


def _is_of_tree(registry: Registry, path: str) -> bool:
    """Whether an entry of /proc is there again when the tree is: threads are made later than files are opened."""
    _, _, name, *rest = (*path.split("/", 3), "")  # /proc itself has no name in it
    if not path.startswith("/proc/") or not name.isdigit():
        return True
    return int(name) in {task.vpid for task in registry.tasks} and not "".join(rest).startswith("task/")


def _locate(registry: Registry, link: str, status: os.stat_result) -> tuple[str, bool]:
    """Path of an open file from the tree's root directory, and whether it leads there (False: deleted)."""
    path = registry.inside(link)
    if _is_at(registry, path, status):  # a living file's name may end in " (deleted)"
        return path, True
    path = registry.inside(link.removesuffix(DELETED))
    if _is_at(registry, path, status):  # its old name was given to it again
        return path, True
    if status.st_nlink == 0:
        if st.S_IFMT(status.st_mode) in _GHOSTS:
            return path, False
        raise Refused(
            f"{path} was removed and is of a kind that cannot be made again",
            "let the program close it or leave it",
        )
    if other := _other_link(registry, path, status):
        return other, True
    raise Refused(
        f"{path} does not lead to it from the tree's root directory (renamed, hidden by a mount, or another "
        f"hard link is left)",
        f"give it back that name: ln -L /proc/PID/fd/N {path}",
    )


def _is_at(registry: Registry, path: str, status: os.stat_result) -> bool:
    try:
        found = os.lstat(registry.outside(path))
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


def _other_link(registry: Registry, path: str, status: os.stat_result) -> str | None:
    """Another name of the same file in the same directory: all that can be found without a search."""
    directory = os.path.dirname(path)
    try:
        with os.scandir(registry.outside(directory)) as entries:
            names = [entry.name for entry in entries if entry.inode() == status.st_ino]
    except OSError:
        return None
    paths = (os.path.join(directory, name) for name in names)
    return next((other for other in paths if _is_at(registry, other, status)), None)


# --- contents that travel -----------------------------------------------------------------------------------


def _content(registry: Registry, path: str, status: os.stat_result, taken: int) -> int:
    """The number of a file's content; "" as `path` for a deleted file."""
    number, _ = registry.content_numbers.of((status.st_dev, status.st_ino))
    if number in registry.contents:
        return number
    _demand_small(registry, path, status.st_blocks * 512)
    content = FileContent(
        id=number,
        path=path,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size,
        atime_ns=status.st_atime_ns,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev,
    )
    if registry.contents_wanted and st.S_ISREG(status.st_mode):
        content = replace(content, data=tuple(_read_data(taken, status.st_size)))
    elif st.S_ISLNK(status.st_mode):
        content = replace(content, data=((0, os.fsencode(os.readlink("", dir_fd=taken))),))
    registry.contents[number] = content
    registry.content_bytes += status.st_blocks * 512
    return number


def _demand_small(registry: Registry, path: str, size: int) -> None:
    """Raise Refused when a file, or all whose content travels, are too much for the time in which the tree stands."""
    limit = CONTENT_LIMIT if path else min(CONTENT_LIMIT, registry.permits.ghost_limit)
    name = path or "the deleted file"
    if size > limit:
        raise Refused(
            f"{name} has {size / (1 << 20):g} MiB that would have to travel with the process, and "
            f"{limit / (1 << 20):g} MiB is the limit",
            "keep it on a file system that both hosts have",
        )
    whole, limit_of_all = registry.content_bytes + size, registry.permits.contents_limit
    if limit_of_all is not None and whole > limit_of_all:
        raise Refused(
            f"{name} has {size / (1 << 20):g} MiB that would have to travel with the process, all such files have "
            f"{whole / (1 << 20):g} MiB, and {limit_of_all / (1 << 20):g} MiB is the limit of a move",
            "keep it on a file system that both hosts have, or use checkpoint and restore",
        )


def _directories(registry: Registry, path: str, status: os.stat_result) -> int:
    """Let the directories of a tmpfs down to `path` travel too. Number of the last; 0: mount point."""
    parent = os.path.dirname(path)
    here = os.lstat(registry.outside(path))
    above = os.lstat(registry.outside(parent))
    if path == parent or here.st_dev != status.st_dev or above.st_dev != status.st_dev:
        return 0
    _directories(registry, parent, status)
    return _content(registry, path, here, -1)


def _read_data(taken: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Everything that is not a hole. Opened anew: SEEK_DATA would move the position the tree shares."""
    fd = os.open(f"/proc/self/fd/{taken}", os.O_RDONLY | os.O_NOATIME | os.O_CLOEXEC)
    try:
        end = 0
        while end < size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole is left
                return
            end = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, _pread(fd, start, end - start)
    finally:
        os.close(fd)


def _pread(fd: int, start: int, length: int) -> bytes:
    """pread(2) gives at most 2 GiB at once, and may give less of a file that shrinks."""
    pieces = []
    while length and (piece := os.pread(fd, length, start)):
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return b"".join(pieces)


# --- memfds -------------------------------------------------------------------------------------------------


@functools.cache
def shmem_device() -> int:
    """st_dev of the kernel's own tmpfs: memfds, shared anonymous memory and SysV segments (mm/shmem.c)."""
    fd = os.memfd_create("lazyproc")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def gather_memfd(registry: Registry, look: Look, taken: int) -> MemFd:
    """A memfd somebody holds open: read(2) and mmap(2) reach it, so its pages cannot come later."""
    return MemFd(_memfd_object(registry, look.link, taken, lazy=False))


def _memfd_object(registry: Registry, link: str, fd: int, *, lazy: bool) -> int:
    status = os.fstat(fd)
    seals = fcntl(fd, F_GET_SEALS)
    number, _ = registry.objects.of((status.st_dev, status.st_ino))
    if number not in registry.shared:
        registry.shared[number] = SharedMemory(
            id=number,
            kind=SharedKind.MEMFD,
            size=status.st_size,
            name=link.removeprefix("/memfd:").removesuffix(DELETED),
            seals=seals,
            mode=st.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            # MADV_REMOVE would fail, and to a pager look as if it had not (mm/shmem.c, shmem_fallocate).
            lazy=lazy and not seals & F_SEAL_FUTURE_WRITE,
        )
    return number


# --- mappings and links -------------------------------------------------------------------------------------


def gather_mapped_file(registry: Registry, pid: int, start: int, end: int, entry: MapsEntry) -> int:
    """The number of the file mapped at `start`..`end` by `pid`; 0 when it is an obstacle (in the registry).

    Mappings of one file share a number when they need the same access. A memfd's OpenFile has a MemFd. Shared
    anonymous memory and SysV segments are not for here: they have no file to open again.
    """
    link = f"/proc/{pid}/map_files/{start:x}-{end:x}"
    # The link's own mode says how the mapped file was opened (fs/proc/base.c, proc_map_files_instantiate).
    with attempt(registry, pid, f"mapping {start:#x}-{end:#x}"):
        writable = entry.perms[3] == "s" and os.lstat(link).st_mode & st.S_IWUSR
        return _gather_link(registry, link, os.O_RDWR if writable else os.O_RDONLY)
    return 0


def is_zero_device(pid: int, entry: MapsEntry) -> bool:
    """A private mapping of /dev/zero is anonymous memory by another name (mmap_zero, drivers/char/mem.c)."""
    if entry.perms[3] != "p" or not entry.path.endswith("/zero"):
        return False
    try:
        status = os.stat(f"/proc/{pid}/map_files/{entry.start:x}-{entry.end:x}")
    except FileNotFoundError:  # unmapped meanwhile
        return False
    return st.S_ISCHR(status.st_mode) and status.st_rdev == ZERO_DEVICE


def gather_link(registry: Registry, pid: int, name: str) -> int:
    """The number of the file behind /proc/PID/`name`: "exe", "cwd" or "root"; 0 when it is an obstacle."""
    with attempt(registry, pid, name):
        return _gather_link(registry, f"/proc/{pid}/{name}", os.O_RDONLY)
    return 0


def _gather_link(registry: Registry, link: str, access: int) -> int:
    status = os.stat(link)
    if not (st.S_ISREG(status.st_mode) or st.S_ISDIR(status.st_mode)):  # opening a device could do something
        raise Refused(f"{leads_to(link)} is no file on a disk", "let the program unmap it before the move")
    number, is_new = registry.intern_path((status.st_dev, status.st_ino, access))
    if not is_new:
        return number if number in registry.files else 0  # 0: an obstacle already
    target = leads_to(link)
    seen = registry.seen.get(file_seen(target, status))
    if seen is not None and _is_at(registry, seen.path, status):
        registry.files[number] = OpenFile(number, access, 0, Owner(), seen)
        return number
    # Whoever watches the file of a process that runs is not to see a writer come and go (inotify(7)).
    fd = os.open(link, (access if registry.contents_wanted else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        registry.files[number] = OpenFile(number, access, 0, Owner(), _mapped_resource(registry, target, fd))
    finally:
        os.close(fd)
    return number


def _mapped_resource(registry: Registry, target: str, fd: int) -> RegularFile | MemFd:
    if is_memfd(target, os.fstat(fd)):
        return MemFd(_memfd_object(registry, target, fd, lazy=True))
    resource = _path_resource(registry, target, fd)
    if st.S_ISREG(resource.mode) and resource.size:
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as data:
            resource = replace(resource, build_id=elf.build_id(data))
    if not resource.content_id:
        registry.looked[file_seen(target, os.fstat(fd))] = resource
    return resource


def is_memfd(link: str, status: os.stat_result) -> bool:
    return status.st_dev == shmem_device() and link.startswith("/memfd:")
