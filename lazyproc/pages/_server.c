#define _GNU_SOURCE
#include "_server.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "crc32c.h"
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

static void count(atomic_uint_fast64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* --- how a connection ends --------------------------------------------------------------------------------------- */

static int end(struct connection *c, enum server_cause cause, int error, uint64_t detail)
{
    c->cause = cause;
    c->error = error;
    c->detail = detail;
    return -1;
}

/* --- where the pages are ----------------------------------------------------------------------------------------- */

/* The first segment of the object that ends above addr. */
static const struct server_segment *find_segment(const struct server *server, uint64_t object, uint64_t addr)
{
    size_t low = 0, high = server->segment_count;

    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct server_segment *s = &server->segments[middle];

        if (s->object < object || (s->object == object && s->end <= addr))
            low = middle + 1;
        else
            high = middle;
    }
    if (low == server->segment_count || server->segments[low].object != object)
        return NULL;
    return &server->segments[low];
}

/* A pid names another process once its own has been reaped. The pidfd, asked after the read, tells that it had not. */
static bool process_ended(int pidfd)
{
    struct pollfd exit = {.fd = pidfd, .events = POLLIN};

    return poll(&exit, 1, 0) != 0;
}

/* process_vm_readv stops at a mapping without PROT_READ; /proc/PID/mem reads those too (FOLL_FORCE), only slower. */
static ssize_t read_some(const struct server_segment *s, uint64_t where, void *to, size_t length)
{
    if (s->pid) {
        struct iovec local = {.iov_base = to, .iov_len = length};
        struct iovec remote = {.iov_base = (void *)where, .iov_len = length};
        ssize_t n = process_vm_readv(s->pid, &local, 1, &remote, 1, 0);

        if (n > 0)
            return n;
    }
    return pread(s->fd, to, length, (off_t)where);
}

static size_t run_of(const uint8_t *class, size_t first, size_t pages)
{
    size_t next = first + 1;

    while (next < pages && class[next] == class[first])
        next++;
    return next - first;
}

/* Both calls stop at the first page that cannot be had (a guard page, the end of a file, a medium error). */
static int read_piece(struct connection *c, const struct server_segment *s, uint64_t addr, size_t pages)
{
    struct workspace *work = c->work;
    size_t done = 0;

    while (done < pages) {
        size_t run = run_of(work->class, done, pages), got;
        ssize_t n;

        if (work->class[done] == PAGE_UNDER_WAY) {
            done += run;
            continue;
        }
        n = read_some(s, s->where + (addr - s->start) + done * PAGE_BYTES, work->piece + done * PAGE_BYTES,
                      run * PAGE_BYTES);
        if (n < 0 && errno == EINTR)
            continue;
        /* No address space (fs/proc/base.c: mem_rw): it is no zombie yet, or one that is traced, and its pidfd not ready. */
        if (n == 0 && s->pid)
            return end(c, SERVER_SOURCE_GONE, 0, (uint64_t)s->pid);
        got = n > 0 ? (size_t)n / PAGE_BYTES : 0;
        done += got;
        if (got == 0)
            work->class[done++] = PAGE_ABSENT;
    }
    if (s->pid && process_ended(s->pidfd))
        return end(c, SERVER_SOURCE_GONE, 0, (uint64_t)s->pid);
    return 0;
}

/* --- pages that are released -------------------------------------------------------------------------------------- */

static atomic_uchar *marks_of(const struct server *server, const struct server_segment *s, uint64_t addr)
{
    return server->marks + server->first_marks[s - server->segments] + (addr - s->start) / PAGE_BYTES;
}

/* Which pages of a piece are not to be read, since they are on their way over the other channel. A page that is asked
 * for again over the same one was thrown away there, and is sent again. */
static int claim_piece(struct connection *c, const struct server_segment *s, uint64_t addr, size_t pages)
{
    const unsigned either = ANSWERED_FIRST | ANSWERED_SECOND;

    memset(c->work->class, PAGE_CONTENT, pages);
    for (size_t i = 0; c->server->marks && i < pages; i++) {
        unsigned before = atomic_fetch_or(marks_of(c->server, s, addr + i * PAGE_BYTES), c->answered);

        if ((before & PAGE_FREED) && !(before & either))
            return end(c, SERVER_RELEASED, 0, addr + i * PAGE_BYTES);
        if ((before & PAGE_FREED) || (before & either & ~(unsigned)c->answered && !(before & c->answered)))
            c->work->class[i] = PAGE_UNDER_WAY;
    }
    return 0;
}

/* It was acknowledged, and perhaps freed, while it was read for another request. */
static void drop_freed(struct connection *c, const struct server_segment *s, uint64_t addr, size_t pages)
{
    for (size_t i = 0; c->server->marks && i < pages; i++)
        if (atomic_load(marks_of(c->server, s, addr + i * PAGE_BYTES)) & PAGE_FREED)
            c->work->class[i] = PAGE_UNDER_WAY;
}

/* --- the answer -------------------------------------------------------------------------------------------------- */

