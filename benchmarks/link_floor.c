/* SPDX-License-Identifier: GPL-2.0-only */
/* The least that pages from another host can cost: TCP and UFFDIO_COPY, nothing else.
 *
 * link_floor serve PORT         answers one connection, says "ready" before
 * link_floor fault HOST PORT MIB   touches pages in random order, each asked for alone; prints median and p99 in ns
 * link_floor bulk HOST PORT MIB    all of it in pieces of 256 KiB; prints how long it took in ns
 *
 * A request is a u64: how many bytes to send. */
#include "floors.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PIECE = 256 << 10 };

struct scene {
	int uffd, link;
	size_t pages;
	char *memory, *piece;
};

static char *anonymous(size_t size)
{
	char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static int stream(int socket_fd)
{
	int on = 1;

	if (setsockopt(socket_fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0)
		die("TCP_NODELAY");
	return socket_fd;
}

static struct sockaddr_in place(const char *host, const char *port)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port)) };

	if (inet_pton(AF_INET, host, &at.sin_addr) != 1)
		die(host);
	return at;
}

static void serve(const char *port)
{
	struct sockaddr_in at = place("0.0.0.0", port);
	int listening = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1, link;
	char *data = anonymous(PIECE);
	uint64_t wanted;

	memset(data, 1, PIECE);
	if (listening < 0 || setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0 ||
	    bind(listening, (struct sockaddr *)&at, sizeof(at)) < 0 || listen(listening, 1) < 0)
		die("listen");
	printf("ready\n");
	fflush(stdout);
	link = stream(accept(listening, NULL, NULL));
	while (recv(link, &wanted, sizeof(wanted), MSG_WAITALL) == sizeof(wanted)) {
		while (wanted) {
			ssize_t sent = send(link, data, wanted < PIECE ? wanted : PIECE, MSG_NOSIGNAL);

			if (sent < 0)
				die("send");
			wanted -= (uint64_t)sent;
		}
	}
}

static void ask(struct scene *scene, uint64_t bytes)
{
	if (send(scene->link, &bytes, sizeof(bytes), MSG_NOSIGNAL) != sizeof(bytes))
		die("send");
}

/* The next `size` bytes of the link become present at `to`. */
static void bring(struct scene *scene, uint64_t to, size_t size)
{
	struct uffdio_copy copy = { .dst = to, .src = (uint64_t)scene->piece, .len = size };

	if (recv(scene->link, scene->piece, size, MSG_WAITALL) != (ssize_t)size)
		die("recv");
	if (ioctl(scene->uffd, UFFDIO_COPY, &copy) < 0)
		die("UFFDIO_COPY");
}

static void *answer_faults(void *argument)
{
	struct scene *scene = argument;
	struct pollfd waiting = { .fd = scene->uffd, .events = POLLIN };

	for (size_t served = 0; served < scene->pages;) {
		struct uffd_msg message;

		if (poll(&waiting, 1, -1) < 0)
			die("poll");
		if (read(scene->uffd, &message, sizeof(message)) != sizeof(message)) {
			if (errno == EAGAIN)
				continue;
			die("read");
		}
		ask(scene, PAGE);
		bring(scene, message.arg.pagefault.address & ~(uint64_t)(PAGE - 1), PAGE);
		served++;
	}
	return NULL;
}

static void open_scene(struct scene *scene, const char *host, const char *port, size_t pages)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct sockaddr_in at = place(host, port);

	scene->pages = pages;
	scene->memory = anonymous(pages * PAGE);
	scene->piece = anonymous(PIECE);
	memset(scene->piece, 1, PIECE);
	scene->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	scene->link = stream(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	if (scene->uffd < 0 || connect(scene->link, (struct sockaddr *)&at, sizeof(at)) < 0)
		die("set-up");
	range.range.start = (uint64_t)scene->memory;
	range.range.len = pages * PAGE;
	if (ioctl(scene->uffd, UFFDIO_API, &api) < 0 || ioctl(scene->uffd, UFFDIO_REGISTER, &range) < 0)
		die("userfaultfd");
}

static int ascending(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static void touch_all(struct scene *scene)
{
	uint64_t *times = calloc(scene->pages, sizeof(*times));
	pthread_t thread;
	size_t at = 0;

	if (!times || pthread_create(&thread, NULL, answer_faults, scene))
		die("pthread_create");
	for (size_t visit = 0; visit < scene->pages; visit++) {
		uint64_t begun = now_ns();

		*(volatile char *)(scene->memory + at * PAGE);
		times[visit] = now_ns() - begun;
		at = (at + 7919) % scene->pages; /* a prime: every page once */
	}
	if (pthread_join(thread, NULL))
		die("pthread_join");
	qsort(times, scene->pages, sizeof(*times), ascending);
	printf("%llu %llu\n", (unsigned long long)times[scene->pages / 2],
	       (unsigned long long)times[scene->pages * 99 / 100]);
}

static void bring_all(struct scene *scene)
{
	uint64_t size = scene->pages * PAGE, begun = now_ns();

	ask(scene, size);
	for (uint64_t done = 0; done < size; done += PIECE)
		bring(scene, (uint64_t)scene->memory + done, PIECE);
	printf("%llu\n", (unsigned long long)(now_ns() - begun));
}

int main(int argc, char **argv)
{
	struct scene scene;

	if (argc == 3 && !strcmp(argv[1], "serve")) {
		serve(argv[2]);
	} else if (argc == 5) {
		open_scene(&scene, argv[2], argv[3], strtoul(argv[4], NULL, 10) << 8);
		(!strcmp(argv[1], "fault") ? touch_all : bring_all)(&scene);
	} else {
		fprintf(stderr, "usage: link_floor serve PORT | (fault|bulk) HOST PORT MIB\n");
		return 2;
	}
	return 0;
}
