"""The command line of a QEMU that is to take guests in."""

from __future__ import annotations

import pytest

from lazyproc.errors import UsageError
from lazyproc.qemu.command import demand_command, served
from lazyproc.qemu.guest import outside


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("/no/such/qemu", "-m", "64"), "no program"),
        (("true", "-daemonize"), "-daemonize is not wanted"),
        (("true", "--incoming", "defer"), "--incoming is not wanted"),
    ],
)
def test_what_cannot_take_a_guest_in_is_refused(command: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        demand_command(command)


def test_other_words_are_left_to_qemu() -> None:
    demand_command(("true", "-name", "incoming", "-nodefaults"))


@pytest.mark.parametrize(
    ("word", "paths"),
    [
        ("unix:/run/qmp,server=on,wait=off", ["/run/qmp"]),
        ("unix:/run/qmp,server,nowait", ["/run/qmp"]),
        ("socket,id=m,path=qmp,server=on,wait=off", ["qmp"]),
        ("unix:/run/vhost.sock", []),
        ("socket,id=net,path=/run/ovs,server=off", []),
        ("if=none,file=/disk,format=raw", []),
    ],
)
def test_where_a_qemu_is_to_listen_is_read(word: str, paths: list[str]) -> None:
    assert list(served(word)) == paths


def test_backends_that_live_outside_are_read() -> None:
    """As QEMU 7.2 prints them."""
    text = """\
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ net0: index=0,type=vhost-user,vhost-user0 to ovs
virtio-net-pci.1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57
 \\ net1: index=0,type=user,net=10.0.2.0,restrict=off
net2: index=0,type=vhost-vdpa,vhost-vdpa
"""
    assert list(outside(text)) == [("net0", "vhost-user"), ("net2", "vhost-vdpa")]
