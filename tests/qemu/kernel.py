"""The kernel that test guests run, and what they find in memory at their start.

Debian's cloud kernel is fetched with apt and unpacked under build/guest; /init is tests/qemu/guest.c. For KVM there is
tests/qemu/mini.c, which needs no kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from lazyproc.facts import dataclass
from tests.fetched import filled, run
from tests.live.programs import WARNINGS
from tests.needs import require

_BUILD = Path(__file__).parents[2] / "build" / "guest"
_SOURCES = Path(__file__).parent
_MINI = (
    "-m32",
    "-ffreestanding",
    "-nostdlib",
    "-fno-pic",
    "-no-pie",
    "-fno-stack-protector",
    "-mgeneral-regs-only",
)
_MINI_PLACES = ("-Wl,--section-start=.multiboot=0x101000", "-Wl,-Ttext=0x200000", "-Wl,--build-id=none")
_PACKAGE = "linux-image-cloud-amd64"
# What a kernel has built in is not there to be loaded.
_MODULES = (
    "virtio",
    "virtio_ring",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
)
_REGULAR, _FOLDER = 0o100755, 0o040755


@dataclass(frozen=True, slots=True)
class Boot:
    """Files for QEMU's -kernel and -initrd."""

    kernel: Path
    initramfs: Path


@cache
def boot() -> Boot:
    """Ends the test when there is no kernel to be had."""
    base = filled(
        _BUILD,
        _fetch,
        "there is no kernel for guests",
        f"make `apt-get download {_PACKAGE}` work (apt-get update)",
    )
    kernel = base / "vmlinuz"
    return Boot(kernel, _initramfs(base))


def _fetch(base: Path) -> None:
    package = _newest_kernel()
    root = base / "package"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    run("apt-get", "-q", "-oAPT::Sandbox::User=root", "download", package, cwd=root)
    (archive,) = root.glob("*.deb")
    run("dpkg", "-x", str(archive), str(root))
    (kernel,) = root.glob("boot/vmlinuz-*")
    kernel.rename(base / "vmlinuz")
    modules = base / "modules"
    modules.mkdir(exist_ok=True)
    for name in _MODULES:
        for module in root.glob(f"**/{name}.ko*"):
            module.rename(modules / module.name)
    shutil.rmtree(root)


def _newest_kernel() -> str:
    """The package that holds the kernel; the one asked for only depends on it."""
    try:
        found = run("apt-cache", "depends", _PACKAGE)
    except subprocess.CalledProcessError:  # the lists of packages may be absent
        run("apt-get", "-q", "update")
        found = run("apt-cache", "depends", _PACKAGE)
    name = re.search(r"Depends: (linux-image-\S+)", found)
    if name is None:
        raise OSError(f"{_PACKAGE} depends on no kernel")
    return name[1]


def _initramfs(base: Path) -> Path:
    """Built anew when /init has changed, or what is written here."""
    archive, init = base / "initramfs", _linked("guest", "-D_GNU_SOURCE", "-pthread")
    newest = max(path.stat().st_mtime_ns for path in (init, Path(__file__)))
    if archive.exists() and archive.stat().st_mtime_ns > newest:
        return archive
    fresh = base / f"initramfs.{os.getpid()}"
    files = {"init": init.read_bytes()}
    modules = {path.name.partition(".")[0]: path.read_bytes() for path in (base / "modules").iterdir()}
    for number, name in enumerate(loading_order(modules)):
        files[f"modules/{number:02}-{name}.ko"] = modules[name]
    fresh.write_bytes(b"".join(_newc(["dev", "modules"], files)))
    fresh.rename(archive)
    return archive


def loading_order(modules: Mapping[str, bytes]) -> list[str]:
    """Each after those that it depends on, which changes from one kernel to the next (depmod(8) reads the same)."""
    needs = {name: _depends(module) & modules.keys() for name, module in modules.items()}
    return list(TopologicalSorter(needs).static_order())


def _depends(module: bytes) -> set[str]:
    found = re.search(rb"\0depends=([\w,-]*)\0", module)
    return set(found[1].decode().split(",")) if found else set()


def mini() -> Path:
    """An image for QEMU's -kernel that is the whole guest."""
    return _linked("mini", *_MINI, *_MINI_PLACES)


def _linked(name: str, *options: str) -> Path:
    """The executable of tests/qemu/NAME.c, linked statically, compiled when that is newer."""
    source, binary = _SOURCES / f"{name}.c", _BUILD / name
    if binary.exists() and binary.stat().st_mtime_ns > source.stat().st_mtime_ns:
        return binary
    _BUILD.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")  # another test session may use the old one
    command = [str(require("gcc")), "-std=gnu11", "-O2", *WARNINGS, "-static", *options]
    subprocess.run([*command, "-o", str(fresh), str(source)], check=True)
    fresh.rename(binary)
    return binary


def _newc(folders: Sequence[str], files: dict[str, bytes]) -> Iterator[bytes]:
    """A cpio archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    for folder in folders:
        yield _entry(folder, _FOLDER, b"")
    for name, content in files.items():
        yield _entry(name, _REGULAR, content)
    yield _entry("TRAILER!!!", 0, b"")


def _entry(name: str, mode: int, content: bytes) -> bytes:
    # ino, mode, uid, gid, nlink, mtime, filesize, dev and rdev, namesize, check
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
