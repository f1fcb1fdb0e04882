/* SPDX-License-Identifier: GPL-2.0-only */
/* A cargo that measures, itself, what a move costs it: it visits pages of its memory, checks every word of each, and
 * notes what its first visit to a page took since it has moved. That it has moved it sees by the name of its host, so any
 * engine may move it and none has to tell it. Its clock is the time of day, which both hosts agree on.
 *
 * Usage: touch STATUS BOARD (random|think|sequential|zipf|jumps|walks)[:WORK_US] MIB THREADS VMAS
 *
 * WORK_US is how long it computes after each visit. `think` rests 1 ms; `zipf` stays in 64 MiB, rank r in 1/r of the
 * visits; `jumps` takes every 7th page downwards, `walks` 64 neighbours from somewhere on, up or down. THREADS - 1 more
 * threads rest, VMAS more mappings of one page lie there. STATUS is check.h's block; its stalls are those of first visits.
 * BOARD holds struct board, all of it in the time of day (ns), and after it one byte a page: visited since the move. */
#define _GNU_SOURCE
#include "../tests/programs/check.h"
#include <sys/utsname.h>

enum { HOT_PAGES_LOG2 = 14, SLOTS = 30000, JUMP = 7, WALK = 64 };
static const uint64_t SLOT_NS = 10000000;

struct board {
	uint64_t started; /* slot 0 begins here */
	uint64_t frozen; /* when the last visit began that certainly was before the move */
	uint64_t resumed; /* and the first moment after it: the blackout lies between */
	uint64_t longest_gap; /* from one visit's beginning to the next, from `frozen` on */
	uint64_t first_visits, stalls, stalls_sum; /* a stall: a first visit of STALL_MIN_NS and longer */
	uint64_t visits;
	uint32_t slots[SLOTS]; /* visits in each 10 ms since `started` */
	uint8_t visited[];
};

static struct {
	struct board *board;
	uint8_t *pages;
	size_t count, next;
	uint64_t random;
	size_t place; /* of a walk */
	bool down;
	uint64_t work_ns;
	char mode;
} scene;

static size_t next_of_walk(void)
{
	uint64_t draw;

	if (scene.next++ % WALK == 0) {
		draw = random_next(&scene.random);
		scene.down = draw & 1;
		scene.place = (draw >> 8) % scene.count;
	}
	scene.place = (scene.place + (scene.down ? scene.count - 1 : 1)) % scene.count;
	return scene.place;
}

static size_t next_page(void)
{
	uint64_t draw = random_next(&scene.random), octave;

	switch (scene.mode) {
	case 's':
		return scene.next++ % scene.count;
	case 'j':
		return (scene.count - scene.next++ * JUMP % scene.count) % scene.count;
	case 'w':
		return next_of_walk();
	case 'z': /* each octave of ranks alike; neighbours in rank lie far apart */
		octave = (uint64_t)1 << (draw >> 32) % HOT_PAGES_LOG2;
		return (octave + (draw & (octave - 1))) * 7919 % scene.count;
	default:
		return (draw >> 8) % scene.count;
	}
}

static bool elsewhere(const struct utsname *home)
{
	struct utsname now;

	MUST(uname(&now));
	return strcmp(now.nodename, home->nodename) != 0;
}

static void visit(size_t page, bool moved)
{
	struct board *board = scene.board;
	uint8_t *at = scene.pages + page * PAGE;
	bool first = moved && !board->visited[page];
	uint64_t begun = now_ns(CLOCK_REALTIME), took;

	(void)*(volatile uint8_t *)at;
	took = now_ns(CLOCK_REALTIME) - begun;
	if (first) {
		board->visited[page] = 1;
		board->first_visits++;
		record_stall(took);
		if (took >= STALL_MIN_NS) {
			board->stalls++;
			board->stalls_sum += took;
		}
	}
	verify_page((uint64_t *)at, (uintptr_t)at, 1);
}

