/* A pager's life: it is made, its threads are started, watched and stopped. */
#define _GNU_SOURCE
#include "_pager.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "_children.h"
#include "_cradle.h"
#include "_engine.h"
#include "_shadow.h"
#include "crc32c.h"
#include "zstd.h"

_Static_assert(sizeof(struct pager_fault) == 72, "a record of docs/trace.md");

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void kick(int eventfd)
{
    const uint64_t one = 1;

    /* Fails only when the counter is full, and then the thread has been kicked. */
    (void)!write(eventfd, &one, sizeof(one));
}

/* --- status ------------------------------------------------------------------------------------------------------- */

static void set_status(struct pager *p, enum pager_status status, const char *reason, int error)
{
    uint64_t ticks;

    p->status = status;
    if (error)
        snprintf(p->reason, sizeof(p->reason), "%s: %s", reason, strerrordesc_np(error < 0 ? -error : error));
    else
        snprintf(p->reason, sizeof(p->reason), "%s", reason);
    pthread_cond_broadcast(&p->changed);
    pthread_cond_broadcast(&p->faulted.more);
    if (status == PAGER_RUNNING || status == PAGER_IDLE)
        (void)!read(p->news, &ticks, sizeof(ticks));
    else
        kick(p->news);
}

void begin_again(struct pager *p)
{
    p->plan.run = p->ahead.run = 0;
    p->plan.page = p->ahead.page = 0;
    p->walk = (struct walk){0};
    p->bulk_idle = false;
}

void lost(struct pager *p, const char *reason, int error)
{
    bool mattered = p->status == PAGER_RUNNING || p->status == PAGER_IDLE;

    p->online = false;
    ledger_forget_asked(&p->ledger);
    begin_again(p);
    if (mattered)
        set_status(p, PAGER_LOST, reason, error == -EBADMSG || error == -EILSEQ ? 0 : error);
    kick(p->fault_kick);
    kick(p->bulk_kick);
}

void lacking(struct pager *p)
{
    if (p->status == PAGER_RUNNING)
        set_status(p, PAGER_LOST, "the map names a page that no segment holds", 0);
}

void failed(struct pager *p, const char *what, int error)
{
    if (p->status != PAGER_FAILED)
        set_status(p, PAGER_FAILED, what, error);
}

/* Also of a lost source: processes that end want nothing more from it. */
void check_done(struct pager *p)
{
    bool goes_on = p->status == PAGER_RUNNING || p->status == PAGER_LOST;

    if (goes_on && p->ledger.head->map_known && p->ledger.head->remaining == 0)
        set_status(p, PAGER_DONE, "", 0);
}

/* --- birth and death ---------------------------------------------------------------------------------------------- */

static int init_lock(struct pager *p)
{
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);

    if (error)
        return -error;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(&p->changed, &attributes);
    if (!error)
        error = pthread_cond_init(&p->faulted.more, &attributes);
    pthread_condattr_destroy(&attributes);
    if (!error)
        error = pthread_mutex_init(&p->lock, NULL);
    return -error;
}

static int open_descriptors(struct pager *p)
{
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    p->fault_kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->bulk_kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    p->news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return p->epoll < 0 || p->fault_kick < 0 || p->bulk_kick < 0 || p->news < 0 ? -errno : 0;
}

/* A dead pager's faults are not delivered again, its requests not answered: wake everybody, who will fault anew. */
static void wake_space(const struct pager *p, uint32_t space)
{
    const struct region *regions = ledger_regions(&p->ledger, space);

    for (uint32_t i = 0; i < p->ledger.spaces[space].regions; i++)
        wake(p, space, regions[i].start, (regions[i].end - regions[i].start) >> PAGE_SHIFT);
}

/* What a dead pager may have left takes a look at every page, 2 ms a gibibyte: the first one after who has filled the
 * tables must not take that time, somebody waits for it already. */
static int take_over(struct pager *p)
{
    struct ledger_head *head = p->ledger.head;
    bool first = !head->served;
    int error = removals_map(&p->removals, head->removal_fds, head->removal_count);

    if (error)
        return error;
    head->served = 1;
    if (!first) {
        shadow_recover(&p->ledger);
        ledger_forget_asked(&p->ledger);
    }
    for (uint32_t s = 0; s < head->spaces; s++) {
        if (!p->ledger.spaces[s].live)
            continue;
        error = watch_space(p, s);
        if (error)
            return error;
        if (!first)
            wake_space(p, s);
    }
    return 0;
}

static int new_cradle(struct ledger_head *head)
{
    head->cradle = cradle_open();
    return head->cradle < 0 ? head->cradle : 0;
}

