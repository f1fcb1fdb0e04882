"""Memory that processes share since a fork, and of which each gets a copy of its own when it is moved. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lazyproc.kernel.proc import SmapsEntry


def bytes_of_copies(tree: Collection[Sequence[SmapsEntry]]) -> int:
    """How much more memory a tree needs when nothing is shared any more; `tree` has the mappings of each process.

    A page that N processes of the tree share counts N - 1 times: each has 1 of Rss and 1/N of Pss (proc_pid_smaps(5)).
    Shared with processes outside of the tree too it counts for more than that, less than N times: the figure is an
    upper bound. Counted are private mappings with none but anonymous pages; a file's pages stay the page cache's.
    """
    if len(tree) < 2:
        return 0
    return sum(
        entry.rss - entry.pss + entry.swap - entry.swap_pss
        for entries in tree
        for entry in entries
        if entry.entry.perms.endswith("p") and entry.rss == entry.anonymous
    )
