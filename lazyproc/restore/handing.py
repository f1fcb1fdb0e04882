"""The other side of lazy-pages.socket (handed.py): a tree of our making, whose missing pages somebody else brings."""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path

from lazyproc.errors import ConnectionLost
from lazyproc.facts import replace
from lazyproc.model import Checkpoint
from lazyproc.restore.handed import FINISHED, NAME, SCM_CREDENTIALS
from lazyproc.restore.tree import BuiltTree


def dialled(directory: Path) -> socket.socket:
    """A connection to the daemon that waits in `directory`. Raises ConnectionLost."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A path of any length: sun_path has 108 bytes.
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{NAME}")
        finally:
            os.close(folder)
    except OSError as error:
        sock.close()
        raise ConnectionLost(
            f"nobody answers ({os.strerror(error.errno or 0).lower()})",
            where=str(directory / NAME),
            remedy="start lazyproc-criu lazy-pages, or criu lazy-pages, with the same folders first",
        ) from None
    return sock


def shared_at_once(checkpoint: Checkpoint) -> Checkpoint:
    """The same with all shared memory there from the start: such a daemon knows private memory only."""
    shared = {number: replace(each, lazy=False) for number, each in checkpoint.shared.items()}
    return replace(checkpoint, shared=shared)


def hand_over(sock: socket.socket, tree: BuiltTree) -> None:
    """The userfaultfd of every process, and that all is restored. The tree has not run. Raises ConnectionLost."""
    try:
        for task in tree.checkpoint.tasks:
            site = tree.sites.get(task.vpid)
            if site is None:
                sock.sendall(struct.pack("<i", -task.vpid))
            else:
                _send(sock, struct.pack("<i", task.vpid), site.pid)
                _send(sock, b"\0", site.pid, tree.userfaultfds[task.vpid])
        sock.sendall(struct.pack("<I", FINISHED))
    except OSError as error:
        raise ConnectionLost(
            f"the daemon has ended ({os.strerror(error.errno or 0).lower()})",
            where=NAME,
            remedy="see its log",
        ) from None


def _send(sock: socket.socket, data: bytes, pid: int, *fds: int) -> None:
    """In the name of the process, which speaks for itself where CRIU restores it: so it is known who it is."""
    credentials = struct.pack("<3i", pid, os.geteuid(), os.getegid())
    control: list[tuple[int, int, bytes]] = [(socket.SOL_SOCKET, SCM_CREDENTIALS, credentials)]
    if fds:
        control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes()))
    sock.sendmsg([data], control)
