/* Drives the pager's C core without Python, so that the sanitizers see all of it: tests/live/toucher.c is the process,
 * two threads are the page server (page_source.h), one looks on (witness.h). Run by tests/sanitize/pager.sh.
 *
 * pager_driver TOUCHER demand|bulk|local|lost|garbage|takeover
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "_pager.h"
#include "check.h"
#include "page_source.h"
#include "witness.h"

#define OBJECT 0x6401u
#define LIMIT_MS 120000

struct target {
    pid_t pid;
    int go, uffd;
    struct range ranges[2];
};

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

static void serve_file(struct pager *p, const struct target *t)
{
    struct pager_segment segments[2];
    uint64_t page[512], offset = 0;
    int fd = memfd_create("pages", 0);

    for (int r = 0; r < 2; r++) {
        segments[r] = (struct pager_segment){
            OBJECT, t->ranges[r].addr, t->ranges[r].addr + t->ranges[r].length, (uint64_t)fd, offset};
        for (uint64_t at = 0; at < t->ranges[r].length; at += sizeof(page)) {
            fill_page(t->ranges, t->ranges[r].addr + at, page);
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

static void finish(struct pager *p, struct witness *w, bool traced)
{
    await_done(w);
    errno = -pager_finish(p);
    check(errno == 0, "pager_finish");
    end_witness(w);
    check_witness(w, traced); /* the target goes on touching until pager_finish */
    pager_free(p);
}

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[2] : "";
    struct target target;
    struct channel first[2], second[2];
    static struct witness witness;
    struct pager *p, *heir;
    int local = strcmp(what, "local") == 0, takeover = strcmp(what, "takeover") == 0;
    int lost = strcmp(what, "lost") == 0, garbage = strcmp(what, "garbage") == 0;

    check(argc == 3, "usage: pager_driver TOUCHER CASE");
    start_target(&target, argv[1]);
    p = make_pager(&target);
    if (local)
        serve_file(p, &target);
    else
        connect_source(p, first, target.ranges, lost || garbage ? 32 : -1, garbage);
    check(pager_start(p, strcmp(what, "demand") != 0, takeover ? 16 << 20 : 0) == 0, "pager_start");
    start_witness(&witness, p, target.ranges);
    check(write(target.go, "\n", 1) == 1, "write");
    close(target.go);
    if (lost || garbage) {
        check(pager_wait(p, LIMIT_MS) == PAGER_LOST, "the connection was to be lost");
        connect_source(p, second, target.ranges, -1, 0);
    }
    if (takeover) {
        pager_wait(p, 100);
        pager_stop(p);
        end_witness(&witness);
        check(pager_new(pager_ledger_fd(p), false, &heir) == 0, "pager_new on a ledger");
        pager_free(p);
        p = heir;
        connect_source(p, second, target.ranges, -1, 0);
        check(pager_start(p, true, 0) == 0, "pager_start of the heir");
        start_witness(&witness, p, target.ranges);
    }
    if (takeover || strcmp(what, "demand") == 0)
        finish_target(&target);
    finish(p, &witness, !takeover);
    if (!takeover && strcmp(what, "demand") != 0)
        finish_target(&target);
    if (!local)
        close_source(first);
    if (lost || garbage || takeover)
        close_source(second);
    return 0;
}
