"""What a host must have before a tree can run on it, one thing each, as plain data.

`dump` reads it off the running tree, `restore` tries it on the host that is to take the tree in. Paths are absolute,
as seen from the tree's root directory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence

from lazyproc.facts import dataclass
from lazyproc.model import Credentials, RegularFile, Vma

SECBIT_KEEP_CAPS = 0x10  # the only one that anybody may set, see capabilities(7)

BENCH, BENCH_OF_MAPPING = 1 << 20, 512  # bytes that a process has beside its own while it is built
FURTHER = 16  # descriptors, likewise: the transport, the anchors
OWN, OF_PROCESS = 40, 4  # descriptors of who builds it: its own, and by which it holds each process

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
class InterfaceNeed:
    """A network interface."""

    name: str


@dataclass(frozen=True, slots=True)
class NetlinkNeed:
    """A port of netlink(7) that nobody has."""

    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class TerminalNeed:
    """A number of a pseudo-terminal that nobody has, of the devpts behind the ptmx at `path`."""

    path: str
    number: int


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


@dataclass(frozen=True, slots=True)
class UserNeed:
    """A uid that a process has, or that owns something which travels."""

    uid: int


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """The same of a gid."""

    gid: int


@dataclass(frozen=True, slots=True)
class PrivilegeNeed:
    """What a user cannot give himself: `capabilities` or `securebits` (`bits` are those). And, of a process without
    no_new_privs, what would fool a set-uid program that it starts: `seccomp` filters, `chroot`, or that it may get
    no other capabilities than `bits` (`bounding`).
    """

    name: str
    bits: int = 0


@dataclass(frozen=True, slots=True)
class LimitNeed:
    """So much of what getrlimit(2) limits a process takes while it is built: `name` as prlimit(1) calls it."""

    name: str
    value: int


Need = (
    FileNeed
    | PathNeed
    | FifoNeed
    | PlaceNeed
    | SocketFileNeed
    | NameNeed
    | AddressNeed
    | InterfaceNeed
    | NetlinkNeed
    | TerminalNeed
    | SegmentNeed
    | PidNeed
    | FeatureNeed
    | UserNeed
    | GroupNeed
    | PrivilegeNeed
    | LimitNeed
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


def limit_needs(vmas: Sequence[Vma], highest_fd: int, behind: int) -> Iterator[LimitNeed]:
    """What a process with these mappings, and `behind` them so many files and objects, takes of the limits. Pure."""
    bench = BENCH + BENCH_OF_MAPPING * len(vmas)
    data = (vma for vma in vmas if vma.prot & mmap.PROT_WRITE and vma.vm_flags.isdisjoint(("sh", "gd")))
    yield LimitNeed("as", sum(vma.length for vma in vmas) + bench)
    yield LimitNeed("data", sum(vma.length for vma in data) + bench)  # is_data_mapping(), mm/vma.h
    yield LimitNeed("nofile", max(highest_fd + 1, behind) + FURTHER)
    if locked := sum(vma.length for vma in vmas if "lo" in vma.vm_flags):
        yield LimitNeed("memlock", locked)


def tree_need(opened: int, processes: int) -> LimitNeed:
    """What who restores it takes: its files and shared objects are open there at the same time. Pure."""
    return LimitNeed("nofile", OWN + opened + OF_PROCESS * processes)


def credential_needs(credentials: Credentials, *, filtered: bool, chroot: bool) -> Iterator[Need]:
    """What the user of a thread must be allowed to be: it has seccomp filters, or another root directory."""
    it = credentials
    yield from map(UserNeed, sorted({it.uid, it.euid, it.suid, it.fsuid}))
    yield from map(GroupNeed, sorted({it.gid, it.egid, it.sgid, it.fsgid, *it.groups}))
    if capabilities := it.cap_inheritable | it.cap_permitted | it.cap_effective | it.cap_ambient:
        yield PrivilegeNeed("capabilities", capabilities)
    if bits := it.securebits & ~SECBIT_KEEP_CAPS:
        yield PrivilegeNeed("securebits", bits)
    if not it.no_new_privs:
        yield PrivilegeNeed("bounding", it.cap_bounding)
        if filtered:
            yield PrivilegeNeed("seccomp")
        if chroot:
            yield PrivilegeNeed("chroot")
