"""Two hosts on one machine: for the demo, the tests and the benchmarks.

A host is a set of net, pid, mnt, ipc, uts and time namespaces of its own, with its own empty /tmp, /run,
/dev/shm and /dev/pts, and its clocks a day away from every other host's. With less, a toy migration passes: SysV
keys collide or are simply "there", tmpfs and deleted files are still "there", and the clock never jumps.

The root file system is shared, so programs and libraries are the same at both ends. Everything ends with
the process that made it, even by SIGKILL: the init of a host reads a pipe whose other end only that
process holds.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lazyproc.errors import HostLacks, NoSuchProcess
from lazyproc.facts import dataclass, field

DAY_S = 86_400
PRIVATE = ("/tmp", "/run", "/dev/shm")  # each host has its own, empty at the start

_CLONE_NEWPID = 0x20000000  # <linux/sched.h>
_NS_GET_PARENT = 0xB702  # <linux/nsfs.h>
_PACKAGES = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "ip": "iproute2",
    "tc": "iproute2",
}

# Runs as pid 1 of the new host: $1 the ground, $2 the host's name, then directories under PRIVATE to keep in
# sight. With SIGCHLD ignored the kernel reaps orphans itself (do_notify_parent in kernel/signal.c), so the
# init only has to wait for the end of its owner.
_INIT = """
set -e
ground=$1 name=$2; shift 2
echo "$name" > /proc/sys/kernel/hostname
mount --bind "$ground/$name" "$ground/scratch"
hold=$ground/.kept/$name
n=0; for kept; do n=$((n + 1)); mkdir -p "$hold/$n"; mount --bind "$kept" "$hold/$n"; done
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts -o mode=0620,ptmxmode=0666 pts /dev/pts
n=0; for kept; do n=$((n + 1)); mkdir -p "$kept"; mount --move "$hold/$n" "$kept"; done
ip link set lo up
rm -rf /run/mount  # mount(8) left its notes there
echo ready
exec env --ignore-signal=CHLD cat > /dev/null 2>&1
"""


@dataclass(frozen=True, slots=True)
class Ground:
    """What the hosts of one group stand on: directories outside PRIVATE.

    `shared` is the same in every host and outside. `scratch` is where each host sees its own directory,
    which lies at `path/NAME` for the caller.
    """

    path: Path
    alive: int  # a descriptor; the directories go when its last holder is gone

    @property
    def shared(self) -> Path:
        return self.path / "shared"

    @property
    def scratch(self) -> Path:
        return self.path / "scratch"


@contextmanager
def ground() -> Iterator[Ground]:
    """A fresh Ground, removed at the end or when this process and its hosts have died."""
    path = Path(tempfile.mkdtemp(prefix="lazyproc-hosts-", dir="/var/tmp"))
    path.chmod(0o755)  # cargo may run under another uid
    for name, mode in (("shared", 0o1777), ("scratch", 0o755)):
        (path / name).mkdir()
        (path / name).chmod(mode)
    sweeper = subprocess.Popen(
        ["sh", "-c", 'cat > /dev/null; exec rm -rf --one-file-system -- "$1"', "sweeper", path],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the owner
    )
    assert sweeper.stdin is not None
    try:
        yield Ground(path, sweeper.stdin.fileno())
    finally:
        sweeper.stdin.close()
        sweeper.wait()


@dataclass(slots=True)
class Host:
    """One host: a context manager.

    `number` 1, 2, … gives its addresses 10.77.0.N and fd77::N and sets its clocks N days ahead.
    Raises HostLacks when the machine cannot make one, with what is missing and the way out.
    """

    name: str
    ground: Ground
    number: int
    _init: subprocess.Popen[str] | None = field(default=None, init=False)
    _init_pid: int = field(default=0, init=False)
    _started: list[subprocess.Popen[Any]] = field(default_factory=list, init=False)

    @property
    def address(self) -> IPv4Address:
        return IPv4Address("10.77.0.0") + self.number

    @property
    def address6(self) -> IPv6Address:
        return IPv6Address("fd77::") + self.number

    @property
    def scratch(self) -> Path:
        """The host's own directory as its processes see it; `outside` is the same one for the caller."""
        return self.ground.scratch

    @property
    def outside(self) -> Path:
        return self.ground.path / self.name

    @property
    def init_pid(self) -> int:
        """The host's pid 1, as the caller sees it: /proc/INIT_PID/ns holds the host's namespaces."""
        return self._init_pid

    def __enter__(self) -> Self:
        _demand_root_and_tools()
        self.outside.mkdir()
        self.outside.chmod(0o1777)
        self._init = subprocess.Popen(
            [
                *(
                    "unshare",
                    "--fork",
                    "--kill-child",
                    "--pid",
                    "--mount-proc",
                    "--mount",
                    "--net",
                    "--ipc",
                    "--uts",
                ),
                *("--time", f"--monotonic={self.number * DAY_S}", f"--boottime={self.number * DAY_S}"),
                *("sh", "-c", _INIT, "init", str(self.ground.path), self.name, *_kept_in_sight()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(self.ground.alive,),
            start_new_session=True,
        )
        assert self._init.stdout is not None
        if self._init.stdout.readline() != "ready\n":
            raise self._refused()
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children")
        self._init_pid = int(children.read_text())
        return self

    def _refused(self) -> HostLacks:
        assert self._init is not None
        _, words = self._init.communicate()
        return HostLacks(
            f"a host of its own namespaces could not be made ({' '.join(words.split())})",
            where=self.name,
            remedy="it takes root with CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SYS_TIME and a kernel with time "
            "namespaces (CONFIG_TIME_NS, Linux 5.6); in a container run it privileged",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        init = self._init
        assert init is not None
        init.kill()  # unshare --kill-child takes pid 1 along, and pid 1 every process of the host
        for process in self._started:
            process.wait()  # the namespace does not end before the last zombie in it is reaped
        init.communicate()

    def popen(
        self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """subprocess.Popen inside the host.

        The process is the caller's own child: `pid`, signals and wait(2) work as ever; its pid inside is
        `vpid(pid)`. It leads a session of its own, because the caller's does not exist there, and keeps its
        journals in the host's own scratch directory (XDG_STATE_HOME).
        """
        options.setdefault("start_new_session", True)
        with self._children_born_inside():
            process = subprocess.Popen(
                self._enter(argv, options.pop("cwd", None)), env=self._environment(env), **options
            )
        self._started.append(process)
        return process

    def run(
        self, argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """subprocess.run inside the host."""
        with self._children_born_inside():
            return subprocess.run(
                self._enter(argv, options.pop("cwd", None)), env=self._environment(env), **options
            )

    def vpid(self, pid: int) -> int:
        """The pid inside this host of a process whose pid the caller knows."""
        return _namespace_pids(pid)[self._depth]

    def pid(self, vpid: int) -> int:
        """The caller's pid of a process of this host, of a nested pid namespace too. Raises NoSuchProcess."""
        home = os.stat(f"/proc/{self._init_pid}/ns/pid").st_ino
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                pids = _namespace_pids(int(entry))
                if len(pids) > self._depth and pids[self._depth] == vpid and _stands_in(int(entry), home):
                    return int(entry)
            except (FileNotFoundError, ProcessLookupError):
                continue  # ended meanwhile
        raise NoSuchProcess(
            f"there is no process {vpid}", where=f"host {self.name}", remedy="look whether it ended"
        )

    @property
    def _depth(self) -> int:
        return len(_namespace_pids(self._init_pid)) - 1

    def _enter(self, argv: Sequence[str | os.PathLike[str]], cwd: str | os.PathLike[str] | None) -> list[str]:
        """Everything but the pid namespace is entered by nsenter(1), which then becomes the program."""
        inside = ("nsenter", f"--target={self._init_pid}", "--mount", "--uts", "--ipc", "--net", "--time")
        return [
            *inside,
            f"--wdns={os.fspath(cwd or Path.cwd())}",
            "--no-fork",
            "--",
            *(os.fspath(word) for word in argv),
        ]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {**(os.environ if env is None else env), "XDG_STATE_HOME": str(self.scratch / "state")}

    @contextmanager
    def _children_born_inside(self) -> Iterator[None]:
        """setns(2) to a pid namespace concerns only later children of the calling thread; it is undone."""
        with ExitStack() as stack:
            home = stack.enter_context(open("/proc/thread-self/ns/pid", "rb"))
            inside = stack.enter_context(open(f"/proc/{self._init_pid}/ns/pid", "rb"))
            _set_children_namespace(inside.fileno())
            try:
                yield
            finally:
                _set_children_namespace(home.fileno())


@dataclass(frozen=True, slots=True)
class Pair:
    source: Host
    destination: Host

    @property
    def shared(self) -> Path:
        """A directory that both hosts and the caller see under the same path."""
        return self.source.ground.shared


@contextmanager
def pair_of_hosts(rate: str | None = None) -> Iterator[Pair]:
    """A source and a destination, joined by a veth. `rate` limits it both ways, in tc(8)'s units: "1gbit".

    The destination's clocks are a day ahead of the source's.
    """
    with ground() as floor, Host("source", floor, 1) as source, Host("destination", floor, 2) as destination:
        plug(source, "eth0", destination, "eth0", rate)
        for host in (source, destination):
            give_addresses(host, "eth0")
        yield Pair(source, destination)


@dataclass(frozen=True, slots=True)
class Trio:
    """A pair and somebody who talks to the process that moves, all in one Ethernet."""

    source: Host
    destination: Host
    client: Host


@contextmanager
def trio_of_hosts() -> Iterator[Trio]:
    """Three hosts in one Ethernet. The client holds the bridge: it sees an address move from port to port."""
    with (
        ground() as floor,
        Host("source", floor, 1) as source,
        Host("destination", floor, 2) as destination,
        Host("client", floor, 3) as client,
    ):
        client.run(["ip", "link", "add", "eth0", "type", "bridge"], check=True)
        for host in (source, destination):
            plug(host, "eth0", client, host.name, None)
            client.run(["ip", "link", "set", host.name, "master", "eth0"], check=True)
        for host in (source, destination, client):
            give_addresses(host, "eth0")
        yield Trio(source, destination, client)


def plug(one: Host, one_end: str, other: Host, other_end: str, rate: str | None) -> None:
    """A veth between two hosts, both ends up; nothing of it ever shows in the caller's own network."""
    first, second = (
        ("name", end, "netns", str(host.init_pid)) for host, end in ((one, one_end), (other, other_end))
    )
    subprocess.run(["ip", "link", "add", *first, "type", "veth", "peer", *second], check=True)
    for host, end in ((one, one_end), (other, other_end)):
        if rate is not None:
            limit = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
            host.run(["tc", "qdisc", "add", "dev", end, "root", *limit], check=True)
        host.run(["ip", "link", "set", end, "up"], check=True)


def give_addresses(host: Host, device: str) -> None:
    host.run(["ip", "link", "set", device, "up"], check=True)
    host.run(["ip", "address", "add", f"{host.address}/24", "dev", device], check=True)
    # nodad: usable at once, nobody else can hold it
    host.run(["ip", "address", "add", f"{host.address6}/64", "dev", device, "nodad"], check=True)


def _demand_root_and_tools() -> None:
    if os.geteuid() != 0:
        raise HostLacks("two hosts on one machine need root", remedy="run the command with sudo")
    for tool, package in _PACKAGES.items():
        if shutil.which(tool) is None:
            raise HostLacks(f"the command {tool} is missing", remedy=f"apt install {package}")


def _kept_in_sight() -> list[str]:
    """Where Python, this package and the working directory lie, as far as PRIVATE would hide them."""
    wanted = {
        Path(place).resolve() for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[1], ".")
    }
    hidden = {path for path in wanted if any(Path(top) in path.parents for top in PRIVATE)}
    return sorted(str(path) for path in hidden if hidden.isdisjoint(path.parents))


def _namespace_pids(pid: int) -> list[int]:
    """The pids of a process, from the caller's namespace to the innermost (proc_pid_status(5), NSpid)."""
    with open(f"/proc/{pid}/status", "rb") as status:
        line = next(line for line in status if line.startswith(b"NSpid:"))
    return [int(word) for word in line.split()[1:]]


def _stands_in(pid: int, namespace: int) -> bool:
    """Whether a process lives in the pid namespace with this inode, or in one below it (ioctl_ns(2))."""
    current = os.open(f"/proc/{pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    while os.fstat(current).st_ino != namespace:
        try:
            parent = fcntl.ioctl(current, _NS_GET_PARENT)
        except PermissionError:  # above the caller's own namespace
            return False
        finally:
            os.close(current)
        current = parent
    os.close(current)
    return True


def _set_children_namespace(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWPID) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
