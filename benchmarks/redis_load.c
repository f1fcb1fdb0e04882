/* SPDX-License-Identifier: GPL-2.0-only */
/* A client of redis with an open loop: every request is due at a time of its own, whether those before it have been
 * answered or not, and its latency counts from then on. What a server that stands still makes everybody wait is all seen.
 *
 * Usage: redis_load HOST PORT CONNECTIONS REQUESTS_A_SECOND KEYS FILE
 *
 * Half of the requests set a key of their own ("c:N", an ever larger number), a quarter read one of these and must find
 * the last number that was set, a quarter read one of the KEYS that DEBUG POPULATE has made ("k:N", SIZE bytes). Says
 * "ready" with the first answer. SIGTERM: no more requests; when all are answered, every key of its own is read once
 * more, and FILE gets struct answer for each request. Anything wrong ends it with exit 1. */
#define _GNU_SOURCE
#include "floors.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

enum { OWN = 256, SIZE = 4000, CONNECTIONS_MAX = 64, INPUT = 1 << 16, COMMAND_MAX = 128, END_S = 60 };
enum kind { SET, GET_OWN, GET };

/* In the time of day, as everything that is compared with it. */
struct answer {
	uint64_t due, came;
};

/* What a connection still has to be told, in the order of its requests. */
struct pending {
	uint64_t due, expected;
	enum kind kind;
};

struct connection {
	int fd;
	char *out, in[INPUT];
	size_t out_size, out_room, sent, in_size;
	struct pending *pending;
	size_t asked, answered, pending_room; /* pending[answered .. asked) */
	uint64_t own[OWN];
};

static struct connection connections[CONNECTIONS_MAX];
static struct answer *answers;
static size_t answer_count, answer_room;
static uint64_t random_state = 0x9E3779B97F4A7C15u;
static unsigned keys;
static volatile sig_atomic_t stopping;

static void on_sigterm(int number)
{
	(void)number;
	stopping = 1;
}

static uint64_t time_of_day(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static uint64_t draw(void)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return random_state * 0x2545F4914F6CDD1Du >> 16;
}

/* An array that has room for one more element. */
static void *grown(void *array, size_t count, size_t *room, size_t size)
{
	if (count < *room)
		return array;
	*room = *room ? 2 * *room : 4096;
	array = realloc(array, *room * size);
	if (!array)
		die("realloc");
	return array;
}

static void dial(struct connection *to, const struct sockaddr_in *at)
{
	int on = 1;

	to->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (to->fd < 0 || connect(to->fd, (const struct sockaddr *)at, sizeof(*at)) < 0 ||
	    setsockopt(to->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) < 0)
		die("connect");
}

