"""The userfaultfd object against the kernel: each outcome and each refusal provoked for real."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lazyproc.errors import HostLacks, RestoreError
from lazyproc.kernel import tracee as ptrace
from lazyproc.model import PAGE
from lazyproc.restore.pages import place
from lazyproc.uffd._pager import ffi
from lazyproc.uffd.device import Feature, Mode, Outcome, Userfaultfd, outcome_of
from tests.live.lazy_rig import ROOT, child, content
from tests.needs import lacking

COPY, ZEROPAGE, WAKE = 1 << 3, 1 << 4, 1 << 2


@contextmanager
def registered(pages: int = 4) -> Iterator[tuple[Userfaultfd, int, mmap.mmap]]:
    memory = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    addr = int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
    with Userfaultfd.open() as uffd:
        uffd.api(Feature(0))
        assert uffd.register(addr, pages * PAGE, Mode.MISSING) & (COPY | ZEROPAGE | WAKE)
        yield uffd, addr, memory
        uffd.unregister(addr, pages * PAGE)


def test_copy_zeropage_and_what_was_there_already() -> None:
    data = content(2)
    with registered() as (uffd, addr, memory):
        placed = uffd.copy(addr, data)
        assert (placed.outcome, placed.length) == (Outcome.INSTALLED, 2 * PAGE)
        assert uffd.zeropage(addr + 2 * PAGE, PAGE).outcome == Outcome.INSTALLED
        again = uffd.copy(addr, data)
        assert (again.outcome, again.length) == (Outcome.PRESENT, 0)
        assert memory[: 3 * PAGE] == data + bytes(PAGE)
        uffd.wake(addr, 4 * PAGE)


def test_a_part_that_was_done_is_told() -> None:
    with registered() as (uffd, addr, _):
        uffd.zeropage(addr + 2 * PAGE, PAGE)
        placed = uffd.copy(addr, content(4))
        assert placed.length == 2 * PAGE
        assert (
            placed.outcome == Outcome.DEFERRED
        )  # EAGAIN: go on from there, and learn of the page that is present


def test_a_page_that_somebody_has_looked_at_before_gets_its_content_all_the_same() -> None:
    """As ps(1) does to the arguments of a process that is being built."""
    data, where = content(6), f"pid {os.getpid()}"
    with registered(6) as (uffd, addr, memory), ptrace.memory(os.getpid()) as written:
        for page in (0, 2, 3, 5):
            uffd.unregister(addr, 6 * PAGE)
            written.read(addr + page * PAGE, 1)
            uffd.register(addr, 6 * PAGE, Mode.MISSING)
        assert uffd.copy(addr, data).outcome == Outcome.PRESENT
        place(uffd, written, addr, data, where)
        assert memory[:] == data
    with registered() as (uffd, addr, _), ptrace.memory(os.getpid()) as written:
        uffd.unregister(addr, PAGE)
        with pytest.raises(RestoreError, match="gone"):
            place(uffd, written, addr, content(1), where)


def test_unregistered_memory_is_gone() -> None:
    with registered() as (uffd, addr, _):
        uffd.unregister(addr, PAGE)
        assert uffd.copy(addr, content(1)).outcome == Outcome.GONE


def test_the_memory_of_a_process_that_ended_is_gone() -> None:
    with child() as process:
        addr = process.call("mmap", length=PAGE)
        uffd = Userfaultfd.from_fd(process.register((addr, PAGE)))
        process.process.kill()
        process.process.wait()
        with uffd:
            assert uffd.copy(addr, content(1)).outcome == Outcome.GONE


def test_poison_is_sigbus() -> None:
    code = (
        "import mmap; from lazyproc.uffd._pager import ffi; from lazyproc.uffd.device import *\n"
        "m = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "addr = int(ffi.cast('uintptr_t', ffi.from_buffer(m)))\n"
        "uffd = Userfaultfd.open(); uffd.api(Feature.POISON); uffd.register(addr, 4096)\n"
        "assert uffd.poison(addr, 4096).outcome == Outcome.INSTALLED\n"
        "m[0]\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    assert ended.returncode == -7


def test_a_real_error_is_raised() -> None:
    with registered() as (uffd, addr, _), pytest.raises(OSError, match="Invalid argument"):
        uffd.copy(addr + 1, content(1))


def test_a_feature_that_the_kernel_lacks() -> None:
    with Userfaultfd.open() as uffd, pytest.raises(HostLacks, match="lacks one of"):
        uffd.api(Feature(1 << 62))


def test_refused_to_somebody_unprivileged() -> None:
    code = (
        "import os, sys; from lazyproc.errors import PermissionDenied; from lazyproc.uffd.device import Userfaultfd\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "Userfaultfd.open(user_mode_only=True).close()\n"
        "try: Userfaultfd.open()\n"
        "except PermissionDenied as error: print(error)\n"
    )
    with open("/proc/sys/vm/unprivileged_userfaultfd") as setting:
        if setting.read().strip() != "0":
            lacking("this host lets everybody have a userfaultfd", "sysctl vm.unprivileged_userfaultfd=0")
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert "/dev/userfaultfd" in ended.stdout
    assert "setfacl" in ended.stdout


def test_closing_is_idempotent_and_detach_hands_over() -> None:
    uffd = Userfaultfd.open()
    fd = uffd.detach()
    uffd.close()
    os.fstat(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (0, Outcome.INSTALLED),
        (errno.EEXIST, Outcome.PRESENT),
        (errno.EAGAIN, Outcome.DEFERRED),
        (errno.ESRCH, Outcome.GONE),
        (errno.ENOENT, Outcome.GONE),
        (errno.ENOSPC, Outcome.GONE),
        (errno.EINVAL, None),
        (errno.EFAULT, None),
    ],
)
def test_outcomes_have_names(error: int, outcome: Outcome | None) -> None:
    assert outcome_of(error) == outcome
