/* The tables: processes and their regions, objects and the states of their pages. */
#define _GNU_SOURCE
#include "_shadow.h"
#include "_tables.h"

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

/* --- the file ----------------------------------------------------------------------------------------------------- */

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

/* --- spaces and regions ------------------------------------------------------------------------------------------- */

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

uint32_t region_above(const struct ledger *l, uint32_t space, uint64_t va)
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

int insert_region(struct ledger *l, uint32_t space, struct region region)
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

void erase_region(struct ledger *l, uint32_t space, uint32_t i)
{
    struct region *regions = ledger_regions(l, space);
    uint32_t rest = l->spaces[space].regions - i - 1;

    l->instances[regions[i].instance].regions--;
    memmove(regions + i, regions + i + 1, rest * sizeof(*regions));
    l->spaces[space].regions--;
}

/* --- instances and their state bytes ------------------------------------------------------------------------------ */

int64_t ledger_primary(const struct ledger *l, uint64_t object)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        if (l->instances[i].object == object && l->instances[i].primary == i)
            return i;
    return -ENOENT;
}

int new_instance(struct ledger *l, struct instance instance)
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

int64_t allot_states(struct ledger *l, uint64_t bytes, uint64_t align)
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

/* --- who maps a page ---------------------------------------------------------------------------------------------- */

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
