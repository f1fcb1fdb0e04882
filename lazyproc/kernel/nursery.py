"""The nursery: a program of a few hundred bytes from which restored processes are forked.

It has so little (one page of code, a data area, a stack, the vdso) that a fork of it can be emptied in two calls.
It starts by waiting for its tracer and ends as the parent of the restored root: it reaps, and passes on the
root's status. In a new pid namespace it is pid 1.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from lazyproc.errors import HostLacks, TraceeError
from lazyproc.facts import dataclass, field
from lazyproc.kernel import cgroup
from lazyproc.kernel import tracee as ptrace
from lazyproc.kernel._core import ffi, lib
from lazyproc.kernel.remote import BLOB, Bench, Call
from lazyproc.kernel.sys import check
from lazyproc.kernel.tracee import Memory, Tracee
from lazyproc.model import PAGE

CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWTIME = 0x20000, 0x20000000, 0x80
TEXT = 0x10000  # vm.mmap_min_addr
DATA = 0x20000
DATA_SIZE = 1 << 20
HEADER = 64 + 3 * 56  # ELF header and three program headers
BLOB_OFFSET = (HEADER + 15) & -16
PT_LOAD, PT_GNU_STACK = 1, 0x6474E551
STOP_MS = 5000
TRANSPORT_FD = 65  # until it is known which numbers are the tree's
BIRTH_NUMBERS = 6  # from there on, on the way to exec (_birth.c, arrange_descriptors)
NS_GET_PID_FROM_PIDNS = 2 << 30 | 4 << 16 | 0xB7 << 8 | 6  # _IOR(NSIO, 0x6, int), include/uapi/linux/nsfs.h


def elf() -> bytes:
    """The executable: the blob as its code, a data area of zeros (elf(5))."""
    entry = TEXT + BLOB_OFFSET + int(lib.lp_blob_nursery())
    size = BLOB_OFFSET + len(BLOB)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    text = struct.pack("<IIQQQQQQ", PT_LOAD, 5, 0, TEXT, TEXT, size, size, PAGE)
    data = struct.pack("<IIQQQQQQ", PT_LOAD, 6, 0, DATA, DATA, 0, DATA_SIZE, PAGE)
    stack = struct.pack("<IIQQQQQQ", PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16)
    return (header + text + data + stack).ljust(BLOB_OFFSET, b"\0") + BLOB


@dataclass(slots=True)
class Nursery:
    """The stopped nursery. `transport` is our end of the socket that it and all its forks hold as `transport_fd`."""

    tracee: Tracee
    pidfd: int
    transport: socket.socket
    transport_fd: int
    memory: Memory
    new_pidns: bool
    namespace: int  # a descriptor of its pid namespace
    sibling: bool  # of ours: it will be the tree's root itself
    has_root: bool = field(default=False)  # a root directory that is not ours
    spare: bool = field(default=True)  # it has neither ended nor been let go

    @property
    def pid(self) -> int:
        return self.tracee.tid

    def bench(self, memory: Memory, ending: int) -> Bench:
        """The bench that the nursery and each fresh fork of it has from the start."""
        return Bench(memory, TEXT + BLOB_OFFSET, DATA, DATA_SIZE, ending)

    def number_here(self, vpid: int) -> int:
        """Our number of a process or thread of its pid namespace; 0 when the kernel does not tell (before Linux 6.12).

        Raises ProcessLookupError when there is none.
        """
        if not self.new_pidns:
            return vpid
        try:
            return fcntl.ioctl(self.namespace, NS_GET_PID_FROM_PIDNS, vpid)
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return 0

    def move_transport(self, number: int) -> None:
        """What is forked from it from now on finds the transport as descriptor `number`."""
        if number != self.transport_fd:
            calls = [Call("dup3", (self.transport_fd, number, 0)), Call("close", (self.transport_fd,))]
            self._bench().run(self.tracee, calls)
            self.transport_fd = number

    def change_root(self, directory: str) -> None:
        """Of it and of what is forked from it from now on. Raises TraceeError."""
        bench = self._bench()
        bench.run(self.tracee, [Call("chroot", (bench.place(os.fsencode(directory) + b"\0"),))])
        self.has_root = True

    @contextmanager
    def new_clocks(self) -> Iterator[int]:
        """A descriptor of ours of a new time namespace, in which nobody lives: until somebody enters it, its offsets
        can be set. What is forked from now on would be in it. Raises HostLacks.
        """
        with _having_clocks():
            self._bench().run(self.tracee, [Call("unshare", (CLONE_NEWTIME,))])
            fd = os.open(f"/proc/{self.pid}/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    def set_clocks(self, offsets: str) -> None:
        """Of the new time namespace, in the form of /proc/PID/timens_offsets. Raises HostLacks."""
        with _having_clocks(), open(f"/proc/{self.pid}/timens_offsets", "w") as file:
            file.write(offsets)

    def _bench(self) -> Bench:
        return self.bench(self.memory, signal.SIGURG)

    def become_parent_of(self, root: int) -> None:
        """Once it runs it reaps, and exits as the root (pid as it sees it) does."""
        registers = self.tracee.registers()
        self.tracee.set_registers(
            registers._replace(
                ip=TEXT + BLOB_OFFSET + int(lib.lp_blob_reap()), r12=root, r13=0, orig_ax=(1 << 64) - 1
            )
        )
        self.tracee.set_blocked(0)


@contextmanager
def _having_clocks() -> Iterator[None]:
    try:
        yield
    except (OSError, TraceeError) as error:
        raise HostLacks(
            f"could not have clocks of its own: {error}",
            where="new time namespace",
            remedy="run as root, or with CAP_SYS_ADMIN and CAP_SYS_TIME",
        ) from error


def _spawn(
    transport: socket.socket, transport_fd: int, *, pidns: bool, groups: Sequence[cgroup.Place], sibling: int
) -> tuple[int, int]:
    """Start it: its pid and a pidfd. HostLacks, NotJoined, FileExistsError for the number `sibling`."""
    image = os.memfd_create("lazyproc-nursery", os.MFD_CLOEXEC)
    try:
        os.write(image, elf())
        name = ffi.new("char[]", b"lazyproc-nursery")
        argv = ffi.new("const char *[2]", [name, ffi.NULL])
        birth = ffi.new("struct lp_birth *")
        birth.argv, birth.exe_fd, birth.keep_fd, birth.keep_as = argv, image, transport.fileno(), transport_fd
        birth.namespaces = CLONE_NEWPID | CLONE_NEWNS if pidns else 0
        birth.sibling = sibling
        pidfd = ffi.new("int *")
        with cgroup.doors(groups) as (birth.cgroup, numbers):
            tasks = ffi.new("int32_t[]", numbers)
            birth.tasks, birth.tasks_count = tasks, len(numbers)
            return _demand_joined(lib.lp_spawn(birth, pidfd)), int(pidfd[0])
    except (cgroup.NotJoined, FileExistsError):
        raise
    except OSError as error:
        raise HostLacks(
            f"could not start the nursery: {error.strerror}",
            where="new pid or mount namespace" if pidns else "nursery",
            remedy="run as root, or with CAP_SYS_ADMIN",
        ) from error
    finally:
        os.close(image)


def demand_descriptors(count: int = TRANSPORT_FD + BIRTH_NUMBERS) -> None:
    """Of the hard limit, to which the new process raises its own. Raises HostLacks."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit < count:
        raise HostLacks(
            f"no more than {limit} descriptors are allowed, and it takes {count} to begin a restore",
            where="RLIMIT_NOFILE",
            remedy="raise the hard limit of who starts it (ulimit -n, LimitNOFILE= of a service)",
        )


