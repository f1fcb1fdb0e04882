"""What completes a tree whose source does not come back: images of the same process, or SIGBUS where nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lazyproc.errors import UsageError
from lazyproc.facts import dataclass
from lazyproc.images.convert import from_images, memory_objects
from lazyproc.images.files import Folder
from lazyproc.migrate.identity import identity, is_same_moment, is_same_tree
from lazyproc.migrate.journal import Record
from lazyproc.pages.images import ImagePages
from lazyproc.pages.private import PrivatePages
from lazyproc.uffd.device import demand_poison


@dataclass(frozen=True, slots=True)
class Supply:
    """`images`: an absolute path, or "". With `poison` what they lack is lost, and touching it is SIGBUS. `criu`: CRIU
    has restored the tree, and left out what is private. `server`: where a page server of CRIU's has what the images
    call lazy.
    """

    images: str = ""
    poison: bool = False
    criu: bool = False
    server: str = ""

    def __bool__(self) -> bool:
        return bool(self.images) or self.poison

    def facts(self) -> dict[str, object]:
        """For a journal."""
        return {"images": self.images, "poison": self.poison, "criu": self.criu, "server": self.server}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Supply:
        return cls(
            str(facts.get("images") or ""),
            facts.get("poison") is True,
            facts.get("criu") is True,
            str(facts.get("server") or ""),
        )

    def pages(self, wanted: Mapping[str, list[int]] | None = None, *, force: bool = False) -> ImagePages:
        """The pages of its images; with `wanted` only if they are of that tree. Raises ImageError, UsageError."""
        directory = Path(self.images)
        with ExitStack() as stack:
            pages: ImagePages
            if self.criu:
                pages = private = stack.enter_context(PrivatePages(directory))
                found = private.identity()
            else:
                folder = Folder(directory)
                checkpoint = from_images(folder.read())
                pages = stack.enter_context(ImagePages(folder, memory_objects(checkpoint)))
                found = identity(checkpoint, pages) if wanted is not None else {}
            if wanted is not None:
                _demand_same(found, wanted, directory, force=force)
            stack.pop_all()
        return pages

    def demand_fits(self, record: Record, *, force: bool) -> None:
        """Before anything is touched. Raises ImageError, UsageError (images of another process; `force` lets those of
        another moment pass), HostLacks.
        """
        if self.poison:
            demand_poison()
        if self.images:
            with self.pages(record.facts.get("identity"), force=force):
                pass


def _demand_same(
    found: Mapping[str, list[int]], wanted: Mapping[str, list[int]], directory: Path, *, force: bool
) -> None:
    if found.keys() != wanted.keys():
        raise UsageError(
            f"is of another process (pid {_pids(found)}; the session's is pid {_pids(wanted)})",
            where=str(directory),
            remedy="name images of the process that was moved",
        )
    if not is_same_tree(wanted, found):
        raise UsageError(
            f"is of another process that had the same number (pid {_pids(found)})",
            where=str(directory),
            remedy="name images of the process that was moved",
        )
    if not force and not is_same_moment(wanted, found):
        raise UsageError(
            "is of the same process at another moment: what it changed since would be lost in silence",
            where=str(directory),
            remedy="name images of when it was moved, or take them as they are with --force",
        )


def _pids(found: Mapping[str, object]) -> str:
    return ", ".join(sorted(found, key=int)) or "none"
