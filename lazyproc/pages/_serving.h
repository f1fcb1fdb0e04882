/* What the page server's files share: a connection, and how the pages of a request become its answer. */
#ifndef LAZYPROC_PAGES_SERVING_H
#define LAZYPROC_PAGES_SERVING_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "_server.h"
#include "native.h"
#include "zstd.h"

/* Pages are read, looked at, summed and sent in pieces that stay in the second-level cache between the passes. */
#define PIECE_PAGES 64u
#define INBOX_FRAMES 128u
#define PACKED_BYTES (PIECE_PAGES * PAGE_BYTES)

enum page_class { PAGE_CONTENT, PAGE_ZERO, PAGE_ABSENT, PAGE_UNDER_WAY };

/* What is known of a page when pages are released, one byte each. A page is never read once PAGE_FREED is set, and what
 * was read is sent only if it was not set afterwards. */
enum { ANSWERED_FIRST = 1, ANSWERED_SECOND = 2, PAGE_FREED = 4 };

struct counters {
    atomic_uint_fast64_t requests, pages, zero, absent, under_way, bytes_in, bytes_out;
};

/* What the thread of a connection works with; nothing is allocated per request. */
struct workspace {
    uint8_t piece[PIECE_PAGES * PAGE_BYTES]; /* first, for its alignment */
    uint8_t class[PIECE_PAGES];
    struct page_frame frames[PIECE_PAGES];
    struct iovec iov[3 * PIECE_PAGES];
    uint32_t lengths[PIECE_PAGES]; /* of what was compressed, by frame */
    uint8_t packed[PACKED_BYTES];
    size_t packed_end;
    uint8_t inbox[INBOX_FRAMES * sizeof(struct page_frame)];
    size_t inbox_start, inbox_end;
};

struct connection {
    struct connection *next;
    struct server *server;
    struct workspace *work; /* NULL once joined */
    pthread_t thread;
    int fd;
    int number;
    void *packer; /* from the first request on that takes compressed pages */
    uint8_t answered; /* ANSWERED_FIRST or ANSWERED_SECOND, by its channel */
    struct counters counters;
    enum server_cause cause; /* these three are written before `ended` */
    int error;
    uint64_t detail;
    atomic_bool ended;
};

struct server {
    const struct server_segment *segments;
    size_t segment_count;
    atomic_uchar *marks;   /* of all pages of all segments, in their order; NULL unless pages are released */
    uint64_t *first_marks; /* of each segment */
    size_t mark_count;
    struct connection *connections; /* newest first */
    int connection_count;
    bool stopped;
    pthread_mutex_t lock;
    struct zstd zstd; /* under the lock until `looked` for */
    bool looked;
};

static inline void count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* How many of the classes from `first` on are the same. */
static inline size_t run_of(const uint8_t *class, size_t first, size_t pages)
{
    size_t next = first + 1;

    while (next < pages && class[next] == class[first])
        next++;
    return next - first;
}

/* The connection ends for this reason; -1. */
int end(struct connection *c, enum server_cause cause, int error, uint64_t detail);

/* _source.c: the first segment of the object that ends above addr, or NULL. */
const struct server_segment *find_segment(const struct server *server, uint64_t object, uint64_t addr);
atomic_uchar *marks_of(const struct server *server, const struct server_segment *s, uint64_t addr);
/* At most PIECE_PAGES pages of one segment come into work->piece, and work->class says which have. 0, or -1: it ended. */
int take_piece(struct connection *c, const struct server_segment *s, uint64_t addr, size_t pages);

/* _answer.c: 0, or -1: it ended. */
int answer(struct connection *c, const struct page_frame *get);

#endif
