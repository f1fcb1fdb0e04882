"""What a process tree is, as plain data: frozen dataclasses without behaviour beyond one-line properties.

Nothing here knows the kernel or a file format. `dump` fills it, `images` turns it into messages and back,
`restore` turns it into steps. Addresses and lengths are bytes, `count` and `pages` are 4096-byte pages, pids
are those seen inside the tree's own pid namespace (`vpid`, `tid`), times are nanoseconds unless named otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from lazyproc.facts import dataclass, field

PAGE = 4096

# --- threads ----------------------------------------------------------------------------------------------------


class Registers(NamedTuple):
    """The general registers, in the order of the kernel's user_regs_struct (arch/x86/include/asm/user_64.h)."""

    r15: int
    r14: int
    r13: int
    r12: int
    bp: int
    bx: int
    r11: int
    r10: int
    r9: int
    r8: int
    ax: int
    cx: int
    dx: int
    si: int
    di: int
    orig_ax: int
    ip: int
    cs: int
    flags: int
    sp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int


@dataclass(frozen=True, slots=True)
class Restart:
    """A sleep that the freeze interrupted: re-issue syscall `nr` with the same arguments and this time left."""

    nr: int
    remaining_ns: int


@dataclass(frozen=True, slots=True)
class SignalStack:
    """sigaltstack(2)."""

    sp: int
    flags: int
    size: int


@dataclass(frozen=True, slots=True)
class Rseq:
    """The registration of rseq(2), as PTRACE_GET_RSEQ_CONFIGURATION gives it."""

    addr: int
    size: int
    signature: int


@dataclass(frozen=True, slots=True)
class Credentials:
    """credentials(7) and capabilities(7) of one thread; capability sets are bit masks."""

    uid: int
    euid: int
    suid: int
    fsuid: int
    gid: int
    egid: int
    sgid: int
    fsgid: int
    groups: tuple[int, ...]
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    securebits: int
    no_new_privs: bool


@dataclass(frozen=True, slots=True)
class Scheduling:
    """sched(7): policy SCHED_*, real-time priority, nice -20..19; ioprio_set(2); the CPUs it may run on, () all."""

    policy: int
    priority: int
    nice: int
    ioprio: int = 0
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SeccompFilter:
    """One classic BPF filter as PTRACE_SECCOMP_GET_FILTER gives it; `flags` are SECCOMP_FILTER_FLAG_*."""

    program: bytes  # struct sock_filter[], 8 bytes each
    flags: int


@dataclass(frozen=True, slots=True)
class Thread:
    """One task of a thread group. Registers are those to resume with: restarts are already rewound."""

    tid: int
    comm: str
    registers: Registers
    xsave: bytes  # NT_X86_XSTATE, standard format, whatever its size
    blocked: int  # signal mask, bit n-1 is signal n
    pending: tuple[bytes, ...]  # siginfo, 128 bytes each, oldest first
    altstack: SignalStack | None
    clear_child_tid: int
    robust_list: int
    robust_list_len: int
    rseq: Rseq | None
    credentials: Credentials
    scheduling: Scheduling
    pdeath_signal: int
    timer_slack_ns: int
    seccomp_mode: int  # 0 none, 1 strict, 2 filter
    seccomp: tuple[SeccompFilter, ...]  # oldest first
    restart: Restart | None = None


# --- memory -----------------------------------------------------------------------------------------------------


DROPPABLE = "dp"  # VmFlags of MAP_DROPPABLE memory
WIPED = "wf"  # and of MADV_WIPEONFORK


