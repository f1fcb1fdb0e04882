"""What a running QEMU is, before anything is done to it, and what of it cannot be moved."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from lazyproc.errors import NoSuchProcess, Obstacle
from lazyproc.facts import dataclass, replace
from lazyproc.kernel import proc
from lazyproc.kernel.sockdiag import unix_sockets
from lazyproc.model import PAGE
from lazyproc.pages.frozen import Place
from lazyproc.qemu.disks import out_of_reach
from lazyproc.qemu.files import files
from lazyproc.qemu.qmp import Qmp
from lazyproc.qemu.ram import Block, blocks, rows

STATES = ("running", "paused")  # RunState in which a guest can be taken
NEEDED = ("xen-save-devices-state", "add-fd", "human-monitor-command")
# Of what "info qtree" shows.
IMMOVABLE = ("vfio-", "vhost-user", "ivshmem")
UNNAMED = ("virtio-pmem", "cxl-type3", "sgx-epc")  # their memory is in no RAM block that has a name
# Of what "info network" shows: others than QEMU write to the RAM of the guest, where no userfaultfd of QEMU's sees it.
OUTSIDE = ("vhost-user", "vhost-vdpa")
AS_ITSELF = "or move the guest with QEMU's own migration"

Plugged = tuple[tuple[str, int], ...]  # memory devices: the object that is each, and where the guest has it


@dataclass(frozen=True, slots=True)
class Guest:
    """`qmp` is the path of its monitor, `started` tells its process from a later one with its number."""

    qmp: str
    pid: int
    started: int  # clock ticks since boot
    machine: str  # "pc-i440fx-7.2"
    version: str  # "7.2.22"
    running: bool
    blocks: tuple[Block, ...]
    plugged: Plugged = ()

    def places(self) -> tuple[Place, ...]:
        """Where the pages of the blocks are."""
        return tuple(Place(each.object, 0, each.used, self.pid, each.addr) for each in self.blocks)

    @property
    def pages(self) -> int:
        """All of its RAM."""
        return sum(each.used for each in self.blocks) // PAGE

    def offer(self) -> dict[str, Any]:
        """What a destination has to know before it is stopped."""
        return {
            "machine": self.machine,
            "version": self.version,
            "running": self.running,
            "blocks": [each.row() for each in self.blocks],
            "plugged": [[*each] for each in self.plugged],
            "files": files(self.pid, self.blocks),
        }


def to_facts(guest: Guest) -> dict[str, Any]:
    """For a journal."""
    places = [each.addr for each in guest.blocks]
    return {
        **guest.offer(), "qmp": guest.qmp, "pid": guest.pid, "started": guest.started, "places": places
    }  # fmt: skip


def from_facts(facts: Mapping[str, Any]) -> Guest:
    """What `to_facts` gave. Raises KeyError, TypeError, ValueError for anything else."""
    found = tuple(
        Block.of(number, row, int(addr))
        for number, (row, addr) in enumerate(zip(facts["blocks"], facts["places"], strict=True))
    )
    return Guest(
        str(facts["qmp"]),
        int(facts["pid"]),
        int(facts["started"]),
        str(facts["machine"]),
        str(facts["version"]),
        facts["running"] is True,
        found,
        plugged_of(facts),
    )


def look(qmp: Qmp) -> Guest:
    """The guest behind a monitor, which runs on. Raises NoSuchProcess when QEMU is in no sight, HostLacks, and what
    `Qmp.execute` does.
    """
    guest = glance(qmp)
    return replace(guest, blocks=blocks(guest.pid, rows(qmp.hmp("info ramblock"))))


def glance(qmp: Qmp) -> Guest:
    """As `look`, without its RAM, which takes longest to find."""
    pid = process_behind(qmp)
    status = qmp.execute("query-status")
    return Guest(
        qmp=os.path.abspath(qmp.path),
        pid=pid,
        started=proc.stat(proc.read(pid, "stat")).start_time,
        machine=machine_of(qmp),
        version=".".join(map(str, qmp.version)),
        running=status["running"] is True,
        blocks=(),
        plugged=plugged(qmp),
    )


def plugged(qmp: Qmp) -> Plugged:
    """By default each is behind what was plugged before, and no section of the devices' state says where it is."""
    found = (each["data"] for each in qmp.execute("query-memory-devices"))
    return tuple(
        (str(each["memdev"]), int(each.get("addr", each.get("memaddr"))))
        for each in found
        if "memdev" in each
    )