int pager_new(int ledger_fd, bool trace, struct pager **result)
{
    struct pager *p;
    int error;

    if (!crc32c_supported())
        return -ENOTSUP;
    p = calloc(1, sizeof(*p));
    error = p ? init_lock(p) : -ENOMEM;
    if (error) {
        free(p);
        return error;
    }
    p->next_urgent = p->next_bulk = p->epoll = p->fault_kick = p->bulk_kick = p->news = -1;
    p->urgent.fd = p->bulk.fd = -1;
    p->traced = trace;
    pace_init(&p->pace);
    packing_init(&p->packing, false);
    p->owner = getpid();
    error = ledger_open(&p->ledger, ledger_fd);
    if (!error)
        error = open_descriptors(p);
    if (!error)
        error = link_init(&p->urgent);
    if (!error)
        error = link_init(&p->bulk);
    if (!error)
        error = ledger_fd < 0 ? new_cradle(p->ledger.head) : take_over(p);
    if (error)
        pager_free(p);
    else
        *result = p;
    return error;
}

int pager_rebind(int ledger_fd, int cradle, const int *uffds, size_t count)
{
    struct ledger ledger;
    int error = ledger_open(&ledger, ledger_fd);

    if (error)
        return error;
    shadow_recover(&ledger);
    for (uint32_t s = 0; s < ledger.head->spaces; s++)
        if (!ledger.spaces[s].child)
            ledger.spaces[s].uffd = s < count ? uffds[s] : -1;
    error = children_take_back(&ledger, cradle);
    if (!error && ledger.head->removal_count) {
        int opened = removals_open(ledger.head->removal_fds, LEDGER_REMOVALS);

        error = opened < 0 ? opened : 0;
        ledger.head->removal_count = opened < 0 ? 0 : (uint32_t)opened;
    }
    ledger_close(&ledger);
    return error;
}

int64_t pager_remaining(int ledger_fd)
{
    uint64_t remaining;
    ssize_t n = pread(ledger_fd, &remaining, sizeof(remaining), offsetof(struct ledger_head, remaining));

    if (n < 0)
        return -errno;
    return n == sizeof(remaining) ? (int64_t)remaining : -EINVAL;
}

static void close_if_open(int fd)
{
    if (fd >= 0)
        close(fd);
}

static void unmap_files(struct pager *p)
{
    for (size_t i = 0; i < p->file_count; i++)
        munmap(p->files[i].base, p->files[i].size);
    free(p->files);
    free(p->segments);
}

void pager_free(struct pager *p)
{
    pager_stop(p);
    close_if_open(p->next_urgent);
    close_if_open(p->next_bulk);
    link_free(&p->urgent);
    link_free(&p->bulk);
    close_if_open(p->epoll);
    close_if_open(p->fault_kick);
    close_if_open(p->bulk_kick);
    close_if_open(p->news);
    if (p->ledger.head)
        ledger_close(&p->ledger);
    unmap_files(p);
    free(p->plan.runs);
    free(p->ahead.runs);
    free(p->fresh.items);
    free(p->waiting.items);
    free(p->calls.items);
    free(p->held);
    if (p->owner == getpid()) /* the kernel does not give a forked copy the rings */
        removals_unmap(&p->removals);
    free(p);
}

int pager_ledger_fd(const struct pager *p)
{
    return p->ledger.fd;
}

int pager_cradle(const struct pager *p)
{
    return p->ledger.head->cradle;
}

/* --- remote pages ------------------------------------------------------------------------------------------------- */

int pager_set_remote(struct pager *p, int urgent, int bulk, bool packs)
{
    pthread_mutex_lock(&p->lock);
    close_if_open(p->next_urgent);
    close_if_open(p->next_bulk);
    p->next_urgent = urgent;
    p->next_bulk = bulk;
    p->next_packs = packs;
    p->reconnects += p->has_remote;
    p->has_remote = true;
    p->online = true;
    p->generation++;
    ledger_forget_asked(&p->ledger);
    begin_again(p);
    if (p->status == PAGER_LOST)
        set_status(p, p->fault_runs ? PAGER_RUNNING : PAGER_IDLE, "", 0);
    pthread_mutex_unlock(&p->lock);
    kick(p->fault_kick);
    kick(p->bulk_kick);
    return 0;
}

/* --- acknowledging ------------------------------------------------------------------------------------------------ */

#define ACK_SCAN (1u << 20) /* pages looked at by one call */
#define ACK_TURN (1u << 16) /* of them before the lock is let go */
#define ACK_RUNS 4096u