static void compute(void)
{
	uint64_t until = scene.work_ns ? now_ns(CLOCK_MONOTONIC) + scene.work_ns : 0;

	while (until && now_ns(CLOCK_MONOTONIC) < until)
		;
}

static void count_visit(uint64_t begun)
{
	uint64_t slot = (begun - scene.board->started) / SLOT_NS;

	scene.board->visits++;
	if (slot < SLOTS)
		scene.board->slots[slot]++;
}

static void work(void)
{
	struct board *board = scene.board;
	uint64_t last = now_ns(CLOCK_REALTIME);
	struct utsname home;
	bool moved = false;

	MUST(uname(&home));
	board->started = last;
	while (!check_stopping) {
		uint64_t begun = now_ns(CLOCK_REALTIME);

		if (begun - last > board->longest_gap && moved)
			board->longest_gap = begun - last;
		if (elsewhere(&home) && !moved) {
			board->frozen = last; /* it was at home after that: a stop comes where a system call ends as well */
			board->resumed = now_ns(CLOCK_REALTIME);
			board->longest_gap = board->resumed - last;
			moved = true;
		}
		last = begun;
		visit(next_page(), moved);
		count_visit(begun);
		check_beat(0);
		compute();
		if (scene.mode == 't')
			check_rest(1000);
	}
}

static void *rest(void *nothing)
{
	while (!check_stopping)
		check_rest(10000);
	return nothing;
}

static void *map(size_t size, int protection, int flags, int file)
{
	void *at = mmap(NULL, size, protection, flags, file, 0);

	if (at == MAP_FAILED)
		check_die("mmap");
	return at;
}

/* CRIU does not find descriptors that were opened in another mount namespace than its own. */
static void reopen_streams(void)
{
	int null;

	MUST(null = open("/dev/null", O_RDWR | O_CLOEXEC));
	for (int stream = 0; stream < 3; stream++)
		MUST(dup2(null, stream));
	MUST(close(null));
}

static void set_up(char **argv)
{
	int file, vmas = atoi(argv[6]);
	size_t size;

	scene.mode = argv[3][0];
	if (strchr(argv[3], ':'))
		scene.work_ns = strtoull(strchr(argv[3], ':') + 1, NULL, 10) * 1000;
	scene.count = (size_t)atoi(argv[4]) << 8;
	scene.random = 0x9E3779B97F4A7C15u;
	size = sizeof(struct board) + scene.count;
	MUST(file = open(argv[2], O_RDWR | O_CREAT | O_CLOEXEC, 0666));
	MUST(ftruncate(file, (off_t)size));
	scene.board = map(size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file);
	MUST(close(file));
	scene.pages = map(scene.count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	for (size_t page = 0; page < scene.count; page++)
		fill_page((uint64_t *)(scene.pages + page * PAGE), (uintptr_t)scene.pages + page * PAGE, 1);
	for (int i = 0; i < vmas; i++) { /* by turns of two kinds, so that no two become one */
		int protection = PROT_READ | (i % 2 ? PROT_WRITE : 0);

		map(PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	}
}

int main(int argc, char **argv)
{
	pthread_t threads[1024];
	int count = argc == 7 ? atoi(argv[5]) : 0;

	if (count < 1 || count > 1024) {
		fprintf(stderr, "usage: touch STATUS BOARD MODE MIB THREADS VMAS\n");
		return 2;
	}
	check_start(argc, argv, 1);
	reopen_streams();
	set_up(argv);
	for (int i = 1; i < count; i++)
		threads[i] = start_thread(rest, NULL);
	check_running();
	work();
	status->phase = FINAL;
	for (int i = 1; i < count; i++)
		pthread_join(threads[i], NULL);
	for (size_t page = 0; page < scene.count; page++)
		verify_page((uint64_t *)(scene.pages + page * PAGE), (uintptr_t)scene.pages + page * PAGE, 1);
	return check_end();
}
