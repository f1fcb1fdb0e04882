#define _GNU_SOURCE
#include "page_source.h"

#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "crc32c.h"
#include "native.h"

int fill_page(const struct range ranges[2], uint64_t addr, uint64_t *page)
{
    for (int r = 0; r < 2; r++)
        if (addr >= ranges[r].addr && addr - ranges[r].addr < ranges[r].length) {
            for (uint64_t i = 0; i < 512; i++)
                page[i] = ((addr - ranges[r].addr) / 8 + i + 1) * 0x9e3779b97f4a7c15ull;
            return 1;
        }
    return 0;
}

static int answer(struct channel *c, const struct page_frame *get)
{
    struct {
        struct page_frame frame;
        uint64_t page[512];
    } out;

    for (uint32_t i = 0; i < get->count; i++) {
        uint64_t addr = get->addr + i * 4096ull;
        size_t bytes = sizeof(out);

        if (c->answers == 0 && !c->garbage)
            return -1;
        out.frame = (struct page_frame){
            .type = FRAME_PAGES, .count = 1, .object = get->object, .addr = addr, .tag = get->tag};
        if (!fill_page(c->ranges, addr, out.page)) {
            out.frame.flags = FRAME_ABSENT;
            bytes = sizeof(out.frame);
        } else {
            out.frame.crc = crc32c_pages(out.page, 1) ^ (c->answers == 0);
        }
        c->answers -= c->answers > 0;
        if (i + 1 == get->count)
            out.frame.flags |= FRAME_LAST;
        if (send(c->fd, &out, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
            return -1;
    }
    return 0;
}

static void *serve(void *channel)
{
    struct channel *c = channel;
    struct page_frame get;

    while (recv(c->fd, &get, sizeof(get), MSG_WAITALL) == (ssize_t)sizeof(get))
        if (answer(c, &get) < 0)
            break;
    shutdown(c->fd, SHUT_RDWR);
    return NULL;
}

static int open_channel(struct channel *c, const struct range ranges[2], int answers, int garbage)
{
    int ends[2];

    check(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    *c = (struct channel){.ranges = ranges, .fd = ends[0], .answers = answers, .garbage = garbage};
    check(pthread_create(&c->thread, NULL, serve, c) == 0, "pthread_create");
    return ends[1];
}

void connect_source(struct pager *p, struct channel channels[2], const struct range ranges[2], int answers,
                    int garbage)
{
    int urgent = open_channel(&channels[0], ranges, -1, 0);
    int bulk = open_channel(&channels[1], ranges, answers, garbage);

    check(pager_set_remote(p, urgent, bulk, false) == 0, "pager_set_remote");
}

void close_source(struct channel channels[2])
{
    for (int i = 0; i < 2; i++) {
        pthread_join(channels[i].thread, NULL);
        close(channels[i].fd);
    }
}