def _lift_limits(pid: int) -> None:
    """Of memory: ours say nothing about the processes that are forked from it, which get their own in the end."""
    for number in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_MEMLOCK):
        with suppress(PermissionError):  # without CAP_SYS_RESOURCE
            resource.prlimit(pid, number, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _demand_joined(result: int) -> int:
    if result < -lib.LP_NOT_JOINED:
        number = -result - int(lib.LP_NOT_JOINED)
        raise cgroup.NotJoined(number, os.strerror(number))
    return check(result)


@contextmanager
def nursery(
    *, pidns: bool, transport_fd: int = TRANSPORT_FD, groups: Sequence[cgroup.Place] = (), sibling: int = 0
) -> Iterator[Nursery]:
    """A stopped nursery, which ends with us (EXITKILL), and with it everything forked from it, unless it was let go.

    It is born in `groups`, and what is forked from it too. With the number `sibling` it is the root itself, and a child
    of our parent. HostLacks, NotJoined; FileExistsError when that number is taken.
    """
    demand_descriptors(transport_fd + BIRTH_NUMBERS)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid, pidfd = _spawn(theirs, transport_fd, pidns=pidns, groups=groups, sibling=sibling)
        try:
            tracee = Tracee(pid)
            tracee.seize(ptrace.PTRACE_O_TRACESYSGOOD | ptrace.PTRACE_O_EXITKILL)
            tracee.interrupt()
            tracee.wait_stop(STOP_MS)
            _lift_limits(pid)
            with ptrace.memory(pid) as memory, open(f"/proc/{pid}/ns/pid") as namespace:
                namespace_fd = namespace.fileno()
                yield Nursery(tracee, pidfd, ours, transport_fd, memory, pidns, namespace_fd, sibling > 0)
        finally:
            os.close(pidfd)
