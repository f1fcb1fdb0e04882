/* One connection to a page server, as its client: requests go out in order, and the answers come back in that order.
 *
 * Nothing of an answer is handed out before all of it has arrived and has been verified. A link belongs to one thread;
 * only the byte counters may be read by others.
 */
#ifndef LAZYPROC_UFFD_LINK_H
#define LAZYPROC_UFFD_LINK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "zstd.h"

#define LINK_MAX_PAGES 64u /* in one request */

struct request {
    uint64_t object;
    uint64_t addr;
    uint64_t asked_ns;
    uint32_t pages; /* asked for */
    uint32_t count; /* of them still to come */
    uint32_t instance;
    uint32_t tag;
    bool packed; /* the pages may come compressed */
};

struct link {
    int fd; /* -1: none */
    uint8_t *in;
    size_t in_start, in_end;
    struct request *asked; /* a ring; the indices run on and are masked */
    uint32_t head;         /* oldest that is not answered */
    uint32_t unsent;       /* oldest that is not wholly sent */
    uint32_t tail;
    uint32_t mask;
    uint32_t next_tag;     /* so many requests have been made */
    atomic_uint_least32_t answered; /* so many of them have been answered, or are forgotten */
    struct zstd zstd;
    bool sought;
    void *unpacker;
    uint8_t *unpacked; /* the pages of one answer */
    size_t partial; /* bytes of `unsent` that are on their way already */
    atomic_uint_fast64_t bytes_in, bytes_out;
};

/* UNDER_WAY: it comes over the other connection. */
enum answer_kind { ANSWER_DATA, ANSWER_ZERO, ANSWER_ABSENT, ANSWER_UNDER_WAY };

/* `pages` pages from `addr`, as part of what `request` asked for; they took `bytes` on the wire. `data` is valid until the
 * next link_next or link_receive. */
struct answer {
    enum answer_kind kind;
    uint64_t addr;
    uint32_t pages;
    uint64_t bytes;
    bool packed; /* they came compressed */
    const uint8_t *data;
    struct request request;
};

int link_init(struct link *link);
void link_free(struct link *link);
void link_connect(struct link *link, int fd); /* forgets the old connection and closes it; fd -1 only closes */

bool link_can_unpack(struct link *link); /* and requests may say so; the first call takes milliseconds */
int link_ask(struct link *link, uint32_t instance, uint64_t object, uint64_t addr, uint32_t pages, bool packed,
             uint64_t now);
/* Whether it is the last of what was asked for at once. */
static inline bool is_last(const struct answer *answer)
{
    return answer->request.count == answer->pages;
}

int link_flush(struct link *link);   /* sends what the socket takes; 0 or -errno */
int link_receive(struct link *link); /* takes what has arrived; 0, -EAGAIN, -ECONNRESET... */

/* 1 and the next whole answer, 0 when there is none yet, -EBADMSG when the peer talks garbage, -EILSEQ when a
 * checksum is wrong. */
int link_next(struct link *link, struct answer *answer);

/* Whether this was the number of requests when the last of them was made that is answered by now, or less. Any thread. */
static inline bool link_answered(const struct link *link, uint32_t requests)
{
    return (int32_t)(atomic_load(&link->answered) - requests) >= 0;
}

static inline uint32_t link_outstanding(const struct link *link)
{
    return link->tail - link->head;
}

/* Bytes that have been received and not handed out. */
static inline size_t link_unread(const struct link *link)
{
    return link->in_end - link->in_start;
}

#endif
