"""What a command may have of its host."""

from __future__ import annotations

import resource
from contextlib import suppress


def raise_descriptor_limit() -> None:
    """As many as the hard limit says: a restore has every file of a tree open, a dump every image until it is on the
    disk, a pager a userfaultfd and more of each process, and shells and services start us with 1024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # above fs.nr_open, which may have been lowered since
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
