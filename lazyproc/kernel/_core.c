/* SPDX-License-Identifier: GPL-2.0-only */
#define _GNU_SOURCE
#include "_core.h"

#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
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

static int64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

/* Waits for `tid` (a thread too: __WALL). A negative timeout waits for ever; 0 when time ran out. */
long lp_wait(int tid, int *status, int timeout_ms)
{
	int64_t deadline = now_ms() + timeout_ms;
	struct timespec pause = { 0, 20000 };

	for (;;) {
		long got = waitpid(tid, status, __WALL | (timeout_ms < 0 ? 0 : WNOHANG));

		if (got > 0)
			return got;
		if (got < 0 && errno != EINTR)
			return -errno;
		if (timeout_ms < 0)
			continue;
		if (now_ms() > deadline)
			return 0;
		nanosleep(&pause, NULL);
	}
}

#define EFLAGS_TF 0x100
#define EFLAGS_DF 0x400

static long job_start(const struct lp_job *job)
{
	struct user_regs_struct regs;
	uint64_t blocked = ~(1ULL << (job->signal - 1));
	long err = lp_ptrace(PTRACE_GETREGS, job->tid, 0, (uint64_t)&regs);

	if (err < 0)
		return err;
	regs.rip = job->entry;
	regs.rsp = job->frame + 8; /* rt_sigreturn takes its frame at rsp - 8 */
	regs.r12 = job->rows;
	regs.r13 = job->count;
	regs.r15 = (uint64_t)job->signal;
	regs.orig_rax = (uint64_t)-1; /* no syscall in progress: nothing is restarted */
	regs.eflags &= ~(uint64_t)(EFLAGS_TF | EFLAGS_DF);
	err = lp_ptrace(PTRACE_SETSIGMASK, job->tid, sizeof(blocked), (uint64_t)&blocked);
	if (err < 0)
		return err;
	err = lp_ptrace(PTRACE_SETREGS, job->tid, 0, (uint64_t)&regs);
	if (err < 0)
		return err;
	return lp_ptrace(PTRACE_CONT, job->tid, 0, 0);
}

/* Waits until the program's own signal stops the thread; other stops (a group stop, the same signal from
 * somebody else) are passed over: the program is a matter of microseconds. */
static long job_finish(struct lp_job *job)
{
	for (;;) {
		struct user_regs_struct regs;
		int status;
		long err = lp_wait(job->tid, &status, -1);

		if (err < 0)
			return err;
		if (!WIFSTOPPED(status)) {
			job->status = status;
			return -ESRCH;
		}
		err = lp_ptrace(PTRACE_GETREGS, job->tid, 0, (uint64_t)&regs);
		if (err < 0)
			return err;
		if (status >> 8 == job->signal) {
			siginfo_t info;

			err = lp_ptrace(PTRACE_GETSIGINFO, job->tid, 0, (uint64_t)&info);
			if (err < 0)
				return err;
			if (info.si_code == SI_TKILL && regs.rip == job->entry - lp_blob_loop() + lp_blob_ended())
				return 0;
			job->foreign++;
		} else if (status >> 16 == 0) { /* a fault inside the program */
			job->status = status;
			return -EFAULT;
		}
		err = lp_ptrace(PTRACE_CONT, job->tid, 0, 0);
		if (err < 0)
			return err;
	}
}

/* Runs the programs of several stopped threads at the same time; every thread is stopped again at the end.
 * Returns 0, or the first error; each job has its own in `status`. */
long lp_run(struct lp_job *jobs, size_t count)
{
	long first = 0;

	for (size_t i = 0; i < count; i++) {
		jobs[i].foreign = 0;
		jobs[i].status = (int32_t)job_start(&jobs[i]);
	}
	for (size_t i = 0; i < count; i++) {
		long err = jobs[i].status;

		if (err == 0)
			err = job_finish(&jobs[i]);
		if (err < 0 && jobs[i].status == 0)
			jobs[i].status = (int32_t)err;
		if (err < 0 && first == 0)
			first = err;
	}
	return first;
}

#define SYSCALL_STOP (SIGTRAP | 0x80) /* PTRACE_O_TRACESYSGOOD */

static long stop_at_syscall(int tid)
{
	for (;;) {
		int status;
		long err = lp_ptrace(PTRACE_SYSCALL, tid, 0, 0);

		if (err < 0)
			return err;
		err = lp_wait(tid, &status, -1);
		if (err < 0)
			return err;
		if (!WIFSTOPPED(status))
			return -ESRCH;
		if (status >> 8 == SYSCALL_STOP)
			return 0;
		if (status >> 16 == 0) /* not a group stop or the echo of PTRACE_INTERRUPT: a fault */
			return -EFAULT;
	}
}

/* Executes the one syscall instruction at ip by its entry and exit stops, and leaves the thread at an event
 * stop behind it (registers put back at a syscall-exit stop would leak -ERESTART* into the program). No trap
 * is taken: a single step would be a forced SIGTRAP, which resets the tracee's own SIGTRAP action. */
