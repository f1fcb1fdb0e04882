"""A real CRIU 4.2 to test against: `criu()` and `crit()` are the beginnings of command lines.

Debian 12's criu does not start on new kernels, so Debian forky's is fetched with apt into a folder of its own
(private sources list and state, the machine's own mirrors and keys), unpacked there and started through that
folder's dynamic linker. Nothing is installed. The folder is $XDG_CACHE_HOME/lazyproc-peer, or
/var/tmp/lazyproc-peer.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from tests.fetched import filled, run

_SUITE = "forky"
_PACKAGES = ("criu", "python3-pycriu")
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_ROOT = "root"


def criu() -> list[str]:
    """The command line of CRIU 4.2 up to its first argument; ends the test when there is none."""
    return [*_linker(), str(_root() / "usr/sbin/criu")]


def crit() -> list[str]:
    """The same of crit, CRIU's image tool."""
    return [*pycriu_python(), "-m", "crit"]


def pycriu_python() -> list[str]:
    """A Python interpreter that can import pycriu."""
    root = _root()
    # PYTHON* of our own environment name folders of another Python.
    environment = ["env", "-i", f"PYTHONHOME={root}/usr", f"PYTHONPATH={root}/usr/lib/python3/dist-packages"]
    interpreter = sorted(root.glob("usr/bin/python3.[0-9]*"))[-1]
    return [*environment, *_linker(), str(interpreter)]


def _linker() -> list[str]:
    libraries = _root() / _LIBRARIES
    return [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]


@cache
def _root() -> Path:
    """The folder with the unpacked packages, filled at the first use."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "/var/tmp") / "lazyproc-peer"
    remedy = f"make Debian's suite {_SUITE} reachable for apt-get"
    return filled(base, _fill, "there is no CRIU 4.2 to test against", remedy) / _ROOT


def _fill(base: Path) -> None:
    root = base / _ROOT
    for folder in (root, base / "lists/partial", base / "archives/partial"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    (base / "sources.list").write_text(f"deb {_mirror()} {_SUITE} main\n")
    (base / "status").write_text("")  # as if nothing were installed: apt then fetches every dependency
    options = [
        f"-oDir::Etc::sourcelist={base}/sources.list",
        "-oDir::Etc::sourceparts=/dev/null",
        f"-oDir::State={base}",
        f"-oDir::State::status={base}/status",
        f"-oDir::Cache={base}",
        "-oAcquire::Languages=none",
        "-oAPT::Install-Recommends=0",
        "-oAPT::Sandbox::User=root",
    ]
    run("apt-get", *options, "-q", "update")
    run("apt-get", *options, "-q", "-y", "--download-only", "install", *_PACKAGES)
    for package in sorted((base / "archives").glob("*.deb")):
        run("dpkg", "-x", str(package), str(root))
    shutil.rmtree(base / "archives")


def _mirror() -> str:
    """The address of the Debian mirror that this machine uses."""
    lines = run("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    for line in lines.splitlines():
        origin, _, address = line.partition(" ")
        if origin == "Debian" and "security" not in address:
            return address
    raise OSError("apt knows no mirror of Debian")
