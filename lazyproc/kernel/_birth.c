/* SPDX-License-Identifier: GPL-2.0-only */
/* How the nursery is started: a process of its own, in the namespaces and groups that its tree is to have. */
#define _GNU_SOURCE
#include "_core.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* From now on `keep_as` and two descriptors above it, closed by exec, are all: first out of the way of those
 * numbers, then there. `report` is kept up to date, so that an error still gets through. */
static int arrange_descriptors(const struct lp_birth *birth, int *report)
{
	int fds[3] = { birth->keep_fd, birth->exe_fd, *report };

	for (int i = 0; i < 3; i++) {
		fds[i] = fcntl(fds[i], F_DUPFD_CLOEXEC, birth->keep_as + 3);
		if (fds[i] < 0)
			return -errno;
	}
	*report = fds[2];
	for (int i = 0; i < 3; i++)
		if (dup3(fds[i], birth->keep_as + i, i ? O_CLOEXEC : 0) < 0)
			return -errno;
	*report = birth->keep_as + 2;
	if (syscall(SYS_close_range, 0, birth->keep_as - 1, 0) < 0 ||
	    syscall(SYS_close_range, birth->keep_as + 3, ~0U, 0) < 0)
		return -errno;
	return 0;
}

/* Dispositions and mask of ours must not be inherited. By the raw call: glibc's signal() leaves 32 and 33, which are its
 * own, as they are, and make(1) starts its children with both ignored. */
static int forget_signals(void)
{
	static const uint64_t by_default[4]; /* struct kernel_sigaction: handler, flags, restorer, mask */
	sigset_t none;

	for (int sig = 1; sig <= 64; sig++)
		if (sig != SIGKILL && sig != SIGSTOP)
			if (syscall(SYS_rt_sigaction, sig, by_default, NULL, sizeof(uint64_t)) < 0)
				return -errno;
	sigemptyset(&none);
	return sigprocmask(SIG_SETMASK, &none, NULL) < 0 ? -errno : 0;
}

/* The last steps before exec. Returns only when one of them failed. */
static int become(const struct lp_birth *birth, int *report)
{
	static const char *const no_environment[] = { NULL };
	int err;

	if (birth->namespaces & CLONE_NEWPID) {
		if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
			return -errno;
		if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
			return -errno;
	}
	err = arrange_descriptors(birth, report);
	if (err == 0)
		err = forget_signals();
	if (err < 0)
		return err;
	syscall(SYS_execveat, birth->keep_as + 1, "", birth->argv, no_environment, AT_EMPTY_PATH);
	return -errno;
}

static _Noreturn void report_and_exit(int report, int32_t message)
{
	ssize_t got = write(report, &message, sizeof(message));

	_exit(got == sizeof(message) ? 0 : 1);
}

/* `keep_as` may lie above our soft limit. */
static int raise_descriptor_limit(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		return -errno;
	limit.rlim_cur = limit.rlim_max;
	return setrlimit(RLIMIT_NOFILE, &limit) < 0 ? -errno : 0;
}

/* Writing 0 to `tasks` moves the caller, a single thread, without the lock that moving another process takes. Not for
 * the middle process: cpuset binds all memory of whom it moves, and that is our own there. */
static int join_v1_groups(const struct lp_birth *birth)
{
	for (int i = 0; i < birth->tasks_count; i++)
		if (write(birth->tasks[i], "0", 1) < 0)
			return -errno;
	return 0;
}

/* A child of our parent, born in the v2 group if there is one. A clone3 with CLONE_PARENT takes no exit signal: the
 * child has ours, SIGCHLD. */
static long clone_sibling(int32_t cgroup)
{
	struct clone_args arguments = { .flags = CLONE_PARENT | CLONE_INTO_CGROUP, .cgroup = (uint64_t)cgroup };

	if (cgroup < 0)
		return syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0);
	return syscall(SYS_clone3, &arguments, sizeof(arguments));
}

struct middle {
	const struct lp_birth *birth;
	int report;
};

/* The middle process: it moves its children into the new namespaces and goes; CLONE_PARENT makes the nursery
 * the caller's own child. It runs in the caller's memory: nothing but system calls until there is a copy of it. */
