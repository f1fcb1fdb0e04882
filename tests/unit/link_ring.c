/* Requests to a peer that reads a few bytes at a time and answers some of them: each arrives once, whole and in order,
 * however often a send is cut short and the ring of requests grows while its first ones are answered already. So do
 * those over the next connection. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_link.h"
#include "native.h"

#define REQUESTS 5000u
#define OBJECT 0x2a01u
#define FIRST (0u - REQUESTS / 2) /* number of the first one: they begin anew on the way */
#define ODD 41u /* bytes: no whole number of frames */

static int peer;
static struct page_frame frame;
static size_t have;
static uint32_t arrived, answered;

static void demand(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "%s, after %u requests and %u answers\n", what, arrived, answered);
    exit(1);
}

static void answer(void)
{
    struct page_frame zero = {
        .type = FRAME_PAGES,
        .flags = FRAME_ZERO | FRAME_LAST,
        .count = 1,
        .object = OBJECT,
        .addr = answered * PAGE_BYTES,
        .tag = FIRST + answered,
    };

    demand(send(peer, &zero, sizeof(zero), 0) == sizeof(zero), "an answer was not sent");
    answered++;
}

/* At most so many bytes. */
static void hear(size_t most)
{
    size_t left = sizeof(frame) - have;
    ssize_t n = recv(peer, (uint8_t *)&frame + have, left < most ? left : most, MSG_DONTWAIT);

    if (n < 0)
        return;
    have += (size_t)n;
    if (have < sizeof(frame))
        return;
    have = 0;
    demand(frame.type == FRAME_GET && frame.count == 1 && frame.object == OBJECT, "no request arrived");
    demand(frame.tag == FIRST + arrived && frame.addr == arrived * PAGE_BYTES, "another request was to arrive");
    arrived++;
}

static void take(struct link *link)
{
    struct answer got;
    int result = link_receive(link);

    demand(result == 0 || result == -EAGAIN, "the connection broke");
    while ((result = link_next(link, &got)) > 0)
        demand(got.kind == ANSWER_ZERO && got.addr == got.request.instance * PAGE_BYTES, "another request is answered");
    demand(result == 0, "an answer was not understood");
}

/* Linked with --wrap=send: a kernel may take any part of what is to be sent, and here it does so all the time. */
ssize_t __real_send(int fd, const void *data, size_t length, int flags);
ssize_t __wrap_send(int fd, const void *data, size_t length, int flags)
{
    return __real_send(fd, data, fd == peer || length < ODD ? length : ODD, flags);
}

static void wait_for(int fd, const char *what)
{
    struct pollfd there = {.fd = fd, .events = POLLIN};

    demand(poll(&there, 1, 5000) == 1, what);
}

static void connect_anew(struct link *link)
{
    int ends[2], little = 1;

    demand(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "no connection");
    demand(setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &little, sizeof(little)) == 0, "no small buffer");
    peer = ends[1];
    have = 0;
    link_connect(link, ends[0]);
}

static void ask(struct link *link, uint32_t number)
{
    demand(link_ask(link, number, OBJECT, number * PAGE_BYTES, 1, false, 0) == 0, "no room for a request");
}

static void ask_for_all(struct link *link)
{
    for (uint32_t i = 0; i < REQUESTS; i++) {
        ask(link, i);
        demand(link_flush(link) == 0, "requests were not sent");
        hear(19);
        if (i % 3 == 0 && answered < arrived) {
            answer();
            take(link);
        }
    }
    while (arrived < REQUESTS) {
        demand(link_flush(link) == 0, "requests were not sent");
        wait_for(peer, "requests were lost");
        hear(sizeof(frame));
    }
    while (answered < REQUESTS) {
        demand(!link_answered(link, FIRST + answered + 1), "it is said to be answered, and is not");
        answer();
        take(link);
    }
    demand(link_outstanding(link) == 0, "a request is open still");
    demand(link_answered(link, FIRST + REQUESTS) && link_answered(link, FIRST), "they are not said to be answered");
}

/* Of two requests the second was under way when the connection was lost: over the next one the third comes whole. */
static void lose_half_a_request(struct link *link)
{
    uint32_t third = arrived + 2;

    ask(link, arrived);
    ask(link, arrived + 1);
    demand(link_flush(link) == 0 && link->partial, "no request is under way");
    close(peer);
    connect_anew(link);
    arrived = answered = third;
    ask(link, third);
    demand(link_flush(link) == 0, "the request was not sent");
    hear(sizeof(frame));
    demand(arrived == third + 1, "the request has not come whole");
}

/* Somebody guesses what will be asked next. */
static void refuse_what_was_not_asked_yet(struct link *link)
{
    struct answer got;

    answer();
    take(link);
    ask(link, arrived);
    answer();
    demand(link_receive(link) == 0 && link_next(link, &got) == -EBADMSG, "what was not sent yet is answered");
}

int main(void)
{
    struct link link;

    demand(link_init(&link) == 0, "no link");
    link.next_tag = FIRST;
    connect_anew(&link);
    ask_for_all(&link);
    lose_half_a_request(&link);
    refuse_what_was_not_asked_yet(&link);
    link_free(&link);
    return 0;
}
