"""cffi build of the images room's C: what reads pagemaps."""

from pathlib import Path

from cffi import FFI

HERE = "lazyproc/images"

# Without its preprocessor lines the header is what cffi reads: C and Python cannot see different ones.
header = Path(HERE, "_pagemap.h").read_text()

ffi = FFI()
ffi.cdef("\n".join(line for line in header.splitlines() if not line.startswith("#")))
ffi.set_source(
    "lazyproc.images._pagemap",
    '#include "_pagemap.h"',
    sources=[f"{HERE}/_pagemap.c"],
    depends=[f"{HERE}/_pagemap.h"],
    include_dirs=[HERE],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
)
