"""Why the kinds of files that have no gatherer cannot be dumped, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from lazyproc.dump.registry import Refused

_CLOSE = "let the program close it before the move and open it anew after it"

# By what /proc/PID/fd/FD points to, up to the first ":[" or digit.
_WORDS: Mapping[str, tuple[str, str]] = {
    "anon_inode:[io_uring]": (
        "is an io_uring, whose rings and requests in flight the kernel does not give out",
        "run the program without io_uring: many have a setting, or see kernel.io_uring_disabled",
    ),
    "anon_inode:[fanotify]": ("is a fanotify group of this host", _CLOSE),
    "anon_inode:[pidfd]": ("is a pidfd", _CLOSE),
    "pidfd": ("is a pidfd", _CLOSE),
    "anon_inode:[perf_event]": ("is a performance counter of this host", "stop profiling before the move"),
    "anon_inode:bpf-map": ("is a BPF map in this host's kernel", _CLOSE),
    "anon_inode:bpf-prog": ("is a BPF program in this host's kernel", _CLOSE),
    "anon_inode:bpf_link": ("is a BPF link in this host's kernel", _CLOSE),
    "anon_inode:[userfaultfd]": (
        "is a userfaultfd: the program serves its own page faults, or a restore or migration still brings its pages",
        "wait until every page has come, or until the program has closed it",
    ),
    "anon_inode:kvm-vm": ("is a KVM virtual machine", "move it with `lazyproc migrate --qemu`"),
    "anon_inode:kvm-vcpu": ("is a KVM virtual CPU", "move it with `lazyproc migrate --qemu`"),
    "anon_inode:[fscontext]": ("is a file system being configured (fsopen)", _CLOSE),
    "anon_inode:[landlock-ruleset]": ("is a Landlock ruleset", _CLOSE),
    "anon_inode:seccomp notify": ("receives another process's system calls (seccomp)", _CLOSE),
    **{
        name: (f"is a handle on a namespace of this host ({name})", _CLOSE)
        for name in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
    },
}


def refusal(link: str) -> Refused:
    """The refusal of a descriptor that points to `link`."""
    kind = link.removesuffix(" (deleted)")
    name = kind if kind in _WORDS else kind.partition(":[")[0].rstrip("0123456789:")
    why, remedy = _WORDS.get(name, ("is of a kind that cannot be moved", _CLOSE))
    return Refused(f"{link} {why}", remedy)
