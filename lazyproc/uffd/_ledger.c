#define _GNU_SOURCE
#include "_ledger.h"
#include "_shadow.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define LEDGER_MAGIC 0x33726765646c707aull

#define HEAD_BYTES (1ull << 16)
#define SPACE_BYTES (LEDGER_SPACES * sizeof(struct space))
#define INSTANCE_BYTES (LEDGER_INSTANCES * sizeof(struct instance))
#define TRACE_BYTES (LEDGER_TRACE * sizeof(struct pager_fault))
#define REGION_BYTES (1ull * LEDGER_SPACES * LEDGER_REGIONS * sizeof(struct region))
#define SPAN_BYTES (1ull * LEDGER_INSTANCES * LEDGER_SPANS * sizeof(struct span))
#define SHADOW_BYTES ((sizeof(struct shadow) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1))
#define TABLE_BYTES (SPACE_BYTES + INSTANCE_BYTES + TRACE_BYTES + SHADOW_BYTES + REGION_BYTES + SPAN_BYTES)
#define LEDGER_BYTES (HEAD_BYTES + TABLE_BYTES + LEDGER_STATES)

_Static_assert(sizeof(struct ledger_head) <= HEAD_BYTES, "the head fits before the tables");

/* --- the file ---------------------------------------------------------------------------------------------------- */

static void lay_out(struct ledger *l, uint8_t *base)
{
    l->head = (struct ledger_head *)base;
    base += HEAD_BYTES;
    l->spaces = (struct space *)base;
    base += SPACE_BYTES;
    l->instances = (struct instance *)base;
    base += INSTANCE_BYTES;
    l->trace = (struct pager_fault *)base;
    base += TRACE_BYTES;
    l->shadow = (struct shadow *)base;
    base += SHADOW_BYTES;
    l->regions = (struct region *)base;
    base += REGION_BYTES;
    l->spans = (struct span *)base;
    base += SPAN_BYTES;
    l->states = base;
}

static int map_file(struct ledger *l)
{
    struct stat status;
    void *base;

    if (fstat(l->fd, &status) < 0)
        return -errno;
    if ((uint64_t)status.st_size != LEDGER_BYTES)
        return -EINVAL;
    base = mmap(NULL, LEDGER_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, l->fd, 0);
    if (base == MAP_FAILED)
        return -errno;
    madvise(base, LEDGER_BYTES, MADV_DONTDUMP);
    lay_out(l, base);
    return 0;
}

int ledger_open(struct ledger *l, int fd)
{
    int error = 0;

    l->fd = fd < 0 ? memfd_create("lazyproc-ledger", MFD_CLOEXEC) : fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (l->fd < 0)
        return -errno;
    if (fd < 0 && ftruncate(l->fd, (off_t)LEDGER_BYTES) < 0)
        error = -errno;
    if (!error)
        error = map_file(l);
    if (error) {
        close(l->fd);
        return error;
    }
    if (fd < 0)
        l->head->magic = LEDGER_MAGIC;
    if (l->head->magic == LEDGER_MAGIC)
        return 0;
    ledger_close(l);
    return -EINVAL;
}

void ledger_close(struct ledger *l)
{
    munmap(l->head, LEDGER_BYTES);
    close(l->fd);
}

/* --- spaces and regions ------------------------------------------------------------------------------------------ */

int ledger_add_space(struct ledger *l, int uffd, uint32_t vpid, uint32_t pid)
{
    uint32_t i = 0;

    while (i < l->head->spaces && l->spaces[i].live)
        i++;
    if (i == LEDGER_SPACES)
        return -ENOSPC;
    l->spaces[i] = (struct space){.uffd = uffd, .live = 1, .vpid = vpid, .pid = pid};
    if (i == l->head->spaces)
        l->head->spaces++;
    return (int)i;
}

/* Index of the first region of the space that ends above va. */
static uint32_t region_above(const struct ledger *l, uint32_t space, uint64_t va)
{
    const struct region *regions = ledger_regions(l, space);
    uint32_t low = 0, high = l->spaces[space].regions;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (regions[middle].end <= va)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct region *ledger_region_at(const struct ledger *l, uint32_t space, uint64_t va)
{
    uint32_t i = region_above(l, space, va);
    struct region *r = ledger_regions(l, space) + i;

    return i < l->spaces[space].regions && r->start <= va ? r : NULL;
}

static int insert_region(struct ledger *l, uint32_t space, struct region region)
{
    struct region *regions = ledger_regions(l, space);
    uint32_t i = region_above(l, space, region.start), count = l->spaces[space].regions;

    if (count == LEDGER_REGIONS)
        return -ENOSPC;
    memmove(regions + i + 1, regions + i, (count - i) * sizeof(*regions));
    regions[i] = region;
    l->spaces[space].regions++;
    l->instances[region.instance].regions++;
    return 0;
}

static void erase_region(struct ledger *l, uint32_t space, uint32_t i)
{
    struct region *regions = ledger_regions(l, space);
    uint32_t rest = l->spaces[space].regions - i - 1;

    l->instances[regions[i].instance].regions--;
    memmove(regions + i, regions + i + 1, rest * sizeof(*regions));
    l->spaces[space].regions--;
}

/* --- instances and their state bytes ----------------------------------------------------------------------------- */

int64_t ledger_primary(const struct ledger *l, uint64_t object)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        if (l->instances[i].live && l->instances[i].object == object && l->instances[i].primary == i)
            return i;
    return -ENOENT;
}

