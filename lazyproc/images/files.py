"""Image files: magics, framing, folders, and a set of them packed for the wire.

An image is `u32 magic, u32 magic` and then records of `u32 size, message`; some records have a payload behind
them. Numbers are little-endian. The facts are those of CRIU 4.2: criu/include/magic.h, criu/image-desc.c,
criu/protobuf.c. Everything that is wrong with an image is an ImageError with the file and the offset.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lazyproc.errors import ImageError

M = TypeVar("M", bound=Message)

COMMON_MAGIC = 0x54564319
INVENTORY_MAGIC = 0x58313116  # the only image without COMMON_MAGIC in front
INVENTORY = "inventory.img"
FILES = "files.img"
EXTRAS = "lazyproc.img"
SUMS = "lazyproc-sums.img"
GUEST = "lazyproc-guest.img"  # of a QEMU: then there is no process in the folder

MAGICS = {
    "pstree": 0x50273030,
    "core": 0x55053847,
    "ids": 0x54432030,
    "mm": 0x57492820,
    "pagemap": 0x56084025,
    "pagemap-shmem": 0x56084025,
    "fs": 0x51403912,
    "fdinfo": 0x56213732,
    "files": 0x56303138,
    "pipes-data": 0x56453709,
    "fifo-data": 0x59333054,
    "sk-queues": 0x56264026,
    "ghost-file": 0x52583605,
    "remap-fpath": 0x59133954,
    "tcp-stream": 0x51465506,
    "memfd": 0x48453499,
    "seccomp": 0x64413049,
    "cgroup": 0x59383330,
    "timens": 0x43114433,
    "filelocks": 0x54323616,
    "tty-info": 0x59453036,
    "lazyproc": 0x50505A4C,  # "LZPP": ours
    "lazyproc-sums": 0x53505A4C,  # "LZPS"
}

_KIND = re.compile(
    "(" + "|".join(sorted(map(re.escape, MAGICS), key=len, reverse=True)) + r")(-[0-9a-f]+)?\.img"
)
_PAGES = re.compile(r"pages-[0-9]+\.img")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_U32 = struct.Struct("<I")
_HEADER = struct.Struct("<II")


@functools.lru_cache(maxsize=4096)  # asked several times of each image
def kind_of(name: str) -> str:
    """`core` for `core-17.img`; "" for what is none of the images named here (pages, logs, tarballs)."""
    match = _KIND.fullmatch(name)
    return match[1] if match else ("inventory" if name == INVENTORY else "")


def _is_image(name: str) -> bool:
    return name.endswith(".img") and not _PAGES.fullmatch(name)


class ImageWriter:
    """Collects records into images, in memory."""

    def __init__(self) -> None:
        self._images: dict[str, bytearray] = {}

    def create(self, name: str) -> bytearray:
        """The image `name`, with its header when it is new."""
        image = self._images.get(name)
        if image is None:
            kind = kind_of(name)
            header = (
                _U32.pack(INVENTORY_MAGIC)
                if kind == "inventory"
                else _HEADER.pack(COMMON_MAGIC, MAGICS[kind])
            )
            image = self._images[name] = bytearray(header)
        return image

    def add(self, name: str, message: Message, payload: bytes = b"") -> None:
        """Appends one record, and the raw payload that belongs to it."""
        image = self.create(name)
        data = message.SerializeToString()
        image += _U32.pack(len(data))
        image += data
        image += payload

    def finish(self) -> dict[str, bytes]:
        return {name: bytes(image) for name, image in self._images.items()}


class ImageReader:
    """Reads one image from front to back. Whatever the bytes are, the only exception is ImageError.

    With `strict` a message may have no fields but those that are known: a newer CRIU means something by them.
    """

    def __init__(self, name: str, data: bytes, *, strict: bool = False) -> None:
        self.name = name
        self._data = data
        self._at = 0
        self._strict = strict
        kind = kind_of(name)
        magics = [INVENTORY_MAGIC] if kind == "inventory" else [COMMON_MAGIC, MAGICS[kind]]
        for magic in magics:
            if _U32.unpack(self.raw(4))[0] != magic:
                raise self.error("the magic number is not that of this kind of image")

    def error(self, what: str) -> ImageError:
        return ImageError(
            what,
            where=f"{self.name}, offset {self._at}",
            remedy="take the checkpoint again, or copy it again when it came from elsewhere",
        )

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    @property
    def ahead(self) -> memoryview:
        """What has not been read yet. Reads nothing."""
        return memoryview(self._data)[self._at :]

    def raw(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self._data) - self._at:
            raise self.error(f"truncated: {count} bytes expected, {len(self._data) - self._at} left")
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        return self.raw(len(self._data) - self._at)

    def message(self, kind: type[M]) -> M:
        """The next record."""
        data = self.record()
        message = self.parsed(kind, data)
        if self._strict:
            self.demand_known(message, data)
        return message

    def record(self) -> bytes:
        """The bytes of the next record."""
        return self.raw(_U32.unpack(self.raw(4))[0])

    def parsed(self, kind: type[M], data: bytes) -> M:
        """The message in the bytes of the last record."""
        try:
            message = kind.FromString(data)
        except DecodeError:
            raise self.error(f"garbled {kind.DESCRIPTOR.name}") from None
        if not message.IsInitialized():
            raise self.error(f"{kind.DESCRIPTOR.name} lacks a required field")
        return message

    def demand_known(self, message: Message, data: bytes) -> None:
        """Raise ImageError for an unknown field of the message, which `data` was."""
        if field := unknown_field(message, data):
            raise ImageError(
                f"{field} is not known to this lazyproc: a newer CRIU wrote it",
                where=self.name,
                remedy="restore it with that criu",
            )


def unknown_field(message: Message, data: bytes) -> str:
    """The first unknown field of the message, which `data` was, "" when there is none. They are gone from it then."""
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return "" if message.ByteSize() == size else next(_unknown(type(message).FromString(data)))


def _unknown(message: Message) -> Iterator[str]:
    unknown = UnknownFieldSet(message)
    for index in range(len(unknown)):
        yield f"field {unknown[index].field_number} of {message.DESCRIPTOR.name}"
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for each in value if descriptor.is_repeated else (value,):
                yield from _unknown(each)


def demand(images: Mapping[str, bytes], name: str) -> bytes:
    """The bytes of the image `name`, which has to be there."""
    if name not in images:
        raise ImageError("missing", where=name, remedy="copy the whole folder of the checkpoint")
    return images[name]


def open_image(images: Mapping[str, bytes], name: str) -> ImageReader:
    """The image `name`, which has to be there. Without lazyproc.img it is CRIU's, and read strictly."""
    return ImageReader(name, demand(images, name), strict=EXTRAS not in images)


