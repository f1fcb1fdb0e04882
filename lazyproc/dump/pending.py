"""An error that waits for the program (SO_ERROR). Whoever reads a socket gets it, by a peek too, and it is gone."""

from __future__ import annotations

import select
import socket

from lazyproc.dump.registry import Refused
from lazyproc.kernel.sockopt import SO_MEMINFO, SOL_SOCKET


def waits(sock: socket.socket) -> bool:
    """Whether there is one; which, nothing tells that would not take it."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _fd, events in poll.poll(0))


def hides_queue(sock: socket.socket) -> bool:
    """Whether nothing of a unix or UDP socket is to be read, since an error would be taken. Behind that of a UDP socket
    there is nothing then; it does not travel, as if the answer that has brought it (ICMP) had been lost. Raises Refused
    where there may be more. On a stream the error comes behind all data, where nobody looks.
    """
    if sock.type == socket.SOCK_STREAM or not waits(sock):
        return False
    if sock.family == socket.AF_UNIX or any(
        sock.getsockopt(SOL_SOCKET, SO_MEMINFO, 4)
    ):  # SK_MEMINFO_RMEM_ALLOC
        raise Refused(
            "has an error for the program, and may hold packets behind it, which cannot be seen without taking it",
            "try again in a moment, or let the program read it first",
        )
    return True