static int new_instance(struct ledger *l, struct instance instance)
{
    uint32_t i = 0;

    while (i < l->head->instances && l->instances[i].live)
        i++;
    if (i == LEDGER_INSTANCES)
        return -ENOSPC;
    instance.live = 1;
    if (instance.primary == NO_KIN)
        instance.primary = i;
    l->instances[i] = instance;
    if (i == l->head->instances)
        l->head->instances++;
    return (int)i;
}

static int primary_of(struct ledger *l, uint64_t object, uint32_t home)
{
    int64_t found = ledger_primary(l, object);

    if (found >= 0)
        return (int)found;
    return new_instance(l, (struct instance){.object = object, .primary = NO_KIN, .kin = NO_KIN, .home = home});
}

/* Index of the first span that ends above addr. */
static uint32_t span_above(const struct ledger *l, uint32_t instance, uint64_t addr)
{
    const struct span *spans = ledger_spans(l, instance);
    uint32_t low = 0, high = l->instances[instance].spans;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;

        if (spans[middle].addr + spans[middle].pages * PAGE_SIZE <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint8_t *ledger_states(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t *pages)
{
    uint32_t i = span_above(l, instance, addr);
    const struct span *s = ledger_spans(l, instance) + i;
    uint64_t skip;

    if (i == l->instances[instance].spans) {
        *pages = UINT64_MAX >> PAGE_SHIFT;
        return NULL;
    }
    if (s->addr > addr) {
        *pages = (s->addr - addr) >> PAGE_SHIFT;
        return NULL;
    }
    skip = (addr - s->addr) >> PAGE_SHIFT;
    *pages = s->pages - skip;
    return l->states + s->states + skip;
}

static int insert_span(struct ledger *l, uint32_t instance, struct span span)
{
    struct span *spans = ledger_spans(l, instance);
    uint32_t i = span_above(l, instance, span.addr), count = l->instances[instance].spans;

    if (count == LEDGER_SPANS)
        return -ENOSPC;
    memmove(spans + i + 1, spans + i, (count - i) * sizeof(*spans));
    spans[i] = span;
    l->instances[instance].spans++;
    return 0;
}

static int64_t allot_states(struct ledger *l, uint64_t bytes, uint64_t align)
{
    uint64_t at = (l->head->states + align - 1) & ~(align - 1);

    if (at + bytes > LEDGER_STATES)
        return -ENOSPC;
    l->head->states = at + bytes;
    return (int64_t)at;
}

/* State bytes for those pages that have none yet: mappings of a shared object may overlap. */
static int cover(struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages)
{
    while (pages) {
        uint64_t run;
        int64_t at;
        int error;

        if (ledger_states(l, instance, addr, &run)) {
            run = run < pages ? run : pages;
        } else {
            run = run < pages ? run : pages;
            at = allot_states(l, run, 1);
            if (at < 0)
                return (int)at;
            error = insert_span(l, instance, (struct span){.addr = addr, .pages = run, .states = (uint64_t)at});
            if (error)
                return error;
            l->head->remaining += run;
        }
        addr += run * PAGE_SIZE;
        pages -= run;
    }
    return 0;
}

int ledger_add_region(struct ledger *l, uint32_t space, uint64_t start, uint64_t length, uint64_t object,
                      uint64_t addr)
{
    uint32_t after = region_above(l, space, start);
    int instance, error;

    if (after < l->spaces[space].regions && ledger_regions(l, space)[after].start < start + length)
        return -EEXIST;
    instance = primary_of(l, object, space);
    if (instance < 0)
        return instance;
    error = cover(l, (uint32_t)instance, addr, length >> PAGE_SHIFT);
    if (error)
        return error;
    return insert_region(l, space, (struct region){start, start + length, addr, (uint32_t)instance, 0});
}

/* --- counting ---------------------------------------------------------------------------------------------------- */

/* Every page counts once, in its primary instance; before the map is known only its class is noted. What was copied
 * eagerly has been counted already, whether the map names it or not. */
static void count_page(struct ledger_head *head, uint8_t *byte, enum page_class class)
{
    if (*byte & CLASS_MASK)
        return;
    *byte |= (uint8_t)(class << CLASS_SHIFT);
    if (!(*byte & IN_MAP))
        return;
    head->counted[CLASS_NONE]--;
    if (class == CLASS_EAGER)
        head->total--;
    else
        head->counted[class]++;
}

bool ledger_kin_waits(const struct ledger *l, uint32_t primary, uint64_t addr)
{
    for (uint32_t i = primary; i != NO_KIN; i = l->instances[i].kin) {
        uint64_t pages;
        const uint8_t *byte = ledger_states(l, i, addr, &pages);

        if (byte && page_waits(*byte))
            return true;
    }
    return false;
}

void ledger_settle(struct ledger *l, uint32_t instance, uint64_t addr, uint8_t *byte, enum page_state state,
                   enum page_class class)
{
    uint32_t primary = l->instances[instance].primary;
    bool waited = page_waits(*byte);
    uint64_t pages;

    *byte = (uint8_t)((*byte & ~STATE_MASK) | state);
    if (!waited)
        return;
    l->head->remaining--;
    /* What one process discards may still come for another, and is counted as that then. */
    if (class == CLASS_DROPPED && l->instances[primary].kin != NO_KIN && ledger_kin_waits(l, primary, addr))
        return;
    if (primary != instance)
        byte = ledger_states(l, primary, addr, &pages);
    if (byte)
        count_page(l->head, byte, class);
}

void ledger_mark(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages, enum page_state below,
                 enum page_state state)
{
    for (uint32_t i = primary; i != NO_KIN; i = l->instances[i].kin) {
        for (uint64_t done = 0, run; done < pages; done += run) {
            uint8_t *bytes = ledger_states(l, i, addr + done * PAGE_SIZE, &run);

            run = run < pages - done ? run : pages - done;
            for (uint64_t k = 0; bytes && k < run; k++)
                if (page_state(bytes[k]) < below)
                    bytes[k] = (uint8_t)((bytes[k] & ~STATE_MASK) | state);
        }
    }
}

void ledger_forget_asked(struct ledger *l)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; l->instances[i].live && s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;
            uint8_t *bytes = l->states + span->states;

            for (uint64_t k = 0; k < span->pages; k++)
                if (page_waits(bytes[k]))
                    bytes[k] &= (uint8_t)~STATE_MASK;
        }
}

