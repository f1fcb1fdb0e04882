"""lazyproc-sums.img: a bit that flipped on a disk or on the way is not taken for another value.

An image of its own, so that who changes another one on purpose has a file to remove and loses nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from lazyproc.errors import ImageError
from lazyproc.images.files import SUMS, ImageWriter, demand, record, to_bytes, to_text
from lazyproc.images.pb import lazyproc_pb2 as own


def sums_of(images: Mapping[str, bytes]) -> dict[str, bytes]:
    """The image with the checksums of `images`."""
    writer, sums = ImageWriter(), own.Sums()
    for name, data in images.items():
        sums.images.add(name=to_bytes(name), crc32=zlib.crc32(data))
    writer.add(SUMS, sums)
    return writer.finish()


def check_sums(images: Mapping[str, bytes]) -> None:
    """Raises ImageError for an image that is not what was written. Without checksums (CRIU's images) all is well."""
    if SUMS not in images:
        return
    for entry in record(images, SUMS, own.Sums).images:
        name = to_text(entry.name, SUMS)
        if zlib.crc32(demand(images, name)) != entry.crc32:
            raise ImageError(
                "is not what was written (its checksum is another)",
                where=name,
                remedy=f"copy the folder again; if you changed it yourself, with crit or otherwise, remove {SUMS}",
            )
