/* Pages become frames, compressed where that was asked for, and are sent. */
#define _GNU_SOURCE
#include "_serving.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/socket.h>

#include "crc32c.h"

/* --- compressing -------------------------------------------------------------------------------------------------- */

/* Not when the server is made: looking for a library takes milliseconds, and a tree may stand still meanwhile. */
static bool has_zstd(struct server *server)
{
    bool found;

    pthread_mutex_lock(&server->lock);
    if (!server->looked)
        (void)zstd_load(&server->zstd);
    server->looked = true;
    found = server->zstd.library;
    pthread_mutex_unlock(&server->lock);
    return found;
}

static bool may_pack(struct connection *c, const struct page_frame *get)
{
    if (!(get->flags & FRAME_PACKED))
        return false;
    if (!c->packer && has_zstd(c->server))
        c->packer = c->server->zstd.new_packer();
    return c->packer;
}

/* Bytes, or 0 when an eighth is not gained by it. */
static uint32_t pack(struct connection *c, const uint8_t *data, size_t pages)
{
    struct workspace *work = c->work;
    size_t room = smaller(pages * PAGE_BYTES * 7 / 8, PACKED_BYTES - work->packed_end);

    return (uint32_t)zstd_pack(&c->server->zstd, c->packer, work->packed + work->packed_end, room, data,
                               pages * PAGE_BYTES);
}

/* The payload of a frame of pages with content, as one or two parts. */
static size_t add_payload(struct connection *c, size_t frame, const uint8_t *data, size_t pages, bool packing,
                          struct iovec *parts)
{
    struct workspace *work = c->work;
    uint32_t length = packing ? pack(c, data, pages) : 0;

    work->frames[frame].crc = crc32c_pages(data, pages);
    if (!length) {
        parts[0] = (struct iovec){.iov_base = (void *)data, .iov_len = pages * PAGE_BYTES};
        return 1;
    }
    work->frames[frame].flags |= FRAME_PACKED;
    work->lengths[frame] = length;
    parts[0] = (struct iovec){.iov_base = &work->lengths[frame], .iov_len = sizeof(length)};
    parts[1] = (struct iovec){.iov_base = work->packed + work->packed_end, .iov_len = length};
    work->packed_end += length;
    return 2;
}

/* --- frames ------------------------------------------------------------------------------------------------------- */

static struct page_frame frame_of(const struct page_frame *get, uint64_t addr, size_t pages, enum page_class class)
{
    static const uint8_t flags[] = {
        [PAGE_CONTENT] = 0,
        [PAGE_ZERO] = FRAME_ZERO,
        [PAGE_ABSENT] = FRAME_ABSENT,
        [PAGE_UNDER_WAY] = FRAME_UNDER_WAY,
    };

    return (struct page_frame){
        .type = FRAME_PAGES,
        .flags = flags[class],
        .count = (uint32_t)pages,
        .object = get->object,
        .addr = addr,
        .tag = get->tag,
    };
}

static void count_pages(struct connection *c, enum page_class class, size_t pages)
{
    atomic_uint_fast64_t *const counters[] = {
        [PAGE_CONTENT] = &c->counters.pages,
        [PAGE_ZERO] = &c->counters.zero,
        [PAGE_ABSENT] = &c->counters.absent,
        [PAGE_UNDER_WAY] = &c->counters.under_way,
    };

    count(counters[class], pages);
}

/* One frame for every run of pages of one class. Returns the number of frames; *parts is how long iov became. */
static size_t cut_frames(struct connection *c, const struct page_frame *get, uint64_t addr, size_t pages,
                         size_t *parts)
{
    struct workspace *work = c->work;
    bool packing = may_pack(c, get);
    size_t frames = 0;

    *parts = work->packed_end = 0;
    for (size_t first = 0, next; first < pages; first = next) {
        struct page_frame *frame = &work->frames[frames];
        enum page_class class = work->class[first];

        next = first + run_of(work->class, first, pages);
        *frame = frame_of(get, addr + first * PAGE_BYTES, next - first, class);
        work->iov[(*parts)++] = (struct iovec){.iov_base = frame, .iov_len = sizeof(*frame)};
        if (class == PAGE_CONTENT)
            *parts += add_payload(c, frames, work->piece + first * PAGE_BYTES, next - first, packing,
                                  work->iov + *parts);
        frames++;
        count_pages(c, class, next - first);
    }
    return frames;
}

static int send_parts(struct connection *c, struct iovec *iov, size_t parts)
{
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = parts};

    while (message.msg_iovlen) {
        ssize_t n = sendmsg(c->fd, &message, MSG_NOSIGNAL);

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return end(c, SERVER_SOCKET_ERROR, errno, 0);
        count(&c->counters.bytes_out, (uint64_t)n);
        for (; message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len; message.msg_iov++, message.msg_iovlen--)
            n -= (ssize_t)message.msg_iov->iov_len;
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + n;
            message.msg_iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

/* Pages that no segment has, up to the next segment. */
static int answer_gap(struct connection *c, const struct page_frame *get, uint64_t addr, size_t pages, bool last)
{
    struct page_frame frame = frame_of(get, addr, pages, PAGE_ABSENT);
    struct iovec part = {.iov_base = &frame, .iov_len = sizeof(frame)};

    frame.flags |= last ? FRAME_LAST : 0;
    count_pages(c, PAGE_ABSENT, pages);
    return send_parts(c, &part, 1);
}

static int answer_piece(struct connection *c, const struct page_frame *get, const struct server_segment *s,
                        uint64_t addr, size_t pages, bool last)
{
    size_t frames, parts;

    if (take_piece(c, s, addr, pages) < 0)
        return -1;
    frames = cut_frames(c, get, addr, pages, &parts);
    c->work->frames[frames - 1].flags |= last ? FRAME_LAST : 0;
    return send_parts(c, c->work->iov, parts);
}

int answer(struct connection *c, const struct page_frame *get)
{
    uint64_t addr = get->addr;
    size_t left = get->count, pages;

    for (; left; left -= pages, addr += pages * PAGE_BYTES) {
        const struct server_segment *s = find_segment(c->server, get->object, addr);
        int result;

        if (s && s->start <= addr) {
            pages = smaller(smaller(left, PIECE_PAGES), (s->end - addr) / PAGE_BYTES);
            result = answer_piece(c, get, s, addr, pages, pages == left);
        } else {
            pages = s ? smaller(left, (s->start - addr) / PAGE_BYTES) : left;
            result = answer_gap(c, get, addr, pages, pages == left);
        }
        if (result < 0)
            return -1;
    }
    return 0;
}
