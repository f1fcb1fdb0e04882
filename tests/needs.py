"""What a test needs from the machine: where it is missing, CI fails and a developer reads how to mend it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

_PACKAGES = {
    "gcc": "gcc",
    "gdb": "gdb",
    "ip": "iproute2",
    "libvirtd": "libvirt-daemon-system libvirt-daemon-driver-qemu",
    "losetup": "mount",
    "mariadbd": "mariadb-server",
    "mkfs.ext4": "e2fsprogs",
    "nft": "nftables",
    "nginx": "nginx-light",
    "nsenter": "util-linux",
    "pgbench": "postgresql-contrib",
    "postgres": "postgresql",
    "qemu-system-x86_64": "qemu-system-x86",
    "redis-benchmark": "redis-tools",
    "redis-cli": "redis-tools",
    "redis-server": "redis-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "strace": "strace",
    "virsh": "libvirt-clients",
}
# Debian keeps the server's programs out of PATH.
_ELSEWHERE = (
    "/usr/sbin",
    "/sbin",
    *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)),
)


def lacking(what: str, remedy: str) -> NoReturn:
    """Ends the test: fails it with CI=true in the environment, skips it otherwise."""
    words = f"{what}; {remedy}"
    if os.environ.get("CI") == "true":
        pytest.fail(words, pytrace=False)
    pytest.skip(words)


def require(tool: str) -> Path:
    """The path of a command."""
    found = shutil.which(tool, path=os.pathsep.join((os.environ.get("PATH", os.defpath), *_ELSEWHERE)))
    if found is None:
        lacking(f"the command {tool} is missing", f"apt install {_PACKAGES.get(tool, tool)}")
    return Path(found)


def require_root() -> None:
    if os.geteuid() != 0:
        lacking("needs root", "run the tests with sudo")


def require_kernel_threads() -> None:
    """kthreadd is pid 2, where its pid namespace is to be seen at all."""
    name = Path("/proc/2/comm")
    if not name.exists() or name.read_text() != "kthreadd\n":
        lacking("kernel threads cannot be seen from this pid namespace", "run the tests outside of it")
