"""What test guests load at their start."""

from __future__ import annotations

import pytest

from tests.qemu.kernel import loading_order


@pytest.mark.parametrize(
    ("virtio", "ring"),
    [("virtio_ring", ""), ("", "virtio"), ("", "")],
    ids=["6.1.192", "turned round", "6.1.176"],
)
def test_a_module_comes_after_what_it_depends_on(virtio: str, ring: str) -> None:
    needs = {"virtio_net": "virtio_ring,virtio,built_in", "virtio": virtio, "virtio_ring": ring, "alone": ""}
    modules = {name: f"ELF\0license=GPL\0depends={needs[name]}\0retpoline=Y\0".encode() for name in needs}
    order = loading_order(modules)
    assert sorted(order) == sorted(needs)
    for name in needs:
        assert all(order.index(each) < order.index(name) for each in needs[name].split(",") if each in needs)