/* --- dropping ---------------------------------------------------------------------------------------------------- */

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

/* --- events ------------------------------------------------------------------------------------------------------ */

/* Takes [start, end) out of the one region `i`. */
static int cut_region(struct ledger *l, uint32_t space, uint32_t i, uint64_t start, uint64_t end)
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

/* The first region at or after `from`, clipped to [from, end) and moved by `shift`. */
static bool shifted(const struct ledger *l, uint32_t space, uint64_t from, uint64_t end, uint64_t shift,
                    struct region *out)
{
    uint32_t i = region_above(l, space, from);
    struct region r = ledger_regions(l, space)[i];
    uint64_t start = r.start > from ? r.start : from;

    if (i == l->spaces[space].regions || start >= end)
        return false;
    out->start = start + shift;
    out->end = (r.end < end ? r.end : end) + shift;
    out->addr = r.addr + (start - r.start);
    out->instance = r.instance;
    out->reserved = 0;
    return true;
}

/* Length 0 is mremap's way of mapping shared memory a second time. The message does not say how much: as much as there
 * is, up to what is known to lie behind. */
static uint64_t doubled_length(const struct ledger *l, uint32_t space, uint64_t from, uint64_t to)
{
    const struct region *whole = ledger_region_at(l, space, from);
    uint32_t i = region_above(l, space, to);
    uint64_t length = whole ? whole->end - from : 0;
    uint64_t next = i < l->spaces[space].regions ? ledger_regions(l, space)[i].start : UINT64_MAX;

    if (next <= to)
        return 0;
    return next - to < length ? next - to : length;
}

/* mremap(2). The old place of a private region is left at once. A shared one keeps it: with MREMAP_DONTUNMAP the old
 * mapping goes on showing the object, and otherwise an UNMAP message follows. */
int ledger_remap(struct ledger *l, uint32_t space, uint64_t from, uint64_t to, uint64_t length)
{
    uint64_t shift = to - from, end = from + (length ? length : doubled_length(l, space, from, to));
    struct region moved;
    int error = ledger_unmap(l, space, from + shift, end + shift);

    while (!error && shifted(l, space, from, end, shift, &moved)) {
        uint64_t old = moved.start - shift;

        from = moved.end - shift;
        error = insert_region(l, space, moved);
        if (!error && instance_is_private(&l->instances[moved.instance]))
            error = cut_region(l, space, region_above(l, space, old), old, from);
    }
    return error;
}

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

