/* Puts pages into processes, and knows what each answer of the kernel means. */
#define _GNU_SOURCE
#include "_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* --- the ioctls -------------------------------------------------------------------------------------------------- */

#ifndef UFFDIO_POISON /* Linux 6.6; struct uffdio_poison has the layout of uffdio_zeropage */
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_zeropage)
#endif

/* Bytes installed, or -errno. Part of the range may be done when an error stops the rest: then the part counts. Any
 * answer but EAGAIN says that no message of the process was under way. */
static int64_t install(struct pager *p, uint32_t space, uint64_t va, const uint8_t *data, uint64_t bytes,
                       enum page_class as)
{
    int uffd = p->ledger.spaces[space].uffd;
    struct uffdio_copy copy = {.dst = va, .src = (uintptr_t)data, .len = bytes};
    struct uffdio_zeropage fill = {.range = {.start = va, .len = bytes}};
    unsigned long filler = as == CLASS_POISONED ? UFFDIO_POISON : UFFDIO_ZEROPAGE;
    int64_t done;

    if (va >= LIMBO) /* it is not known yet where that is */
        return -ENOENT;
    if (data ? ioctl(uffd, UFFDIO_COPY, &copy) == 0 : ioctl(uffd, filler, &fill) == 0) {
        ledger_quiet(&p->ledger, space);
        return (int64_t)bytes;
    }
    if (errno != EAGAIN)
        ledger_quiet(&p->ledger, space);
    done = data ? copy.copy : fill.zeropage;
    return done > 0 ? done : -errno;
}

void wake(const struct pager *p, uint32_t space, uint64_t va, uint64_t pages)
{
    struct uffdio_range range = {.start = va, .len = pages * PAGE_SIZE};

    /* Fails only for a range that no mapping can have, and then nobody sleeps there. */
    (void)ioctl(p->ledger.spaces[space].uffd, UFFDIO_WAKE, &range);
}

/* -1: an error without a name, which ends the pager. A full memory (ENOMEM) may pass. */
static int outcome_of(int64_t result)
{
    switch (result) {
    case -EEXIST:
        return OUTCOME_PRESENT;
    case -EAGAIN:
    case -ENOMEM:
        return OUTCOME_DEFERRED;
    case -ENOENT:
    case -ESRCH:
    case -ENOSPC: /* what ESRCH was before Linux 4.13 */
        return OUTCOME_GONE;
    default:
        return result > 0 ? OUTCOME_INSTALLED : -1;
    }
}

static int count_outcome(struct pager *p, enum page_class as, int64_t result)
{
    int outcome = outcome_of(result);

    if (outcome >= 0)
        p->ledger.head->outcomes[as][outcome] += result > 0 ? (uint64_t)result >> PAGE_SHIFT : 1;
    return outcome;
}

/* --- faults that wait -------------------------------------------------------------------------------------------- */

int faults_push(struct faults *list, const struct fault *f)
{
    if (list->count == list->capacity) {
        uint32_t capacity = list->capacity ? 2 * list->capacity : 64;
        struct fault *items = realloc(list->items, capacity * sizeof(*items));

        if (!items)
            return -ENOMEM;
        list->items = items;
        list->capacity = capacity;
    }
    list->items[list->count++] = *f;
    return 0;
}

void requeue(struct pager *p, int64_t space)
{
    for (uint32_t i = 0; i < p->waiting.count;) {
        struct fault *f = &p->waiting.items[i];

        if (space >= 0 && f->space != space) {
            i++;
            continue;
        }
        if (faults_push(&p->fresh, f) < 0)
            return failed(p, "no memory for the list of faults", ENOMEM);
        *f = p->waiting.items[--p->waiting.count];
    }
}

static uint32_t bucket(uint64_t ns)
{
    uint32_t octave;

    if (ns < 16)
        return (uint32_t)ns;
    octave = 63 - (uint32_t)__builtin_clzll(ns);
    return (octave - 3) * 16 + (uint32_t)(ns >> (octave - 4) & 15);
}

static void record(struct pager *p, const struct fault *f, enum outcome outcome, enum page_class as)
{
    struct ledger_head *head = p->ledger.head;
    uint64_t now = now_ns(), took = now - f->event_ns;

    head->faults++;
    head->fault_ns[bucket(took)]++;
    head->fault_max_ns = took > head->fault_max_ns ? took : head->fault_max_ns;
    if (!p->traced)
        return;
    keep_order(); /* not before the last record was announced: see pager_trace */
    p->ledger.trace[head->traced % LEDGER_TRACE] = (struct pager_fault){
        .event_ns = f->event_ns,
        .queued_ns = f->queued_ns,
        .sent_ns = f->sent_ns,
        .installed_ns = now,
        .va = f->va,
        .object = f->instance == NO_INSTANCE ? 0 : p->ledger.instances[f->instance].object,
        .addr = f->addr,
        .vpid = p->ledger.spaces[f->space].vpid,
        .tid = f->tid,
        .outcome = outcome,
        .page_class = as,
    };
    __atomic_store_n(&head->traced, head->traced + 1, __ATOMIC_RELEASE);
}

