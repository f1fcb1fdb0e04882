/* SPDX-License-Identifier: GPL-2.0-only */
/* A wire with a length: two network interfaces (TAP), one in each of two network namespaces, and every frame that goes
 * into one of them comes out of the other after a delay. Frames and not the bytes of connections, so that TCP sees the
 * round trip as it does on a real way. Frames of up to 64 KiB pass whole, their checksums and segments still to be made
 * (the virtio header says so), as they do over a veth.
 *
 * Usage: delay NETNS NETNS INTERFACE DELAY_NS (one way). Says "ready" when both interfaces are there; runs until it is
 * killed, and the interfaces go with it. */
#define _GNU_SOURCE
#include "floors.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { FRAME_MAX = 66 << 10, QUEUE = 4096 };

struct frame {
	uint64_t due;
	size_t size;
	char data[FRAME_MAX];
};

/* One direction: held[head .. tail) are the frames under way, the oldest first. Of the spare ones the last that became so
 * is taken first, so that no more memory is touched than is under way. */
struct way {
	int in, out;
	uint64_t delay;
	struct frame *held[QUEUE], *spare[QUEUE];
	unsigned head, tail, spares;
};

static int tap_in(const char *netns, const char *name)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	int space = open(netns, O_RDONLY | O_CLOEXEC), tap;

	if (space < 0 || setns(space, CLONE_NEWNET) < 0)
		die(netns);
	close(space);
	tap = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (tap < 0)
		die("/dev/net/tun");
	strncpy(request.ifr_name, name, IFNAMSIZ - 1);
	if (ioctl(tap, TUNSETIFF, &request) < 0 ||
	    ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0)
		die("TUNSETIFF");
	return tap;
}

/* Whether a frame came. */
static int take(struct way *way)
{
	struct frame *frame = way->spare[way->spares - 1];
	ssize_t size = read(way->in, frame->data, FRAME_MAX);

	if (size < 0 && errno != EAGAIN)
		die("read");
	if (size <= 0)
		return 0;
	frame->size = (size_t)size;
	frame->due = now_ns() + way->delay;
	way->held[way->tail++ % QUEUE] = frame;
	way->spares--;
	return 1;
}

static void pass_what_is_due(struct way *way)
{
	while (way->head != way->tail && way->held[way->head % QUEUE]->due <= now_ns()) {
		struct frame *frame = way->held[way->head++ % QUEUE];

		/* EIO: the other end is not up. A wire loses what cannot be taken. */
		if (write(way->out, frame->data, frame->size) < 0 && errno != EIO && errno != ENOBUFS && errno != EAGAIN)
			die("write");
		way->spare[way->spares++] = frame;
	}
}

static void wait_for_either(const struct way *way)
{
	struct pollfd readable = { .fd = way->in, .events = POLLIN };
	struct timespec left = { 0, 0 };
	int held = way->head != way->tail;

	if (held) {
		uint64_t due = way->held[way->head % QUEUE]->due, now = now_ns(), ns = due > now ? due - now : 0;

		left.tv_sec = (time_t)(ns / 1000000000);
		left.tv_nsec = (long)(ns % 1000000000);
	}
	if (ppoll(&readable, way->spares ? 1 : 0, held ? &left : NULL, NULL) < 0 && errno != EINTR)
		die("ppoll");
}

static void *carry(void *argument)
{
	struct way *way = argument;

	for (;;) {
		wait_for_either(way);
		do
			pass_what_is_due(way);
		while (way->spares && take(way));
	}
	return NULL;
}

static void open_way(struct way *way, int in, int out, uint64_t delay)
{
	size_t size = QUEUE * sizeof(struct frame);
	struct frame *frames = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (frames == MAP_FAILED)
		die("mmap");
	way->in = in;
	way->out = out;
	way->delay = delay;
	while (way->spares < QUEUE)
		way->spare[way->spares++] = frames++;
}

int main(int argc, char **argv)
{
	struct sched_param first = { .sched_priority = 1 };
	static struct way there, back;
	pthread_t thread;
	int one, other;

	if (argc != 5) {
		fprintf(stderr, "usage: delay NETNS NETNS INTERFACE DELAY_NS\n");
		return 2;
	}
	one = tap_in(argv[1], argv[3]);
	other = tap_in(argv[2], argv[3]);
	open_way(&there, one, other, strtoull(argv[4], NULL, 10));
	open_way(&back, other, one, there.delay);
	/* A wire waits for no processor: before all others, and not a timer's slack too late. */
	if (prctl(PR_SET_TIMERSLACK, 1) < 0 || sched_setscheduler(0, SCHED_FIFO, &first) < 0)
		die("real-time priority");
	if (pthread_create(&thread, NULL, carry, &back))
		die("pthread_create");
	printf("ready\n");
	fflush(stdout);
	carry(&there);
	return 0;
}
