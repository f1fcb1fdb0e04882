/* What processes do to their memory: the tables follow. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "_shadow.h"
#include "_tables.h"

/* --- dropping ----------------------------------------------------------------------------------------------------- */

static void drop_pages(struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages)
{
    for (uint64_t done = 0, run; done < pages; done += run) {
        uint8_t *bytes = ledger_states(l, instance, addr + done * PAGE_SIZE, &run);

        run = run < pages - done ? run : pages - done;
        for (uint64_t k = 0; bytes && k < run; k++)
            ledger_settle(l, instance, addr + (done + k) * PAGE_SIZE, bytes + k, PAGE_DROPPED, CLASS_DROPPED);
    }
}

/* Is `addr` mapped anywhere? *until is the address up to which the answer holds. */
static bool is_mapped(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t end, uint64_t *until)
{
    struct cursor at = {0};
    struct mapping m;

    *until = end;
    while (ledger_next_mapping(l, instance, addr, (end - addr) >> PAGE_SHIFT, &at, &m)) {
        if (m.addr == addr) {
            *until = addr + m.pages * PAGE_SIZE;
            return true;
        }
        *until = m.addr < *until ? m.addr : *until;
    }
    return false;
}

static void drop_unmapped(struct ledger *l, uint32_t instance, uint64_t addr, uint64_t end)
{
    uint64_t until = end;

    if (instance_is_private(&l->instances[instance])) {
        drop_pages(l, instance, addr, (end - addr) >> PAGE_SHIFT);
        return;
    }
    for (; addr < end; addr = until)
        if (!is_mapped(l, instance, addr, end, &until))
            drop_pages(l, instance, addr, (until - addr) >> PAGE_SHIFT);
}

/* A child's copy that nobody maps gives its memory back; a primary stays, for the counts. */
static void release_instance(struct ledger *l, uint32_t instance)
{
    struct instance *gone = &l->instances[instance];

    if (gone->regions || gone->primary == instance)
        return;
    for (uint32_t i = gone->primary; i != NO_KIN; i = l->instances[i].kin)
        if (l->instances[i].kin == instance)
            l->instances[i].kin = gone->kin;
    /* Failing costs only memory. */
    (void)!fallocate(l->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                     (off_t)(l->states - (uint8_t *)l->head) + (off_t)gone->block, (off_t)gone->block_bytes);
    gone->spans = 0;
    gone->live = 0;
}

/* --- unmap, remove ------------------------------------------------------------------------------------------------ */

/* Takes [start, end) out of the one region `i`. */
int cut_region(struct ledger *l, uint32_t space, uint32_t i, uint64_t start, uint64_t end)
{
    struct region *r = ledger_regions(l, space) + i;
    struct region tail = {end, r->end, r->addr + (end - r->start), r->instance, 0};

    if (r->start < start && end < r->end) {
        r->end = start;
        return insert_region(l, space, tail);
    }
    if (r->start < start)
        r->end = start;
    else if (end < r->end)
        *r = tail;
    else
        erase_region(l, space, i);
    return 0;
}

int ledger_unmap(struct ledger *l, uint32_t space, uint64_t start, uint64_t end)
{
    for (;;) {
        uint32_t i = region_above(l, space, start);
        struct region r = ledger_regions(l, space)[i];
        uint64_t from, to;
        int error;

        if (i == l->spaces[space].regions || r.start >= end)
            return 0;
        from = r.start > start ? r.start : start;
        to = r.end < end ? r.end : end;
        error = cut_region(l, space, i, from, to);
        if (error)
            return error;
        drop_unmapped(l, r.instance, r.addr + (from - r.start), r.addr + (to - r.start));
        release_instance(l, r.instance);
    }
}

void ledger_retire(struct ledger *l, uint32_t space)
{
    shadow_begin(l, space, SHADOW_RETIRE);
    /* Cutting whole regions splits none, so it cannot fail. */
    (void)ledger_unmap(l, space, 0, UINT64_MAX & ~(PAGE_SIZE - 1));
    l->spaces[space].live = 0;
    shadow_end_retire(l);
    forget_due(l, space);
}

