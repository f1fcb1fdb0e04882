#define _GNU_SOURCE
#include "_link.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "crc32c.h"
#include "native.h"

#define FIRST_RING 256u
#define SEND_BATCH 64u
/* Several of the largest answers: the rest of one that has half arrived is moved to the front only now and then. */
#define IN_BYTES (4 * (sizeof(struct page_frame) + LINK_MAX_PAGES * PAGE_BYTES))

int link_init(struct link *link)
{
    memset(link, 0, sizeof(*link));
    link->fd = -1;
    link->mask = FIRST_RING - 1;
    link->in = malloc(IN_BYTES);
    link->asked = malloc(FIRST_RING * sizeof(*link->asked));
    if (link->in && link->asked)
        return 0;
    link_free(link);
    return -ENOMEM;
}

static void forget_zstd(struct link *link)
{
    if (link->unpacker)
        link->zstd.end_unpacker(link->unpacker);
    free(link->unpacked);
    zstd_unload(&link->zstd);
    link->unpacker = NULL;
    link->unpacked = NULL;
}

void link_free(struct link *link)
{
    if (link->fd >= 0)
        close(link->fd);
    forget_zstd(link);
    free(link->in);
    free(link->asked);
    link->in = NULL;
    link->asked = NULL;
    link->fd = -1;
}

void link_connect(struct link *link, int fd)
{
    int yes = 1;

    if (link->fd >= 0)
        close(link->fd);
    link->fd = fd;
    link->in_start = link->in_end = 0;
    link->head = link->unsent = link->tail = 0;
    atomic_store(&link->answered, link->next_tag);
    link->partial = 0;
    /* Refused by a socket that is not TCP, which has no such delay. */
    if (fd >= 0)
        (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
}

bool link_can_unpack(struct link *link)
{
    if (link->sought)
        return link->unpacker;
    link->sought = true;
    if (!zstd_load(&link->zstd))
        return false;
    link->unpacked = malloc(LINK_MAX_PAGES * PAGE_BYTES);
    if (link->unpacked)
        link->unpacker = link->zstd.new_unpacker();
    if (!link->unpacker)
        forget_zstd(link);
    return link->unpacker;
}

/* --- requests ---------------------------------------------------------------------------------------------------- */

static int grow(struct link *link)
{
    uint32_t size = link->mask + 1, count = link_outstanding(link);
    struct request *ring = malloc(2 * size * sizeof(*ring));

    if (!ring)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++)
        ring[i] = link->asked[(link->head + i) & link->mask];
    free(link->asked);
    link->asked = ring;
    link->mask = 2 * size - 1;
    link->unsent -= link->head;
    link->tail = count;
    link->head = 0;
    return 0;
}

int link_ask(struct link *link, uint32_t instance, uint64_t object, uint64_t addr, uint32_t pages, bool packed,
             uint64_t now)
{
    if (pages == 0 || pages > LINK_MAX_PAGES)
        return -EINVAL;
    if (link_outstanding(link) > link->mask) {
        int error = grow(link);

        if (error)
            return error;
    }
    link->asked[link->tail++ & link->mask] =
        (struct request){object, addr, now, pages, pages, instance, link->next_tag++, packed};
    return 0;
}

/* As many requests as one send takes. */
static size_t make_frames(const struct link *link, struct page_frame *frames)
{
    size_t n = 0;

    for (uint32_t i = link->unsent; i != link->tail && n < SEND_BATCH; i++, n++) {
        const struct request *r = &link->asked[i & link->mask];

        frames[n] = (struct page_frame){
            .type = FRAME_GET,
            .flags = r->packed ? FRAME_PACKED : 0,
            .count = r->count,
            .object = r->object,
            .addr = r->addr,
            .tag = r->tag,
        };
    }
    return n * sizeof(*frames);
}

int link_flush(struct link *link)
{
    struct page_frame frames[SEND_BATCH];

    while (link->unsent != link->tail) {
        size_t bytes = make_frames(link, frames) - link->partial;
        ssize_t sent = send(link->fd, (const uint8_t *)frames + link->partial, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);

        if (sent < 0)
            return errno == EAGAIN || errno == EINTR ? 0 : -errno;
        atomic_fetch_add_explicit(&link->bytes_out, (uint64_t)sent, memory_order_relaxed);
        link->partial += (size_t)sent;
        link->unsent += (uint32_t)(link->partial / sizeof(*frames));
        link->partial %= sizeof(*frames);
        if ((size_t)sent < bytes)
            return 0;
    }
    return 0;
}

/* --- answers ----------------------------------------------------------------------------------------------------- */

