"""cffi build of the kernel room's C primitives."""

from pathlib import Path

from cffi import FFI

HERE = Path("lazyproc/kernel")

ffi = FFI()
ffi.cdef("""
struct lp_job {
    int32_t tid; int32_t signal; uint64_t entry; uint64_t home; uint64_t rows; uint64_t count;
    int32_t error; int32_t stop_again; int32_t foreign[2]; uint8_t siginfo[2][128];
};
struct lp_thread {
    int32_t tid; int32_t error; uint64_t registers[27]; uint64_t blocked; uint64_t rseq_addr;
    uint32_t rseq_size; uint32_t rseq_signature; uint64_t robust_list; uint64_t robust_list_len;
    uint64_t xsave_size;
};
struct lp_sleep {
    int32_t tid; int32_t error; uint64_t registers[27]; int64_t result;
};
struct lp_dress {
    int32_t tid; uint64_t registers[27]; uint64_t blocked; uint64_t xsave; uint64_t xsave_size;
};
struct lp_birth {
    const char *const *argv; uint64_t namespaces;
    int32_t exe_fd; int32_t keep_fd; int32_t keep_as;
    int32_t cgroup; int32_t sibling; int32_t tasks_count; const int32_t *tasks;
};
long lp_syscall(long nr, long a, long b, long c, long d, long e, long f);
long lp_ptrace(long request, int pid, uint64_t addr, uint64_t data);
long lp_wait(int tid, int *status, int timeout_ms);
long lp_look(struct lp_thread *threads, size_t count, uint8_t *xsave, size_t xsave_max);
long lp_run(struct lp_job *jobs, size_t count);
long lp_step(int tid, const void *regs, int64_t *result);
long lp_sleep(struct lp_sleep *sleeps, size_t count);
long lp_dress(const struct lp_dress *threads, size_t count, size_t *at);
long lp_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded,
                     uint64_t anyof, void *regions, size_t count, uint64_t *walked);
#define LP_NOT_JOINED 4096
long lp_spawn(const struct lp_birth *birth, int *pidfd);
#define LP_OPTION 256
void lp_getsockopts(int fd, const int32_t (*options)[2], size_t count, uint8_t *values, int32_t *lengths);
int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t *out);
const uint8_t *lp_blob(size_t *size);
size_t lp_blob_loop(void);
size_t lp_blob_syscall(void);
size_t lp_blob_nursery(void);
size_t lp_blob_reap(void);
""")
ffi.set_source(
    "lazyproc.kernel._core",
    '#include "_core.h"',
    sources=[str(HERE / name) for name in ("_core.c", "_birth.c", "_sockopt.c", "_blob.c")],
    include_dirs=[str(HERE)],
    depends=[str(HERE / "_core.h")],
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
)