/* A page whose first word is zero and that equals itself one word on is zero: libc's memcmp is as wide as the CPU. */
static bool is_zero(const uint8_t *page)
{
    uint64_t first;

    memcpy(&first, page, sizeof(first));
    return first == 0 && memcmp(page, page + sizeof(first), PAGE_BYTES - sizeof(first)) == 0;
}

static void classify(struct workspace *work, size_t pages)
{
    for (size_t i = 0; i < pages; i++)
        if (work->class[i] == PAGE_CONTENT && is_zero(work->piece + i * PAGE_BYTES))
            work->class[i] = PAGE_ZERO;
}

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

/* --- the answer, in frames ----------------------------------------------------------------------------------------- */

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

    if (claim_piece(c, s, addr, pages) < 0 || read_piece(c, s, addr, pages) < 0)
        return -1;
    classify(c->work, pages);
    drop_freed(c, s, addr, pages);
    frames = cut_frames(c, get, addr, pages, &parts);
    c->work->frames[frames - 1].flags |= last ? FRAME_LAST : 0;
    return send_parts(c, c->work->iov, parts);
}

static int answer(struct connection *c, const struct page_frame *get)
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

/* --- the requests ------------------------------------------------------------------------------------------------ */

static int receive_frame(struct connection *c, struct page_frame *frame)
{
    struct workspace *work = c->work;

    while (work->inbox_end - work->inbox_start < sizeof(*frame)) {
        ssize_t n;

        memmove(work->inbox, work->inbox + work->inbox_start, work->inbox_end - work->inbox_start);
        work->inbox_end -= work->inbox_start;
        work->inbox_start = 0;
        n = recv(c->fd, work->inbox + work->inbox_end, sizeof(work->inbox) - work->inbox_end, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return end(c, SERVER_SOCKET_ERROR, errno, 0);
        if (n == 0)
            return end(c, SERVER_HUNG_UP, 0, 0);
        count(&c->counters.bytes_in, (uint64_t)n);
        work->inbox_end += (size_t)n;
    }
    memcpy(frame, work->inbox + work->inbox_start, sizeof(*frame));
    work->inbox_start += sizeof(*frame);
    return 0;
}

static bool is_valid_get(const struct page_frame *f)
{
    return f->type == FRAME_GET && (f->flags & ~FRAME_PACKED) == 0 && f->reserved == 0 && f->crc == 0 && f->count >= 1 &&
           f->count <= FRAME_MAX_PAGES && f->addr % PAGE_BYTES == 0 &&
           f->addr <= UINT64_MAX - (uint64_t)f->count * PAGE_BYTES;
}

static int serve_request(struct connection *c)
{
    struct page_frame frame;

    if (receive_frame(c, &frame) < 0)
        return -1;
    if (frame.type == FRAME_CLOSE)
        return end(c, SERVER_CLOSED, 0, 0);
    if (!is_valid_get(&frame))
        return end(c, SERVER_BAD_FRAME, 0, frame.type);
    count(&c->counters.requests, 1);
    return answer(c, &frame);
}

/* The descriptor stays open until the thread is joined, so that nobody ever shuts down a stranger's; the peer sees
 * the end at once, and by then the cause can be read. */
static void *serve_connection(void *argument)
{
    struct connection *c = argument;

    while (serve_request(c) == 0)
        ;
    atomic_store_explicit(&c->ended, true, memory_order_release);
    shutdown(c->fd, SHUT_RDWR);
    return NULL;
}

/* --- connections ------------------------------------------------------------------------------------------------- */

static void join(struct connection *c)
{
    if (!c->work)
        return;
    pthread_join(c->thread, NULL);
    close(c->fd);
    if (c->packer)
        c->server->zstd.end_packer(c->packer);
    c->packer = NULL;
    free(c->work);
    c->work = NULL;
}

/* With every signal blocked: they belong to Python's main thread. */
static int start_thread(struct connection *c)
{
    sigset_t all, before;
    int error;

    sigfillset(&all);
    error = pthread_sigmask(SIG_SETMASK, &all, &before);
    if (error)
        return -error;
    error = pthread_create(&c->thread, NULL, serve_connection, c);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

static int make_blocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);

    return flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0 ? -errno : 0;
}

