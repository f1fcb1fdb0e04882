"""Mapped files, the executable, cwd and root of a stopped process."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import F_ADD_SEALS, fcntl
from pathlib import Path

import pytest

from lazyproc.dump.descriptors import Gathered, gather_descriptors
from lazyproc.dump.files import F_SEAL_FUTURE_WRITE, gather_link, gather_mapped_file
from lazyproc.dump.registry import TaskRef
from lazyproc.errors import RestoreError
from lazyproc.kernel import proc
from lazyproc.kernel.sys import syscall
from lazyproc.model import Checkpoint, MemFd, Mm, RegularFile, SharedKind, Vma, VmaKind
from lazyproc.restore.files import make_files
from tests.live.descriptors import at, checkpoint_of, stopped

SYS_MMAP, SYS_IO_URING_SETUP = 9, 425


@contextmanager
def _gathered(body: Callable[[], object]) -> Iterator[tuple[int, Gathered]]:
    with stopped(body) as tasks:
        gathered = gather_descriptors(tasks)
        with gathered.sockets:
            yield tasks[0].pid, gathered


def _file_ids(pid: int, gathered: Gathered, part: str) -> list[int]:
    """The numbers of the files whose mapping's line has `part`."""
    return [
        gather_mapped_file(gathered.registry, pid, entry.start, entry.end, entry)
        for entry in proc.maps(proc.read(pid, "maps"))
        if part in entry.path
    ]


def _regular(gathered: Gathered, number: int) -> RegularFile:
    resource = gathered.files[number].resource
    assert isinstance(resource, RegularFile)
    return resource


_kept: list[mmap.mmap] = []


def _map(path: Path | str, flags: int, access: int = os.O_RDWR) -> None:
    fd = os.open(path, access)
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if access == os.O_RDWR else 0)
    _kept.append(mmap.mmap(fd, 0, flags, prot))
    os.close(fd)


def test_all_parts_of_a_library_are_one_file_with_its_build_id() -> None:
    with _gathered(lambda: None) as (pid, gathered):
        numbers = _file_ids(pid, gathered, "/libc.so.6")
        assert len(numbers) > 2
        assert len(set(numbers)) == 1
        resource = _regular(gathered, numbers[0])
        text = subprocess.run(
            ["readelf", "-n", resource.path], capture_output=True, text=True, check=True
        ).stdout
        assert resource.build_id.hex() in text
        assert len(resource.build_id) == 20
        assert resource.size == os.stat(resource.path).st_size
        assert gathered.files[numbers[0]].flags == os.O_RDONLY


def test_access_follows_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"x" * 8192)

    def body() -> None:
        _map(path, mmap.MAP_SHARED)
        _map(path, mmap.MAP_PRIVATE)
        _map(path, mmap.MAP_SHARED, os.O_RDONLY)

    with _gathered(body) as (pid, gathered):
        numbers = _file_ids(pid, gathered, str(path))
        flags = sorted(gathered.files[number].flags for number in numbers)
        assert flags == [os.O_RDONLY, os.O_RDONLY, os.O_RDWR]
        assert len(set(numbers)) == 2


def test_deleted_mapping_travels_with_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "gone"
    path.write_bytes(b"x" * 8192)

    def body() -> None:
        _map(path, mmap.MAP_SHARED)
        _kept[-1][4096:4100] = b"mine"
        path.unlink()

    with _gathered(body) as (pid, gathered):
        (number,) = _file_ids(pid, gathered, str(path))
        with make_files(checkpoint_of(gathered), open_path=os.open) as done:
            with mmap.mmap(done.files[number], 0) as again:
                assert again[4090:4102] == b"xxxxxxminexx"
            assert os.readlink(f"/proc/self/fd/{done.files[number]}") == f"{path} (deleted)"


def test_mapped_memfd_is_one_object_with_its_descriptors() -> None:
    def body() -> None:
        at(10, os.memfd_create("both"))
        os.ftruncate(10, 8192)
        _map("/proc/self/fd/10", mmap.MAP_SHARED)
        at(11, os.memfd_create("mapped"))
        os.ftruncate(11, 4096)
        syscall(SYS_MMAP, 0, 4096, mmap.PROT_READ, mmap.MAP_SHARED, 11, 0)  # mmap.mmap keeps a descriptor
        os.close(11)

    with _gathered(body) as (pid, gathered):
        (row,) = [row for row in gathered.descriptors[pid] if row.fd == 10]
        (both,), (mapped,) = (_file_ids(pid, gathered, f"memfd:{name}") for name in ("both", "mapped"))
        resources = [gathered.files[number].resource for number in (row.file_id, both, mapped)]
        assert all(isinstance(resource, MemFd) for resource in resources)
        objects = [resource.object_id for resource in resources if isinstance(resource, MemFd)]
        assert objects[0] == objects[1] != objects[2]
        shared = gathered.shared[objects[0]], gathered.shared[objects[2]]
        assert [memory.lazy for memory in shared] == [False, True]
        assert [memory.size for memory in shared] == [8192, 4096]
        assert {memory.kind for memory in shared} == {SharedKind.MEMFD}