class VmaKind(enum.Enum):
    """What lies behind a mapping."""

    ANON = "anon"  # private anonymous, heap and stacks included
    SHARED = "shared"  # anonymous shared, memfd or SysV: `object_id` names the SharedMemory
    FILE = "file"  # a file, private or shared: `file_id` names the OpenFile
    VDSO = "vdso"
    VVAR = "vvar"
    VVAR_VCLOCK = "vvar_vclock"
    AIO = "aio"  # an AIO ring


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping. `prot` PROT_*, `flags` MAP_* as one would pass to mmap(2), `vm_flags` the two-letter VmFlags."""

    start: int
    end: int
    prot: int
    flags: int
    kind: VmaKind
    offset: int = 0  # bytes into the file or object
    file_id: int = 0
    object_id: int = 0
    vm_flags: frozenset[str] = frozenset()
    name: str = ""  # "[heap]", "[stack]", or the PR_SET_VMA_ANON_NAME name
    huge_pages: int = 0  # AnonHugePages at the source, in units of 4 KiB pages
    guards: tuple[tuple[int, int], ...] = ()  # (start, end) of what MADV_GUARD_INSTALL guards
    reserved: bool = (
        False  # it is large, nobody may access it, and there was nothing in it: only the addresses
    )

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def may_be_lazy(self) -> bool:
        """Whether pages of its own may come after the process runs. What mlock(2) holds must be there before; what
        the kernel may drop at any time (MAP_DROPPABLE) does not come at all. What a fork wipes (MADV_WIPEONFORK) is
        wiped by not being copied (dup_mmap, kernel/fork.c): a page that is missing then would come to the child.
        For each page of what is lazy a pager has a byte, which is too much for terabytes that are only reserved.
        """
        return (
            self.kind is VmaKind.ANON
            and not self.reserved
            and self.vm_flags.isdisjoint(("lo", DROPPABLE, WIPED))
        )


class ObjectKind(enum.IntEnum):
    """The low byte of an object's number, as CRIU numbers them (page-xfer.c)."""

    TASK = 1  # address space of a task, addresses are its virtual addresses
    SHARED = 2  # shared memory object, addresses are offsets into it


class MemoryObject(NamedTuple):
    """Something that has pages. `key` is its number on the wire: id << 8 | kind."""

    kind: ObjectKind
    id: int  # vpid, or the id of a SharedMemory

    @property
    def key(self) -> int:
        return self.id << 8 | self.kind


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of pages with content. Pages in no extent read as zero (or as the file, in a private file mapping)."""

    addr: int
    count: int  # pages
    lazy: bool  # may come after the process runs
    in_parent: bool = False  # the content lies in the parent image (pre-dump)

    @property
    def end(self) -> int:
        return self.addr + self.count * PAGE


class SharedKind(enum.Enum):
    ANON = "anon"  # MAP_SHARED | MAP_ANONYMOUS
    MEMFD = "memfd"
    SYSV = "sysv"


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A shared memory object. For memfd: name, seals, mode and owner; for SysV: key, shmid and the ipc permissions."""

    id: int
    kind: SharedKind
    size: int  # bytes
    name: str = ""
    seals: int = 0
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    sysv_key: int = 0
    sysv_shmid: int = 0
    lazy: bool = True  # nothing but mappings can reach it, see docs/design.md


@dataclass(frozen=True, slots=True)
class MmFlags:
    """What prctl(2) and /proc/PID/coredump_filter set of an address space, and only they show."""

    thp_disabled: bool = False
    thp_exceptions: int = 0  # PR_THP_DISABLE_EXCEPT_ADVISED
    mdwe: int = 0  # PR_SET_MDWE
    merges: bool = False  # PR_SET_MEMORY_MERGE
    coredump_filter: int | None = None  # None: nobody says