const struct region *ledger_shared_in(const struct ledger *l, uint32_t space, uint64_t start, uint64_t end)
{
    const struct region *regions = ledger_regions(l, space);

    for (uint32_t i = region_above(l, space, start); i < l->spaces[space].regions && regions[i].start < end; i++)
        if (!instance_is_private(&l->instances[regions[i].instance]))
            return regions + i;
    return NULL;
}

void ledger_remove(struct ledger *l, uint32_t space, uint64_t start, uint64_t end, bool shared_too)
{
    struct region *regions = ledger_regions(l, space);

    for (uint32_t i = region_above(l, space, start); i < l->spaces[space].regions && regions[i].start < end; i++) {
        uint64_t from = regions[i].start > start ? regions[i].start : start;
        uint64_t to = regions[i].end < end ? regions[i].end : end;

        if (shared_too || instance_is_private(&l->instances[regions[i].instance]))
            drop_pages(l, regions[i].instance, regions[i].addr + (from - regions[i].start), (to - from) >> PAGE_SHIFT);
    }
}

/* --- fork --------------------------------------------------------------------------------------------------------- */

static uint64_t waiting_pages(const struct ledger *l, const struct span *span)
{
    uint64_t count = 0;

    for (uint64_t k = 0; k < span->pages; k++)
        count += page_waits(l->states[span->states + k]);
    return count;
}

/* What nothing waits for needs no states: a page without them is one that has come. */
static int copy_spans(struct ledger *l, uint32_t from, uint32_t to)
{
    struct instance *child = &l->instances[to];
    uint64_t bytes = 0;
    int64_t at;

    for (uint32_t s = 0; s < l->instances[from].spans; s++)
        if (waiting_pages(l, ledger_spans(l, from) + s))
            bytes += ledger_spans(l, from)[s].pages;
    at = allot_states(l, (bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1), PAGE_SIZE);
    if (at < 0)
        return (int)at;
    child->block = (uint64_t)at;
    child->block_bytes = (bytes + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
    for (uint32_t s = 0; s < l->instances[from].spans; s++) {
        struct span span = ledger_spans(l, from)[s];
        uint64_t waiting = waiting_pages(l, &span);

        if (!waiting)
            continue;
        memcpy(l->states + at, l->states + span.states, span.pages);
        span.states = (uint64_t)at;
        at += (int64_t)span.pages;
        ledger_spans(l, to)[child->spans++] = span;
        l->head->remaining += waiting;
    }
    return 0;
}

/* The child's instance of a private instance of its parent, made when first asked for. */
static int child_instance(struct ledger *l, uint32_t parent, uint32_t space)
{
    const struct instance *mother = &l->instances[parent];
    uint32_t primary = mother->primary;
    int child, error;

    /* A primary whose process is gone may still name the slot of a space that was used again. */
    for (uint32_t i = l->instances[primary].kin; i != NO_KIN; i = l->instances[i].kin)
        if (l->instances[i].home == space)
            return (int)i;
    child = new_instance(l, (struct instance){.object = mother->object,
                                              .primary = primary,
                                              .kin = l->instances[primary].kin,
                                              .home = space});
    if (child < 0)
        return child;
    error = copy_spans(l, parent, (uint32_t)child);
    if (error)
        return error;
    l->instances[primary].kin = (uint32_t)child;
    return child;
}

int ledger_fork(struct ledger *l, uint32_t parent, int uffd, uint32_t child_id)
{
    int space = ledger_add_space(l, uffd, 0, 0);

    if (space < 0)
        return space;
    l->spaces[space].child = child_id;
    for (uint32_t i = 0; i < l->spaces[parent].regions; i++) {
        struct region r = ledger_regions(l, parent)[i];
        int error;

        if (instance_is_private(&l->instances[r.instance])) {
            int child = child_instance(l, r.instance, (uint32_t)space);

            if (child < 0)
                return child;
            r.instance = (uint32_t)child;
        }
        error = insert_region(l, (uint32_t)space, r);
        if (error)
            return error;
    }
    return space;
}
