"""What a tree shares with processes outside of it, by CRIU's names (criu(8): --external, --inherit-fd).

Such a thing stays where it is. Images have its name, and who restores the tree gives a descriptor in its place.
"""

from __future__ import annotations

import os
import stat as st

from lazyproc.model import (
    Checkpoint,
    InetSocket,
    MemFd,
    NetlinkSocket,
    OpenFile,
    PipeEnd,
    RegularFile,
    UnixSocket,
)


def name_of(file: OpenFile, checkpoint: Checkpoint) -> str:
    """How a descriptor is offered in its place; "" for what none can stand in for. Pure."""
    match file.resource:
        case RegularFile(path):
            return path.lstrip("/")
        case PipeEnd(number):
            return checkpoint.pipes[number].path.lstrip("/") or f"pipe:[{number}]"
        case UnixSocket(inode) | InetSocket(inode) | NetlinkSocket(inode):
            return f"socket:[{inode}]"
        case MemFd(number):
            return f"/memfd:{checkpoint.shared[number].name}"
        case _:
            return ""


def external_name(status: os.stat_result, mnt_id: int) -> str:
    """What a file with a path is called to have it stay outside: a terminal by its device. Pure."""
    if st.S_ISCHR(status.st_mode):
        return f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
    return f"file[{mnt_id:x}:{status.st_ino:x}]"


def external_socket(inode: int) -> str:
    """The same of a unix socket whose other end is outside."""
    return f"unix[{inode}]"
