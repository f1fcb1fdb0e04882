"""Builds lazyproc.uffd._pager: the pager's C files, and the frames and the checksum of the wire room."""

from pathlib import Path

from cffi import FFI

HERE = "lazyproc/uffd"
WIRE = "lazyproc/wire"
PARTS = (
    "pager",
    "given",
    "faults",
    "faulted",
    "bulk",
    "cradle",
    "children",
    "place",
    "ledger",
    "states",
    "events",
    "remap",
    "acknowledge",
    "link",
    "pace",
    "packing",
    "release",
    "remove",
    "removals",
    "shadow",
)

# Without its preprocessor lines the header is what cffi reads: C and Python cannot see different ones.
header = Path(HERE, "_pager.h").read_text()

ffi = FFI()
ffi.cdef("\n".join(line for line in header.splitlines() if not line.startswith("#")))
ffi.set_source(
    "lazyproc.uffd._pager",
    '#include "_pager.h"',
    sources=[f"{HERE}/_{part}.c" for part in PARTS],
    depends=[
        f"{HERE}/_pager.h",
        f"{HERE}/_engine.h",
        f"{HERE}/_ledger.h",
        f"{HERE}/_tables.h",
        f"{HERE}/_acknowledge.h",
        f"{HERE}/_cradle.h",
        f"{HERE}/_children.h",
        f"{HERE}/_link.h",
        f"{HERE}/_pace.h",
        f"{HERE}/_packing.h",
        f"{HERE}/_removals.h",
        f"{HERE}/_shadow.h",
        f"{WIRE}/native.h",
        f"{WIRE}/crc32c.h",
        f"{WIRE}/zstd.h",
    ],
    include_dirs=[HERE, WIRE],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread"],
)
