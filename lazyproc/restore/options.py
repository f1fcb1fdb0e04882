"""Setting the options of a socket again."""

from __future__ import annotations

import os
import socket

from lazyproc.errors import RestoreError
from lazyproc.kernel.sockopt import set_options
from lazyproc.model import SocketOptions


def apply(sock: socket.socket, options: SocketOptions, which: tuple[tuple[int, int], ...]) -> None:
    """Set the options of `which` that differ. Raises RestoreError naming those that this host does not
    take.
    """
    unset = set_options(sock, options.values, which)
    if unset:
        words = ", ".join(
            f"level {o.level} option {o.name} ({os.strerror(o.error.errno or 0)})" for o in unset
        )
        raise RestoreError(
            f"this host does not take {words}",
            where=f"socket of family {int(sock.family)}",
            remedy="load the kernel module that has it (TCP_CONGESTION is level 6 option 13), or run as root",
        )
