"""Small programs to be frozen: C in a string. They report through a FIFO, so no descriptor leads to us."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyproc.dump.freeze import FrozenTree, frozen_tree
from lazyproc.dump.gather import dumped
from lazyproc.kernel import proc
from tests.live.programs import WARNINGS

PRELUDE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char **words;

/* One line to whoever waits for it. */
__attribute__((unused)) static void say(const char *format, long a, long b, long c)
{
    int fd;

    do
        fd = open(words[1], O_WRONLY | O_CLOEXEC); /* until there is a reader, or a signal */
    while (fd < 0 && errno == EINTR);
    if (fd < 0 || dprintf(fd, format, a, b, c) < 0 || close(fd) < 0)
        _exit(99);
}

__attribute__((unused)) static long now_ms(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A program of ours; `hear` waits for the next line it says."""

    process: subprocess.Popen[Any]
    fifo: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> str:
        return self.fifo.read_text().strip()


@functools.cache
def _compiled(source: str, flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        code, binary = Path(name, "tracee.c"), Path(name, "tracee")
        code.write_text(f"{PRELUDE}\n{source}")
        subprocess.run(["gcc", "-O1", *WARNINGS, "-pthread", *flags, "-o", binary, code], check=True)
        return binary.read_bytes()


@contextmanager
def tracee(source: str, directory: Path, *arguments: str, flags: tuple[str, ...] = ()) -> Iterator[Running]:
    """Run `int main(int argc, char **argv)` of `source` (with `words = argv;` done) until it has said its first line.

    It is killed at the end if it still runs.
    """
    binary, fifo = directory / "tracee", directory / "fifo"
    binary.write_bytes(_compiled(source, flags))
    binary.chmod(0o755)
    os.mkfifo(fifo)
    null = subprocess.DEVNULL
    process = subprocess.Popen(
        [binary, fifo, *arguments], stdin=null, stdout=null, stderr=null, start_new_session=True
    )
    try:
        running = Running(process, fifo)
        running.hear()
        yield running
    finally:
        process.kill()
        process.wait()


@contextmanager
def frozen_and_dumped(pid: int) -> Iterator[FrozenTree]:
    """A dump that is taken back: everything a dump does to the source has been done, and it is still frozen."""
    with frozen_tree(pid) as tree, dumped(tree):
        yield tree


def freeze_and_let_go(pid: int) -> None:
    with frozen_and_dumped(pid):
        pass


def state_of(pid: int) -> str:
    return proc.stat(proc.read(pid, "stat")).state
