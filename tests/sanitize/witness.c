#define _GNU_SOURCE
#include "witness.h"

#include <time.h>

#include "check.h"

#define LINK_MS 20
#define LINKS 6000

enum { RECORDS = 48, RUNS = 16 };

static void read_trace(struct witness *w)
{
    struct pager_fault records[RECORDS];
    size_t count;

    while ((count = pager_trace(w->pager, &w->next, &w->lost, records, RECORDS)) > 0)
        for (size_t i = 0; i < count; i++, w->seen++)
            check(records[i].installed_ns >= records[i].event_ns && records[i].vpid, "a record is whole");
}

static size_t number_of(const struct witness *w, uint64_t addr)
{
    for (size_t r = 0, first = 0; r < 2; first += w->ranges[r++].length / 4096)
        if (addr >= w->ranges[r].addr && addr - w->ranges[r].addr < w->ranges[r].length)
            return first + (addr - w->ranges[r].addr) / 4096;
    check(0, "a page is acknowledged that is in no range");
    return 0;
}

/* Returns how many pages that were. */
static uint64_t acknowledge(struct witness *w)
{
    struct pager_run runs[RUNS];
    int count = pager_acknowledge(w->pager, runs, RUNS);
    uint64_t pages = 0;

    for (int i = 0; i < count; pages += runs[i++].count)
        for (uint64_t k = 0; k < runs[i].count; k++)
            check(++w->given[number_of(w, runs[i].addr + k * 4096)] <= atomic_load(&w->links),
                  "each page is acknowledged once a link");
    return pages;
}

static void *look(void *witness)
{
    const struct timespec pause = {.tv_nsec = 200000};
    struct pager_counters counters;
    struct witness *w = witness;
    char reason[200];

    while (!atomic_load(&w->ends)) {
        read_trace(w);
        acknowledge(w);
        pager_counters(w->pager, &counters);
        check(counters.remaining <= WITNESS_PAGES * 16ull, "pages of a few processes wait");
        pager_status(w->pager, reason, sizeof(reason));
        nanosleep(&pause, NULL);
    }
    return NULL;
}

void start_witness(struct witness *w, struct pager *p, const struct range ranges[2])
{
    check((ranges[0].length + ranges[1].length) / 4096 <= WITNESS_PAGES, "the ranges are too long");
    *w = (struct witness){.pager = p, .ranges = ranges, .links = 1};
    check(pthread_create(&w->thread, NULL, look, w) == 0, "pthread_create");
}

void begin_link(struct witness *w)
{
    atomic_fetch_add(&w->links, 1);
    check(pager_forget_acked(w->pager) == 0, "pager_forget_acked");
}

void await_done(struct witness *w)
{
    int status = -ETIMEDOUT;
    char reason[200];

    for (unsigned i = 0; status == -ETIMEDOUT && i < LINKS; i++) {
        status = pager_wait(w->pager, LINK_MS);
        begin_link(w);
    }
    if (status == PAGER_DONE)
        return;
    pager_status(w->pager, reason, sizeof(reason));
    fprintf(stderr, "%s: not done: %s\n", program_invocation_short_name, reason);
    exit(1);
}

void end_witness(struct witness *w)
{
    atomic_store(&w->ends, true);
    pthread_join(w->thread, NULL);
}

void check_witness(struct witness *w, bool whole)
{
    struct pager_counters c;
    uint64_t pages, acknowledged = 0;

    read_trace(w);
    pager_counters(w->pager, &c);
    check(w->next == w->seen + w->lost, "each record comes once");
    check(whole ? w->next == c.faults : w->next <= c.faults, "each fault has one record");
    check(c.total == c.zero + c.eager + c.urgent + c.bulk + c.dropped + c.poisoned, "each page counts once");
    begin_link(w);
    while ((pages = acknowledge(w)) > 0)
        acknowledged += pages;
    check(acknowledged == c.total, "the source need keep no page");
}