/* Under the lock: the next part of the ledger is looked through. False when nothing more can be found for now. */
static bool find_settled(struct pager *p)
{
    uint64_t budget = ACK_TURN;
    bool goes_on;

    if (!p->ledger.head->map_known)
        return false;
    p->held_count += ledger_acknowledge(&p->ledger, &p->acked, &budget, p->held + p->held_count,
                                        ACK_RUNS - p->held_count);
    goes_on = !budget && p->held_count < ACK_RUNS;
    if (budget && p->held_count < ACK_RUNS)
        p->acked = (struct ledger_place){0};
    p->held_urgent = p->urgent.next_tag;
    p->held_bulk = p->bulk.next_tag;
    return goes_on;
}

/* A page that was asked for and then discarded is wanted by nobody, but its request may still be on the way, and a source
 * that has freed it would take that for a page that is lost. So what is found is held until those are answered. */
int pager_acknowledge(struct pager *p, struct pager_run *runs, size_t count)
{
    bool searches;
    size_t given = 0;

    pthread_mutex_lock(&p->lock);
    if (!p->held)
        p->held = calloc(ACK_RUNS, sizeof(*p->held));
    searches = p->held && !p->held_count;
    for (uint64_t looked = 0; searches && looked < ACK_SCAN; looked += ACK_TURN) {
        searches = find_settled(p);
        pthread_mutex_unlock(&p->lock);
        pthread_mutex_lock(&p->lock);
    }
    if ((p->held_urgent == p->gone_urgent || link_answered(&p->urgent, p->held_urgent)) &&
        (p->held_bulk == p->gone_bulk || link_answered(&p->bulk, p->held_bulk))) {
        given = min_u64(p->held_count, count);
        p->held_count -= given;
        if (given)
            memcpy(runs, p->held + p->held_count, given * sizeof(*runs));
    }
    pthread_mutex_unlock(&p->lock);
    return (int)given;
}

int pager_forget_acked(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    ledger_forget_acked(&p->ledger);
    p->held_count = 0;
    p->gone_urgent = p->urgent.next_tag;
    p->gone_bulk = p->bulk.next_tag;
    p->acked = (struct ledger_place){0};
    pthread_mutex_unlock(&p->lock);
    return 0;
}

/* --- running ------------------------------------------------------------------------------------------------------ */

/* Signals are for the threads of Python. */
static int start_thread(pthread_t *thread, void *(*main)(void *), struct pager *p)
{
    sigset_t all, old;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    error = pthread_create(thread, NULL, main, p);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return -error;
}

int pager_news(const struct pager *p)
{
    return p->news;
}