int link_receive(struct link *link)
{
    ssize_t n;

    if (link->in_start) {
        memmove(link->in, link->in + link->in_start, link->in_end - link->in_start);
        link->in_end -= link->in_start;
        link->in_start = 0;
    }
    n = recv(link->fd, link->in + link->in_end, IN_BYTES - link->in_end, MSG_DONTWAIT);
    if (n < 0)
        return errno == EINTR ? -EAGAIN : -errno;
    if (n == 0)
        return -ECONNRESET;
    atomic_fetch_add_explicit(&link->bytes_in, (uint64_t)n, memory_order_relaxed);
    link->in_end += (size_t)n;
    return 0;
}

/* Is this header the next part of the answer to the oldest request that was sent? */
static int check_header(const struct link *link, const struct page_frame *f)
{
    const struct request *r = &link->asked[link->head & link->mask];
    unsigned payloadless = f->flags & (FRAME_ZERO | FRAME_ABSENT | FRAME_UNDER_WAY);
    unsigned allowed = payloadless | FRAME_LAST;

    if (link->head == link->unsent || f->type != FRAME_PAGES || f->reserved || f->tag != r->tag)
        return -EBADMSG;
    if (r->packed && !payloadless)
        allowed |= FRAME_PACKED;
    if (f->flags & ~allowed || payloadless & (payloadless - 1))
        return -EBADMSG;
    if (f->object != r->object || f->addr != r->addr || f->count == 0 || f->count > r->count)
        return -EBADMSG;
    if (!!(f->flags & FRAME_LAST) != (f->count == r->count))
        return -EBADMSG;
    return payloadless && f->crc ? -EBADMSG : 0;
}

static enum answer_kind kind_of(uint8_t flags)
{
    if (flags & FRAME_ABSENT)
        return ANSWER_ABSENT;
    if (flags & FRAME_UNDER_WAY)
        return ANSWER_UNDER_WAY;
    return flags & FRAME_ZERO ? ANSWER_ZERO : ANSWER_DATA;
}

/* The length of what follows a header, once that can be told: 0, -EAGAIN, -EBADMSG. */
static int payload_of(const struct page_frame *f, const uint8_t *after, size_t have, size_t *payload)
{
    uint32_t length;

    *payload = kind_of(f->flags) == ANSWER_DATA ? (size_t)f->count * PAGE_BYTES : 0;
    if (!(f->flags & FRAME_PACKED))
        return have < *payload ? -EAGAIN : 0;
    if (have < sizeof(length))
        return -EAGAIN;
    memcpy(&length, after, sizeof(length));
    if (length == 0 || length >= *payload)
        return -EBADMSG;
    *payload = sizeof(length) + length;
    return have < *payload ? -EAGAIN : 0;
}

/* The pages of a payload that has come whole, or NULL: it is not what was sent. */
static const uint8_t *pages_of(struct link *link, const struct page_frame *f, const uint8_t *at, size_t payload)
{
    if (f->flags & FRAME_PACKED) {
        if (!zstd_unpack(&link->zstd, link->unpacker, link->unpacked, (size_t)f->count * PAGE_BYTES,
                         at + sizeof(uint32_t), payload - sizeof(uint32_t)))
            return NULL;
        at = link->unpacked;
    }
    return crc32c_pages(at, f->count) == f->crc ? at : NULL;
}

int link_next(struct link *link, struct answer *answer)
{
    struct page_frame f;
    size_t have = link->in_end - link->in_start, payload;
    const uint8_t *after = link->in + link->in_start + sizeof(f);
    struct request *r;
    int error;

    if (have < sizeof(f))
        return 0;
    memcpy(&f, link->in + link->in_start, sizeof(f));
    if (check_header(link, &f))
        return -EBADMSG;
    answer->kind = kind_of(f.flags);
    error = payload_of(&f, after, have - sizeof(f), &payload);
    if (error)
        return error == -EAGAIN ? 0 : error;
    answer->data = payload ? pages_of(link, &f, after, payload) : NULL;
    if (payload && !answer->data)
        return -EILSEQ;
    link->in_start += sizeof(f) + payload;
    r = &link->asked[link->head & link->mask];
    answer->request = *r;
    answer->addr = f.addr;
    answer->pages = f.count;
    answer->packed = f.flags & FRAME_PACKED;
    answer->bytes = sizeof(f) + payload;
    r->addr += (uint64_t)f.count * PAGE_BYTES;
    r->count -= f.count;
    if (r->count == 0) {
        link->head++;
        atomic_store(&link->answered, r->tag + 1);
    }
    return 1;
}
