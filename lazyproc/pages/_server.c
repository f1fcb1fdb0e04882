/* Connections and their requests. */
#define _GNU_SOURCE
#include "_serving.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "crc32c.h"

/* --- requests ----------------------------------------------------------------------------------------------------- */

int end(struct connection *c, enum server_cause cause, int error, uint64_t detail)
{
    c->cause = cause;
    c->error = error;
    c->detail = detail;
    return -1;
}

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

/* --- connections -------------------------------------------------------------------------------------------------- */

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

/* --- the server --------------------------------------------------------------------------------------------------- */

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
