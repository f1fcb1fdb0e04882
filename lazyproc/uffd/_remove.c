/* Tells MADV_REMOVE of shared memory from MADV_DONTNEED, whose events look the same (docs/adr/0013). */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "_engine.h"

#define FEW 64u

/* What a process maps at an address. */
struct mapped {
    uint64_t inode;
    unsigned major, minor;
};

/* --- calls ------------------------------------------------------------------------------------------------------- */

/* The records are of the whole machine. Those of other pid namespaces have no number here. */
static bool may_concern(const struct pager *p, const struct removal *call)
{
    if (!call->pid)
        return false;
    for (uint32_t s = 0; s < p->ledger.head->spaces; s++)
        if (p->ledger.spaces[s].live && ledger_shared_in(&p->ledger, s, call->start, call->end))
            return true;
    return false;
}

/* A thread makes one call at a time. */
static uint32_t call_of(const struct calls *calls, uint32_t tid)
{
    uint32_t i = 0;

    while (i < calls->count && calls->items[i].tid != tid)
        i++;
    return i;
}

static void forget_call(struct calls *calls, uint32_t tid)
{
    uint32_t i = call_of(calls, tid);

    if (i < calls->count)
        calls->items[i] = calls->items[--calls->count];
}

int note_call(struct pager *p, const struct removal *call)
{
    struct calls *calls = &p->calls;
    uint32_t i = call_of(calls, call->tid);

    if (i == calls->capacity) {
        uint32_t capacity = calls->capacity ? 2 * calls->capacity : FEW;
        struct removal *items = realloc(calls->items, capacity * sizeof(*items));

        if (!items)
            return -ENOMEM;
        calls->items = items;
        calls->capacity = capacity;
    }
    calls->items[i] = *call;
    calls->count += i == calls->count;
    return 0;
}

static bool is_gone(uint32_t tid)
{
    char path[24];

    snprintf(path, sizeof(path), "/proc/%" PRIu32, tid);
    return access(path, F_OK) < 0;
}

void forget_ended(struct pager *p)
{
    struct calls *calls = &p->calls;
    uint32_t kept = 0;

    if (calls->count < calls->enough + FEW)
        return;
    for (uint32_t i = 0; i < calls->count; i++)
        if (!is_gone(calls->items[i].tid))
            calls->items[kept++] = calls->items[i];
    calls->count = kept;
    calls->enough = 2 * kept;
}

int collect_calls(struct pager *p)
{
    struct removal call;
    int error = 0;

    while (!error && removals_next(&p->removals, &call)) {
        if (call.failed)
            forget_call(&p->calls, call.tid);
        else if (may_concern(p, &call))
            error = note_call(p, &call);
    }
    return error;
}

/* --- whose ------------------------------------------------------------------------------------------------------- */

static bool look_at(uint32_t pid, uint64_t va, struct mapped *found)
{
    char path[40], line[8192];
    bool there = false;
    FILE *maps;

    snprintf(path, sizeof(path), "/proc/%" PRIu32 "/maps", pid);
    maps = fopen(path, "re");
    if (!maps)
        return false;
    while (!there && fgets(line, sizeof(line), maps)) {
        uint64_t start, end;

        there = sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %*s %x:%x %" SCNu64, &start, &end, &found->major,
                       &found->minor, &found->inode) == 5 &&
                start <= va && va < end;
    }
    fclose(maps);
    return there;
}

/* A process whose number is known and that maps the page of an instance; *va is where. */
static uint32_t somebody_with(const struct pager *p, uint32_t instance, uint64_t addr, uint64_t *va)
{
    struct cursor at = {0};
    struct mapping m;

    while (ledger_next_mapping(&p->ledger, instance, addr, 1, &at, &m)) {
        *va = m.va;
        if (p->ledger.spaces[m.space].pid)
            return p->ledger.spaces[m.space].pid;
    }
    return 0;
}

/* A stranger may have other memory at the same address. Whoever has none there any more was ours: nobody else's
 * address was looked for. */
static bool shows_the_object(const struct pager *p, uint32_t pid, const struct region *r)
{
    struct mapped theirs, ours;
    uint64_t va;
    uint32_t known = somebody_with(p, r->instance, r->addr, &va);

    if (!known || !look_at(known, va, &ours) || !look_at(pid, r->start, &theirs))
        return true;
    return ours.inode == theirs.inode && ours.major == theirs.major && ours.minor == theirs.minor;
}

/* Nobody tells the number of a forked child, and a child of vfork(2) shares its parent's memory. */
static bool may_be_in(const struct pager *p, uint32_t space, uint32_t pid)
{
    if (p->ledger.spaces[space].pid == pid)
        return true;
    for (uint32_t s = 0; s < p->ledger.head->spaces; s++)
        if (p->ledger.spaces[s].live && p->ledger.spaces[s].pid == pid)
            return false;
    return true;
}

static bool made_in(const struct pager *p, uint32_t space, const struct removal *call, const struct region *r)
{
    return p->ledger.spaces[space].pid == call->pid ||
           (may_be_in(p, space, call->pid) && shows_the_object(p, call->pid, r));
}

/* A call that is over does no harm: what it removed is gone. It may still be there for a part of its range, or for
 * another thread's MADV_DONTNEED within it. */
bool was_remove(const struct pager *p, uint32_t space, uint64_t start, uint64_t end)
{
    const struct region *r = ledger_shared_in(&p->ledger, space, start, end);

    for (uint32_t i = 0; r && i < p->calls.count; i++) {
        const struct removal *call = &p->calls.items[i];

        if (call->start <= start && end <= call->end && made_in(p, space, call, r))
            return true;
    }
    return false;
}

void forget_calls(struct pager *p, uint32_t space, uint64_t start, uint64_t end)
{
    struct calls *calls = &p->calls;

    for (uint32_t i = 0; i < calls->count;) {
        const struct removal *call = &calls->items[i];

        if (call->start < end && start < call->end && may_be_in(p, space, call->pid))
            calls->items[i] = calls->items[--calls->count];
        else
            i++;
    }
}
