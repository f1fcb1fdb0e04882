/* SPDX-License-Identifier: GPL-2.0-only */
/* The C primitives of the kernel room: one raw call each, and the few loops too hot for Python.
 * Every function returns a value >= 0 or a negative errno, and keeps no state. */
#ifndef LAZYPROC_CORE_H
#define LAZYPROC_CORE_H

#include <stddef.h>
#include <stdint.h>

/* One syscall of a remote program. `nr` bit 32 set: an error does not end the program. */
struct lp_row {
	int64_t nr;
	int64_t args[6];
	int64_t result;
};

/* One thread that runs a program: rows at `rows` (an address in the tracee), dead man's frame at `frame`. */
struct lp_job {
	int32_t tid;
	int32_t signal; /* ends the program, see remote.py */
	uint64_t entry; /* address of lp_loop in the tracee */
	uint64_t frame;
	uint64_t rows;
	uint64_t count;
	int32_t status; /* out: 0, or a negative errno, or the wait status of an unexpected end */
	int32_t foreign; /* out: how often `signal` came from elsewhere and has to be sent again */
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
int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4]);

/* Position-independent code that runs in tracees: offsets into the blob. */
const uint8_t *lp_blob(size_t *size);
size_t lp_blob_loop(void);    /* runs rows r12, count r13, ends by signal r15, then rt_sigreturn at rsp */
size_t lp_blob_ended(void);   /* where ip is when the signal of the loop's end is delivered */
size_t lp_blob_stub(void);    /* one syscall, then rt_sigreturn at rsp */
size_t lp_blob_stub_end(void);
size_t lp_blob_nursery(void); /* waits for its tracer */
size_t lp_blob_reap(void);    /* reaps children until none is left, exits like the child in r12 */

#endif
