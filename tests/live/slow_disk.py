"""A file system that asks before it says that something is on the disk: `python -m tests.live.slow_disk FOLDER PLACE`.

Run on a host. It shows FOLDER at PLACE by FUSE (include/uapi/linux/fuse.h) and prints `ready`; then for every fsync(2)
of a file or folder its path below PLACE, and answers it with the errno that it reads, 0 for well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path

_MAJOR, _MINOR = 7, 31
_MAX_WRITE = 1 << 17
_REQUEST = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, extensions, padding
_ANSWER = struct.Struct("<IiQ")  # length, -errno, unique
_ATTR = struct.Struct("<6Q10I")
_OPEN = struct.Struct("<QII")  # handle, flags, padding
_DIRENT = struct.Struct("<QQII")  # inode, next offset, length of the name, type
_WRITE = struct.Struct("<QQIIQII")  # handle, offset, size, flags, owner, flags, padding
_UNANSWERED = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET


class Disk:
    """A node is the place of its path in `nodes`; no descriptor is kept open."""

    def __init__(self, folder: Path) -> None:
        self.nodes = [folder, folder]  # node 0 is none, node 1 the root
        self.answers: dict[int, Callable[[Path, bytes], bytes]] = {
            1: lambda path, rest: self.entry(path / _name(rest)),
            3: lambda path, rest: struct.pack("<QII", 0, 0, 0) + _attr(path),
            9: self.mkdir,
            10: _unlink,
            11: _rmdir,
            14: _open,
            16: _write,
            18: _well,
            20: self.sync,
            25: _well,
            26: _init,
            27: _open,
            28: _readdir,
            29: _well,
            30: self.sync,
            35: self.create,
        }

    def entry(self, path: Path) -> bytes:
        attr = _attr(path)
        if path not in self.nodes:
            self.nodes.append(path)
        return struct.pack("<QQQQII", self.nodes.index(path), 0, 0, 0, 0, 0) + attr

    def mkdir(self, path: Path, rest: bytes) -> bytes:
        os.mkdir(path / _name(rest[8:]), struct.unpack_from("<I", rest)[0])
        return self.entry(path / _name(rest[8:]))

    def create(self, path: Path, rest: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", rest)
        path /= _name(rest[16:])
        os.close(os.open(path, flags | os.O_CREAT, mode))
        return self.entry(path) + _OPEN.pack(0, 0, 0)

    def sync(self, path: Path, rest: bytes) -> bytes:
        print(path.relative_to(self.nodes[1]), flush=True)
        code = int(sys.stdin.readline())
        if code:
            raise OSError(code, os.strerror(code))
        return b""

    def serve(self, device: int) -> None:
        while True:
            request = os.read(device, _MAX_WRITE + 4096)
            _, opcode, unique, node, *_ = _REQUEST.unpack_from(request)
            if opcode in _UNANSWERED:
                continue
            try:
                data, code = self.answers[opcode](self.nodes[node], request[_REQUEST.size :]), 0
            except KeyError:
                data, code = b"", errno.ENOSYS
            except OSError as error:
                data, code = b"", error.errno or errno.EIO
            os.write(device, _ANSWER.pack(_ANSWER.size + len(data), -code, unique) + data)


def _name(rest: bytes) -> str:
    return os.fsdecode(rest.split(b"\0")[0])


def _well(path: Path, rest: bytes) -> bytes:
    return b""


def _unlink(path: Path, rest: bytes) -> bytes:
    os.unlink(path / _name(rest))
    return b""


def _rmdir(path: Path, rest: bytes) -> bytes:
    os.rmdir(path / _name(rest))
    return b""


def _attr(path: Path) -> bytes:
    of = path.lstat()
    times = (int(of.st_atime), int(of.st_mtime), int(of.st_ctime), 0, 0, 0)
    return _ATTR.pack(
        of.st_ino, of.st_size, of.st_blocks, *times, of.st_mode, of.st_nlink, of.st_uid, of.st_gid, 0, 4096, 0
    )


def _init(path: Path, rest: bytes) -> bytes:
    return struct.pack("<4I2H2I2H8I", _MAJOR, _MINOR, 0, 0, 0, 0, _MAX_WRITE, 1, 0, 0, *[0] * 8)


def _open(path: Path, rest: bytes) -> bytes:
    return _OPEN.pack(0, 0, 0)


def _write(path: Path, rest: bytes) -> bytes:
    _, offset, size, *_ = _WRITE.unpack_from(rest)
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, rest[_WRITE.size : _WRITE.size + size], offset)
    finally:
        os.close(fd)
    return struct.pack("<II", size, 0)


def _readdir(path: Path, rest: bytes) -> bytes:
    _, offset, size = struct.unpack_from("<QQI", rest)
    found = b""
    for number, name in enumerate(sorted(os.listdir(path))[offset:], start=offset + 1):
        kind = stat.S_IFMT((path / name).lstat().st_mode) >> 12
        row = _DIRENT.pack(number, number, len(os.fsencode(name)), kind) + os.fsencode(name)
        row += bytes(-len(row) % 8)
        if len(found) + len(row) > size:
            break
        found += row
    return found


def main(folder: str, place: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"slow_disk", os.fsencode(place), b"fuse", 0, options.encode()) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    print("ready", flush=True)
    Disk(Path(folder)).serve(device)


if __name__ == "__main__":
    main(*sys.argv[1:])
