"""lazyproc.img: what CRIU's format has no field for, found by the number of what it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from lazyproc.errors import ImageError
from lazyproc.facts import dataclass, field
from lazyproc.images.files import EXTRAS, garbled, record
from lazyproc.images.pb import lazyproc_pb2 as own

VERSION = 1


class _Numbered(Protocol):
    @property
    def id(self) -> int: ...


T = TypeVar("T", bound=_Numbered)


@dataclass(frozen=True, slots=True)
class Extras:
    """The records of lazyproc.img by id; all empty for a checkpoint that CRIU took."""

    message: own.Extras = field(default_factory=own.Extras)
    threads: Mapping[int, own.ThreadExtra] = field(default_factory=dict)
    tasks: Mapping[int, own.TaskExtra] = field(default_factory=dict)
    files: Mapping[int, own.FileExtra] = field(default_factory=dict)
    pipes: Mapping[int, own.PipeExtra] = field(default_factory=dict)
    packets: Mapping[tuple[int, int], own.PacketExtra] = field(default_factory=dict)
    shared: Mapping[int, own.SharedExtra] = field(default_factory=dict)
    contents: Mapping[int, own.ContentExtra] = field(default_factory=dict)

    flag_sets: tuple[frozenset[str], ...] = ()

    def vm_flags(self, index: int) -> frozenset[str]:
        """The set of VmFlags that TaskExtra.vm_flags numbers."""
        if index >= len(self.flag_sets):
            raise garbled(EXTRAS, f"there is no set {index} of VmFlags")
        return self.flag_sets[index]


def read_extras(images: Mapping[str, bytes]) -> Extras:
    """lazyproc.img, or empty Extras when there is none."""
    if EXTRAS not in images:
        return Extras()
    message = record(images, EXTRAS, own.Extras)
    if message.version != VERSION:
        raise ImageError(
            f"version {message.version} of the format, this lazyproc knows {VERSION}",
            where=EXTRAS,
            remedy="use the same lazyproc on both sides",
        )
    return Extras(
        message,
        {extra.tid: extra for extra in message.threads},
        {extra.vpid: extra for extra in message.tasks},
        _by_id(message.files),
        _by_id(message.pipes),
        {(extra.file_id, extra.index): extra for extra in message.packets},
        _by_id(message.shared),
        _by_id(message.contents),
        tuple(frozenset(flags.decode("latin-1").split()) for flags in message.vm_flag_sets),
    )


def _by_id(messages: Iterable[T]) -> dict[int, T]:
    return {message.id: message for message in messages}
