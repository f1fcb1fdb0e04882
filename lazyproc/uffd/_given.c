/* What a pager is given: processes and their memory, where pages are, in which order they come, which have content. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "_engine.h"

#define MAP_SLICE 65536u /* pages of the map that are applied before the lock is let go */

/* --- processes and their memory ----------------------------------------------------------------------------------- */

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

/* --- local pages -------------------------------------------------------------------------------------------------- */

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

/* --- plan and map ------------------------------------------------------------------------------------------------- */

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
        uint64_t addr = run->addr + done * PAGE_SIZE, known;
        int64_t primary;

        n = run->count - done;
        pthread_mutex_lock(&p->lock);
        primary = ledger_primary(&p->ledger, run->object);
        if (primary >= 0 && !ledger_states(&p->ledger, (uint32_t)primary, addr, &known)) {
            n = min_u64(n, known); /* in no region: whoever made the map may name all there is */
        } else if (primary >= 0) {
            n = min_u64(n, MAP_SLICE);
            ledger_map_run(&p->ledger, (uint32_t)primary, addr, n);
        }
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

        if (at->span >= i->spans) {
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