static void flush(struct connection *to)
{
	while (to->sent < to->out_size) {
		ssize_t sent = send(to->fd, to->out + to->sent, to->out_size - to->sent, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (sent < 0 && errno == EAGAIN)
			return;
		if (sent < 0)
			die("send");
		to->sent += (size_t)sent;
	}
	to->sent = to->out_size = 0;
}

static void ask(struct connection *to, enum kind kind, unsigned which, unsigned key, uint64_t due)
{
	char name[32], value[32], command[COMMAND_MAX];
	int size, length = snprintf(name, sizeof(name), kind == GET ? "k:%u" : "c:%u", kind == GET ? key : which * OWN + key);
	uint64_t expected = kind == GET ? key : to->own[key];

	if (kind == SET) {
		int digits = snprintf(value, sizeof(value), "%llu", (unsigned long long)++to->own[key]);

		size = snprintf(command, sizeof(command), "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", length, name, digits, value);
	} else {
		size = snprintf(command, sizeof(command), "*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n", length, name);
	}
	while (to->out_room - to->out_size < COMMAND_MAX)
		to->out = grown(to->out, to->out_room, &to->out_room, 1);
	memcpy(to->out + to->out_size, command, (size_t)size);
	to->out_size += (size_t)size;
	to->pending = grown(to->pending, to->asked, &to->pending_room, sizeof(*to->pending));
	to->pending[to->asked++] = (struct pending){ .due = due, .expected = expected, .kind = kind };
	flush(to);
}

static void wrong(const char *found, size_t size, const struct pending *of)
{
	fprintf(stderr, "redis answered %.*s where %llu was set\n", (int)(size < 80 ? size : 80), found,
		(unsigned long long)of->expected);
	exit(1);
}

/* The value of a key that DEBUG POPULATE made: "value:N", and zeros. */
static bool is_populated(const char *value, size_t size, uint64_t number)
{
	char expected[SIZE] = { 0 };

	snprintf(expected, sizeof(expected), "value:%llu", (unsigned long long)number);
	return size == SIZE && memcmp(value, expected, SIZE) == 0;
}

static bool is_number(const char *value, size_t size, uint64_t number)
{
	char expected[32];

	return size == (size_t)snprintf(expected, sizeof(expected), "%llu", (unsigned long long)number) &&
	       memcmp(value, expected, size) == 0;
}

/* Checks one reply, and says how long it is; 0 when it is not whole yet. A key that was never set is nil. */
static size_t check(const char *in, size_t size, const struct pending *of)
{
	const char *line = memmem(in, size, "\r\n", 2), *value;
	long length;

	if (!line)
		return 0;
	value = line + 2;
	if (of->kind == SET) {
		if (value - in != 5 || memcmp(in, "+OK", 3) != 0)
			wrong(in, size, of);
		return 5;
	}
	length = in[0] == '$' ? strtol(in + 1, NULL, 10) : -2;
	if (length == -1 && of->kind == GET_OWN && of->expected == 0)
		return (size_t)(value - in);
	if (length < 0)
		wrong(in, size, of);
	if (size - (size_t)(value - in) < (size_t)length + 2)
		return 0;
	if (!(of->kind == GET ? is_populated : is_number)(value, (size_t)length, of->expected))
		wrong(in, size, of);
	return (size_t)(value - in) + (size_t)length + 2;
}

static void take_answers(struct connection *from)
{
	ssize_t came = recv(from->fd, from->in + from->in_size, INPUT - from->in_size, MSG_DONTWAIT);
	uint64_t now = time_of_day();
	size_t used, done = 0;

	if (came == 0 || (came < 0 && errno != EAGAIN))
		die("redis closed the connection");
	if (came < 0)
		return;
	from->in_size += (size_t)came;
	while (from->answered < from->asked &&
	       (used = check(from->in + done, from->in_size - done, &from->pending[from->answered])) != 0) {
		done += used;
		answers = grown(answers, answer_count, &answer_room, sizeof(*answers));
		answers[answer_count++] = (struct answer){ from->pending[from->answered++].due, now };
	}
	memmove(from->in, from->in + done, from->in_size - done);
	from->in_size -= done;
}

/* Until `due`, or until something has come; answers are taken. */
static void wait_and_take(int count, uint64_t due)
{
	uint64_t now = time_of_day(), left = due > now ? due - now : 0;
	struct timespec timeout = { (time_t)(left / 1000000000), (long)(left % 1000000000) };
	struct pollfd ready[CONNECTIONS_MAX];

	for (int i = 0; i < count; i++) {
		short out = connections[i].out_size ? POLLOUT : 0;

		ready[i] = (struct pollfd){ .fd = connections[i].fd, .events = POLLIN | out };
	}
	if (ppoll(ready, (nfds_t)count, &timeout, NULL) <= 0)
		return;
	for (int i = 0; i < count; i++) {
		if (ready[i].revents & POLLOUT)
			flush(&connections[i]);
		if (ready[i].revents & (POLLIN | POLLERR | POLLHUP))
			take_answers(&connections[i]);
	}
}

static void load(int count, uint64_t interval)
{
	uint64_t due = time_of_day();
	bool said = false;

	while (!stopping) {
		for (; due <= time_of_day(); due += interval) {
			uint64_t chosen = draw();
			enum kind kind = chosen % 4 < 2 ? SET : chosen % 4 == 2 ? GET_OWN : GET;
			unsigned which = (unsigned)(chosen >> 2) % (unsigned)count, key = (unsigned)(draw() % (kind == GET ? keys : OWN));

			ask(&connections[which], kind, which, key, due);
		}
		wait_and_take(count, due);
		if (answer_count && !said) {
			said = true;
			printf("ready\n");
			fflush(stdout);
		}
	}
}

static void wait_for_all(int count)
{
	uint64_t until = time_of_day() + (uint64_t)END_S * 1000000000;

	for (int i = 0; i < count; i++)
		while (connections[i].answered < connections[i].asked) {
			if (time_of_day() > until)
				errno = ETIMEDOUT, die("an answer");
			wait_and_take(count, time_of_day() + 10000000);
		}
}

int main(int argc, char **argv)
{
	struct sigaction on_term = { .sa_handler = on_sigterm };
	struct sockaddr_in at = { .sin_family = AF_INET };
	int count = argc == 7 ? atoi(argv[3]) : 0;
	size_t loaded;
	FILE *file;

	if (count < 1 || count > CONNECTIONS_MAX || inet_pton(AF_INET, argv[1], &at.sin_addr) != 1) {
		fprintf(stderr, "usage: redis_load HOST PORT CONNECTIONS REQUESTS_A_SECOND KEYS FILE\n");
		return 2;
	}
	at.sin_port = htons((uint16_t)atoi(argv[2]));
	keys = (unsigned)atoi(argv[5]);
	if (sigaction(SIGTERM, &on_term, NULL) < 0 || prctl(PR_SET_TIMERSLACK, 1) < 0)
		die("set-up");
	for (int i = 0; i < count; i++)
		dial(&connections[i], &at);
	load(count, 1000000000 / (uint64_t)atoi(argv[4]));
	wait_for_all(count);
	loaded = answer_count;
	for (int i = 0; i < count; i++)
		for (unsigned key = 0; key < OWN; key++)
			ask(&connections[i], GET_OWN, (unsigned)i, key, time_of_day());
	wait_for_all(count);
	file = fopen(argv[6], "wb");
	if (!file || fwrite(answers, sizeof(*answers), loaded, file) != loaded || fclose(file))
		die(argv[6]);
	return 0;
}