/* These pages have been placed and woken: whoever waited for one runs again. */
static void release(struct pager *p, uint32_t instance, uint64_t addr, uint64_t pages, enum outcome outcome,
                    enum page_class as)
{
    for (uint32_t i = 0; i < p->waiting.count;) {
        struct fault *f = &p->waiting.items[i];

        if (f->instance == instance && f->addr >= addr && f->addr - addr < pages * PAGE_SIZE) {
            record(p, f, outcome, as);
            if (as == CLASS_BULK)
                pace_waited(&p->pace, now_ns());
            *f = p->waiting.items[--p->waiting.count];
        } else {
            i++;
        }
    }
}

/* --- processes that come and go ---------------------------------------------------------------------------------- */

int watch_space(struct pager *p, uint32_t space)
{
    int uffd = p->ledger.spaces[space].uffd, flags = fcntl(uffd, F_GETFL);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = space};

    /* A blocking userfaultfd polls as an error. */
    if (flags < 0 || fcntl(uffd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    return epoll_ctl(p->epoll, EPOLL_CTL_ADD, uffd, &event) < 0 ? -errno : 0;
}

static void forget_faults(struct faults *list, uint32_t space)
{
    uint32_t kept = 0;

    for (uint32_t i = 0; i < list->count; i++)
        if (list->items[i].space != space)
            list->items[kept++] = list->items[i];
    list->count = kept;
}

void retire_space(struct pager *p, uint32_t space)
{
    int uffd = p->ledger.spaces[space].uffd;

    forget_faults(&p->waiting, space);
    ledger_retire(&p->ledger, space);
    /* Closing takes it out of the epoll set only if nobody else holds the same userfaultfd. */
    epoll_ctl(p->epoll, EPOLL_CTL_DEL, uffd, NULL);
    close(uffd);
}

/* A request for an address where nothing is missing; mostly nothing is mapped there. */
int64_t probe_space(struct pager *p, uint32_t space)
{
    uint64_t nowhere = 0x10000; /* the default vm.mmap_min_addr */
    const struct region *r;

    while ((r = ledger_region_at(&p->ledger, space, nowhere)))
        nowhere = r->end;
    return install(p, space, nowhere, NULL, PAGE_SIZE, CLASS_ZERO);
}

/* A process that ends sends no message. */
bool reap_dead(struct pager *p)
{
    bool any = false;

    for (uint32_t s = 0; s < p->ledger.head->spaces; s++)
        if (p->ledger.spaces[s].live && probe_space(p, s) == -ESRCH) {
            retire_space(p, s);
            any = true;
        }
    p->reaped_ns = now_ns();
    return any;
}

/* --- pages ------------------------------------------------------------------------------------------------------- */

/* A copy wakes who sleeps on its own userfaultfd; shared memory may be waited for in other processes as well. */
static void wake_mappings(const struct pager *p, uint32_t instance, uint64_t addr, uint64_t pages, uint64_t copied_va)
{
    struct cursor at = {0};
    struct mapping m;

    while (ledger_next_mapping(&p->ledger, instance, addr, pages, &at, &m))
        if (m.va != copied_va || !instance_is_private(&p->ledger.instances[instance]))
            wake(p, m.space, m.va, m.pages);
}

static void settle(struct pager *p, uint32_t instance, uint64_t addr, uint64_t pages, enum outcome outcome,
                   enum page_class as)
{
    enum page_state state = outcome == OUTCOME_GONE ? PAGE_DROPPED
                            : outcome == OUTCOME_INSTALLED && as == CLASS_POISONED ? PAGE_POISONED
                                                                                   : PAGE_INSTALLED;
    uint64_t run;

    for (uint64_t k = 0; k < pages; k++)
        ledger_settle(&p->ledger, instance, addr + k * PAGE_SIZE,
                      ledger_states(&p->ledger, instance, addr + k * PAGE_SIZE, &run), state,
                      outcome == OUTCOME_GONE ? CLASS_DROPPED : as);
    release(p, instance, addr, pages, outcome, as);
}

/* The kernel looks whether mappings are changing (userfaultfd_copy in fs/userfaultfd.c), waits for the mapping's lock,
 * and only then finds nothing mapped (mfill_atomic in mm/userfaultfd.c). What was moved away meanwhile is not gone: the
 * message about that is unread still, as we hold the lock that reading takes (docs/adr/0016). */
static int64_t install_mapped(struct pager *p, uint32_t space, uint64_t va, const uint8_t *data, uint64_t pages,
                              enum page_class as)
{
    int64_t result = install(p, space, va, data, pages * PAGE_SIZE, as);

    return result == -ENOENT && probe_space(p, space) == -EAGAIN ? -EAGAIN : result;
}

/* One mapping is one or more VMAs: mprotect(2) and madvise(2) split them unseen, and a copy must not cross a border. */
static int64_t install_run(struct pager *p, const struct mapping *m, const uint8_t *data, enum page_class as)
{
    int64_t result = install_mapped(p, m->space, m->va, data, m->pages, as);

    return result == -ENOENT && m->pages > 1 ? install_mapped(p, m->space, m->va, data, 1, as) : result;
}

/* Places what it can of a run of waiting pages: their number, 0 when the tables changed, or -errno. */
static int64_t place_run(struct pager *p, uint32_t instance, uint64_t addr, uint64_t pages, const uint8_t *data,
                         enum page_class as)
{
    struct cursor at = {0};
    struct mapping m;

    while (ledger_next_mapping(&p->ledger, instance, addr, pages, &at, &m)) {
        int64_t result, done;
        int outcome;

        if (m.addr != addr)
            continue;
        result = install_run(p, &m, data, as);
        outcome = count_outcome(p, as, result);
        if (outcome < 0 || outcome == OUTCOME_DEFERRED)
            return result == -ENOMEM ? -EAGAIN : result;
        if (result == -ESRCH || result == -ENOSPC) {
            retire_space(p, m.space);
            return 0;
        }
        if (outcome == OUTCOME_GONE)
            continue;
        done = outcome == OUTCOME_INSTALLED ? result >> PAGE_SHIFT : 1;
        wake_mappings(p, instance, addr, (uint64_t)done, outcome == OUTCOME_INSTALLED ? m.va : 0);
        settle(p, instance, addr, (uint64_t)done, outcome, as);
        return done;
    }
    wake_mappings(p, instance, addr, 1, 0);
    settle(p, instance, addr, 1, OUTCOME_GONE, as);
    return 1;
}

/* A page of memory that several mappings may show, at each of them: the mark is in their page tables, not in the object.
 * As place_run. */
static int64_t poison_shared(struct pager *p, uint32_t instance, uint64_t addr)
{
    struct cursor at = {0};
    struct mapping m;
    bool mapped = false;

    while (ledger_next_mapping(&p->ledger, instance, addr, 1, &at, &m)) {
        int64_t result = install_mapped(p, m.space, m.va, NULL, 1, CLASS_POISONED);
        int outcome = count_outcome(p, CLASS_POISONED, result);

        if (outcome < 0 || outcome == OUTCOME_DEFERRED)
            return result == -ENOMEM ? -EAGAIN : result;
        if (result == -ESRCH || result == -ENOSPC) {
            retire_space(p, m.space);
            return 0;
        }
        mapped |= outcome != OUTCOME_GONE;
    }
    wake_mappings(p, instance, addr, 1, 0);
    settle(p, instance, addr, 1, mapped ? OUTCOME_INSTALLED : OUTCOME_GONE, CLASS_POISONED);
    return 1;
}

static int place_in(struct pager *p, uint32_t instance, uint64_t addr, uint64_t pages, const uint8_t *data,
                    enum page_class as)
{
    for (uint64_t i = 0; i < pages;) {
        uint64_t run, n = 0;
        const uint8_t *bytes = ledger_states(&p->ledger, instance, addr + i * PAGE_SIZE, &run);
        int64_t placed;

        run = min_u64(run, pages - i);
        if (!bytes || !page_waits(*bytes)) {
            i += bytes ? 1 : run;
            continue;
        }
        while (n < run && page_waits(bytes[n]))
            n++;
        if (as == CLASS_POISONED && !instance_is_private(&p->ledger.instances[instance]))
            placed = poison_shared(p, instance, addr + i * PAGE_SIZE);
        else
            placed = place_run(p, instance, addr + i * PAGE_SIZE, n, data ? data + i * PAGE_SIZE : NULL, as);
        if (placed < 0)
            return (int)placed;
        i += (uint64_t)placed;
    }
    return 0;
}

int place_pages(struct pager *p, uint32_t primary, uint64_t addr, uint64_t pages, const uint8_t *data,
                enum page_class as)
{
    for (uint32_t i = primary, next; i != NO_INSTANCE; i = next) {
        int error;

        next = p->ledger.instances[i].kin; /* the instance goes when its process turns out to be gone */
        error = place_in(p, i, addr, pages, data, as);
        if (error)
            return error;
    }
    return 0;
}

/* The page has come, was discarded, or never was: whatever is there stays (EEXIST), and else zeros are right. One that
 * was poisoned is so wherever it is mapped since. */
int place_filler(struct pager *p, const struct fault *f, enum page_class as)
{
    int64_t result = install(p, f->space, f->va, NULL, PAGE_SIZE, as);
    int outcome = count_outcome(p, as, result);

    if (outcome < 0 || outcome == OUTCOME_DEFERRED)
        return result == -ENOMEM ? -EAGAIN : (int)result;
    if (result == -ESRCH || result == -ENOSPC) {
        retire_space(p, f->space);
        return 0;
    }
    if (outcome != OUTCOME_INSTALLED)
        wake(p, f->space, f->va, 1);
    if (f->instance != NO_INSTANCE)
        wake_mappings(p, f->instance, f->addr, 1, f->va);
    record(p, f, outcome, as);
    return 0;
}
