"""What a command may have of its host: the limits of getrlimit(2)."""

from __future__ import annotations

import resource
from contextlib import suppress

DESCRIPTORS = 1 << 20  # fs.nr_open, unless somebody changed it: no limit can be above that
OURS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK)
NAMES = (  # as prlimit(1) calls them, in the order of include/uapi/asm-generic/resource.h
    *("cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as", "locks"),
    *("sigpending", "msgqueue", "nice", "rtprio", "rttime"),
)


def raise_limits() -> None:
    """As many descriptors as may be had: a restore has every file of a tree open, a dump every image until it is on the
    disk, a pager a userfaultfd and more of each process, and shells and services start us with 1024. Memory and files
    as large as the hard limits allow: the tables of a pager are, and what is restored begins with limits like ours.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for number in (hard, max(hard, DESCRIPTORS)):
        with suppress(OSError, ValueError):  # without CAP_SYS_RESOURCE, or above fs.nr_open
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
    for each in OURS:
        hard = resource.getrlimit(each)[1]
        with suppress(OSError, ValueError):
            resource.setrlimit(each, (hard, hard))
