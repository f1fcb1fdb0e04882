"""The state of a stopped guest's devices, as a migration stream without RAM (qemu's migration/savevm.c).

"xen-save-devices-state" is not Xen's alone: it writes every device that is no RAM. What a destination wants besides is
the section with the machine's name before the first device.
"""

from __future__ import annotations

import os

from lazyproc.errors import ProtocolError
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.stream import CONFIGURATION, HEADER, configuration

NAME = "devices.img"  # among the images of a hand-over
SAVE_S = 30.0


def saved(qmp: Qmp, machine: str, *, ran: bool = True) -> bytes:
    """What "migrate-incoming" of a QEMU of the same machine takes. The guest must be stopped; its disks are let go if
    it `ran` before. One that was paused keeps them: only `cont` takes them back, and QEMU aborts when disks that were
    let go are to be let go again (block.c bdrv_inactivate_recurse()).

    By a descriptor that is passed along: QEMU may not be allowed to make files. Raises Refusal, ConnectionLost,
    ProtocolError for what is no such stream.
    """
    file = os.memfd_create("lazyproc-devices", os.MFD_CLOEXEC)
    try:
        # QEMU takes from the set what was opened as it would open it: for writing only (util/osdep.c).
        writing = os.open(f"/proc/self/fd/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            number = int(qmp.execute("add-fd", fds=[writing])["fdset-id"])
        finally:
            os.close(writing)
        try:
            name = f"/dev/fdset/{number}"
            qmp.execute("xen-save-devices-state", {"filename": name, "live": ran}, timeout=SAVE_S)
        finally:
            qmp.execute("remove-fd", {"fdset-id": number})
        return stream(os.pread(file, os.fstat(file).st_size, 0), machine)
    finally:
        os.close(file)


def stream(devices: bytes, machine: str) -> bytes:
    """With the section that names the machine. Raises ProtocolError."""
    if not devices.startswith(HEADER):
        raise ProtocolError(f"QEMU's device state begins with {devices[: len(HEADER)].hex()}")
    rest = devices[len(HEADER) :]
    if rest.startswith(bytes([CONFIGURATION])):
        return devices
    return HEADER + configuration(machine) + rest
