/* A pager's life: its tables are filled, its threads started, watched and stopped. */
#define _GNU_SOURCE
#include "_pager.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "_children.h"
#include "_cradle.h"
#include "_engine.h"
#include "_shadow.h"
#include "crc32c.h"
#include "zstd.h"

#define MAP_SLICE 65536u /* pages of the map that are applied before the lock is let go */

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

/* --- status ------------------------------------------------------------------------------------------------------ */

static void set_status(struct pager *p, enum pager_status status, const char *reason, int error)
{
    p->status = status;
    if (error)
        snprintf(p->reason, sizeof(p->reason), "%s: %s", reason, strerrordesc_np(error < 0 ? -error : error));
    else
        snprintf(p->reason, sizeof(p->reason), "%s", reason);
    pthread_cond_broadcast(&p->changed);
    pthread_cond_broadcast(&p->faulted.more);
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

void check_done(struct pager *p)
{
    if (p->status == PAGER_RUNNING && p->ledger.head->map_known && p->ledger.head->remaining == 0)
        set_status(p, PAGER_DONE, "", 0);
}

/* --- birth and death --------------------------------------------------------------------------------------------- */

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
    return p->epoll < 0 || p->fault_kick < 0 || p->bulk_kick < 0 ? -errno : 0;
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
    p->next_urgent = p->next_bulk = p->epoll = p->fault_kick = p->bulk_kick = -1;
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
    if (p->ledger.head)
        ledger_close(&p->ledger);
    unmap_files(p);
    free(p->plan.runs);
    free(p->ahead.runs);
    free(p->fresh.items);
    free(p->waiting.items);
    free(p->calls.items);
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

/* --- tables ------------------------------------------------------------------------------------------------------ */

int pager_add_space(struct pager *p, int uffd, uint32_t vpid, uint32_t pid)
{
    int space, error;

    pthread_mutex_lock(&p->lock);
    space = ledger_add_space(&p->ledger, uffd, vpid, pid);
    if (space >= 0) {
        error = watch_space(p, (uint32_t)space);
        if (error) {
            p->ledger.spaces[space].live = 0;
            space = error;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return space;
}

int pager_watch_removals(struct pager *p)
{
    struct ledger_head *head = p->ledger.head;
    int count = 0, error = 0;

    pthread_mutex_lock(&p->lock);
    if (!head->removal_count) {
        count = removals_open(head->removal_fds, LEDGER_REMOVALS);
        error = count < 0 ? count : removals_map(&p->removals, head->removal_fds, (uint32_t)count);
        while (error && count > 0)
            close(head->removal_fds[--count]);
        head->removal_count = error ? 0 : (uint32_t)count;
    }
    pthread_mutex_unlock(&p->lock);
    return error;
}

int pager_note_removal(struct pager *p, uint32_t pid, uint32_t tid, uint64_t start, uint64_t length)
{
    const struct removal call = {
        .start = start, .end = (start + length + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1), .pid = pid, .tid = tid};
    int error;

    pthread_mutex_lock(&p->lock);
    error = note_call(p, &call);
    pthread_mutex_unlock(&p->lock);
    return error;
}

static bool misaligned(uint64_t a, uint64_t b, uint64_t c)
{
    return (a | b | c) & (PAGE_SIZE - 1);
}

static int add_region(struct pager *p, int space, const struct pager_region *r)
{
    if (misaligned(r->start, r->length, r->addr) || !r->length || r->start + r->length < r->start ||
        r->addr + r->length < r->addr)
        return -EINVAL;
    if (space < 0 || (uint32_t)space >= p->ledger.head->spaces || !p->ledger.spaces[space].live)
        return -EINVAL;
    return ledger_add_region(&p->ledger, (uint32_t)space, r->start, r->length, r->object, r->addr);
}

int pager_add_regions(struct pager *p, int space, const struct pager_region *regions, size_t count)
{
    int error = 0;

    pthread_mutex_lock(&p->lock);
    for (size_t k = 0; !error && k < count; k++)
        error = add_region(p, space, &regions[k]);
    pthread_mutex_unlock(&p->lock);
    return error;
}

int pager_add_region(struct pager *p, int space, uint64_t start, uint64_t length, uint64_t object, uint64_t addr)
{
    const struct pager_region region = {start, length, object, addr};

    return pager_add_regions(p, space, &region, 1);
}

int pager_register(int uffd, const struct pager_region *regions, size_t count)
{
    for (size_t k = 0; k < count; k++) {
        struct uffdio_register request = {.range = {regions[k].start, regions[k].length},
                                          .mode = UFFDIO_REGISTER_MODE_MISSING};

        if (ioctl(uffd, UFFDIO_REGISTER, &request) < 0)
            return -errno;
    }
    return 0;
}

int pager_add_eager(struct pager *p, uint64_t pages)
{
    pthread_mutex_lock(&p->lock);
    p->ledger.head->total += pages;
    p->ledger.head->counted[CLASS_EAGER] += pages;
    pthread_mutex_unlock(&p->lock);
    return 0;
}

int pager_mark_installed(struct pager *p, uint64_t object, uint64_t addr, uint64_t pages)
{
    int64_t primary;

    pthread_mutex_lock(&p->lock);
    primary = ledger_primary(&p->ledger, object);
    for (uint64_t k = 0, run; primary >= 0 && k < pages; k++) {
        uint8_t *byte = ledger_states(&p->ledger, (uint32_t)primary, addr + k * PAGE_SIZE, &run);

        if (byte)
            ledger_settle(&p->ledger, (uint32_t)primary, addr + k * PAGE_SIZE, byte, PAGE_INSTALLED, CLASS_EAGER);
        else
            primary = -ENOENT;
    }
    pthread_mutex_unlock(&p->lock);
    return primary < 0 ? (int)primary : 0;
}

/* --- local pages ------------------------------------------------------------------------------------------------- */

/* NULL, with errno, when it cannot be mapped. */
static const struct file_map *map_file(struct pager *p, int fd)
{
    struct stat status;
    void *base;

    for (size_t i = 0; i < p->file_count; i++)
        if (p->files[i].fd == fd)
            return &p->files[i];
    if (fstat(fd, &status) < 0)
        return NULL;
    base = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return NULL;
    p->files[p->file_count] = (struct file_map){fd, base, (size_t)status.st_size};
    return &p->files[p->file_count++];
}

static int add_segment(struct pager *p, const struct pager_segment *s)
{
    const struct segment *last = p->segment_count ? &p->segments[p->segment_count - 1] : NULL;
    const struct file_map *file;

    if (misaligned(s->start, s->end, 0) || s->start >= s->end)
        return -EINVAL;
    if (last && (s->object < last->object || (s->object == last->object && s->start < last->end)))
        return -EINVAL;
    file = map_file(p, (int)s->fd);
    if (!file)
        return -errno;
    if (s->offset > file->size || s->end - s->start > file->size - s->offset)
        return -ENODATA;
    p->segments[p->segment_count++] =
        (struct segment){s->object, s->start, s->end, (const uint8_t *)file->base + s->offset};
    return 0;
}

int pager_set_segments(struct pager *p, const struct pager_segment *sorted, size_t count)
{
    int error = 0;

    if (p->segments || p->fault_runs)
        return -EBUSY;
    p->segments = calloc(count + 1, sizeof(*p->segments));
    p->files = calloc(count + 1, sizeof(*p->files));
    if (!p->segments || !p->files)
        return -ENOMEM;
    for (size_t i = 0; i < count && !error; i++)
        error = add_segment(p, &sorted[i]);
    return error;
}

const uint8_t *local_pages(const struct pager *p, uint64_t object, uint64_t addr, uint64_t *pages)
{
    size_t low = 0, high = p->segment_count;
    const struct segment *s;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        s = &p->segments[middle];
        if (s->object < object || (s->object == object && s->end <= addr))
            low = middle + 1;
        else
            high = middle;
    }
    s = p->segments + low;
    if (low == p->segment_count || s->object != object)
        return NULL;
    if (s->start > addr) {
        *pages = min_u64(*pages, (s->start - addr) >> PAGE_SHIFT);
        return NULL;
    }
    *pages = min_u64(*pages, (s->end - addr) >> PAGE_SHIFT);
    return s->data + (addr - s->start);
}

/* --- remote pages ------------------------------------------------------------------------------------------------ */

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

/* --- plan and map ------------------------------------------------------------------------------------------------ */

static int set_course(struct pager *p, struct course *course, const struct pager_run *runs, size_t count)
{
    struct run *known = calloc(count + 1, sizeof(*known)), *old;
    size_t n = 0;

    if (!known)
        return -ENOMEM;
    pthread_mutex_lock(&p->lock);
    for (size_t i = 0; i < count; i++) {
        int64_t primary = ledger_primary(&p->ledger, runs[i].object);

        if (primary >= 0)
            known[n++] = (struct run){runs[i].addr, runs[i].count, (uint32_t)primary};
    }
    old = course->runs;
    *course = (struct course){.runs = known, .count = n};
    p->bulk_idle = false;
    pthread_mutex_unlock(&p->lock);
    free(old);
    kick(p->bulk_kick);
    return 0;
}

int pager_set_plan(struct pager *p, const struct pager_run *runs, size_t count)
{
    return set_course(p, &p->plan, runs, count);
}

int pager_set_ahead(struct pager *p, const struct pager_run *runs, size_t count)
{
    return set_course(p, &p->ahead, runs, count);
}

static void map_runs(struct pager *p, const struct pager_run *run)
{
    for (uint64_t done = 0, n; done < run->count; done += n) {
        int64_t primary;

        n = min_u64(MAP_SLICE, run->count - done);
        pthread_mutex_lock(&p->lock);
        primary = ledger_primary(&p->ledger, run->object);
        if (primary >= 0)
            ledger_map_run(&p->ledger, (uint32_t)primary, run->addr + done * PAGE_SIZE, n);
        pthread_mutex_unlock(&p->lock);
    }
}

/* One slice of the pages that the map did not name; false when there is none left. A process that forks meanwhile may
 * leave pages of its child out: those are asked for, and the source says zero. */
static bool close_slice(struct pager *p, struct walk *at, int *error)
{
    bool found = false;

    pthread_mutex_lock(&p->lock);
    while (!found && !*error && at->instance < p->ledger.head->instances) {
        const struct instance *i = &p->ledger.instances[at->instance];
        const struct span *s = ledger_spans(&p->ledger, at->instance) + at->span;

        if (!i->live || at->span >= i->spans) {
            at->instance++;
            at->span = 0;
        } else if (at->page >= s->pages) {
            at->span++;
            at->page = 0;
        } else {
            *error = ledger_map_close(&p->ledger, at->instance, s->addr + at->page * PAGE_SIZE,
                                      min_u64(MAP_SLICE, s->pages - at->page));
            at->page += MAP_SLICE;
            found = true;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return found;
}

int pager_apply_map(struct pager *p, const struct pager_run *runs, size_t count)
{
    struct walk at = {0};
    int error = 0;

    for (size_t i = 0; i < count; i++)
        map_runs(p, &runs[i]);
    while (!error && close_slice(p, &at, &error))
        ;
    pthread_mutex_lock(&p->lock);
    if (error)
        lost(p, "the source does not have a page that its map names", 0);
    p->ledger.head->map_known = 1;
    p->bulk_idle = false;
    p->retry = true; /* who waited for a page that the source does not have learns that it is zero */
    check_done(p);
    pthread_mutex_unlock(&p->lock);
    kick(p->fault_kick);
    kick(p->bulk_kick);
    return error;
}

void pager_alone(struct pager *p, bool poison)
{
    pthread_mutex_lock(&p->lock);
    ledger_close_map(&p->ledger);
    p->poisons = poison;
    pthread_mutex_unlock(&p->lock);
}

bool pager_shares_poison(struct pager *p)
{
    bool found;

    pthread_mutex_lock(&p->lock);
    found = ledger_shares_poison(&p->ledger);
    pthread_mutex_unlock(&p->lock);
    return found;
}

bool pager_map_known(struct pager *p)
{
    bool known;

    pthread_mutex_lock(&p->lock);
    known = p->ledger.head->map_known;
    pthread_mutex_unlock(&p->lock);
    return known;
}

/* --- acknowledging ----------------------------------------------------------------------------------------------- */

#define ACK_SCAN (1u << 20) /* pages looked at by one call */
#define ACK_TURN (1u << 16) /* of them before the lock is let go */

int pager_acknowledge(struct pager *p, struct pager_run *runs, size_t count)
{
    size_t found = 0;
    bool at_end = false;

    for (uint64_t looked = 0; looked < ACK_SCAN && found < count && !at_end; looked += ACK_TURN) {
        uint64_t budget = ACK_TURN;

        pthread_mutex_lock(&p->lock);
        if (p->ledger.head->map_known)
            found += ledger_acknowledge(&p->ledger, &p->acked, &budget, runs + found, count - found);
        at_end = budget && found < count;
        if (at_end)
            p->acked = (struct ledger_place){0};
        pthread_mutex_unlock(&p->lock);
    }
    return (int)found;
}

int pager_forget_acked(struct pager *p)
{
    pthread_mutex_lock(&p->lock);
    ledger_forget_acked(&p->ledger);
    p->acked = (struct ledger_place){0};
    pthread_mutex_unlock(&p->lock);
    return 0;
}

/* --- running ----------------------------------------------------------------------------------------------------- */

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
