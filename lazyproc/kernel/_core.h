/* SPDX-License-Identifier: GPL-2.0-only */
/* The C primitives of the kernel room: one raw call each, and the few loops too hot for Python.
 * Every function returns a value >= 0 or a negative errno, and keeps no state. */
#ifndef LAZYPROC_CORE_H
#define LAZYPROC_CORE_H

#include <stddef.h>
#include <stdint.h>

/* One syscall of a remote program. `nr` bit 32 set: an error does not end the program; bit 33: no syscall but an
 * `xrstor` from the area args[0], of the components args[2] << 32 | args[1]. */
struct lp_row {
	int64_t nr;
	int64_t args[6];
	int64_t result;
};

/* One thread that runs a program: rows at `rows`, code that takes it home at `home` (addresses in the tracee). */
struct lp_job {
	int32_t tid;
	int32_t signal; /* ends the program, see remote.py */
	uint64_t entry; /* address of lp_loop in the tracee */
	uint64_t home;
	uint64_t rows;
	uint64_t count;
	int32_t error; /* out: 0 or a negative errno */
	int32_t stop_again; /* out: 1 when a SIGSTOP came meanwhile and has to be sent again */
	int32_t foreign[2]; /* out: 1 when `signal` came from elsewhere, to the process [0], to the thread [1] */
	uint8_t siginfo[2][128];
};

/* A stopped thread as ptrace(2) shows it. */
struct lp_thread {
	int32_t tid;
	int32_t error; /* out: 0 or a negative errno */
	uint64_t registers[27]; /* user_regs_struct */
	uint64_t blocked;
	uint64_t rseq_addr; /* 0: not registered */
	uint32_t rseq_size, rseq_signature;
	uint64_t robust_list, robust_list_len;
	uint64_t xsave_size; /* bytes of the NT_X86_XSTATE area */
};

/* A thread that begins to sleep. */
struct lp_sleep {
	int32_t tid;
	int32_t error; /* out: a negative errno, or 1 when a SIGSTOP came meanwhile and has to be sent again, or 0 */
	uint64_t registers[27]; /* at a syscall instruction */
	int64_t result; /* out */
};

/* A thread about to go on. */
struct lp_dress {
	int32_t tid;
	uint64_t registers[27];
	uint64_t blocked;
	uint64_t xsave, xsave_size; /* address and bytes of the NT_X86_XSTATE area */
};

/* How the nursery is started. */
struct lp_birth {
	const char *const *argv;
	uint64_t namespaces;
	int32_t exe_fd, keep_fd, keep_as;
	int32_t cgroup;       /* the v2 group in which it is born, or -1 for the caller's */
	int32_t sibling;      /* a number: it is born with it, and as a child of the caller's parent; or 0 */
	int32_t tasks_count;
	const int32_t *tasks; /* files `tasks` of v1 groups to be born in */
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
#define LP_NOT_JOINED 4096 /* added to the errno when it is a group that refuses */
long lp_spawn(const struct lp_birth *birth, int *pidfd);
#define LP_OPTION 256 /* bytes for the value of a socket option */
void lp_getsockopts(int fd, const int32_t (*options)[2], size_t count, uint8_t *values, int32_t *lengths);
int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4]);

/* Position-independent code that runs in tracees: offsets into the blob. */
const uint8_t *lp_blob(size_t *size);
size_t lp_blob_loop(void);    /* runs rows r12, count r13, ends by signal r15, then goes home to r14 */
size_t lp_blob_syscall(void); /* its `syscall` instruction */
size_t lp_blob_ended(void);   /* where ip is when the signal of the loop's end is delivered */
size_t lp_blob_nursery(void); /* waits for its tracer */
size_t lp_blob_reap(void);    /* reaps children until none is left, exits like the child in r12 */

#endif