long lp_step(int tid, const void *regs, int64_t *result)
{
	struct user_regs_struct after;
	int status;
	long err = lp_ptrace(PTRACE_SETREGS, tid, 0, (uint64_t)regs);

	if (err < 0)
		return err;
	for (int stops = 0; stops < 2; stops++) {
		err = stop_at_syscall(tid);
		if (err < 0)
			return err;
	}
	err = lp_ptrace(PTRACE_GETREGS, tid, 0, (uint64_t)&after);
	if (err < 0)
		return err;
	*result = (int64_t)after.rax;
	err = lp_ptrace(PTRACE_INTERRUPT, tid, 0, 0);
	if (err < 0)
		return err;
	err = lp_ptrace(PTRACE_CONT, tid, 0, 0);
	if (err < 0)
		return err;
	err = lp_wait(tid, &status, -1);
	if (err < 0)
		return err;
	return WIFSTOPPED(status) && status >> 16 ? 0 : -EFAULT;
}

int lp_cpuid(uint32_t leaf, uint32_t sub, uint32_t out[4])
{
	return __get_cpuid_count(leaf, sub, &out[0], &out[1], &out[2], &out[3]) ? 0 : -ENOSYS;
}

/* Bytes of a standard-format xsave area that holds `features` (CPUID leaf 0xd: offset and size of each). */
long lp_xsave_size(uint64_t features)
{
	long size = 576; /* legacy area and header */

	for (uint32_t bit = 2; bit < 63; bit++) {
		uint32_t out[4];

		if (!(features >> bit & 1))
			continue;
		if (lp_cpuid(0xd, bit, out) < 0)
			return -ENOSYS;
		if ((long)(out[0] + out[1]) > size)
			size = (long)(out[0] + out[1]);
	}
	return size;
}

#define XFEATURE_AMX (3ULL << 17)
#define FP_XSTATE_MAGIC1 0x46505853U
#define FP_XSTATE_MAGIC2 0x46505845U

struct sw_bytes { /* struct _fpx_sw_bytes, arch/x86/include/uapi/asm/sigcontext.h */
	uint32_t magic1, extended_size;
	uint64_t xfeatures;
	uint32_t xstate_size, padding[7];
};

struct frame { /* struct rt_sigframe, arch/x86/include/asm/sigframe.h */
	uint64_t pretcode;
	uint64_t uc_flags, uc_link;
	uint64_t ss_sp;
	uint32_t ss_flags, ss_pad;
	uint64_t ss_size;
	uint64_t gregs[18]; /* r8-r15 di si bp bx dx ax cx sp ip flags */
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
	uint64_t sigmask;
	uint8_t siginfo[128];
};

#define UC_FP_XSTATE 1
#define UC_SIGCONTEXT_SS 2
#define UC_STRICT_RESTORE_SS 4

/* -ERESTART* in rax: rt_sigreturn disarms restart blocks, so the call is made again from its start. */
static void rewind_syscall(struct user_regs_struct *regs)
{
	int64_t ax = (int64_t)regs->rax;

	if ((int64_t)regs->orig_rax < 0)
		return;
	if (ax == -512 || ax == -513 || ax == -514 || ax == -516) {
		regs->rax = regs->orig_rax;
		regs->rip -= 2;
	}
}

/* Writes into `out` a signal frame that will lie at `addr` (16-byte aligned, `size` bytes) and from which
 * rt_sigreturn resumes with these registers, this xsave area and this mask. Returns its length. */
