"""`lazyproc-criu check`: what this host and lazyproc can do, in CRIU's words."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from lazyproc.criu.log import ERROR, INFO, WARNING, Log
from lazyproc.criu.parse import Given
from lazyproc.errors import HostLacks, LazyprocError, UsageError
from lazyproc.facts import dataclass


@dataclass(frozen=True, slots=True)
class Feature:
    """CRIU's name of a feature. With `lacks` lazyproc has no use for it whatever the kernel has; otherwise `probe`
    names the row of `lazyproc check` that tries it ("": every kernel that lazyproc runs on has it).
    """

    name: str
    probe: str = ""
    lacks: str = ""
    program: str = ""  # that has to be there


PROGRAMS = "/usr/sbin:/sbin:/usr/bin:/bin"
_NAMESPACES = "namespaces are not dumped"

FEATURES = (
    Feature("mnt_id", lacks="mounts are not dumped"),
    Feature("mem_dirty_track", lacks="there is no dump in steps yet"),
    Feature("aio_remap"),
    Feature("timerfd"),
    Feature("tun", lacks="tun interfaces are refused"),
    Feature("tun_ns", lacks="tun interfaces are refused"),
    Feature("userns", lacks=_NAMESPACES),
    Feature("fdinfo_lock"),
    Feature("seccomp_suspend"),
    Feature("seccomp_filters"),
    Feature("loginuid", lacks="login uids are not set"),
    Feature("cgroupns", lacks=_NAMESPACES),
    Feature("autofs", lacks="mounts are not dumped"),
    Feature("tcp_half_closed", "TCP_REPAIR"),
    Feature("compat_cr", lacks="32-bit programs are refused"),
    Feature("uffd", "userfaultfd of tasks"),
    Feature("uffd-noncoop", "userfaultfd of tasks"),
    Feature("can_map_vdso"),
    Feature("sk_ns", lacks=_NAMESPACES),
    Feature("sk_unix_file"),
    Feature("net_diag_raw", lacks="raw sockets are refused"),
    Feature("nsid", lacks=_NAMESPACES),
    Feature("link_nsid", lacks=_NAMESPACES),
    Feature("kcmp_epoll", "kcmp"),
    Feature("timens", "time namespaces"),
    Feature("external_net_ns", lacks=_NAMESPACES),
    Feature("clone3_set_tid", "choose pids"),
    Feature("newifindex", lacks=_NAMESPACES),
    Feature("nftables", "nftables"),
    Feature("has_ipt_legacy", program="iptables-legacy"),
    Feature("pidfd_store", lacks="there is no dump in steps yet"),
    Feature("ns_pid"),
    Feature("apparmor_stacking", lacks="security labels are not set"),
    Feature("network_lock_nftables", "nftables"),
    Feature("sockopt_buf_lock"),
    Feature("memfd_hugetlb", lacks="memfds with huge pages are refused"),
    Feature("move_mount_set_group", lacks="mounts are not dumped"),
    Feature("openat2"),
    Feature("get_rseq_conf"),
    Feature("ipv6_freebind"),
    Feature("pagemap_scan", "PAGEMAP_SCAN"),
    Feature("timer_cr_ids", "POSIX timers"),
    Feature("overlayfs_maps"),
    Feature("breakpoints"),
    Feature("pagemap_scan_guard_pages", "guard regions"),
)


def run(given: Given, log: Log) -> None:
    """Raises HostLacks with all that is missing."""
    names = given.every("feature")
    if "list" in names:
        print(" ".join(feature.name for feature in FEATURES))
        return
    missing = list(filter(None, map(why_not, map(_named, names)))) if names else _missing(log)
    if missing:
        raise HostLacks("; ".join(missing), where="check", remedy="see `lazyproc check`")
    log.write(WARNING, "Looks good.")


def why_not(feature: Feature) -> str:
    """ "" when the host has it, and lazyproc a use for it."""
    if feature.lacks:
        return f"{feature.name}: {feature.lacks}"
    if feature.program and shutil.which(feature.program, path=PROGRAMS) is None:
        return f"{feature.name}: {feature.program} is not installed"
    if feature.probe:
        try:
            _probes()[feature.probe]()
        except (LazyprocError, OSError) as error:
            return f"{feature.name}: {error}"
    return ""


def _named(name: str) -> Feature:
    for feature in FEATURES:
        if feature.name == name:
            return feature
    raise UsageError("is no feature", where=f"--feature {name}", remedy="see --feature list")


def _probes() -> Mapping[str, Callable[[], object]]:
    from lazyproc.host_check import PROBES

    return {probe.name: probe.attempt for probe in PROBES}


def _missing(log: Log) -> list[str]:
    from lazyproc.host_check import State, check_host

    findings = list(check_host())
    for finding in findings:
        level = ERROR if finding.state is State.MISSING else INFO
        log.write(level, f"{finding.name}: {finding.state.value}, {finding.detail}")
    return [finding.name for finding in findings if finding.state is State.MISSING]
