"""Pseudo-terminals, pty(7), by ioctl_tty(2): what the kernel tells of a pair, and how one is made like another.

All but TIOCEXCL can be asked and set by way of the master: the kernel takes it for the slave (tty_pair_get_tty,
drivers/tty/tty_io.c).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable, Collection
from contextlib import ExitStack

# include/uapi/asm-generic/ioctls.h
TIOCEXCL, TIOCSCTTY, TIOCGPGRP, TIOCSPGRP, TIOCGWINSZ, TIOCSWINSZ = (
    0x540C,
    0x540E,
    0x540F,
    0x5410,
    0x5413,
    0x5414,
)
FIONREAD, TIOCPKT, TIOCGSID = 0x541B, 0x5420, 0x5429
TCGETS2, TCSETS2, TIOCGLCKTRMIOS, TIOCSLCKTRMIOS = 0x802C542A, 0x402C542B, 0x5456, 0x5457
TIOCGPTN, TIOCSPTLCK, TIOCGDEV, TIOCGPKT, TIOCGPTLCK = (
    0x80045430,
    0x40045431,
    0x80045432,
    0x80045438,
    0x80045439,
)
TIOCGEXCL, TIOCGPTPEER = 0x80045440, 0x5441

TERMIOS2 = struct.Struct(
    "<4IB19s2I"
)  # input, output, control and local modes, line discipline, characters, speeds
TERMIOS = struct.Struct("<4IB19s")
WINSIZE = struct.Struct("<4H")
N_TTY = 0

SLAVE_MAJOR = 136  # UNIX98_PTY_SLAVE_MAJOR
PTMX = os.makedev(5, 2)
OWN_TERMINAL = os.makedev(5, 0)  # /dev/tty


def ask(fd: int, request: int) -> int:
    """What an ioctl(2) says with one int."""
    return int(struct.unpack("<i", fcntl.ioctl(fd, request, bytes(4)))[0])


def tell(fd: int, request: int, value: int) -> None:
    """An ioctl(2) that takes a pointer to one int."""
    fcntl.ioctl(fd, request, struct.pack("<i", value))


def slave_number(fd: int) -> int | None:
    """N of the /dev/pts/N behind a slave, also one that was opened as /dev/tty; None for other terminals, and for one
    whose master was closed.
    """
    try:
        device = ask(fd, TIOCGDEV)
    except OSError:
        return None
    return os.minor(device) if os.major(device) == SLAVE_MAJOR else None


def open_slave(master: int, flags: int) -> int:
    """TIOCGPTPEER: a new open file description of the slave, or with O_PATH a look at it that opens nothing. It would
    keep O_CLOEXEC among its own flags, and fdinfo show that for every descriptor of it.
    """
    slave = fcntl.ioctl(master, TIOCGPTPEER, flags & ~os.O_CLOEXEC | os.O_NOCTTY)
    os.set_inheritable(slave, False)
    return slave


def session_of(master: int) -> int:
    """The session whose controlling terminal the slave is, by our numbers: 0 when there is none, or it is of no
    namespace below ours.
    """
    try:
        return ask(master, TIOCGSID)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return 0


def events(fd: int) -> int:
    """What poll(2) says. It waits for bytes that the other end has written and that are on their way (n_tty_poll)."""
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLPRI | select.POLLOUT)
    return sum(found for _, found in poll.poll(0))


def unread(fd: int) -> bool:
    """Whether an end holds bytes, or of a master in packet mode a change, that nobody has read. Half a line that is
    being edited does not show.
    """
    return bool(events(fd) & (select.POLLIN | select.POLLPRI)) or ask(fd, FIONREAD) > 0


def new_masters(open_ptmx: Callable[[], int], numbers: Collection[int]) -> dict[int, int]:
    """The masters of new pairs by their numbers; those that somebody has are missing. devpts gives the lowest free
    number: others on the way to the highest are held meanwhile.
    """
    made: dict[int, int] = {}
    with ExitStack() as held, ExitStack() as failing:
        highest = -1
        while highest < max(numbers):
            master = open_ptmx()
            highest = ask(master, TIOCGPTN)
            (failing if highest in numbers else held).callback(os.close, master)
            if highest in numbers:
                made[highest] = master
        failing.pop_all()
    return made
