"""Images cannot have anything read that is not in their folder, whoever has made them."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from tests.live.bad_luck import images_sent, lazyproc, says, unchanged
from tests.live.moving import checkpoint, receiving
from tests.live.programs import running


@pytest.fixture
def images(pair: Pair) -> Path:
    """A checkpoint in order, at the destination."""
    folder = pair.shared / "images"
    with running("memory_random", 4, 2, 1000, directory=pair.shared, host=pair.source) as program:
        checkpoint(pair.source, program.pid, folder)
    return folder


@pytest.mark.parametrize(
    "command", ["restore --detach", "restore --lazy --detach", "serve --listen 127.0.0.1:0"]
)
def test_a_link_in_the_place_of_an_image(pair: Pair, images: Path, command: str) -> None:
    """It leads to the image itself: who followed it would not notice."""
    for kind in ("pages-", "pagemap-", "core-", "inventory.", "lazyproc-sums."):
        path = next(each for each in sorted(images.iterdir()) if each.name.startswith(kind))
        elsewhere = path.rename(pair.shared / "elsewhere")
        path.symlink_to("../elsewhere")
        with unchanged(pair.destination):
            done = lazyproc(pair.destination, *command.split(), "-D", images)
            says(done, 1, str(path), "replace the symbolic link by the file itself")
        elsewhere.rename(path)


@pytest.mark.parametrize("name", ["pages-1.img", "inventory.img"])
def test_a_fifo_in_the_place_of_an_image(pair: Pair, images: Path, name: str) -> None:
    (images / name).unlink()
    os.mkfifo(images / name)
    with unchanged(pair.destination):
        done = lazyproc(pair.destination, "restore", "--detach", "-D", images)
        says(done, 1, f"{images / name}: not a regular file")


@pytest.mark.parametrize("target", ["/var/tmp", "../../other", "../detour"])
def test_a_parent_elsewhere(pair: Pair, images: Path, target: str) -> None:
    shutil.copytree(images, pair.shared.parent / "other")
    (pair.shared / "detour").symlink_to("../other")
    (images / "parent").symlink_to(target)
    with unchanged(pair.destination):
        done = lazyproc(pair.destination, "restore", "--detach", "-D", images)
        says(done, 1, f"{images}/parent: leads out of {pair.shared}", "next to each other")


@pytest.mark.parametrize("name", ["../core-1.img", "/etc/shadow", "..", "a/b.img", "core-1.img\0"])
def test_a_name_that_leads_out_comes_over_the_wire(pair: Pair, name: str) -> None:
    raw = name.encode()
    packed = b"lzpk" + struct.pack("<IHQ", 1, len(raw), 1) + raw + b"x"
    with receiving(pair.destination) as receiver, unchanged(pair.destination):
        reason = images_sent(pair, receiver, packed)
        assert f"{name!r}: not a name that an image can have" in reason
