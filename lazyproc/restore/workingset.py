"""The working set of an earlier restore: the pages that it waited for, out of the file that `--record` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lazyproc.errors import ImageError, UsageError
from lazyproc.model import PAGE, Extent, MemoryObject, ObjectKind
from lazyproc.runs import Extents
from lazyproc.trace import Fault, read_trace
from lazyproc.uffd.policy import RECORDED, Page, Policy, named, recorded


def policy_of(name: str, memory: Mapping[MemoryObject, Sequence[Extent]] | None = None) -> Policy:
    """The policy of that name, `recorded:FILE` too; see `read_working_set`.

    Raises UsageError when there is none, or the file cannot be read.
    """
    if not name.startswith(RECORDED):
        return named(name)
    try:
        return recorded(read_working_set(Path(name.removeprefix(RECORDED)), memory))
    except OSError as error:
        raise UsageError(
            f"the record cannot be read: {error.strerror}",
            where=f"--policy {name}",
            remedy="name what --record wrote",
        ) from None


def read_working_set(
    path: Path, memory: Mapping[MemoryObject, Sequence[Extent]] | None = None
) -> Sequence[Page]:
    """The pages with content that were touched before they were there, in that order, each once.

    Raises ImageError when the file is no trace, or one of a process whose pages are not all in `memory`. OSError.
    """
    faults = sorted(read_trace(path), key=lambda fault: fault.time_ns)
    pages = list(dict.fromkeys(_page(fault, path) for fault in faults if fault.source in ("urgent", "bulk")))
    if memory is not None:
        _demand_known(pages, memory, path)
    return pages


def _demand_known(pages: Sequence[Page], memory: Mapping[MemoryObject, Sequence[Extent]], path: Path) -> None:
    known = {obj: Extents.of(runs) for obj, runs in memory.items()}
    for obj, addr in pages:
        if obj not in known or not known[obj].within(addr, addr + PAGE):
            raise ImageError(
                f"names a page at {addr:#x} of object {obj.key:#x} that these images do not have",
                where=str(path),
                remedy="name what --record wrote when the same images were restored",
            )


def _page(fault: Fault, path: Path) -> Page:
    try:
        obj = MemoryObject(ObjectKind(fault.object & 0xFF), fault.object >> 8)
    except ValueError:
        raise ImageError(
            f"names an object {fault.object:#x} of no kind that there is",
            where=str(path),
            remedy="record it again",
        ) from None
    return Page(obj, fault.object_addr)