/* --- who maps a page --------------------------------------------------------------------------------------------- */

static bool overlap(const struct region *r, uint32_t instance, uint64_t addr, uint64_t end, struct mapping *found)
{
    uint64_t from = r->addr > addr ? r->addr : addr, to = r->addr + (r->end - r->start);

    to = to < end ? to : end;
    if (r->instance != instance || from >= to)
        return false;
    found->addr = from;
    found->va = r->start + (from - r->addr);
    found->pages = (to - from) >> PAGE_SHIFT;
    return true;
}

/* Private memory is nearly always where its object says: address by address. One look instead of a search. */
static bool mapped_at_home(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t end,
                           struct mapping *found)
{
    const struct region *r = ledger_region_at(l, l->instances[instance].home, addr);

    return r && overlap(r, instance, addr, end, found) && found->addr == addr &&
           addr + (found->pages << PAGE_SHIFT) == end;
}

bool ledger_next_mapping(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages, struct cursor *at,
                         struct mapping *found)
{
    bool private = instance_is_private(&l->instances[instance]);
    uint32_t last = private ? l->instances[instance].home + 1 : l->head->spaces;
    uint64_t end = addr + pages * PAGE_SIZE;

    if (private && at->space == 0 && at->region == 0) {
        at->space = l->instances[instance].home;
        if (mapped_at_home(l, instance, addr, end, found)) {
            found->space = at->space;
            at->space = last;
            at->region = 1;
            return true;
        }
    }
    for (; at->space < last; at->space++, at->region = 0) {
        const struct space *space = &l->spaces[at->space];

        while (space->live && at->region < space->regions) {
            if (overlap(ledger_regions(l, at->space) + at->region++, instance, addr, end, found)) {
                found->space = at->space;
                return true;
            }
        }
    }
    return false;
}

/* --- the map ----------------------------------------------------------------------------------------------------- */

void ledger_map_run(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages)
{
    for (uint32_t i = primary; i != NO_KIN; i = l->instances[i].kin) {
        for (uint64_t done = 0, run; done < pages; done += run) {
            uint8_t *bytes = ledger_states(l, i, addr + done * PAGE_SIZE, &run);

            run = run < pages - done ? run : pages - done;
            for (uint64_t k = 0; bytes && k < run; k++) {
                enum page_class class = (bytes[k] & CLASS_MASK) >> CLASS_SHIFT;

                if (i == primary && !(bytes[k] & IN_MAP) && class != CLASS_EAGER) {
                    l->head->total++;
                    l->head->counted[class]++;
                }
                bytes[k] |= IN_MAP;
            }
        }
    }
}

int ledger_map_close(struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages)
{
    for (uint64_t done = 0, run; done < pages; done += run) {
        uint8_t *bytes = ledger_states(l, instance, addr + done * PAGE_SIZE, &run);

        run = run < pages - done ? run : pages - done;
        for (uint64_t k = 0; bytes && k < run; k++) {
            enum page_state state = page_state(bytes[k]);

            if (state == PAGE_ABSENT && (bytes[k] & IN_MAP))
                return -ENODATA;
            /* What has been asked for comes: the source will say zero. */
            if ((state == PAGE_MISSING || state == PAGE_ABSENT) && !(bytes[k] & IN_MAP)) {
                bytes[k] = (uint8_t)((bytes[k] & ~STATE_MASK) | PAGE_HOLE);
                l->head->remaining--;
            }
        }
    }
    return 0;
}

void ledger_close_map(struct ledger *l)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; l->instances[i].live && s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            if (!l->head->map_known && l->instances[i].primary == i)
                ledger_map_run(l, i, span->addr, span->pages);
        }
    ledger_forget_asked(l);
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; l->instances[i].live && s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            /* Nothing is absent any more, so it cannot fail. */
            (void)ledger_map_close(l, i, span->addr, span->pages);
        }
    l->head->map_known = 1;
}

bool ledger_shares_poison(const struct ledger *l)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; l->instances[i].live && s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            for (uint64_t k = 0; !instance_is_private(&l->instances[i]) && k < span->pages; k++)
                if (page_state(l->states[span->states + k]) == PAGE_POISONED)
                    return true;
        }
    return false;
}

int ledger_absent(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages)
{
    int error = 0;

    ledger_mark(l, primary, addr, pages, PAGE_ABSENT, PAGE_ABSENT);
    if (!l->head->map_known)
        return 0;
    for (uint32_t i = primary; i != NO_KIN && !error; i = l->instances[i].kin)
        error = ledger_map_close(l, i, addr, pages);
    return error;
}