@dataclass(frozen=True, slots=True)
class Mm:
    """One address space: the fields of prctl(PR_SET_MM_MAP), the flags that go with it, and the mappings."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    auxv: tuple[int, ...]
    exe_id: int  # OpenFile
    dumpable: int
    vmas: tuple[Vma, ...]
    vdso_build_id: bytes = b""
    future_locks: int = 0  # MCL_FUTURE and MCL_ONFAULT of mlockall(2)
    flags: MmFlags = field(default_factory=MmFlags)


# --- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owner:
    """fcntl(2) F_SETOWN_EX, F_SETSIG: who gets SIGIO. `pid` is a vpid, 0 nobody; `type` F_OWNER_*."""

    pid: int = 0
    type: int = 0
    signal: int = 0
    uid: int = 0
    euid: int = 0


class LockKind(enum.IntEnum):
    """As CRIU numbers them (criu/include/file-lock.h)."""

    POSIX = 1  # fcntl(2) F_SETLK, of the process
    FLOCK = 2  # flock(2), of the open file description
    OFD = 4  # fcntl(2) F_OFD_SETLK, of the open file description
    LEASE = 8  # fcntl(2) F_SETLEASE, of the open file description


@dataclass(frozen=True, slots=True)
class FileLock:
    """Held through descriptor `fd`. `start` and `length` in bytes, 0: up to the end; POSIX and OFD only."""

    fd: int
    kind: LockKind
    exclusive: bool
    start: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class FileContent:
    """A file whose content travels: deleted, or on a tmpfs. `data` holds (offset, bytes) of everything not a hole."""

    id: int
    path: str  # "" when it was deleted
    mode: int  # st_mode
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    rdev: int = 0
    data: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class RegularFile:
    """A path: regular file, directory, or character device (told apart by `mode`)."""

    path: str  # absolute, as seen from the tree's root directory
    mode: int  # st_mode
    size: int = 0  # st_size when dumped
    mtime_ns: int = 0
    build_id: bytes = b""  # of ELF files that are mapped executable
    content_id: int = 0  # FileContent, 0 when the destination must have the file
    rdev: int = 0


@dataclass(frozen=True, slots=True)
class Pipe:
    """A pipe, or a FIFO when `path` is set. `data` is what lies in it."""

    id: int
    capacity: int  # bytes, F_GETPIPE_SZ
    data: bytes = b""
    path: str = ""
    packets: tuple[int, ...] = ()  # lengths, for O_DIRECT pipes


@dataclass(frozen=True, slots=True)
class PipeEnd:
    """One end of a pipe or FIFO; the direction is in the open flags."""

    pipe_id: int


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """What SOL_SOCKET and friends were set to: (level, name) -> raw option value."""

    values: Mapping[tuple[int, int], bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Packet:
    """Queued data of a socket: one datagram, or a run of stream bytes, with the descriptors sent along."""

    data: bytes
    file_ids: tuple[int, ...] = ()
    sender: bytes = b""  # sockaddr of a datagram's sender
    credentials: tuple[int, int, int] | None = None  # pid (vpid), uid, gid


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """unix(7). `inode` numbers it within the tree; `peer` is the inode of the other end, 0 none."""

    inode: int
    type: int  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    state: int  # TCP_ESTABLISHED 1, TCP_CLOSE 7, TCP_LISTEN 10
    peer: int
    name: bytes  # sun_path without padding; abstract names begin with NUL
    bound_here: bool  # False for the accepted end, which shows its listener's name
    backlog: int
    shutdown: int  # bits: 1 RCV_SHUTDOWN, 2 SEND_SHUTDOWN
    options: SocketOptions
    queue: tuple[Packet, ...] = ()
    mode: int = 0  # permissions of the socket file
    uid: int = 0
    gid: int = 0
    pending: tuple[int, ...] = ()  # inodes of connections not yet accepted (listening sockets)
    path: str = ""  # where the socket file lies, absolute; "" when it was unlinked or the name is abstract
    peer_credentials: tuple[int, int, int] | None = None  # SO_PEERCRED: pid (vpid, 0 unknown), uid, gid
    peer_name: bytes = (
        b""  # of a datagram socket's peer outside of the tree, to be connected to again by its name
    )
    reset: bool = False  # its peer was closed with unread data: ECONNRESET waits for the program


@dataclass(frozen=True, slots=True)
class TcpState:
    """What TCP_REPAIR reads from an established connection."""

    send_seq: int
    recv_seq: int
    send_queue: bytes
    recv_queue: bytes
    unsent: int  # bytes at the end of send_queue never sent
    mss: int
    options: int  # TCPI_OPT_* bits
    send_wscale: int
    recv_wscale: int
    timestamp: int
    window: bytes  # struct tcp_repair_window, 20 bytes


@dataclass(frozen=True, slots=True)
class Membership:
    """Of a socket in a multicast group, on one interface, by name: it hears all but these sources, or only these."""

    family: int
    address: bytes  # packed
    interface: str
    only: bool = False
    sources: tuple[bytes, ...] = ()


# IP_UNICAST_IF, IPV6_UNICAST_IF and IPV6_MULTICAST_IF (linux/in.h, in6.h), with the order of bytes that they have.
TIES: Mapping[tuple[int, int], Literal["big", "little"]] = {
    (0, 50): "big",
    (41, 76): "big",
    (41, 17): "little",
}


@dataclass(frozen=True, slots=True)
class Tie:
    """An option of a socket whose value is the number of an interface, by the interface's name."""

    level: int
    option: int
    interface: str


