"""Network namespaces, for the questions that only a thread inside one can ask (sock_diag, bind)."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from lazyproc.kernel.sockopt import SIOCGSKNS, SO_NETNS_COOKIE, SOL_SOCKET
from lazyproc.kernel.sys import syscall

SYS_SETNS = 308
CLONE_NEWNET = 0x40000000


def cookie(sock: socket.socket) -> int:
    """A number that names the socket's network namespace (Linux 5.14)."""
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


@contextmanager
def namespace_of(sock: socket.socket) -> Iterator[None]:
    """The calling thread is in the socket's network namespace for the length of a block.

    EPERM without CAP_NET_ADMIN and CAP_SYS_ADMIN, unless it is there already.
    """
    with socket.socket(socket.AF_UNIX) as ours:
        already = cookie(ours) == cookie(sock)
    if already:
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = fcntl.ioctl(sock, SIOCGSKNS)
        try:
            syscall(SYS_SETNS, there, CLONE_NEWNET)
        finally:
            os.close(there)
        try:
            yield
        finally:
            syscall(SYS_SETNS, home, CLONE_NEWNET)
    finally:
        os.close(home)