def records(images: Mapping[str, bytes], name: str, kind: type[M]) -> Iterator[tuple[M, ImageReader]]:
    """Every record with the reader that stands behind it, so that the caller can take the payload.

    An image that is not there has no records: CRIU writes none for what does not occur.
    """
    if name in images:
        reader = open_image(images, name)
        while reader.more:
            yield reader.message(kind), reader


def record(images: Mapping[str, bytes], name: str, kind: type[M]) -> M:
    """The only record of an image that has to be there."""
    return open_image(images, name).message(kind)


def garbled(name: str, what: str) -> ImageError:
    """For what is well-formed and cannot be true."""
    return ImageError(
        what, where=name, remedy="take the checkpoint again, or copy it again when it came from elsewhere"
    )


# --- text ---------------------------------------------------------------------------------------------------


def to_bytes(text: str) -> bytes:
    """A path or name as the kernel has it; the counterpart of os.fsdecode whatever the locale is."""
    return text.encode("utf-8", "surrogateescape")


def to_text(data: bytes, name: str) -> str:
    """The other way; `name` is the image to blame when the text holds a NUL, which no path or name can."""
    if b"\0" in data:
        raise garbled(name, "a NUL byte in a path or name")
    return data.decode("utf-8", "surrogateescape")


# --- a set of images for the wire ---------------------------------------------------------------------------

_PACK = b"lzpk"
_MAX_IMAGES = 1 << 20
_ENTRY = struct.Struct("<HQ")


def pack(images: Mapping[str, bytes]) -> bytes:
    """`lzpk`, u32 count, then for each: u16 length of the name, u64 length of the image, name, image."""
    parts = [_PACK, _U32.pack(len(images))]
    for name, data in images.items():
        encoded = check_name(name).encode()
        parts += [_ENTRY.pack(len(encoded), len(data)), encoded, data]
    return b"".join(parts)


