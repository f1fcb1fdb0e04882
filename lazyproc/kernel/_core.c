/* SPDX-License-Identifier: GPL-2.0-only */
#define _GNU_SOURCE
#include "_core.h"

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

long lp_syscall(long nr, long a, long b, long c, long d, long e, long f)
{
	long result = syscall(nr, a, b, c, d, e, f);

	return result == -1 ? -errno : result;
}

/* The raw call: glibc's ptrace() hides the result of PEEK requests. */
long lp_ptrace(long request, int pid, uint64_t addr, uint64_t data)
{
	long result = syscall(SYS_ptrace, request, pid, addr, data);

	return result == -1 ? -errno : result;
}

static int64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

#define BRISK_US 1000 /* a stop takes microseconds, or something is amiss */

/* Waits for `tid` (a thread too: __WALL) for `timeout_ms` at most; 0 when time ran out. waitpid(2) knows no
 * timeout: we look again and again, at first giving up the CPU only to whom it is due. */
long lp_wait(int tid, int *status, int timeout_ms)
{
	struct timespec pause = { 0, 100000 };
	int64_t began = now_us(), passed;

	for (;;) {
		long got = waitpid(tid, status, __WALL | WNOHANG);

		if (got > 0)
			return got;
		if (got < 0 && errno != EINTR)
			return -errno;
		passed = now_us() - began;
		if (passed > (int64_t)timeout_ms * 1000)
			return 0;
		if (passed < BRISK_US)
			sched_yield();
		else
			nanosleep(&pause, NULL);
	}
}

#define SIGSET_SIZE 8

static long look_at(struct lp_thread *thread, uint8_t *xsave, size_t xsave_max)
{
	struct iovec area = { xsave, xsave_max };
	struct __ptrace_rseq_configuration rseq;
	long err = lp_ptrace(PTRACE_GETREGS, thread->tid, 0, (uint64_t)thread->registers);

	if (err >= 0)
		err = lp_ptrace(PTRACE_GETREGSET, thread->tid, NT_X86_XSTATE, (uint64_t)&area);
	if (err >= 0)
		err = lp_ptrace(PTRACE_GETSIGMASK, thread->tid, SIGSET_SIZE, (uint64_t)&thread->blocked);
	if (err >= 0)
		err = lp_ptrace(PTRACE_GET_RSEQ_CONFIGURATION, thread->tid, sizeof(rseq), (uint64_t)&rseq);
	if (err >= 0)
		err = lp_syscall(SYS_get_robust_list, thread->tid, (long)&thread->robust_list,
				 (long)&thread->robust_list_len, 0, 0, 0);
	if (err < 0)
		return err;
	if (area.iov_len == xsave_max) /* the kernel cuts off in silence what has no room */
		return -ENOSPC;
	thread->xsave_size = area.iov_len;
	thread->rseq_addr = rseq.rseq_abi_pointer;
	thread->rseq_size = rseq.rseq_abi_size;
	thread->rseq_signature = rseq.signature;
	return 0;
}

/* The state of several stopped threads; `xsave` has `xsave_max` bytes for each. Returns 0, or the first error;
 * each thread has its own in `error`. */
long lp_look(struct lp_thread *threads, size_t count, uint8_t *xsave, size_t xsave_max)
{
	long first = 0;

	for (size_t i = 0; i < count; i++) {
		threads[i].error = (int32_t)look_at(&threads[i], xsave + i * xsave_max, xsave_max);
		if (threads[i].error < 0 && first == 0)
			first = threads[i].error;
	}
	return first;
}

#define EFLAGS_TF 0x100 /* a single step would be a trap, see below */

/* Registers first, then the mask: a thread that is let go between the two runs its program with its own mask, and
 * a handler on its own stack; the other way round it would run its own code with all signals blocked. */
static long job_start(const struct lp_job *job)
{
	struct user_regs_struct regs;
	uint64_t blocked = ~(1ULL << (job->signal - 1));
	long err = lp_ptrace(PTRACE_GETREGS, job->tid, 0, (uint64_t)&regs);

	if (err < 0)
		return err;
	regs.rip = job->entry;
	regs.r12 = job->rows;
	regs.r13 = job->count;
	regs.r14 = job->home;
	regs.r15 = (uint64_t)job->signal;
	regs.orig_rax = (uint64_t)-1; /* no syscall in progress: nothing is restarted */
	regs.eflags &= ~(uint64_t)EFLAGS_TF;
	err = lp_ptrace(PTRACE_SETREGS, job->tid, 0, (uint64_t)&regs);
	if (err < 0)
		return err;
	err = lp_ptrace(PTRACE_SETSIGMASK, job->tid, SIGSET_SIZE, (uint64_t)&blocked);
	if (err < 0)
		return err;
	return lp_ptrace(PTRACE_CONT, job->tid, 0, 0);
}

/* Whether it is the signal that the program has sent to its own thread, with `own` as getpid(2). Where there is no room
 * for a siginfo (RLIMIT_SIGPENDING) the kernel makes up a blank one, without a sender (collect_signal, kernel/signal.c). */
