"""Disk images that a QEMU lets go of, and has to take again.

With the devices it saves the source opens its images for reading only, and a destination has them so until its guest
runs. Both open them by name again (block/file-posix.c raw_reconfigure_getfd), as whom they run by then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

from lazyproc.errors import Obstacle
from lazyproc.kernel import proc
from lazyproc.qemu.qmp import Qmp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lazyproc.restore.users import User

FDSET = "/dev/fdset/"  # descriptors that QEMU was given


def out_of_reach(qmp: Qmp, pid: int) -> Iterator[Obstacle]:
    """Those that QEMU, process `pid`, may not write by name: it has dropped its rights since it was started. Raises
    NoSuchProcess.
    """
    status = proc.status(proc.read(pid, "status"))
    if status.uid.fs == 0:
        return
    from lazyproc.restore.users import User

    user = User(status.uid.fs, status.gid.fs, status.groups)
    for path in sorted(set(_written(qmp))):
        if not _may_write(pid, user, path):
            yield Obstacle(
                0,
                f"image {path}",
                f"could not be opened again by uid {user.uid}, as whom QEMU runs",
                "let that user write it",
            )


def _written(qmp: Qmp) -> Iterator[str]:
    for node in qmp.execute("query-named-block-nodes", {"flat": True}):
        if node["drv"] in ("file", "host_device") and not node["ro"] and not node["file"].startswith(FDSET):
            yield str(node["file"])


def _may_write(pid: int, user: User, path: str) -> bool:
    """In its root and working directory, which only we may look up there."""
    from lazyproc.restore.users import acting_as

    home = os.open(f"/proc/{pid}/{'root' if path.startswith('/') else 'cwd'}", os.O_PATH | os.O_CLOEXEC)
    try:
        with acting_as(user) if os.geteuid() == 0 else nullcontext():
            return os.access(path.lstrip("/"), os.R_OK | os.W_OK, dir_fd=home, effective_ids=True)
    finally:
        os.close(home)
