/* Where pages are: in a frozen process or in a file, and which of them may still be read. */
#define _GNU_SOURCE
#include "_serving.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* --- reading ------------------------------------------------------------------------------------------------------ */

const struct server_segment *find_segment(const struct server *server, uint64_t object, uint64_t addr)
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

atomic_uchar *marks_of(const struct server *server, const struct server_segment *s, uint64_t addr)
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

/* --- a piece ------------------------------------------------------------------------------------------------------ */

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

int take_piece(struct connection *c, const struct server_segment *s, uint64_t addr, size_t pages)
{
    if (claim_piece(c, s, addr, pages) < 0 || read_piece(c, s, addr, pages) < 0)
        return -1;
    classify(c->work, pages);
    drop_freed(c, s, addr, pages);
    return 0;
}