@dataclass(frozen=True, slots=True)
class InetSocket:
    """A TCP or UDP socket, IPv4 or IPv6. `state` as in UnixSocket; addresses are packed (4 or 16 bytes)."""

    inode: int
    family: int
    type: int
    protocol: int
    state: int
    local: tuple[bytes, int]
    remote: tuple[bytes, int] | None
    backlog: int
    shutdown: int
    options: SocketOptions
    v6only: bool = False
    interface: str = ""  # SO_BINDTODEVICE
    tcp: TcpState | None = None
    queue: tuple[Packet, ...] = ()  # UDP
    absent: bool = (
        False  # its local address is on no interface: it was bound with IP_FREEBIND, whatever that says now
    )
    error: int = 0  # errno that the program has not been told: what ended the connection
    memberships: tuple[Membership, ...] = ()  # UDP
    ties: tuple[Tie, ...] = ()


# NETLINK_ROUTE, SOCK_DIAG and KOBJECT_UEVENT (linux/netlink.h): for a socket of these the kernel keeps nothing but its
# groups. Of others it keeps queues, registrations and tables by the socket's port.
NETLINK_PROTOCOLS = (0, 4, 15)


@dataclass(frozen=True, slots=True)
class NetlinkSocket:
    """A netlink(7) socket."""

    inode: int
    type: int  # SOCK_*
    protocol: int
    port: int  # nl_pid, 0: not bound
    groups: tuple[int, ...]  # numbers of multicast groups, from 1 on
    remote: tuple[
        int, int
    ]  # port and mask of groups that it is connected to, (0, 0): the kernel, as without connect(2)
    options: SocketOptions


@dataclass(frozen=True, slots=True)
class EventFd:
    count: int
    semaphore: bool


@dataclass(frozen=True, slots=True)
class EpollTarget:
    """One entry of an epoll set. `fd` is the number it was added under, `file_id` the file it watches."""

    fd: int
    file_id: int
    events: int
    data: int  # u64


@dataclass(frozen=True, slots=True)
class Epoll:
    targets: tuple[EpollTarget, ...]


@dataclass(frozen=True, slots=True)
class TimerFd:
    """timerfd_create(2); times are what timerfd_gettime(2) gives: remaining, and interval, in ns."""

    clock: int
    settime_flags: int
    ticks: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class SignalFd:
    mask: int


@dataclass(frozen=True, slots=True)
class MemFd:
    """An open memfd; `object_id` names its SharedMemory."""

    object_id: int


@dataclass(frozen=True, slots=True)
class InotifyWatch:
    wd: int
    path: str
    mask: int


@dataclass(frozen=True, slots=True)
class Inotify:
    watches: tuple[InotifyWatch, ...]


@dataclass(frozen=True, slots=True)
class TerminalMaster:
    """The master of a pseudo-terminal, pty(7), and with it what the kernel keeps of the pair."""

    number: int  # N of /dev/pts/N
    path: str  # of the ptmx by which it was made
    termios: bytes  # struct termios2
    locked_termios: bytes  # struct termios: what TIOCSLCKTRMIOS has locked
    size: tuple[int, int, int, int]  # rows, columns, and both in pixels
    mode: int | None  # permissions of /dev/pts/N, None: what devpts gives; and its owner
    uid: int
    gid: int
    session: int  # whose controlling terminal it is, 0 of none
    foreground: int  # process group of that session
    packets: bool  # TIOCPKT
    locked: bool  # TIOCSPTLCK
    exclusive: bool  # TIOCEXCL
    left: bool  # the slave was open and was closed by all: the master reads EIO


@dataclass(frozen=True, slots=True)
class TerminalSlave:
    """The other end of the TerminalMaster with that number."""

    number: int


