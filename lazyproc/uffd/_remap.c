/* mremap(2): memory moves in the tables, whatever the order in which that is heard of.
 *
 * The kernel changes mappings under its lock and tells of it when it has let go of that, and mremap(2) tells twice: of the
 * new place, and when that has been read, that the old one is unmapped. Meanwhile another thread may move other memory
 * there, and be heard first. docs/adr/0016.
 */
#include "_shadow.h"
#include "_tables.h"

/* --- messages that are due ---------------------------------------------------------------------------------------- */

static bool overlaps(const struct due *d, uint32_t space, uint64_t start, uint64_t end)
{
    return d->space == space && d->start < end && start < d->end;
}

static bool has_regions(const struct ledger *l, uint32_t space, uint64_t start, uint64_t end)
{
    uint32_t i = region_above(l, space, start);

    return i < l->spaces[space].regions && ledger_regions(l, space)[i].start < end;
}

/* False: there is no room. */
static bool note_due(struct ledger *l, struct due due)
{
    if (l->head->due_count == LEDGER_DUE)
        return false;
    l->head->due[l->head->due_count++] = due;
    return true;
}

/* Is a message of `at` late? *until is the address up to which the answer holds. */
static bool is_late(const struct ledger *l, uint32_t space, uint64_t at, uint64_t end, uint64_t *until)
{
    *until = end;
    for (uint32_t i = 0; i < l->head->due_count; i++) {
        const struct due *d = &l->head->due[i];

        if (!d->late || !overlaps(d, space, at, *until))
            continue;
        if (d->start <= at) {
            *until = d->end < end ? d->end : end;
            return true;
        }
        *until = d->start;
    }
    return false;
}

static void forget_where(struct ledger *l, bool (*over)(const struct ledger *, const struct due *, uint32_t),
                         uint32_t space)
{
    struct ledger_head *head = l->head;

    for (uint32_t i = 0; i < head->due_count;)
        if (over(l, &head->due[i], space))
            head->due[i] = head->due[--head->due_count];
        else
            i++;
}

static bool is_over(const struct ledger *l, const struct due *d, uint32_t space)
{
    (void)space;
    return d->late ? !has_regions(l, d->space, LIMBO + d->start, LIMBO + d->end) : d->over;
}

static bool is_of(const struct ledger *l, const struct due *d, uint32_t space)
{
    (void)l;
    return d->space == space;
}

void ledger_message_over(struct ledger *l)
{
    forget_where(l, is_over, 0);
}

void forget_due(struct ledger *l, uint32_t space)
{
    forget_where(l, is_of, space);
}

void ledger_quiet(struct ledger *l, uint32_t space)
{
    if (!l->head->due_count)
        return;
    if (has_regions(l, space, LIMBO, UINT64_MAX)) {
        shadow_begin(l, space, SHADOW_RETIRE);
        /* Cutting whole regions splits none, so it cannot fail. */
        (void)ledger_unmap(l, space, LIMBO, UINT64_MAX & ~(PAGE_SIZE - 1));
        shadow_end_retire(l);
    }
    forget_due(l, space);
}

/* --- moving ------------------------------------------------------------------------------------------------------- */

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

/* To where nothing is. With `leaves` shared regions are not at the old place any more, as private ones never are. */
static int carry(struct ledger *l, uint32_t space, uint64_t from, uint64_t end, uint64_t shift, bool leaves)
{
    struct region moved;
    int error = 0;

    while (!error && shifted(l, space, from, end, shift, &moved)) {
        uint64_t old = moved.start - shift;

        from = moved.end - shift;
        error = insert_region(l, space, moved);
        if (!error && (leaves || instance_is_private(&l->instances[moved.instance])))
            error = cut_region(l, space, region_above(l, space, old), old, from);
    }
    return error;
}

/* Other memory comes to [start, end). What is there by the tables is so no more, and the message that says where it is now
 * is late, or says that it is unmapped, which it has been all the time. */
static int make_way(struct ledger *l, uint32_t space, uint64_t start, uint64_t end)
{
    int error = 0;

    for (uint32_t i = 0; i < l->head->due_count && !error; i++) {
        struct due *d = &l->head->due[i];

        if (d->late || d->reused || !overlaps(d, space, start, end))
            continue;
        error = ledger_unmap(l, space, d->start, d->end);
        d->reused = 1;
    }
    if (error || !has_regions(l, space, start, end))
        return error;
    if (!note_due(l, (struct due){.start = start, .end = end, .space = space, .late = 1}))
        return ledger_unmap(l, space, start, end);
    error = ledger_unmap(l, space, LIMBO + start, LIMBO + end);
    return error ? error : carry(l, space, start, end, LIMBO, true);
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

/* The old place of a private region is left at once. A shared one keeps it: with MREMAP_DONTUNMAP the old mapping goes on
 * showing the object, and otherwise an UNMAP message follows. */
int ledger_remap(struct ledger *l, uint32_t space, uint64_t from, uint64_t to, uint64_t length)
{
    uint64_t end = from + (length ? length : doubled_length(l, space, from, to)), until;
    bool late = is_late(l, space, from, end, &until) || until < end;
    int error = make_way(l, space, to, to + (end - from));

    for (uint64_t at = from; at < end && !error; at = until) {
        uint64_t place = is_late(l, space, at, end, &until) ? LIMBO : 0;

        error = carry(l, space, place + at, place + until, to - from - place, late);
    }
    if (length)
        (void)note_due(l, (struct due){.start = from, .end = end, .space = space, .reused = late});
    return error;
}

int ledger_unmapped(struct ledger *l, uint32_t space, uint64_t start, uint64_t end)
{
    int error = 0;

    for (uint32_t i = 0; i < l->head->due_count; i++) {
        struct due *d = &l->head->due[i];

        if (d->late || d->space != space || d->start != start || d->end != end)
            continue;
        d->over = 1;
        if (d->reused)
            return 0;
        break;
    }
    for (uint64_t at = start, until; at < end && !error; at = until) {
        uint64_t place = is_late(l, space, at, end, &until) ? LIMBO : 0;

        error = ledger_unmap(l, space, place + at, place + until);
    }
    return error;
}