int pager_start(struct pager *p, bool bulk, uint64_t max_rate)
{
    int error = -EBUSY;

    pthread_mutex_lock(&p->lock);
    if (!p->fault_runs && p->status == PAGER_IDLE) {
        p->max_rate = max_rate;
        p->ledger.head->served = 1;
        p->status = PAGER_RUNNING;
        check_done(p);
        error = apply_messages(p, LEDGER_MESSAGES);
        if (!error)
            error = start_thread(&p->fault_thread, fault_main, p);
        p->fault_runs = !error;
        if (!error && bulk) {
            error = start_thread(&p->bulk_thread, bulk_main, p);
            p->bulk_runs = !error;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return error;
}

int pager_start_bulk(struct pager *p, bool wakes)
{
    int error = -EBUSY;

    pthread_mutex_lock(&p->lock);
    if (p->fault_runs && !p->bulk_runs) {
        if (wakes)
            pace_wakes(&p->pace, now_ns());
        error = start_thread(&p->bulk_thread, bulk_main, p);
        p->bulk_runs = !error;
    }
    pthread_mutex_unlock(&p->lock);
    return error;
}

void pager_stop(struct pager *p)
{
    /* A forked copy of our process has the object but not the threads. */
    if (p->owner != getpid())
        return;
    atomic_store(&p->stopping, true);
    kick(p->fault_kick);
    kick(p->bulk_kick);
    if (p->fault_runs)
        pthread_join(p->fault_thread, NULL);
    if (p->bulk_runs)
        pthread_join(p->bulk_thread, NULL);
    pthread_mutex_lock(&p->lock);
    p->fault_runs = p->bulk_runs = false;
    if (p->status == PAGER_RUNNING || p->status == PAGER_LOST || p->status == PAGER_IDLE)
        p->status = PAGER_STOPPED;
    pthread_cond_broadcast(&p->changed);
    pthread_cond_broadcast(&p->faulted.more);
    pthread_mutex_unlock(&p->lock);
}

struct timespec moment_after(int timeout_ms)
{
    uint64_t end = now_ns() + (uint64_t)timeout_ms * 1000000u;

    return (struct timespec){(time_t)(end / 1000000000u), (long)(end % 1000000000u)};
}

int pager_wait(struct pager *p, int timeout_ms)
{
    const struct timespec until = moment_after(timeout_ms);
    int error = 0, status;

    pthread_mutex_lock(&p->lock);
    while (p->status == PAGER_RUNNING && !error)
        error = pthread_cond_timedwait(&p->changed, &p->lock, &until);
    status = (int)p->status;
    pthread_mutex_unlock(&p->lock);
    return status == PAGER_RUNNING ? -ETIMEDOUT : status;
}

int pager_wait_plan(struct pager *p, int timeout_ms)
{
    const struct timespec until = moment_after(timeout_ms);
    int error = 0;

    pthread_mutex_lock(&p->lock);
    while (p->status == PAGER_RUNNING && !p->bulk_idle && !error)
        error = pthread_cond_timedwait(&p->changed, &p->lock, &until);
    if (p->status != PAGER_RUNNING)
        error = ESHUTDOWN;
    else if (p->bulk_idle)
        error = 0;
    pthread_mutex_unlock(&p->lock);
    return -error;
}

int pager_status(struct pager *p, char *reason, size_t size)
{
    int status;

    pthread_mutex_lock(&p->lock);
    status = (int)p->status;
    if (reason)
        snprintf(reason, size, "%s", p->reason);
    pthread_mutex_unlock(&p->lock);
    return status;
}

void pager_counters(struct pager *p, struct pager_counters *c)
{
    static const enum page_class classes[3] = {CLASS_ZERO, CLASS_URGENT, CLASS_BULK};
    const struct ledger_head *head = p->ledger.head;

    pthread_mutex_lock(&p->lock);
    c->total = head->total;
    c->zero = head->counted[CLASS_ZERO];
    c->eager = head->counted[CLASS_EAGER];
    c->urgent = head->counted[CLASS_URGENT];
    c->bulk = head->counted[CLASS_BULK];
    c->dropped = head->counted[CLASS_DROPPED];
    c->poisoned = head->counted[CLASS_POISONED];
    c->remaining = head->remaining;
    for (int i = 0; i < 3; i++)
        memcpy(c->outcomes[i], head->outcomes[classes[i]], sizeof(c->outcomes[i]));
    c->bytes_in = atomic_load(&p->urgent.bytes_in) + atomic_load(&p->bulk.bytes_in);
    c->bytes_out = atomic_load(&p->urgent.bytes_out) + atomic_load(&p->bulk.bytes_out);
    c->packed = __atomic_load_n(&head->packed, __ATOMIC_RELAXED);
    c->reconnects = p->reconnects;
    c->faults = head->faults;
    c->fault_max_ns = head->fault_max_ns;
    memcpy(c->fault_ns, head->fault_ns, sizeof(c->fault_ns));
    pthread_mutex_unlock(&p->lock);
}

/* The number of the oldest record that is whole, when `written` have been: the next one may be in the making, in the
 * slot of the oldest. */
static uint64_t oldest_whole(uint64_t written)
{
    return written < LEDGER_TRACE ? 0 : written + 1 - LEDGER_TRACE;
}

size_t pager_trace(const struct pager *p, uint64_t *next, uint64_t *lost, struct pager_fault *records, size_t count)
{
    const uint64_t *traced = &p->ledger.head->traced;
    uint64_t written = __atomic_load_n(traced, __ATOMIC_ACQUIRE), oldest = oldest_whole(written);
    uint64_t from = *next > oldest ? *next : oldest, end = from + min_u64(written - from, count);

    for (uint64_t i = from; i < end; i++)
        records[i - from] = p->ledger.trace[i % LEDGER_TRACE];
    /* What was overwritten while it was copied is not whole. */
    keep_order();
    oldest = oldest_whole(__atomic_load_n(traced, __ATOMIC_RELAXED));
    oldest = oldest < from ? from : min_u64(oldest, end);
    memmove(records, records + (oldest - from), (end - oldest) * sizeof(*records));
    *lost += oldest - *next;
    *next = end;
    return end - oldest;
}

bool pager_has_zstd(void)
{
    struct zstd zstd;
    bool found = zstd_load(&zstd);

    zstd_unload(&zstd);
    return found;
}

uint32_t pager_crc32c(const void *pages, size_t count)
{
    return crc32c_pages(pages, count);
}