def unpack(data: bytes) -> dict[str, bytes]:
    """The images that pack() packed; ImageError when `data` is anything else."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        if count > len(data) - at:
            raise ImageError(f"truncated at offset {at}", where="packed images", remedy="send them again")
        at += count
        return data[at - count : at]

    if take(4) != _PACK or (count := _U32.unpack(take(4))[0]) > _MAX_IMAGES:
        raise ImageError("not a set of images", where="packed images", remedy="send them again")
    images: dict[str, bytes] = {}
    for _ in range(count):
        name_length, length = _ENTRY.unpack(take(_ENTRY.size))
        name = check_name(take(name_length).decode("latin-1"))
        if name in images:
            raise ImageError("given twice", where=name, remedy="send them again")
        images[name] = take(length)
    if at != len(data):
        raise ImageError(f"{len(data) - at} bytes too many", where="packed images", remedy="send them again")
    return images


def check_name(name: str) -> str:
    """`name`, when it is a plain file name; ImageError when it could lead anywhere else."""
    if not _NAME.fullmatch(name):
        raise ImageError(
            "not a name that an image can have", where=repr(name), remedy="do not restore this set"
        )
    return name


# --- folders ------------------------------------------------------------------------------------------------


class Folder:
    """A folder of images. Files are private to the owner (0600): they hold a process's memory and keys."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Folder({str(self.path)!r})"

    def images(self) -> list[str]:
        """The names of all images, those of pages too."""
        try:
            return [name for name in os.listdir(self.path) if name.endswith(".img")]
        except OSError as error:
            raise self.failed(error, self.path) from None

    def open(self, name: str, flags: int) -> int:
        """A descriptor of the regular file `name`, made 0600 when `flags` say so; never through a symbolic link."""
        path = self.path / check_name(name)
        try:
            # O_NONBLOCK: a FIFO put in the place of an image must not stop the restore.
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            if self.path.is_dir():
                remedy = "copy the whole folder of the checkpoint"
                raise ImageError("missing", where=str(path), remedy=remedy) from None
            raise self.failed(error, path) from None
        except OSError as error:
            raise self.failed(error, path) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise ImageError("not a regular file", where=str(path), remedy="copy the folder again")
        return fd

    def read(self) -> dict[str, bytes]:
        """Every image but the pages, those of kinds that are not known too. What is named otherwise (logs) is none."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.path) if _is_image(entry.name))
        except OSError as error:
            raise self.failed(error, self.path) from None
        return {name: self.contents(name) for name in names}

    def contents(self, name: str) -> bytes:
        """One image, or any other regular file of the folder."""
        with os.fdopen(self.open(name, os.O_RDONLY), "rb") as file:
            try:
                return file.read()
            except OSError as error:
                raise self.failed(error, self.path / name) from None

    def parent(self) -> Folder | None:
        """The folder with the pages of the pre-dump before this one; CRIU's link `parent`. It has to lie next to this
        one: who writes images must not have those of others read. Raises ImageError.
        """
        link = self.path / "parent"
        if not link.is_symlink():
            return None
        around = Path(os.path.realpath(self.path)).parent
        parent = Path(os.path.realpath(link))
        if parent.parent != around or os.readlink(link).startswith("/"):
            raise ImageError(
                f"leads out of {around}, to {os.readlink(link)}",
                where=str(link),
                remedy="put the folders of one process next to each other, and make the link anew: ../NAME",
            )
        if not parent.is_dir():
            raise ImageError(
                f"the folder with the pages of the pre-dump before is missing: {os.readlink(link)}",
                where=str(link),
                remedy="copy the folders of all pre-dumps, next to each other",
            )
        return Folder(parent)

    def remove(self, name: str) -> None:
        """As far as it can be done: what had to be removed is said already."""
        with suppress(OSError):
            (self.path / check_name(name)).unlink()

    @staticmethod
    def failed(error: OSError, path: Path) -> ImageError:
        """What went wrong with `path`, and what the user can do."""
        code = error.errno or 0
        remedy = _REMEDIES.get(code, f"see {errno.errorcode.get(code, code)} in errno(3)")
        return ImageError(os.strerror(code).lower(), where=str(path), remedy=remedy)


_REMEDIES = {
    errno.ENOSPC: "make room there, or choose a folder on a larger file system with -D",
    errno.EDQUOT: "raise the quota, or choose another folder with -D",
    errno.EIO: "look for the disk in the kernel log (dmesg), or choose a folder on another one with -D",
    errno.EEXIST: "name a folder",
    errno.ENOTDIR: "name a folder",
    errno.EROFS: "choose a folder that can be written with -D",
    errno.ENOENT: "name an existing folder of images",
    errno.EACCES: "run as the owner of the folder",
    errno.ELOOP: "replace the symbolic link by the file itself",
}