def plugged_of(facts: Mapping[str, Any]) -> Plugged:
    """Those of an offer; of an older lazyproc none. Raises TypeError, ValueError."""
    return tuple((str(name), int(addr)) for name, addr in facts.get("plugged", ()))


def misplaced(ours: Plugged, theirs: Plugged) -> Iterator[Obstacle]:
    """What the guest would have elsewhere than it had."""
    places = dict(ours)
    for name, addr in theirs:
        if places.get(name, addr) != addr:
            yield Obstacle(
                0,
                f"memory {name}",
                f"is at {places[name]:#x} there, and the guest has it at {addr:#x}",
                "name its place on the command line there (-device pc-dimm,addr=...)",
            )


def machine_of(qmp: Qmp) -> str:
    """With its version, whatever alias it was started by."""
    name = str(qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
    return name.removesuffix("-machine")


def process_behind(qmp: Qmp) -> int:
    """Who has the other end of the connection: who has begun to listen may be somebody who passed the socket on."""
    own = unix_sockets().get(qmp.inode())
    link = f"socket:[{own.peer if own else 0}]"
    pids = [qmp.peer_pid(), *(int(name) for name in os.listdir("/proc") if name.isdecimal())]
    for pid in pids:
        with suppress(OSError):
            for number in os.listdir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{number}") == link:
                        return pid
    raise NoSuchProcess(
        "the QEMU behind this monitor is no process that can be seen from here",
        where=qmp.path,
        remedy="run lazyproc as root, in the pid namespace of QEMU or above it",
    )


def _misses_pages(pid: int) -> bool:
    """Whoever brings them leaves it a userfaultfd until the last has come. Raises NoSuchProcess."""
    for number in proc.descriptor_numbers(pid):
        with suppress(OSError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[userfaultfd]":
                return True
    return False


def outside(text: str) -> Iterator[tuple[str, str]]:
    """Name and kind of the backends in what "info network" prints (net/net.c print_net_client) that are processes of
    their own, or hardware.
    """
    for name, kind in re.findall(r"(?m)^[ \\]*(\S+): index=\d+,type=([\w-]+),", text):
        if kind in OUTSIDE:
            yield name, kind


def obstacles(qmp: Qmp, guest: Guest) -> Iterator[Obstacle]:
    """Everything of it that cannot be moved."""
    status = str(qmp.execute("query-status")["status"])
    if status not in STATES:
        yield Obstacle(guest.pid, "guest", f"is {status}", "wait until it runs or is paused")
    if _misses_pages(guest.pid):
        why = "has not got all of its memory yet, which would be zeros"
        yield Obstacle(
            guest.pid, "guest", why, "wait until the move that brings it is over (lazyproc sessions)"
        )
    known = {str(each["name"]) for each in qmp.execute("query-commands")}
    for name in NEEDED:
        if name not in known:
            yield Obstacle(guest.pid, "QEMU", f"has no {name}", f"use a QEMU that has, {AS_ITSELF}")
    migration = qmp.execute("query-migrate")
    if migration.get("status") in ("setup", "active", "postcopy-active", "postcopy-paused", "device"):
        yield Obstacle(guest.pid, "guest", "is being migrated", "wait for the end of that, or cancel it")
    for reason in migration.get("blocked-reasons", ()):
        yield Obstacle(guest.pid, "guest", f"cannot be migrated: {reason}", "take away what it names")
    for device in re.findall(r"(?m)^ *dev: ([^,\s]+)", qmp.hmp("info qtree")):
        if device.startswith(IMMOVABLE):
            yield Obstacle(guest.pid, f"device {device}", "lives outside of QEMU", "unplug it (device_del)")
        if device.startswith(UNNAMED):
            why = "has memory of the guest's that QEMU does not count as its RAM"
            yield Obstacle(guest.pid, f"device {device}", why, "unplug it (device_del)")
    for name, kind in outside(qmp.hmp("info network")):
        yield Obstacle(
            guest.pid, f"netdev {name}", f"is {kind}: it lives outside of QEMU", "unplug its device"
        )
    for job in qmp.execute("query-block-jobs"):
        yield Obstacle(
            guest.pid, f"block job {job['device']}", "is running", "wait for its end, or cancel it"
        )
    yield from out_of_reach(qmp, guest.pid)
    for each in guest.blocks:
        if each.page_size != PAGE:
            why = f"has pages of {each.page_size} bytes"
            yield Obstacle(
                guest.pid, f"RAM block {each.name}", why, f"start it without huge pages, {AS_ITSELF}"
            )
