"""A dump of CRIU's with its pages compressed as CRIU's development branch does it, in either of its two layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from lazyproc.images.files import INVENTORY, Folder, ImageReader, ImageWriter
from lazyproc.images.packed import PE_PAYLOAD_ALIGNED
from lazyproc.images.pagemap import PE_PRESENT, Pagemap, read_pagemap
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.model import PAGE

REGION = 16  # pages; few, so that entries have several blocks and a shorter last one


class Layout(Enum):
    PAGES = "pull request 2895, each page"
    REGIONS = "pull request 2895, regions"
    BLOCKS = "pull request 3115"


def compress(images: Path, layout: Layout) -> int:
    """Rewrites the folder; by how many bytes its pages have shrunk."""
    saved = 0
    for name in [name for name in Folder(images).read() if name.startswith("pagemap-")]:
        pagemap = read_pagemap(ImageReader(name, (images / name).read_bytes()))
        pages = images / f"pages-{pagemap.pages_id}.img"
        data = pages.read_bytes()
        image, payload = _compressed(name, pagemap, data, layout)
        (images / name).write_bytes(image)
        pages.write_bytes(payload)
        saved += len(data) - len(payload)
    inventory = ImageReader(INVENTORY, (images / INVENTORY).read_bytes()).message(pb.inventory_entry)
    inventory.img_version = 3
    inventory.compress = 1 if layout is Layout.PAGES else 2
    writer = ImageWriter()
    writer.add(INVENTORY, inventory)
    (images / INVENTORY).write_bytes(writer.finish()[INVENTORY])
    return saved


def _compressed(name: str, pagemap: Pagemap, data: bytes, layout: Layout) -> tuple[bytes, bytes]:
    writer, payload = ImageWriter(), bytearray()
    writer.add(name, pb.pagemap_head(pages_id=pagemap.pages_id))
    for number, entry in enumerate(pagemap):
        message = _message(layout)
        count = (entry.end - entry.addr) // PAGE
        message.vaddr, message.compat_nr_pages, message.nr_pages = entry.addr, count, count
        message.flags = entry.flags
        content = data[entry.offset : entry.offset + count * PAGE]
        if entry.flags & PE_PRESENT and number % 5 == 4:  # an entry that is not compressed begins with a page
            message.flags |= PE_PAYLOAD_ALIGNED
            payload += bytes(-len(payload) % PAGE) + content
        elif entry.flags & PE_PRESENT:
            blocks = list(_blocks(content, 1 if layout is Layout.PAGES else REGION))
            _describe(message, [len(block) for block in blocks], layout)
            payload += b"".join(blocks)
        writer.add(name, message)
    return writer.finish()[name], bytes(payload)


def _message(layout: Layout) -> pb.pagemap_entry | pb.pagemap_entry_2895:
    return pb.pagemap_entry() if layout is Layout.BLOCKS else pb.pagemap_entry_2895()


def _describe(message: pb.pagemap_entry | pb.pagemap_entry_2895, sizes: list[int], layout: Layout) -> None:
    if isinstance(message, pb.pagemap_entry):
        message.blocks.block_sizes.extend(sizes)
        message.blocks.total_payload_size, message.blocks.pages_per_block = sum(sizes), REGION
        return
    message.compressed_size.extend(sizes)
    message.total_compressed_size = sum(sizes)
    if layout is Layout.REGIONS:
        message.region_pages = REGION


def _blocks(content: bytes, pages: int) -> Iterator[bytes]:
    lz4 = ctypes.CDLL("liblz4.so.1")
    room = ctypes.create_string_buffer(2 * pages * PAGE)
    for start in range(0, len(content), pages * PAGE):
        block = content[start : start + pages * PAGE]
        if not any(block):
            yield b""
            continue
        size = lz4.LZ4_compress_default(block, room, len(block), len(room))
        yield room.raw[:size] if 0 < size < len(block) * 7 // 8 else block
