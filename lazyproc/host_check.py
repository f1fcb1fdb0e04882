"""What this host can do of what lazyproc needs: each thing tried, with its remedy where it fails."""

from __future__ import annotations

import enum
import os
import platform
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from lazyproc.errors import LazyprocError
from lazyproc.facts import dataclass
from lazyproc.kernel import host, netfilter, proc
from lazyproc.kernel.nursery import demand_descriptors
from lazyproc.restore import groups
from lazyproc.uffd.device import (
    DEVICE,
    PAGER_FEATURES,
    Feature,
    Userfaultfd,
    demand_for_tasks,
    demand_poison,
)
from lazyproc.uffd.pager import demand_removals, demand_tables, demand_zstd

HEADROOM = 256 << 20  # bytes; with less available no process of any size can arrive
AS_ROOT = "run as root; in a container, privileged"
NEWER = "use a newer kernel"


class State(enum.Enum):
    OK = "ok"
    DEGRADED = "degraded"  # the main job works, something at its edge does not
    MISSING = "missing"  # the main job does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of `lazyproc check`; `remedy` is empty when there is nothing to mend."""

    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """Something to try, and what its failure means."""

    name: str
    attempt: Callable[[], object]
    detail: str  # what it is for
    otherwise: State
    remedy: str


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability of capabilities(7) by number."""

    name: str
    number: int
    detail: str
    otherwise: State


PROBES = (
    Probe("userfaultfd of tasks", demand_for_tasks, "lets restored processes wait for their pages", State.MISSING,
          AS_ROOT),
    Probe("ptrace", host.trace, "stops and describes processes", State.MISSING,
          "run as root; a container's seccomp profile must allow ptrace; kernel.yama.ptrace_scope must not be 3"),
    Probe("pidfd_getfd", host.pidfd_getfd, "takes descriptors", State.MISSING, NEWER + " (5.6)"),
    Probe("kcmp", host.kcmp, "tells shared files apart", State.MISSING, "use a kernel with CONFIG_KCMP"),
    Probe("PAGEMAP_SCAN", host.pagemap_scan, "finds pages with content", State.MISSING, NEWER + " (6.7)"),
    Probe("children", host.children, "finds process trees", State.MISSING, "use a kernel with CONFIG_PROC_CHILDREN"),
    Probe("map_files", host.map_files, "opens mapped files and shared memory", State.MISSING, AS_ROOT),
    Probe("choose pids", host.choose_pid, "gives restored processes their numbers (clone3)", State.MISSING, AS_ROOT),
    Probe("pid namespaces", lambda: host.new_namespace(host.CLONE_NEWPID),
          "restores trees whose numbers are taken here", State.MISSING, AS_ROOT),
    Probe("time namespaces", lambda: host.new_namespace(host.CLONE_NEWTIME),
          "lets monotonic clocks go on across hosts", State.MISSING, AS_ROOT + ", on a kernel with CONFIG_TIME_NS"),
    Probe("cgroups", lambda: groups.tried(None), "let restored trees outlive the service that restored them",
          State.DEGRADED, groups.AMENDS),
    Probe("TCP_REPAIR", host.repair_tcp, "moves established TCP connections", State.DEGRADED, AS_ROOT),
    Probe("nftables", netfilter.leftovers, "holds packets back while connections move", State.DEGRADED, AS_ROOT),
    Probe("POSIX timers", host.timer_ids, "gives restored timers their numbers", State.DEGRADED, NEWER + " (6.16)"),
    Probe("descriptors", demand_descriptors, "begins a restore", State.MISSING, "raise RLIMIT_NOFILE"),
    Probe("tables", demand_tables, "knows which page of each process is where", State.MISSING,
          "make RLIMIT_AS and RLIMIT_FSIZE unlimited"),
    Probe("removals", demand_removals, "tells MADV_REMOVE of shared memory from MADV_DONTNEED while it comes",
          State.DEGRADED, AS_ROOT + ", on a kernel with CONFIG_FTRACE_SYSCALLS"),
    Probe("guard regions", host.guard, "guards memory as programs do (MADV_GUARD_INSTALL)", State.DEGRADED,
          NEWER + " (6.13)"),
    Probe("UFFDIO_POISON", demand_poison, "marks pages that are lost for good (resume --poison)", State.DEGRADED,
          NEWER + " (6.6)"),
    Probe("zstd", demand_zstd, "compresses bulk where the link is the limit", State.DEGRADED,
          "install the library of zstd (libzstd.so.1)"),
    Probe("MADV_COLLAPSE", host.collapse, "makes huge pages again", State.DEGRADED,
          NEWER + " (6.1), with transparent huge pages"),
)  # fmt: skip
CAPABILITIES = (
    Capability("CAP_SYS_PTRACE", 19, "looks into processes of others", State.MISSING),
    Capability("CAP_SYS_ADMIN", 21, "makes namespaces", State.MISSING),
    Capability("CAP_NET_ADMIN", 12, "moves established TCP connections", State.DEGRADED),
    Capability("CAP_SYS_RESOURCE", 24, "raises limits above those of this host", State.DEGRADED),
    Capability("CAP_CHECKPOINT_RESTORE", 40, "chooses pids; CAP_SYS_ADMIN does as well", State.DEGRADED),
)


FEATURES = {
    Feature.EVENT_FORK: "learns of forks while memory is missing",
    Feature.EVENT_REMAP: "learns of mremap(2)",
    Feature.EVENT_REMOVE: "learns of madvise(2) that discards memory",
    Feature.EVENT_UNMAP: "learns of munmap(2)",
    Feature.MISSING_SHMEM: "brings shared memory when it is touched",
    Feature.THREAD_ID: "knows which thread waits",
}


def check_host() -> tuple[Finding, ...]:
    """Try everything; takes some tens of milliseconds and changes nothing."""
    return (
        _kernel(),
        _userfaultfd(),
        *(_feature(feature, FEATURES.get(feature, "")) for feature in Feature if feature in PAGER_FEATURES),
        *(_tried(probe) for probe in PROBES),
        *_capabilities(),
        _memory(),
    )


def unmet(names: Collection[str]) -> Iterator[Finding]:
    """Those of the probes with these names that fail. Names that are not known here are passed over."""
    tried = (_tried(probe) for probe in PROBES if probe.name in names)
    return (finding for finding in tried if finding.state is not State.OK)


def _kernel() -> Finding:
    detail = f"Linux {platform.release()} on {platform.machine()}"
    right = platform.machine() == "x86_64"
    return Finding(
        "kernel", State.OK if right else State.MISSING, detail, "" if right else "use an x86-64 host"
    )


def _userfaultfd() -> Finding:
    try:
        Userfaultfd.open().close()
    except LazyprocError as error:
        return Finding("userfaultfd", State.MISSING, error.what, error.remedy)
    way = DEVICE if os.access(DEVICE, os.R_OK | os.W_OK) else "system call"
    return Finding("userfaultfd", State.OK, f"brings pages when they are touched (by {way})")


def _feature(feature: Feature, detail: str) -> Finding:
    """The kernel refuses a feature that it does not have with the first ioctl (UFFDIO_API)."""
    name = f"userfaultfd {feature.name}"
    try:
        with Userfaultfd.open() as userfaultfd:
            userfaultfd.api(feature)
    except LazyprocError as error:
        return Finding(name, State.MISSING, error.what, error.remedy)
    return Finding(name, State.OK, detail)


def _tried(probe: Probe) -> Finding:
    try:
        probe.attempt()
    except LazyprocError as error:
        return Finding(
            probe.name, probe.otherwise, f"{probe.detail}: {error.what}", error.remedy or probe.remedy
        )
    except OSError as error:
        return Finding(probe.name, probe.otherwise, f"{probe.detail}: {error.strerror}", probe.remedy)
    return Finding(probe.name, State.OK, probe.detail)


def _capabilities() -> Iterator[Finding]:
    held = proc.status(proc.read(os.getpid(), "status")).cap_effective
    for capability in CAPABILITIES:
        if held >> capability.number & 1:
            yield Finding(capability.name, State.OK, capability.detail)
        else:
            detail = f"{capability.detail}: not held"
            yield Finding(capability.name, capability.otherwise, detail, AS_ROOT)


def _memory() -> Finding:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    available = next(int(row[1]) for row in rows if row[0] == "MemAvailable:") * 1024
    detail = f"{available >> 20} MiB available"
    if available < HEADROOM:
        return Finding("memory", State.DEGRADED, detail, "free memory before processes arrive")
    return Finding("memory", State.OK, detail)
