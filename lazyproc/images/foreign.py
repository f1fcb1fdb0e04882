"""What CRIU writes down and lazyproc has no model for: it is refused by name, never left out in silence. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from lazyproc.errors import ImageError
from lazyproc.images.files import EXTRAS, INVENTORY, kind_of, record
from lazyproc.images.pb import process_pb2 as pb

_HEADER = 8  # bytes of an image without records
_WORDS = {
    "autofs": "an autofs mount",
    "bpfmap-data": "a BPF map",
    "bpfmap-file": "a BPF map",
    "filelocks": "file locks (criu dump --file-locks)",
    "ipcns-msg": "message queues of an ipc namespace",
    "ipcns-sem": "semaphores of an ipc namespace",
    "ipcns-shm": "SysV shared memory of an ipc namespace",
    "mountpoints": "mounts of a mount namespace",
    "netdev": "devices of a net namespace",
    "netns": "a net namespace",
    "tty-data": "unread bytes of a terminal",
    "userns": "a user namespace",
}
# They say how to check the host, or how the dump went.
_NO_STATE = ("cpuinfo", "irmap-cache")
_REGIONS = 2  # inventory_entry.compress; what the entries of a pagemap say decides
_TABLE_NAME = 31  # bytes that CRIU has room for, the family included (criu/netfilter.c)
_IPTABLES, _NFTABLES = 0, 1  # inventory_entry.network_lock_method


def refuse(images: Mapping[str, bytes], inventory: pb.inventory_entry) -> None:
    """Raise ImageError for an image that is none of those that are read, and for what the inventory says of others."""
    for name, data in images.items():
        stem = name.removesuffix(".img").rstrip("0123456789").rstrip("-")
        if not kind_of(name) and len(data) > _HEADER and stem not in _NO_STATE:
            what = _WORDS.get(stem, "an image of a kind that is not known")
            raise _refused(f"holds {what}, which lazyproc does not restore", name)
    if inventory.compress > _REGIONS:
        raise _refused(f"its pages are compressed in the unknown way {inventory.compress}", INVENTORY)
    for plugin in inventory.plugins_entry.plugins:
        raise _refused(f"CRIU's plugin {plugin} took part in the dump", INVENTORY)


def network_lock(images: Mapping[str, bytes]) -> str | None:
    """Where the dump left rules that hold packets of its connections back: the name of an nftables table, "" when it
    was by iptables, None when there are none.
    """
    inventory = record(images, INVENTORY, pb.inventory_entry)
    if EXTRAS in images or inventory.tcp_close or not inventory.HasField("network_lock_method"):
        return None
    if inventory.network_lock_method == _NFTABLES:
        root = record(images, "pstree.img", pb.pstree_entry).pid
        return f"inet CRIU-{inventory.dump_criu_run_id or root}"[:_TABLE_NAME]
    return "" if inventory.network_lock_method == _IPTABLES else None


def _refused(what: str, name: str) -> ImageError:
    return ImageError(what, where=name, remedy="restore it with criu")
