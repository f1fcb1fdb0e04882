"""cffi build of the kernel room's C primitives."""

from pathlib import Path

from cffi import FFI

HERE = Path("lazyproc/kernel")

ffi = FFI()
ffi.cdef("""
struct lp_row { int64_t nr; int64_t args[6]; int64_t result; };
struct lp_job {
    int32_t tid; int32_t signal; uint64_t entry; uint64_t frame; uint64_t rows; uint64_t count;
    int32_t status; int32_t foreign;
};
long lp_syscall(long nr, long a, long b, long c, long d, long e, long f);
long lp_ptrace(long request, int pid, uint64_t addr, uint64_t data);
long lp_wait(int tid, int *status, int timeout_ms);
long lp_run(struct lp_job *jobs, size_t count);
long lp_step(int tid, const void *regs, int64_t *result);
long lp_frame(uint8_t *out, size_t size, uint64_t addr, const void *regs, const uint8_t *xsave,
              size_t xsave_size, uint64_t blocked);
long lp_xsave_size(uint64_t features);
long lp_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded,
                     uint64_t anyof, void *regions, size_t count, uint64_t *walked);
long lp_spawn(const char *const *argv, int exe_fd, int keep_fd, int keep_as, uint64_t namespaces,
              const char *timens_offsets, int *pidfd);
int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t *out);
const uint8_t *lp_blob(size_t *size);
size_t lp_blob_loop(void);
size_t lp_blob_stub(void);
size_t lp_blob_stub_end(void);
size_t lp_blob_nursery(void);
size_t lp_blob_reap(void);
""")
ffi.set_source(
    "lazyproc.kernel._core",
    '#include "_core.h"',
    sources=[str(HERE / "_core.c"), str(HERE / "_blob.c")],
    include_dirs=[str(HERE)],
    depends=[str(HERE / "_core.h")],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
)
