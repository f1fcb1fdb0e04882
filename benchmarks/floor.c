/* SPDX-License-Identifier: GPL-2.0-only */
/* The least a fault from a local image can cost: one thread touches pages in random order, another answers each
 * userfaultfd message with one UFFDIO_COPY from a mapped file. Prints the toucher's median and p99 in nanoseconds.
 * Usage: floor FILE PAGES */
#include "floors.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct scene {
	int uffd;
	size_t pages;
	char *memory;
	const char *image;
};

static void *serve(void *argument)
{
	struct scene *scene = argument;
	struct pollfd waiting = { .fd = scene->uffd, .events = POLLIN };

	for (size_t served = 0; served < scene->pages;) {
		struct uffd_msg message;
		struct uffdio_copy copy = { .len = PAGE };

		if (poll(&waiting, 1, -1) < 0)
			die("poll");
		if (read(scene->uffd, &message, sizeof(message)) != sizeof(message)) {
			if (errno == EAGAIN)
				continue;
			die("read");
		}
		copy.dst = message.arg.pagefault.address & ~(uint64_t)(PAGE - 1);
		copy.src = (uint64_t)scene->image + (copy.dst - (uint64_t)scene->memory);
		if (ioctl(scene->uffd, UFFDIO_COPY, &copy) < 0)
			die("UFFDIO_COPY");
		served++;
	}
	return NULL;
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void open_scene(struct scene *scene, const char *path, size_t pages)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		die(path);
	scene->pages = pages;
	scene->image = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, file, 0);
	scene->memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	scene->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (scene->image == MAP_FAILED || scene->memory == MAP_FAILED || scene->uffd < 0)
		die("set-up");
	range.range.start = (uint64_t)scene->memory;
	range.range.len = pages * PAGE;
	if (ioctl(scene->uffd, UFFDIO_API, &api) < 0 || ioctl(scene->uffd, UFFDIO_REGISTER, &range) < 0)
		die("userfaultfd");
}

int main(int argc, char **argv)
{
	struct scene scene;
	pthread_t thread;
	uint64_t *times;
	size_t pages = argc == 3 ? strtoul(argv[2], NULL, 10) : 0, at = 0;

	if (!pages) {
		fprintf(stderr, "usage: floor FILE PAGES\n");
		return 2;
	}
	times = malloc(pages * sizeof(*times));
	if (!times)
		die("malloc");
	open_scene(&scene, argv[1], pages);
	if (pthread_create(&thread, NULL, serve, &scene))
		die("pthread_create");
	for (size_t visit = 0; visit < pages; visit++) {
		uint64_t begun = now_ns();

		*(volatile char *)(scene.memory + at * PAGE);
		times[visit] = now_ns() - begun;
		at = (at + 7919) % pages; /* a prime: every page once, in an order no readahead likes */
	}
	if (pthread_join(thread, NULL))
		die("pthread_join");
	qsort(times, pages, sizeof(*times), ascending);
	printf("%llu %llu\n", (unsigned long long)times[pages / 2], (unsigned long long)times[pages * 99 / 100]);
	return 0;
}
