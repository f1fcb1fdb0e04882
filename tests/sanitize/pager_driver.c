/* Drives the pager's C core without Python, so that the sanitizers see all of it: tests/live/toucher.c is the process,
 * two threads in here are the page server. Run by tests/sanitize/pager.sh.
 *
 * pager_driver TOUCHER demand|bulk|local|lost|garbage|takeover
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "_pager.h"
#include "crc32c.h"
#include "native.h"

#define OBJECT 0x6401u
#define LIMIT_MS 120000

struct range {
    uint64_t addr, length;
};

struct target {
    pid_t pid;
    int go, uffd;
    struct range ranges[2];
};

struct channel {
    const struct target *target;
    int fd;
    int answers; /* before it hangs up or talks garbage; < 0: for ever */
    int garbage;
    pthread_t thread;
};

static void check(int good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "pager_driver: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* --- the process ------------------------------------------------------------------------------------------------- */

static void start_target(struct target *t, const char *binary)
{
    int in[2], out[2], pidfd, theirs;
    FILE *answers;

    check(pipe(in) == 0 && pipe(out) == 0, "pipe");
    t->pid = fork();
    check(t->pid >= 0, "fork");
    if (t->pid == 0) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        close(in[1]);
        execl(binary, binary, "16", "3", (char *)NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    answers = fdopen(out[0], "r");
    check(answers && fscanf(answers, "%d %lu %lu %lu %lu", &theirs, &t->ranges[0].addr, &t->ranges[0].length,
                            &t->ranges[1].addr, &t->ranges[1].length) == 5, "toucher");
    fclose(answers);
    pidfd = (int)syscall(SYS_pidfd_open, t->pid, 0);
    t->uffd = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
    check(t->uffd >= 0, "pidfd_getfd");
    close(pidfd);
    t->go = in[1];
}

static void finish_target(const struct target *t)
{
    int status;

    check(waitpid(t->pid, &status, 0) == t->pid && status == 0, "the toucher found a wrong word");
}

/* --- the page server --------------------------------------------------------------------------------------------- */

static int fill(const struct target *t, uint64_t addr, uint64_t *page)
{
    for (int r = 0; r < 2; r++)
        if (addr >= t->ranges[r].addr && addr - t->ranges[r].addr < t->ranges[r].length) {
            for (uint64_t i = 0; i < 512; i++)
                page[i] = ((addr - t->ranges[r].addr) / 8 + i + 1) * 0x9e3779b97f4a7c15ull;
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
        if (!fill(c->target, addr, out.page)) {
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

static int open_channel(struct channel *c, const struct target *t, int answers, int garbage)
{
    int ends[2];

    check(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
    *c = (struct channel){.target = t, .fd = ends[0], .answers = answers, .garbage = garbage};
    check(pthread_create(&c->thread, NULL, serve, c) == 0, "pthread_create");
    return ends[1];
}

static void connect_server(struct pager *p, struct channel channels[2], const struct target *t, int answers,
                           int garbage)
{
    int urgent = open_channel(&channels[0], t, -1, 0), bulk = open_channel(&channels[1], t, answers, garbage);

    check(pager_set_remote(p, urgent, bulk) == 0, "pager_set_remote");
}

static void close_server(struct channel channels[2])
{
    for (int i = 0; i < 2; i++) {
        pthread_join(channels[i].thread, NULL);
        close(channels[i].fd);
    }
}

static void serve_file(struct pager *p, const struct target *t)
{
    struct pager_segment segments[2];
    uint64_t page[512], offset = 0;
    int fd = memfd_create("pages", 0);

    for (int r = 0; r < 2; r++) {
        segments[r] = (struct pager_segment){
            OBJECT, t->ranges[r].addr, t->ranges[r].addr + t->ranges[r].length, (uint64_t)fd, offset};
        for (uint64_t at = 0; at < t->ranges[r].length; at += sizeof(page)) {
            fill(t, t->ranges[r].addr + at, page);
            check(write(fd, page, sizeof(page)) == (ssize_t)sizeof(page), "write");
        }
        offset += t->ranges[r].length;
    }
    if (segments[1].start < segments[0].start) {
        struct pager_segment first = segments[1];

        segments[1] = segments[0];
        segments[0] = first;
    }
    check(pager_set_segments(p, segments, 2) == 0, "pager_set_segments");
    close(fd);
}

/* --- the cases --------------------------------------------------------------------------------------------------- */

static struct pager *make_pager(const struct target *t)
{
    struct pager_run map[2];
    struct pager *p;
    int space;

    check(pager_new(-1, true, &p) == 0, "pager_new");
    space = pager_add_space(p, t->uffd, 0, 0);
    check(space == 0, "pager_add_space");
    for (int r = 0; r < 2; r++) {
        const struct range *range = &t->ranges[r];

        map[r] = (struct pager_run){OBJECT, range->addr, range->length / 4096};
        check(pager_add_region(p, space, range->addr, range->length, OBJECT, range->addr) == 0, "add_region");
    }
    check(pager_apply_map(p, map, 2) == 0, "pager_apply_map");
    check(pager_set_plan(p, map, 2) == 0, "pager_set_plan");
    return p;
}

/* The trace has each fault, when this pager has served them all. */
static void read_trace(struct pager *p, uint64_t faults)
{
    static struct pager_fault records[48];
    uint64_t next = 0, lost = 0, seen = 0;
    size_t count;

    while ((count = pager_trace(p, &next, &lost, records, 48)) > 0)
        for (size_t i = 0; i < count; i++, seen++)
            check(records[i].installed_ns >= records[i].event_ns && records[i].vpid, "a record is whole");
    check(next == seen + lost && next <= faults, "each record comes once");
}

static void finish(struct pager *p)
{
    struct pager_counters c;
    char reason[200];

    if (pager_wait(p, LIMIT_MS) != PAGER_DONE) {
        pager_status(p, reason, sizeof(reason));
        fprintf(stderr, "pager_driver: not done: %s\n", reason);
        exit(1);
    }
    pager_counters(p, &c);
    check(c.total == c.zero + c.eager + c.urgent + c.bulk + c.dropped + c.poisoned, "each page counts once");
    errno = -pager_finish(p);
    check(errno == 0, "pager_finish");
    pager_counters(p, &c); /* the target goes on touching until then */
    read_trace(p, c.faults);
    pager_free(p);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[2] : "";
    struct target target;
    struct channel first[2], second[2];
    struct pager *p, *heir;
    int local = strcmp(what, "local") == 0, takeover = strcmp(what, "takeover") == 0;
    int lost = strcmp(what, "lost") == 0, garbage = strcmp(what, "garbage") == 0;

    check(argc == 3, "usage: pager_driver TOUCHER CASE");
    start_target(&target, argv[1]);
    p = make_pager(&target);
    if (local)
        serve_file(p, &target);
    else
        connect_server(p, first, &target, lost || garbage ? 32 : -1, garbage);
    check(pager_start(p, strcmp(what, "demand") != 0, takeover ? 16 << 20 : 0) == 0, "pager_start");
    check(write(target.go, "\n", 1) == 1, "write");
    close(target.go);
    if (lost || garbage) {
        check(pager_wait(p, LIMIT_MS) == PAGER_LOST, "the connection was to be lost");
        connect_server(p, second, &target, -1, 0);
    }
    if (takeover) {
        pager_wait(p, 100);
        pager_stop(p);
        check(pager_new(pager_ledger_fd(p), false, &heir) == 0, "pager_new on a ledger");
        pager_free(p);
        p = heir;
        connect_server(p, second, &target, -1, 0);
        check(pager_start(p, true, 0) == 0, "pager_start of the heir");
    }
    if (takeover || strcmp(what, "demand") == 0)
        finish_target(&target);
    finish(p);
    if (!takeover && strcmp(what, "demand") != 0)
        finish_target(&target);
    if (!local)
        close_server(first);
    if (lost || garbage || takeover)
        close_server(second);
    return 0;
}
