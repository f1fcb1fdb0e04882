"""A guest of one libvirt goes on in another, as docs/qemu.md has it: both keep their domain."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import copy
from xml.sax.saxutils import escape

import pytest

from lazyproc.hosts import Host, Pair, pair_of_hosts
from tests.live.moving import CLI
from tests.live.programs import wait_until
from tests.needs import require
from tests.qemu.guests import Serial, Shape, empty_disk
from tests.qemu.kernel import boot

pytestmark = pytest.mark.long

NAME, PORT, START_S = "guest", 4444, 60
MONITOR = Path("/var/lib/libvirt/qemu/guest.qmp")
OWN = ("/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt")  # of each host
# The hosts share one tree of cgroups, in which two guests of one name would have one; the log daemon that keeps a
# serial line would not give it to two of them; and a QEMU of another user than root has a userfaultfd only where
# vm.unprivileged_userfaultfd lets everybody have one: that would change what other tests find on this machine.
SETTINGS = """
cgroup_controllers = []
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
clear_emulator_capabilities = 0
"""
RESUME = f"until virsh -q -c qemu:///system resume {NAME}; do sleep 0.02; done"
DOMAIN = """
<domain type="qemu" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>{name}</name>
  <memory unit="MiB">{memory}</memory>
  <os>
    <type arch="x86_64" machine="pc-i440fx-7.2">hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <cpu mode="maximum"/>
  <devices>
    <emulator>{qemu}</emulator>
    <controller type="usb" model="none"/>
    <disk type="file" device="disk">
      <driver name="qemu" type="raw" cache="none" io="threads"/>
      <source file="{disk}"/>
      <target dev="vda" bus="virtio"/>
    </disk>
    <serial type="file"><source path="{serial}" append="on"/><target port="0"/></serial>
    <memballoon model="none"/>
  </devices>
  <qemu:commandline>{more}</qemu:commandline>
</domain>
"""


def start_libvirt(host: Host) -> None:
    """Its daemon goes into the background when it listens, and ends with the host."""
    daemon = require("libvirtd")
    script = [f"mount -t tmpfs -o mode=0755 own {folder}" for folder in OWN]
    script += [f"echo '{SETTINGS}' > /etc/libvirt/qemu.conf", f"exec {daemon} --daemon"]
    host.run(["sh", "-ec", "\n".join(script)], check=True, timeout=START_S)


def virsh(host: Host, *words: object) -> str:
    argv = [str(require("virsh")), "-c", "qemu:///system", "-q", *map(str, words)]
    done = host.run(argv, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).strip()


def create(host: Host, shape: Shape, serial: Path, *more: str, paused: bool = False) -> None:
    """A domain whose QEMU is also given `more`. Its kernel becomes that of libvirt's user while it runs."""
    files, folder = boot(), host.outside
    kernel, initramfs = (
        host.scratch / Path(copy(file, folder)).name for file in (files.kernel, files.initramfs)
    )
    command = shape.command(serial, MONITOR)
    options = ("-qmp", f"unix:{MONITOR},server=on,wait=off", *more)
    fields = {
        "name": NAME,
        "memory": shape.memory,
        "kernel": kernel,
        "initramfs": initramfs,
        "cmdline": command[command.index("-append") + 1],
        "qemu": require("qemu-system-x86_64"),
        "disk": shape.disk,
        "serial": serial,
    }
    arguments = "".join(f'<qemu:arg value="{escape(word)}"/>' for word in options)
    words = {key: escape(str(value)) for key, value in fields.items()}
    (folder / "guest.xml").write_text(DOMAIN.format(**words, more=arguments))
    virsh(host, "create", *(["--paused"] if paused else []), host.scratch / "guest.xml")


@pytest.fixture
def libvirts() -> Iterator[Pair]:
    for tool in ("libvirtd", "virsh"):
        require(tool)
    with pair_of_hosts() as pair:
        for host in (pair.source, pair.destination):
            start_libvirt(host)
        yield pair


def lazyproc(host: Host, *words: object) -> subprocess.CompletedProcess[str]:
    return host.run([*CLI, *map(str, words)], capture_output=True, text=True, timeout=START_S)


def test_a_guest_goes_on_in_another_libvirt(libvirts: Pair) -> None:
    here, there = libvirts.source, libvirts.destination
    where = f"{there.address}:{PORT}"
    shape = Shape(memory=96, visited=16, disk=empty_disk(libvirts.shared))
    with Serial(libvirts.shared / "serial") as serial:
        serial.path.chmod(0o666)
        create(here, shape, serial.path)
        serial.wait(20)
        found = lazyproc(here, "explain", "--qemu", MONITOR)
        assert found.returncode == 0, found.stdout + found.stderr
        incoming = ("-incoming", f"tcp:{where}", "-global", "migration.x-postcopy-ram=on")
        create(there, shape, serial.path, *incoming, paused=True)
        resuming = there.popen(["sh", "-c", RESUME], stderr=subprocess.DEVNULL)
        moved = lazyproc(here, "qemu-serve", MONITOR, "--to", where, "--insecure")
        assert moved.returncode == 0, moved.stderr
        assert resuming.wait(START_S) == 0
        serial.wait(30)
        wait_until(lambda: NAME not in virsh(here, "list", "--name"), "the domain at the source ends")
        assert virsh(there, "domstate", NAME) == "running"
        virsh(there, "suspend", NAME)
        virsh(there, "resume", NAME)
        blocks = serial.beats()[-1].blocks
        assert serial.wait(30).blocks > blocks > 0
        serial.check()
