"""Framing, names, folders, and sets of images for the wire."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import ImageError
from lazyproc.images.files import (
    Folder,
    ImageReader,
    ImageWriter,
    kind_of,
    pack,
    record,
    records,
    to_bytes,
    to_text,
    unpack,
)
from lazyproc.images.pb import process_pb2 as pb

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)


def _pstree(*pids: int) -> bytes:
    writer = ImageWriter()
    for pid in pids:
        writer.add("pstree.img", pb.pstree_entry(pid=pid, ppid=0, pgid=1, sid=1), b"")
    return writer.finish()["pstree.img"]


def test_an_image_begins_with_the_two_magics_and_the_size_of_the_first_record() -> None:
    assert _pstree(5)[:12].hex() == "19435654" + "30302750" + "08000000"


def test_the_inventory_has_one_magic() -> None:
    writer = ImageWriter()
    writer.add("inventory.img", pb.inventory_entry(img_version=2))
    image = writer.finish()["inventory.img"]
    assert image.hex() == "16313158" + "02000000" + "0802"
    assert record({"inventory.img": image}, "inventory.img", pb.inventory_entry).img_version == 2


def test_records_are_read_in_order_and_an_absent_image_has_none() -> None:
    images = {"pstree.img": _pstree(5, 6)}
    assert [entry.pid for entry, _ in records(images, "pstree.img", pb.pstree_entry)] == [5, 6]
    assert not list(records({}, "pstree.img", pb.pstree_entry))


@given(st.data())
def test_a_broken_image_is_an_image_error_with_file_and_offset(data: st.DataObject) -> None:
    image = _pstree(5, 6)
    cut = data.draw(st.integers(0, len(image) - 1).filter(lambda length: length not in (8, 20)))
    with pytest.raises(ImageError, match=r"pstree.img, offset \d+: truncated"):
        list(records({"pstree.img": image[:cut]}, "pstree.img", pb.pstree_entry))
    changed = bytearray(image)
    changed[data.draw(st.integers(0, 11))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ImageError, match=r"pstree.img, offset \d+"):
        list(records({"pstree.img": bytes(changed)}, "pstree.img", pb.pstree_entry))


def test_a_record_without_a_required_field_is_refused() -> None:
    reader = ImageReader("pstree.img", _pstree(5)[:8] + b"\0\0\0\0")
    with pytest.raises(ImageError, match="required field"):
        reader.message(pb.pstree_entry)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("core-17.img", "core"),
        ("pagemap-3.img", "pagemap"),
        ("pagemap-shmem-3.img", "pagemap-shmem"),
        ("ghost-file-ff.img", "ghost-file"),
        ("files.img", "files"),
        ("inventory.img", "inventory"),
        ("pages-1.img", ""),
        ("dump.log", ""),
        ("stats-dump", ""),
        ("core-17.img.bak", ""),
    ],
)
def test_the_kind_of_an_image_is_in_its_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@given(st.binary().map(lambda raw: raw.replace(b"\0", b"")))
def test_any_bytes_that_the_kernel_allows_in_a_name_come_back(raw: bytes) -> None:
    assert to_bytes(to_text(raw, "files.img")) == raw


def test_a_nul_in_a_path_is_refused() -> None:
    with pytest.raises(ImageError, match=r"files.img.*NUL"):
        to_text(b"/etc\0/passwd", "files.img")


# --- sets for the wire --------------------------------------------------------------------------------------


@given(st.dictionaries(names, st.binary(max_size=50)))
def test_what_is_packed_is_unpacked(images: dict[str, bytes]) -> None:
    assert unpack(pack(images)) == images


@given(st.dictionaries(names, st.binary(max_size=9), min_size=1, max_size=3), st.data())
def test_a_broken_set_is_an_image_error(images: dict[str, bytes], data: st.DataObject) -> None:
    packed = pack(images)
    with pytest.raises(ImageError):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(ImageError):
        unpack(packed + b"x")
    changed = bytearray(packed)
    changed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ImageError):
        assert unpack(bytes(changed)) != images


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".", "..", "a/b", "", "a\0", "a\n", "é", "x" * 200])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a name"):
        pack({name: b""})
    with pytest.raises(ImageError, match="not a name"):
        Folder(tmp_path).open(name, os.O_WRONLY | os.O_CREAT)
    raw = name.encode("latin-1")
    with pytest.raises(ImageError, match="not a name"):
        unpack(b"lzpk" + struct.pack("<IHQ", 1, len(raw), 0) + raw)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_follows_no_links_and_waits_for_no_fifo(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    (tmp_path / "pstree.img").symlink_to("/etc/passwd")
    with pytest.raises(ImageError, match=r"pstree.img.*replace the symbolic link"):
        folder.read()
    (tmp_path / "pstree.img").unlink()
    os.mkfifo(tmp_path / "pstree.img")
    with pytest.raises(ImageError, match="not a regular file"):
        folder.read()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"absent: no such file.*name an existing folder"):
        Folder(tmp_path / "absent").read()


def test_a_missing_image_is_not_taken_for_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"pages-1\.img: missing; copy the whole folder"):
        Folder(tmp_path).open("pages-1.img", os.O_RDONLY)


def test_the_parent_is_where_the_link_points(tmp_path: Path) -> None:
    first, second = Folder(tmp_path / "1"), Folder(tmp_path / "2")
    first.path.mkdir()
    second.path.mkdir()
    assert second.parent() is None
    (second.path / "parent").symlink_to("../1")
    parent = second.parent()
    assert parent is not None
    assert parent.path == first.path


@pytest.mark.parametrize("target", ["{}/1", "../../other", "1", "..", "parent", "../detour", "/"])
def test_a_parent_that_does_not_lie_next_to_it_is_refused(target: str, tmp_path: Path) -> None:
    around = tmp_path / "around"
    for name in ("1", "2/1", "../other"):
        (around / name).mkdir(parents=True)
    (around / "detour").symlink_to("../other")
    folder = Folder(around / "2")
    (folder.path / "parent").symlink_to(target.format(around))
    with pytest.raises(ImageError, match=r"2/parent: leads out of .*around, to .*next to each other"):
        folder.parent()