static int is_own(const siginfo_t *info, int own)
{
	return (info->si_code == SI_TKILL && info->si_pid == own) || (info->si_code == SI_USER && info->si_pid == 0);
}

/* A signal-delivery-stop during a program: 1 when it is the program's end, 0 when the signal came from elsewhere
 * and is kept to be sent again. Nothing but `signal` and SIGSTOP is unblocked: all others are faults. Behind its last
 * call the program has come to its end whosever signal that was: another one to the thread has taken its own in. */
static long job_stopped(struct lp_job *job, int sig)
{
	struct user_regs_struct regs;
	siginfo_t info;
	int own_thread, ended;
	long err;

	if (sig == SIGSTOP) {
		job->stop_again = 1;
		return 0;
	}
	if (sig != job->signal)
		return -EFAULT;
	err = lp_ptrace(PTRACE_GETREGS, job->tid, 0, (uint64_t)&regs);
	if (err < 0)
		return err;
	err = lp_ptrace(PTRACE_GETSIGINFO, job->tid, 0, (uint64_t)&info);
	if (err < 0)
		return err;
	ended = regs.rip == job->entry - lp_blob_loop() + lp_blob_ended();
	if (ended && is_own(&info, (int)regs.rbx))
		return 1;
	own_thread = ended || info.si_code == SI_TKILL;
	job->foreign[own_thread] = 1;
	memcpy(job->siginfo[own_thread], &info, sizeof(info));
	return ended;
}

#define PROGRAM_MS 10000 /* microseconds are usual; a call that does not return must not hang us */
#define LOOK_MS 20

/* A leader that was killed is told of by wait(2) only when all other threads have been waited for (delay_group_leader,
 * include/linux/sched/signal.h), and those are tracees, too. */
static bool has_died(int tid)
{
	char path[32], text[256];
	const char *state;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n < 0)
		return errno == ESRCH;
	text[n] = '\0';
	state = strrchr(text, ')');
	return state && (strncmp(state, ") Z", 3) == 0 || strncmp(state, ") X", 3) == 0);
}

/* As lp_wait, for PROGRAM_MS. */
static long await_program(int tid, int *status)
{
	for (int waited = 0; waited < PROGRAM_MS; waited += LOOK_MS) {
		long got = lp_wait(tid, status, LOOK_MS);

		if (got != 0)
			return got;
		if (has_died(tid))
			return -ESRCH;
	}
	return 0;
}

/* Waits until the program's own signal stops the thread. Group stops and the echo of PTRACE_INTERRUPT are passed
 * over. */
static long job_finish(struct lp_job *job)
{
	for (;;) {
		int status;
		long err = await_program(job->tid, &status);

		if (err <= 0)
			return err < 0 ? err : -ETIMEDOUT;
		if (!WIFSTOPPED(status))
			return -ESRCH;
		if (status >> 16 == 0) {
			err = job_stopped(job, WSTOPSIG(status));
			if (err != 0)
				return err < 0 ? err : 0;
		}
		err = lp_ptrace(PTRACE_CONT, job->tid, 0, 0);
		if (err < 0)
			return err;
	}
}

/* Runs the programs of several stopped threads at the same time; every thread is stopped again at the end.
 * Returns 0, or the first error; each job has its own in `error`. */
long lp_run(struct lp_job *jobs, size_t count)
{
	long first = 0;

	for (size_t i = 0; i < count; i++)
		jobs[i].error = (int32_t)job_start(&jobs[i]);
	for (size_t i = 0; i < count; i++) {
		if (jobs[i].error == 0)
			jobs[i].error = (int32_t)job_finish(&jobs[i]);
		if (jobs[i].error < 0 && first == 0)
			first = jobs[i].error;
	}
	return first;
}

#define SYSCALL_STOP (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

/* Until the next syscall stop of a thread that was told to continue to it. Returns 1 when a SIGSTOP was swallowed on
 * the way, else 0. */
static long await_syscall(int tid)
{
	long swallowed = 0;

	for (;;) {
		int status;
		long err = await_program(tid, &status);

		if (err <= 0)
			return err < 0 ? err : -ETIMEDOUT;
		if (!WIFSTOPPED(status))
			return -ESRCH;
		if (status >> 8 == SYSCALL_STOP)
			return swallowed;
		if (status >> 8 == SIGSTOP)
			swallowed = 1;
		else if (status >> 16 == 0) /* not a group stop or the echo of PTRACE_INTERRUPT: a fault */
			return -EFAULT;
		err = lp_ptrace(PTRACE_SYSCALL, tid, 0, 0);
		if (err < 0)
			return err;
	}
}

static long to_event(int tid)
{
	long err = lp_ptrace(PTRACE_INTERRUPT, tid, 0, 0);

	return err < 0 ? err : lp_ptrace(PTRACE_CONT, tid, 0, 0);
}

static long await_event(int tid)
{
	int status;
	long err = await_program(tid, &status);

	if (err <= 0)
		return err < 0 ? err : -ETIMEDOUT;
	if (!WIFSTOPPED(status))
		return -ESRCH;
	return status >> 16 ? 0 : -EFAULT;
}