static int middle(void *argument)
{
	const struct middle *m = argument;
	const struct lp_birth *birth = m->birth;
	int report = m->report, err = raise_descriptor_limit();
	long pid;

	/* The nursery leaves the caller's session without leading one: as pid 1 of a namespace it may have to lead
	 * its own later, or be in none that the namespace can see. */
	if (err == 0 && setsid() < 0)
		err = -errno;
	if (err == 0 && birth->namespaces && unshare((int)birth->namespaces) < 0)
		err = -errno;
	if (err < 0)
		report_and_exit(report, err);
	pid = clone_sibling(birth->cgroup);
	if (pid < 0)
		report_and_exit(report, birth->cgroup < 0 ? -errno : -errno - LP_NOT_JOINED);
	if (pid == 0) {
		err = join_v1_groups(birth);
		if (err < 0)
			report_and_exit(report, err - LP_NOT_JOINED);
		err = become(birth, &report);
		report_and_exit(report, err);
	}
	report_and_exit(report, (int32_t)pid);
}

/* The caller sleeps until the middle process has gone, so for that its page tables need not be copied. No handler may
 * run there meanwhile: it would be the caller's, in the caller's memory. */
static long start_middle(struct middle *m)
{
	char stack[1 << 15] __attribute__((aligned(16)));
	sigset_t all, before;
	long pid;

	sigfillset(&all);
	if (sigprocmask(SIG_SETMASK, &all, &before) < 0)
		return -errno;
	pid = clone(middle, stack + sizeof(stack), CLONE_VM | CLONE_VFORK | SIGCHLD, m);
	if (pid < 0)
		pid = -errno;
	/* What was the mask before is one. */
	(void)sigprocmask(SIG_SETMASK, &before, NULL);
	return pid;
}

/* A child of our parent, by the number that is wanted; without a middle process, whose end our parent would be told. */
static long start_sibling(const struct lp_birth *birth, int report)
{
	pid_t number = birth->sibling;
	struct clone_args arguments = { .flags = CLONE_PARENT | birth->namespaces,
					.set_tid = (uint64_t)(uintptr_t)&number,
					.set_tid_size = 1 };
	long pid;
	int err;

	if (birth->cgroup >= 0) {
		arguments.flags |= CLONE_INTO_CGROUP;
		arguments.cgroup = (uint64_t)birth->cgroup;
	}
	pid = syscall(SYS_clone3, &arguments, sizeof(arguments));
	if (pid < 0)
		return birth->cgroup < 0 || errno == EEXIST ? -errno : -errno - LP_NOT_JOINED;
	if (pid == 0) {
		err = raise_descriptor_limit();
		if (err == 0)
			err = join_v1_groups(birth);
		if (err == 0)
			err = become(birth, &report);
		report_and_exit(report, err);
	}
	return pid;
}

/* Reads what the middle process and its child report, in either order, up to the end of file: exec has closed
 * the pipe, or both have ended. Returns the first error, else 0; `nursery` is the child's pid, 0 without one. */
static int read_reports(int report, long *nursery)
{
	int err = 0;
	int32_t message;

	for (;;) {
		ssize_t got = read(report, &message, sizeof(message));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got != sizeof(message))
			return err < 0 || *nursery ? err : -EIO;
		if (message > 0)
			*nursery = message;
		else if (err == 0)
			err = message;
	}
}

static void reap(long pid)
{
	while (waitpid((pid_t)pid, NULL, __WALL) < 0 && errno == EINTR)
		continue;
}

/* Starts the executable `exe_fd` as a child of the caller, or as its sibling, in new `namespaces` (CLONE_NEW* bits), with an empty
 * environment and no descriptor but `keep_fd` as number `keep_as`. Returns its pid once exec has happened. */
long lp_spawn(const struct lp_birth *birth, int *pidfd)
{
	int report[2], err;
	long pid, nursery = 0;

	if (pipe2(report, O_CLOEXEC) < 0)
		return -errno;
	if (birth->sibling)
		pid = nursery = start_sibling(birth, report[1]);
	else
		pid = start_middle(&(struct middle){ birth, report[1] });
	err = pid < 0 ? (int)pid : 0;
	close(report[1]);
	if (err == 0)
		err = read_reports(report[0], &nursery);
	close(report[0]);
	if (pid < 0)
		return err;
	if (!birth->sibling)
		reap(pid);
	if (err == 0) {
		*pidfd = (int)syscall(SYS_pidfd_open, nursery, 0);
		if (*pidfd >= 0)
			return nursery;
		err = -errno;
	}
	if (nursery > 0) {
		kill((pid_t)nursery, SIGKILL);
		reap(nursery);
	}
	return err;
}