long lp_frame(uint8_t *out, size_t size, uint64_t addr, const void *regs, const uint8_t *xsave,
	      size_t xsave_size, uint64_t blocked)
{
	struct user_regs_struct r;
	struct frame *frame = (struct frame *)out;
	uint64_t features;
	uint64_t fp = (addr + sizeof(*frame) + 63) & ~63ULL; /* XRSTOR wants 64-byte alignment */
	uint32_t magic2 = FP_XSTATE_MAGIC2;
	struct sw_bytes sw = { 0 };
	long length;

	if (xsave_size < 576)
		return -EINVAL;
	memcpy(&features, xsave + 464 + 8, sizeof(features)); /* XCR0, left there by the kernel's regset */
	memcpy(&sw.xfeatures, xsave + 512, sizeof(sw.xfeatures));
	/* A thread without AMX permission has a smaller buffer, and a larger frame would be read as FXSAVE only. */
	if (!(sw.xfeatures & XFEATURE_AMX))
		features &= ~XFEATURE_AMX;
	length = lp_xsave_size(features ? features : sw.xfeatures);
	if (length < 0)
		return length;
	if ((size_t)length > xsave_size || fp - addr + (size_t)length + sizeof(magic2) > size)
		return -ENOSPC;
	memcpy(&r, regs, sizeof(r));
	rewind_syscall(&r);
	memset(out, 0, fp - addr);
	frame->uc_flags = UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS;
	frame->ss_flags = 0x7fffffff; /* invalid on purpose: restore_altstack() then leaves the real one alone */
	memcpy(frame->gregs,
	       (uint64_t[]){ r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx,
			     r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags },
	       sizeof(frame->gregs));
	frame->cs = (uint16_t)r.cs;
	frame->ss = (uint16_t)r.ss;
	frame->fpstate = fp;
	frame->sigmask = blocked;
	sw.magic1 = FP_XSTATE_MAGIC1;
	sw.xfeatures = features ? features : sw.xfeatures;
	sw.xstate_size = (uint32_t)length;
	sw.extended_size = (uint32_t)length + (uint32_t)sizeof(magic2);
	memcpy(out + (fp - addr), xsave, (size_t)length);
	memcpy(out + (fp - addr) + 464, &sw, sizeof(sw));
	memcpy(out + (fp - addr) + length, &magic2, sizeof(magic2));
	return (long)(fp - addr) + length + (long)sizeof(magic2);
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

static int write_text(const char *path, const char *text)
{
	size_t length = strlen(text);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t got;

	if (fd < 0)
		return -errno;
	got = write(fd, text, length);
	if (got != (ssize_t)length) {
		int err = got < 0 ? -errno : -EIO;

		close(fd);
		return err;
	}
	return close(fd) < 0 ? -errno : 0;
}

/* The last steps before the nursery's exec: nothing of ours stays but the one descriptor. */
static int become(const char *const *argv, int exe_fd, int keep_fd, int keep_as, int report, uint64_t namespaces)
{
	static const char *const no_environment[] = { NULL };
	sigset_t none;

	if (namespaces & CLONE_NEWPID) {
		if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
			return -errno;
		if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
			return -errno;
	}
	if (setsid() < 0)
		return -errno;
	if (dup3(keep_fd, keep_as, 0) < 0)
		return -errno;
	if (dup3(exe_fd, keep_as + 1, O_CLOEXEC) < 0 || dup3(report, keep_as + 2, O_CLOEXEC) < 0)
		return -errno;
	if (syscall(SYS_close_range, 0, keep_as - 1, 0) < 0 || syscall(SYS_close_range, keep_as + 3, ~0U, 0) < 0)
		return -errno;
	for (int sig = 1; sig <= 64; sig++) /* dispositions of ours must not be inherited */
		if (sig != SIGKILL && sig != SIGSTOP && sig != 32 && sig != 33)
			if (signal(sig, SIG_DFL) == SIG_ERR)
				return -errno;
	sigemptyset(&none);
	if (sigprocmask(SIG_SETMASK, &none, NULL) < 0)
		return -errno;
	syscall(SYS_execveat, keep_as + 1, "", argv, no_environment, AT_EMPTY_PATH);
	return -errno;
}

static void report_and_exit(int report, int err)
{
	ssize_t got = write(report, &err, sizeof(err));

	_exit(got == sizeof(err) ? 1 : 2);
}

/* The middle process: it moves its children into the new namespaces and goes; CLONE_PARENT makes the nursery
 * the caller's own child. */
static void middle(const char *const *argv, int exe_fd, int keep_fd, int keep_as, uint64_t namespaces,
		   const char *timens_offsets, int report)
{
	long pid;

	if (namespaces && unshare((int)namespaces) < 0)
		report_and_exit(report, -errno);
	if (timens_offsets) {
		int err = write_text("/proc/self/timens_offsets", timens_offsets);

		if (err < 0)
			report_and_exit(report, err);
	}
	pid = syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	if (pid < 0)
		report_and_exit(report, -errno);
	if (pid == 0)
		report_and_exit(report, become(argv, exe_fd, keep_fd, keep_as, report + 0, namespaces));
	report_and_exit(report, (int)pid);
}

/* Starts the executable `exe_fd` as a child of the caller in new `namespaces` (CLONE_NEW* bits), with an empty
 * environment and no descriptor but `keep_fd` as number `keep_as`. Returns its pid once exec has happened. */
long lp_spawn(const char *const *argv, int exe_fd, int keep_fd, int keep_as, uint64_t namespaces,
	      const char *timens_offsets, int *pidfd)
{
	int report[2], status, err = 0;
	long pid, nursery = 0;
	ssize_t got;

	if (pipe2(report, O_CLOEXEC) < 0)
		return -errno;
	pid = fork();
	if (pid < 0) {
		err = -errno;
		close(report[0]);
		close(report[1]);
		return err;
	}
	if (pid == 0)
		middle(argv, exe_fd, keep_fd, keep_as, namespaces, timens_offsets, report[1]);
	close(report[1]);
	/* A negative number is an error; the pid is seen from the middle process, which shares our pid
	 * namespace; end of file means that exec closed the pipe. */
	while ((got = read(report[0], &err, sizeof(err))) == sizeof(err)) {
		if (err < 0)
			break;
		nursery = err;
		err = 0;
	}
	close(report[0]);
	if (waitpid((pid_t)pid, &status, 0) < 0 && err == 0)
		err = -errno;
	if (err == 0 && (got != 0 || nursery == 0))
		err = -EIO;
	if (err < 0) {
		if (nursery > 0)
			waitpid((pid_t)nursery, &status, __WALL);
		return err;
	}
	*pidfd = (int)syscall(SYS_pidfd_open, nursery, 0);
	return *pidfd < 0 ? -errno : nursery;
}