/* Towards the entry of the syscall instruction at ip, with all signals blocked: after the registers for the reason
 * given at job_start(). */
static long to_syscall(int tid, const void *regs)
{
	const uint64_t all = ~0ULL;
	long err = lp_ptrace(PTRACE_SETREGS, tid, 0, (uint64_t)regs);

	if (err >= 0)
		err = lp_ptrace(PTRACE_SETSIGMASK, tid, SIGSET_SIZE, (uint64_t)&all);
	return err < 0 ? err : lp_ptrace(PTRACE_SYSCALL, tid, 0, 0);
}

static long returned(int tid, int64_t *result)
{
	struct user_regs_struct regs;
	long err = lp_ptrace(PTRACE_GETREGS, tid, 0, (uint64_t)&regs);

	*result = (int64_t)regs.rax;
	return err;
}

/* Executes the one syscall instruction at ip by its entry and exit stops, and leaves the thread at an event
 * stop behind it (registers put back at a syscall-exit stop would leak -ERESTART* into the program). No trap
 * is taken: a single step would be a forced SIGTRAP, which resets the tracee's own SIGTRAP action. Returns 1 when
 * a SIGSTOP was swallowed and has to be sent again, else 0. */
long lp_step(int tid, const void *regs, int64_t *result)
{
	long err = to_syscall(tid, regs), entered, left;

	if (err < 0)
		return err;
	entered = await_syscall(tid);
	if (entered < 0)
		return entered;
	err = lp_ptrace(PTRACE_SYSCALL, tid, 0, 0);
	if (err < 0)
		return err;
	left = await_syscall(tid);
	if (left < 0)
		return left;
	err = returned(tid, result);
	if (err >= 0)
		err = to_event(tid);
	if (err >= 0)
		err = await_event(tid);
	return err < 0 ? err : entered | left;
}

/* One phase of lp_sleep() in a thread in which none has failed. */
#define EACH(s, sleeps, count) \
	for (struct lp_sleep *s = (sleeps); s < (sleeps) + (count); s++) \
		if (s->error >= 0)

/* The same in several threads, with each call interrupted as soon as it sleeps: a sleep then returns
 * -ERESTART_RESTARTBLOCK with its restart block armed, and anything that needs no sleep its result. All threads go at
 * the same time. Returns 0, or the first error; each has its own in `error`, or 1 when a SIGSTOP was swallowed. */
long lp_sleep(struct lp_sleep *sleeps, size_t count)
{
	EACH(s, sleeps, count)
		s->error = (int32_t)to_syscall(s->tid, s->registers);
	EACH(s, sleeps, count)
		s->error = (int32_t)await_syscall(s->tid);
	EACH(s, sleeps, count) {
		long err = to_event(s->tid);

		s->error = err < 0 ? (int32_t)err : s->error;
	}
	EACH(s, sleeps, count) {
		long err = await_event(s->tid);

		if (err >= 0)
			err = returned(s->tid, &s->result);
		s->error = err < 0 ? (int32_t)err : s->error;
	}
	for (size_t i = 0; i < count; i++)
		if (sleeps[i].error < 0)
			return sleeps[i].error;
	return 0;
}

static long dress(const struct lp_dress *d)
{
	struct iovec area = { (void *)(uintptr_t)d->xsave, d->xsave_size };
	long err = lp_ptrace(PTRACE_SETREGSET, d->tid, NT_X86_XSTATE, (uint64_t)&area);

	if (err >= 0)
		err = lp_ptrace(PTRACE_SETREGS, d->tid, 0, (uint64_t)d->registers);
	if (err >= 0)
		err = lp_ptrace(PTRACE_SETSIGMASK, d->tid, SIGSET_SIZE, (uint64_t)&d->blocked);
	return err;
}

/* The state that stopped threads of ours go on with. Returns 0, or the first error, which ends it; `at` is where. */
long lp_dress(const struct lp_dress *threads, size_t count, size_t *at)
{
	for (*at = 0; *at < count; (*at)++) {
		long err = dress(&threads[*at]);

		if (err < 0)
			return err;
	}
	return 0;
}

int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4])
{
	return __get_cpuid_count(leaf, sub, &out[0], &out[1], &out[2], &out[3]) ? 0 : -ENOSYS;
}

struct pm_scan_arg { /* include/uapi/linux/fs.h, newer than Debian 12's headers */
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)

/* Runs of pages that have all of `required`, none of `excluded` and, unless it is 0, one of `anyof`. Fills
 * `regions` with {start, end, categories} (u64 each), returns how many; `walked` is where it stopped. */
long lp_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded,
		     uint64_t anyof, void *regions, size_t count, uint64_t *walked)
{
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = start,
		.end = end,
		.vec = (uint64_t)regions,
		.vec_len = count,
		.category_inverted = excluded,
		.category_mask = required | excluded,
		.category_anyof_mask = anyof,
		.return_mask = required | anyof,
	};
	long got = ioctl(fd, PAGEMAP_SCAN, &arg);

	*walked = arg.walk_end;
	return got < 0 ? -errno : got;
}
