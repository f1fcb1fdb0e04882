"""Files whose content travels: ghost-file-<id>.img and remap-fpath.img (CRIU 4.2: images/ghost-file.proto).

CRIU carries the content of deleted files. The content of a file that has a path (on a tmpfs) is written the
same way, and only lazyproc.img says where it belongs; CRIU does not look at a ghost that no remap names.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping

from lazyproc.errors import ImageError
from lazyproc.images.extras import Extras
from lazyproc.images.files import ImageReader, ImageWriter, open_image, to_bytes, to_text
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.model import Checkpoint, FileContent, RegularFile

REMAPS = "remap-fpath.img"
_GHOST = re.compile(r"ghost-file-([0-9a-f]{1,8})\.img")
_SECOND_US = 1_000_000
_U64 = (1 << 64) - 1


def write_contents(checkpoint: Checkpoint, writer: ImageWriter, extras: own.Extras) -> None:
    """A ghost for every content, and a remap for every file that was deleted."""
    for content in checkpoint.contents.values():
        _write_ghost(content, writer)
        extras.contents.add(
            id=content.id,
            path=to_bytes(content.path),
            atime_ns=content.atime_ns,
            mtime_ns=content.mtime_ns,
            rdev=content.rdev,
        )
    for file in checkpoint.files.values():
        if isinstance(file.resource, RegularFile) and file.resource.content_id:
            content = checkpoint.contents[file.resource.content_id]
            if not content.path:
                remap = pb.remap_file_path_entry(orig_id=file.id, remap_id=content.id, remap_type=pb.GHOST)
                writer.add(REMAPS, remap)


def _write_ghost(content: FileContent, writer: ImageWriter) -> None:
    name = f"ghost-file-{content.id:x}.img"
    entry = pb.ghost_file_entry(uid=content.uid, gid=content.gid, mode=content.mode, size=content.size)
    if content.rdev:
        entry.rdev = content.rdev & 0xFFFFFFFF
    for message, nanoseconds in ((entry.atim, content.atime_ns), (entry.mtim, content.mtime_ns)):
        seconds, message.tv_usec = divmod(nanoseconds // 1000, _SECOND_US)
        message.tv_sec = seconds & _U64
    if stat.S_ISLNK(content.mode):
        entry.symlnk_target = b"".join(data for _, data in content.data)
        writer.add(name, entry)
        return
    entry.chunks = True
    writer.add(name, entry)
    for offset, data in content.data:
        writer.add(name, pb.ghost_chunk_entry(off=offset, len=len(data)), data)


def read_remaps(entries: Iterator[tuple[pb.remap_file_path_entry, ImageReader]]) -> dict[int, int]:
    """The content of each deleted file, by file id."""
    remaps = {}
    for entry, reader in entries:
        if entry.remap_type != pb.GHOST:
            raise ImageError(
                f"file {entry.orig_id} is a link that CRIU made, or an entry of /proc",
                where=reader.name,
                remedy="restore it with criu",
            )
        remaps[entry.orig_id] = entry.remap_id
    return remaps


def read_contents(images: Mapping[str, bytes], extras: Extras) -> dict[int, FileContent]:
    """Every ghost by its id."""
    contents = {}
    for name in images:
        if match := _GHOST.fullmatch(name):
            number = int(match[1], 16)
            contents[number] = _read_ghost(number, open_image(images, name), extras.contents.get(number))
    return contents


def _read_ghost(number: int, reader: ImageReader, extra: own.ContentExtra | None) -> FileContent:
    entry = reader.message(pb.ghost_file_entry)
    data: list[tuple[int, bytes]] = []
    if entry.HasField("symlnk_target"):
        data = [(0, entry.symlnk_target)]
    elif entry.chunks:
        while reader.more:
            chunk = reader.message(pb.ghost_chunk_entry)
            if chunk.off + chunk.len > entry.size:
                raise reader.error(f"a chunk ends behind the file's {entry.size} bytes")
            data.append((chunk.off, reader.raw(chunk.len)))
    elif reader.more:
        data = [(0, reader.rest())]
    return FileContent(
        id=number,
        path=to_text(extra.path, reader.name) if extra else "",
        mode=entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        size=entry.size if entry.HasField("size") else sum(len(part) for _, part in data),
        atime_ns=extra.atime_ns if extra else _nanoseconds(entry.atim),
        mtime_ns=extra.mtime_ns if extra else _nanoseconds(entry.mtim),
        rdev=extra.rdev if extra else entry.rdev,
        data=tuple(data),
    )


def _nanoseconds(time: pb.timeval) -> int:
    seconds = time.tv_sec - (1 << 64) if time.tv_sec >> 63 else time.tv_sec
    return (seconds * _SECOND_US + time.tv_usec) * 1000