def test_a_memfd_whose_content_may_not_be_removed_cannot_come_later() -> None:
    def body() -> None:
        at(10, os.memfd_create("sealed", os.MFD_ALLOW_SEALING))
        os.ftruncate(10, 4096)
        syscall(SYS_MMAP, 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, 10, 0)
        fcntl(10, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        os.close(10)

    with _gathered(body) as (pid, gathered):
        _file_ids(pid, gathered, "memfd:sealed")
        (memory,) = gathered.shared.values()
        assert (memory.lazy, memory.seals) == (False, F_SEAL_FUTURE_WRITE)


def test_executable_cwd_and_root(tmp_path: Path) -> None:
    with _gathered(lambda: os.chdir(tmp_path)) as (pid, gathered):
        names = {name: gather_link(gathered.registry, pid, name) for name in ("exe", "cwd", "root")}
        assert _regular(gathered, names["cwd"]).path == str(tmp_path)
        assert _regular(gathered, names["root"]).path == "/"
        exe = _regular(gathered, names["exe"])
        assert exe.path == os.readlink("/proc/self/exe")
        assert names["exe"] in _file_ids(pid, gathered, exe.path)  # the mapping of it is the same file


def test_deleted_executable_can_be_executed_again(tmp_path: Path) -> None:
    path = tmp_path / "sleep"
    shutil.copy("/bin/sleep", path)

    with _running([str(path), "1000"]) as task:
        path.unlink()
        gathered = gather_descriptors([task])
        with gathered.sockets:
            number = gather_link(gathered.registry, task.pid, "exe")
    only_that = dataclasses.replace(checkpoint_of(gathered), files={number: gathered.files[number]})
    with make_files(only_that, open_path=os.open) as done:
        exe = os.dup(done.files[number])
    assert os.fstat(exe).st_nlink == 0
    result = subprocess.run([f"/proc/self/fd/{exe}", "0"], pass_fds=[exe], check=False)
    os.close(exe)
    assert result.returncode == 0


@contextmanager
def _running(argv: list[str]) -> Iterator[TaskRef]:
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        pidfd = os.pidfd_open(process.pid)
        try:
            yield TaskRef(process.pid, process.pid, pidfd)
        finally:
            os.close(pidfd)
            process.kill()


def test_mapped_ring_is_an_obstacle() -> None:
    def body() -> None:
        parameters = ctypes.create_string_buffer(120)
        ring = syscall(SYS_IO_URING_SETUP, 4, ctypes.addressof(parameters))
        syscall(SYS_MMAP, 0, 4096, mmap.PROT_READ, mmap.MAP_SHARED, ring, 0)

    with _gathered(body) as (pid, gathered):
        before = len(gathered.obstacles)
        numbers = _file_ids(pid, gathered, "io_uring")
        assert numbers == [0]
        obstacle = gathered.obstacles[before]
        assert obstacle.why == "anon_inode:[io_uring] is no file on a disk"
        assert re.fullmatch(r"mapping 0x[0-9a-f]+-0x[0-9a-f]+", obstacle.where)


def _with_private_mapping(checkpoint: Checkpoint, number: int) -> Checkpoint:
    vma = Vma(0x1000, 0x2000, mmap.PROT_READ, mmap.MAP_PRIVATE, VmaKind.FILE, file_id=number)
    mm = Mm(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, (), 0, 1, (vma,))
    return dataclasses.replace(checkpoint, tasks=(dataclasses.replace(checkpoint.root, mm=mm),))


def test_another_size_or_build_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    shutil.copy(os.path.realpath("/lib/x86_64-linux-gnu/libz.so.1"), path)

    with _gathered(lambda: _map(path, mmap.MAP_PRIVATE, os.O_RDONLY)) as (pid, gathered):
        (number,) = _file_ids(pid, gathered, str(path))
    checkpoint = _with_private_mapping(checkpoint_of(gathered), number)
    with make_files(checkpoint, open_path=os.open) as done:
        assert os.fstat(done.files[number]).st_size == path.stat().st_size
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(
        RestoreError, match=r"lib.so: has \d+ bytes on this host and had \d+ where the process"
    ):
        make_files(checkpoint, open_path=os.open).__enter__()
    shutil.copy(os.path.realpath("/lib/x86_64-linux-gnu/libc.so.6"), path)
    with pytest.raises(
        RestoreError, match=r"lib.so: is another build on this host .*; install the same version"
    ):
        make_files(checkpoint, open_path=os.open).__enter__()
