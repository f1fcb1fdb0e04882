"""What of a guest cannot be moved is named while it runs on."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

import lazyproc
from lazyproc.errors import PermissionDenied, ProtocolError
from lazyproc.facts import replace
from lazyproc.qemu import ram
from lazyproc.qemu.guest import look
from tests.live.moving import CLI
from tests.qemu.guests import AS_NOBODY, Guest, Serial, Shape, beating, empty_disk, monitor, started

SMALL = Shape(memory=96, visited=4)


def explained(guest: Guest, expected: int) -> dict[str, Any]:
    argv = [*CLI, "explain", "--qemu", str(guest.qmp), "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == expected, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_nothing_stands_in_the_way(tmp_path: Path) -> None:
    """And its RAM is where QEMU itself says, which names one address."""
    spare = ("-object", "memory-backend-ram,id=spare,size=1M")  # which no device has
    with beating(SMALL, tmp_path, "-device", "VGA", *spare) as guest:
        assert explained(guest, 0)["obstacles"] == []
        with monitor(guest) as qmp:
            found = {each.name: each for each in look(qmp).blocks}
            (line,) = qmp.hmp("gpa2hva 0").splitlines()
        assert int(line.split()[-1], 16) == found["pc.ram"].addr
        assert {"pc.bios", "pc.rom", "0000:00:02.0/vga.vram"} < found.keys()
        with open(f"/proc/{guest.pid}/mem", "rb") as memory:
            memory.seek(found["pc.bios"].addr)
            assert b"SeaBIOS" in memory.read(found["pc.bios"].used)
        guest.serial.wait(5)
        guest.serial.check()


def test_a_list_of_blocks_that_does_not_point_back_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same blocks are found, each by its name."""
    walked: list[list[int]] = []
    walk = ram._walk

    def noted(mem: int, at: int, named: dict[str, ram.Named]) -> Iterator[int]:
        walked.append([])
        for place in walk(mem, at, named):
            walked[-1].append(place)
            yield place

    monkeypatch.setattr(ram, "_walk", noted)
    with (
        Serial(tmp_path / "serial") as serial,
        started(SMALL, serial, tmp_path, "-S") as guest,
        monitor(guest) as qmp,
    ):
        named = ram.rows(qmp.hmp("info ramblock"))
        found = ram.blocks(guest.pid, named)
        (places,) = walked
        assert len(places) == len(found) == len(named) > 2
        with open(f"/proc/{guest.pid}/mem", "wb") as memory:
            memory.seek(places[-1] // 8 * 8 + ram.NAME_SIZE + 16)  # QLIST_ENTRY.le_prev
            memory.write(bytes(8))
        assert ram.blocks(guest.pid, named) == found
        assert len(walked) > 2


def test_a_qemu_whose_memory_may_not_be_read_takes_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Yama, which lets a user see another process of his, but not its memory."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionDenied, match=rf"pid {os.getpid()}: .*; run lazyproc as root"):
        ram.blocks(os.getpid(), [])


def test_each_obstacle_is_named(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with beating(
        Shape(memory=96, visited=4, slots=True, disk=empty_disk(tmp_path)),
        tmp_path,
        *("-object", f"memory-backend-file,id=mem,share=on,size=1M,mem-path={tmp_path / 'mem'}"),
        *("-device", "ivshmem-plain,memdev=mem"),
        *("-object", "memory-backend-ram,id=pmem,size=128M", "-device", "virtio-pmem-pci,memdev=pmem"),
        *("-drive", f"if=none,id=fat,file=fat:rw:{shared},format=raw"),
    ) as guest:
        with monitor(guest) as qmp:
            target = {"device": "disk", "target": str(tmp_path / "copy"), "sync": "full", "speed": 1}
            qmp.execute("drive-mirror", {**target, "format": "raw"})
        words = [f"{each['where']}: {each['why']}" for each in explained(guest, 3)["obstacles"]]
        for wanted in (
            "device ivshmem-plain: lives outside",
            "device virtio-pmem: has memory",
            "block job disk: is running",
            "vvfat",
        ):
            assert any(wanted in each for each in words), words


def test_an_image_that_cannot_be_taken_again_is_named(tmp_path: Path) -> None:
    """QEMU has opened it as root; to go on after a failure it would have to open it as nobody."""
    with tempfile.TemporaryDirectory() as folder, Serial(tmp_path / "serial") as serial:
        disk = empty_disk(Path(folder))
        disk.parent.chmod(0o755)
        shape = replace(SMALL, disk=disk, options=AS_NOBODY)
        with started(shape, serial, tmp_path) as guest:
            monitor(guest).close()
            (obstacle,) = lazyproc.explain_guest(str(guest.qmp))
            assert obstacle.where == f"image {disk}"
            disk.chmod(0o666)
            assert not lazyproc.explain_guest(str(guest.qmp))


def test_an_image_that_has_lost_its_name_is_named(tmp_path: Path) -> None:
    """Another QEMU would have another one, and this one if it had to go on after a failure. By links it is the same."""
    disk, link = empty_disk(tmp_path), tmp_path / "link"
    link.symlink_to(disk)
    shape = replace(SMALL, disk=link)
    with Serial(tmp_path / "serial") as serial, started(shape, serial, tmp_path, "-S") as guest:
        monitor(guest).close()
        wanted = f"image {link}: is not what QEMU has open"
        assert not any("image" in each for each in named(guest))
        disk.rename(tmp_path / "kept")
        assert any(wanted in each for each in named(guest))
        empty_disk(tmp_path)
        assert any(wanted in each for each in named(guest))
        (tmp_path / "kept").rename(disk)
        assert not any("image" in each for each in named(guest))


def test_what_snapshot_writes_to_stays_behind(tmp_path: Path) -> None:
    shape = replace(SMALL, disk=empty_disk(tmp_path))
    with (
        Serial(tmp_path / "serial") as serial,
        started(shape, serial, tmp_path, "-S", "-snapshot") as guest,
    ):
        monitor(guest).close()
        assert any("-snapshot" in each for each in named(guest))


def named(guest: Guest) -> list[str]:
    return [f"{each.where}: {each.why}" for each in lazyproc.explain_guest(str(guest.qmp))]


def test_a_guest_that_is_still_coming_cannot_leave(tmp_path: Path) -> None:
    with (
        Serial(tmp_path / "serial") as serial,
        started(SMALL, serial, tmp_path, "-incoming", "defer") as guest,
    ):
        monitor(guest).close()
        obstacles = lazyproc.explain_guest(str(guest.qmp))
        assert [each.why for each in obstacles] == ["is inmigrate"]


def test_the_list_of_blocks_is_read() -> None:
    text = """\
              Block Name    PSize              Offset               Used              Total
                     ram    2 MiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
    /rom@etc/acpi/tables    4 KiB  0x0000000008080000 0x0000000000020000 0x0000000000200000
                             4 KiB  0x0000000000000000 0x0000000000100000 0x0000000000100000
  /rom@genroms/my own.rom    4 KiB  0x00000000080a0000 0x0000000000001000 0x0000000000001000
"""
    assert ram.rows(text) == (
        ram.Named("ram", 2 << 20, 128 << 20, 128 << 20),
        ram.Named("/rom@etc/acpi/tables", 4096, 1 << 17, 2 << 20),
        ram.Named("/rom@genroms/my own.rom", 4096, 4096, 4096),
    )


def test_a_line_of_a_newer_qemu_is_read() -> None:
    text = (
        " Block Name PSize Offset Used Total HVA RO\r\n"
        " pc.ram 4 KiB 0x0000 0x1000 0x2000 0x00007f0000000000 rw\r\n"
    )
    assert ram.rows(text) == (ram.Named("pc.ram", 4096, 4096, 8192),)


def test_a_block_that_cannot_be_read_is_not_left_out() -> None:
    with pytest.raises(ProtocolError, match="vga"):
        ram.rows(" Block Name PSize Offset Used Total\n vga.vram 4 PiB 0x0 0x1000 0x1000\n")


@pytest.mark.parametrize(
    ("name", "value"), [("name", "ram"), ("total", 8192), ("shared", True), ("page_size", 2 << 20)]
)
def test_another_guest_is_not_taken_for_the_same(name: str, value: object) -> None:
    ours = ram.Block("pc.ram", 4096, 4096, 4096, False, 1 << 30, 0)
    assert not list(ram.differences([ours], [ours]))
    found = list(ram.differences([ours], [replace(ours, **{name: value})]))  # type: ignore[arg-type]
    assert {each.where for each in found} >= {"RAM block pc.ram"}
