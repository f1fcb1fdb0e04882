/* SPDX-License-Identifier: GPL-2.0-only */
/* A cargo that, once restored lazily, touches every page of its memory in the order of floor.c and writes what each
 * first touch cost into a shared file: u32 go, u32 done, u64 median, u64 p99, u64 mean (ns). Usage: first_touch FILE
 * PAGES [MORE], the number of pages below those that it has as well and never touches again */
#include "floors.h"

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct board {
	volatile uint32_t go, done;
	volatile uint64_t median, p99, mean;
};

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	struct timespec pause = { 0, 1000000 };
	size_t pages = argc > 2 ? strtoul(argv[2], NULL, 10) : 0, more = argc > 3 ? strtoul(argv[3], NULL, 10) : 0, at = 0;
	int file = argc > 2 ? open(argv[1], O_RDWR | O_CLOEXEC) : -1;
	struct board *board;
	uint64_t *times, all;
	char *memory, *rest;

	if (!pages || file < 0)
		die("usage: first_touch FILE PAGES [MORE]");
	board = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	times = mmap(NULL, pages * sizeof(*times), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	rest = mmap(NULL, (more + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (rest == MAP_FAILED || board == MAP_FAILED || memory == MAP_FAILED || times == MAP_FAILED)
		die("mmap");
	close(file);
	memset(times, 1, pages * sizeof(*times)); /* present before the clock runs: a write to it must not fault */
	for (size_t page = 0; page < pages * PAGE / sizeof(uint64_t); page++)
		((uint64_t *)memory)[page] = page + 1;
	for (size_t page = 0; page < more * PAGE / sizeof(uint64_t); page++)
		((uint64_t *)rest)[page] = page + 1;
	board->done = 1;
	while (!board->go)
		nanosleep(&pause, NULL);
	memset(times, 1, pages * sizeof(*times));
	all = now_ns();
	for (size_t visit = 0; visit < pages; visit++) {
		uint64_t begun = now_ns();

		if (*(volatile uint64_t *)(memory + at * PAGE) != at * (PAGE / sizeof(uint64_t)) + 1)
			die("a page is wrong");
		times[visit] = now_ns() - begun;
		at = (at + 7919) % pages;
	}
	board->mean = (now_ns() - all) / pages;
	qsort(times, pages, sizeof(*times), ascending);
	board->median = times[pages / 2];
	board->p99 = times[pages * 99 / 100];
	board->done = 2;
	for (;;)
		pause.tv_nsec = 100000000, nanosleep(&pause, NULL);
}