Resource = (
    RegularFile
    | PipeEnd
    | UnixSocket
    | InetSocket
    | NetlinkSocket
    | EventFd
    | Epoll
    | TimerFd
    | SignalFd
    | MemFd
    | Inotify
    | TerminalMaster
    | TerminalSlave
)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """One open file description (what dup and fork share), with the status flags O_* and the position. What is
    `outside` is shared with processes outside of the tree, and given to it by who restores (lazyproc/outside.py).
    """

    id: int
    flags: int
    pos: int
    owner: Owner
    resource: Resource
    outside: bool = False


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One entry of a descriptor table."""

    fd: int
    file_id: int
    cloexec: bool


# --- tasks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SigAction:
    """The kernel's struct sigaction for one signal."""

    signal: int
    handler: int
    flags: int
    restorer: int
    mask: int


@dataclass(frozen=True, slots=True)
class IntervalTimer:
    """setitimer(2), in microseconds as the call takes them."""

    which: int  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
    value_us: int
    interval_us: int


@dataclass(frozen=True, slots=True)
class PosixTimer:
    """timer_create(2). `notify` SIGEV_*, `tid` for SIGEV_THREAD_ID."""

    id: int
    clock: int
    signal: int
    notify: int
    value: int  # sigev_value
    tid: int
    overrun: int
    value_ns: int
    interval_ns: int


@dataclass(frozen=True, slots=True)
class Limit:
    resource: int  # RLIMIT_*
    soft: int  # RLIM_INFINITY is 2**64 - 1
    hard: int


@dataclass(frozen=True, slots=True)
class Fs:
    """What chroot, chdir and umask set; the ids name OpenFiles of directories."""

    cwd_id: int
    root_id: int
    umask: int


class TaskState(enum.Enum):
    ALIVE = "alive"
    STOPPED = "stopped"  # by SIGSTOP and friends
    ZOMBIE = "zombie"


@dataclass(frozen=True, slots=True)
class Task:
    """One process. A zombie has no threads, mm, fs or descriptors. `threads[0]` is the leader."""

    vpid: int
    ppid: int
    pgid: int
    sid: int
    state: TaskState
    comm: str
    exit_code: int = 0  # wait status of a zombie
    exit_signal: int = 17
    stop_signal: int = 0
    threads: tuple[Thread, ...] = ()
    mm: Mm | None = None
    fs: Fs | None = None
    descriptors: tuple[Descriptor, ...] = ()
    sigactions: tuple[SigAction, ...] = ()
    pending: tuple[bytes, ...] = ()  # shared pending signals, siginfo 128 bytes each
    itimers: tuple[IntervalTimer, ...] = ()
    posix_timers: tuple[PosixTimer, ...] = ()
    limits: tuple[Limit, ...] = ()
    personality: int = 0
    oom_score_adj: int = 0
    loginuid: int = 0xFFFFFFFF
    child_subreaper: bool = False
    mce_kill: int = 2  # PR_MCE_KILL_GET of its first thread; 2 is the default
    locks: tuple[FileLock, ...] = ()  # those of an open file description with the first task that has it
    membarriers: int = 0  # membarrier(2) commands it has registered for, by bit
    xfeatures: int = 0  # components of the xsave area that it had to ask for (ARCH_REQ_XCOMP_PERM), by bit
    cgroups: Mapping[str, str] = field(default_factory=dict)  # controllers ("" is v2) -> path

    @property
    def leader(self) -> Thread:
        return self.threads[0]


@dataclass(frozen=True, slots=True)
class Clocks:
    """What the tree's clocks showed when all of the frozen tree had been read, in ns."""

    monotonic_ns: int
    boottime_ns: int
    realtime_ns: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A frozen tree. `tasks[0]` is the root; a parent stands before its children.

    `memory` says which pages of which object have content; the pages themselves come from a PageSource.
    """

    tasks: tuple[Task, ...]
    files: Mapping[int, OpenFile]
    pipes: Mapping[int, Pipe]
    shared: Mapping[int, SharedMemory]
    contents: Mapping[int, FileContent]
    memory: Mapping[MemoryObject, Sequence[Extent]]
    clocks: Clocks
    hostname: str = ""
    held: str = ""  # the netfilter session that holds back its packets where it was dumped; "" none

    @property
    def root(self) -> Task:
        return self.tasks[0]
