"""What a host must have before a tree can run on it, one thing each, as plain data.

`dump` reads it off the running tree, `restore` tries it on the host that is to take the tree in. Paths are absolute,
as seen from the tree's root directory.
"""

from __future__ import annotations

from lazyproc.facts import dataclass
from lazyproc.model import RegularFile

Options = tuple[tuple[int, int, bytes], ...]  # level, name, raw value


@dataclass(frozen=True, slots=True)
class FileNeed:
    """A file, directory or device whose content does not travel."""

    path: str
    mode: int  # st_mode: what kind of file
    flags: int  # O_*, how it will be opened
    rdev: int = 0  # of a character device
    size: int = -1  # bytes that it must have, -1 any
    build_id: bytes = b""  # that it must have, b"" any


@dataclass(frozen=True, slots=True)
class PathNeed:
    """Anything at all at this path: inotify(7) watches it."""

    path: str


@dataclass(frozen=True, slots=True)
class FifoNeed:
    path: str


@dataclass(frozen=True, slots=True)
class PlaceNeed:
    """Room for a file that travels with the tree; one that is there already must be of the same kind."""

    path: str
    mode: int  # st_mode


@dataclass(frozen=True, slots=True)
class SocketFileNeed:
    """Room for the file of a unix socket."""

    path: str


@dataclass(frozen=True, slots=True)
class NameNeed:
    """An abstract name of unix(7), NUL included."""

    name: bytes
    type: int  # SOCK_*


@dataclass(frozen=True, slots=True)
class AddressNeed:
    """A local address, and its port unless that is 0. `address` is packed; `options` decide who else may have it."""

    family: int
    type: int
    protocol: int
    address: bytes
    port: int
    interface: str = ""  # SO_BINDTODEVICE
    options: Options = ()


@dataclass(frozen=True, slots=True)
class SegmentNeed:
    """The key and the number of a System V shared memory segment."""

    key: int
    id: int


@dataclass(frozen=True, slots=True)
class PidNeed:
    """A number for a process or thread, where the tree gets no pid namespace of its own."""

    number: int


@dataclass(frozen=True, slots=True)
class FeatureNeed:
    """Something of the kernel, by the name that `lazyproc check` has for it."""

    name: str


Need = (
    FileNeed
    | PathNeed
    | FifoNeed
    | PlaceNeed
    | SocketFileNeed
    | NameNeed
    | AddressNeed
    | SegmentNeed
    | PidNeed
    | FeatureNeed
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A need and whose it is: process `pid` as the source numbers it, and "fd 7", "exe" or the like."""

    need: Need
    pid: int
    where: str


def file_need(file: RegularFile, flags: int, *, sized: bool) -> FileNeed:
    """What a file that does not travel must be like; `sized` when its size counts (it is mapped private)."""
    return FileNeed(file.path, file.mode, flags, file.rdev, file.size if sized else -1, file.build_id)
