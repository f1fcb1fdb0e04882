"""Holds file locks: lock_holder.py FOLDER CODE runs the code, which takes them, and answers signals from then on.

FOLDER/said gets a line when the code has come to its end, `here` at each SIGUSR1, and what the code itself says.
"""

import fcntl
import os
import signal
import struct
import sys

F_OFD_SETLK = 37


def say(word: str) -> None:
    os.write(_said, word.encode() + b"\n")


def opened(name: str) -> int:
    return os.open(f"{_folder}/{name}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def take(kind: str, fd: int, how: int = fcntl.F_WRLCK) -> None:
    """Waits where it has to, but for a lock of an open file description's bytes."""
    if kind == "flock":
        fcntl.flock(fd, fcntl.LOCK_EX if how == fcntl.F_WRLCK else fcntl.LOCK_SH)
    elif kind == "lease":
        fcntl.fcntl(fd, fcntl.F_SETLEASE, how)
    else:
        command = F_OFD_SETLK if kind == "ofd" else fcntl.F_SETLKW
        fcntl.fcntl(fd, command, struct.pack("hhqqi4x", how, os.SEEK_SET, 10, 10, 0))


def hold() -> None:
    """Until SIGUSR2."""
    say("holds")
    while signal.sigwait({signal.SIGUSR1, signal.SIGUSR2}) == signal.SIGUSR1:
        say("here")


if __name__ == "__main__":
    _folder = sys.argv[1]
    _said = os.open(f"{_folder}/said", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    exec(sys.argv[2])
    hold()