static int new_connection(struct server *server, int fd, int channel, struct connection **result)
{
    struct connection *c = calloc(1, sizeof(*c));
    int error;

    if (!c)
        return -ENOMEM;
    c->server = server;
    c->fd = fd;
    c->number = server->connection_count;
    c->answered = channel ? ANSWERED_SECOND : ANSWERED_FIRST;
    c->work = aligned_alloc(PAGE_BYTES, (sizeof(*c->work) + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES);
    error = c->work ? make_blocking(fd) : -ENOMEM;
    if (!error) {
        c->work->inbox_start = c->work->inbox_end = 0;
        error = start_thread(c);
    }
    if (error) {
        free(c->work);
        free(c);
        return error;
    }
    *result = c;
    return 0;
}

int server_serve(struct server *server, int fd, int channel)
{
    struct connection *c;
    int error;

    if (server->stopped)
        return -ESHUTDOWN;
    for (c = server->connections; c; c = c->next)
        if (atomic_load_explicit(&c->ended, memory_order_acquire))
            join(c);
    error = new_connection(server, fd, channel, &c);
    if (error)
        return error;
    c->next = server->connections;
    server->connections = c;
    return server->connection_count++;
}

int server_status(struct server *server, int connection, struct server_status *status)
{
    struct connection *c = server->connections;
    bool ended;

    while (c && c->number != connection)
        c = c->next;
    if (!c)
        return -ENOENT;
    ended = atomic_load_explicit(&c->ended, memory_order_acquire);
    *status = (struct server_status){
        .requests = atomic_load_explicit(&c->counters.requests, memory_order_relaxed),
        .pages = atomic_load_explicit(&c->counters.pages, memory_order_relaxed),
        .zero = atomic_load_explicit(&c->counters.zero, memory_order_relaxed),
        .absent = atomic_load_explicit(&c->counters.absent, memory_order_relaxed),
        .under_way = atomic_load_explicit(&c->counters.under_way, memory_order_relaxed),
        .bytes_in = atomic_load_explicit(&c->counters.bytes_in, memory_order_relaxed),
        .bytes_out = atomic_load_explicit(&c->counters.bytes_out, memory_order_relaxed),
        .cause = ended ? (int32_t)c->cause : SERVER_RUNNING,
        .error = ended ? c->error : 0,
        .detail = ended ? c->detail : 0,
    };
    return 0;
}

/* --- the server -------------------------------------------------------------------------------------------------- */

static bool is_valid_table(const struct server_segment *s, size_t segments)
{
    for (size_t i = 0; i < segments; i++) {
        if ((s[i].start | s[i].end | s[i].where) % PAGE_BYTES || s[i].start >= s[i].end)
            return false;
        if (i && (s[i].object < s[i - 1].object || (s[i].object == s[i - 1].object && s[i].start < s[i - 1].end)))
            return false;
    }
    return true;
}

/* The pages of a mapping that is reserved and hardly used cost no memory here either. */
static int make_marks(struct server *server)
{
    void *marks;

    server->first_marks = calloc(server->segment_count + 1, sizeof(*server->first_marks));
    if (!server->first_marks)
        return -ENOMEM;
    for (size_t i = 0; i < server->segment_count; i++) {
        server->first_marks[i] = server->mark_count;
        server->mark_count += (server->segments[i].end - server->segments[i].start) / PAGE_BYTES;
    }
    if (server->mark_count == 0)
        return 0;
    marks = mmap(NULL, server->mark_count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (marks == MAP_FAILED)
        return -ENOMEM;
    server->marks = marks;
    return 0;
}

int server_new(const struct server_segment *segments, size_t segment_count, bool releasing, struct server **result)
{
    struct server *server;
    struct server_segment *table;

    if (!crc32c_supported())
        return -ENOTSUP;
    if (!is_valid_table(segments, segment_count))
        return -EINVAL;
    server = calloc(1, sizeof(*server));
    table = calloc(segment_count + 1, sizeof(*table));
    if (!server || !table || pthread_mutex_init(&server->lock, NULL)) {
        free(server);
        free(table);
        return -ENOMEM;
    }
    if (segment_count)
        memcpy(table, segments, segment_count * sizeof(*table));
    server->segments = table;
    server->segment_count = segment_count;
    if (releasing && make_marks(server) < 0) {
        server_free(server);
        return -ENOMEM;
    }
    *result = server;
    return 0;
}

int64_t server_release(struct server *server, uint64_t object, uint64_t addr, uint64_t pages)
{
    uint64_t end = addr + pages * PAGE_BYTES;
    int64_t count = 0;

    if (!server->marks)
        return -EINVAL;
    for (const struct server_segment *s; addr < end && (s = find_segment(server, object, addr)); addr = s->end) {
        uint64_t from = addr > s->start ? addr : s->start, to = end < s->end ? end : s->end;

        for (; from < to; from += PAGE_BYTES, count++)
            atomic_fetch_or(marks_of(server, s, from), PAGE_FREED);
    }
    return count;
}

static void end_connections(struct server *server)
{
    for (struct connection *c = server->connections; c; c = c->next)
        if (c->work)
            shutdown(c->fd, SHUT_RDWR);
    for (struct connection *c = server->connections; c; c = c->next)
        join(c);
}

void server_stop(struct server *server)
{
    server->stopped = true;
    end_connections(server);
}

void server_new_link(struct server *server)
{
    end_connections(server);
    for (size_t i = 0; i < server->mark_count; i++)
        if (atomic_load_explicit(&server->marks[i], memory_order_relaxed) & ~PAGE_FREED)
            atomic_fetch_and(&server->marks[i], PAGE_FREED);
}

void server_free(struct server *server)
{
    server_stop(server);
    for (struct connection *c = server->connections, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    if (server->marks)
        munmap((void *)server->marks, server->mark_count);
    zstd_unload(&server->zstd);
    pthread_mutex_destroy(&server->lock);
    free(server->first_marks);
    free((void *)server->segments);
    free(server);
}

uint32_t server_crc32c(const void *data, size_t pages)
{
    return crc32c_pages(data, pages);
}
