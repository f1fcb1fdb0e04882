/* SPDX-License-Identifier: GPL-2.0-only */
/* For LD_PRELOAD: the process kills itself right before its N-th step of work on a tracee.
 *
 * A step is a ptrace(2) or a pwrite(2), and the first waitpid(2) after either: then the tracee runs. (Looking
 * again with waitpid is not counted: how often that happens is chance.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

long dying_at; /* 0: never */
long dying_steps;
static int waited;

static void step(void)
{
	if (++dying_steps == dying_at)
		raise(SIGKILL);
}

long syscall(long nr, ...)
{
	static long (*real)(long, ...);
	va_list list;
	long a[6];

	va_start(list, nr);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (!real)
		real = dlsym(RTLD_NEXT, "syscall");
	if (nr == SYS_ptrace) {
		waited = 0;
		step();
	}
	return real(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at)
{
	static ssize_t (*real)(int, const void *, size_t, off64_t);

	if (!real)
		real = dlsym(RTLD_NEXT, "pwrite64");
	waited = 0;
	step();
	return real(fd, data, length, at);
}

pid_t waitpid(pid_t pid, int *status, int options)
{
	static pid_t (*real)(pid_t, int *, int);

	if (!real)
		real = dlsym(RTLD_NEXT, "waitpid");
	if (!waited++)
		step();
	return real(pid, status, options);
}
