#define _GNU_SOURCE
#include "_shadow.h"

#include <stdatomic.h>
#include <string.h>

static void barrier(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

void shadow_begin(struct ledger *l, uint32_t space, uint32_t active)
{
    struct shadow *s = l->shadow;

    s->active = 0;
    barrier();
    s->space = space;
    s->space_count = l->head->spaces;
    s->instance_count = l->head->instances;
    memcpy(s->spaces, l->spaces, s->space_count * sizeof(*s->spaces));
    memcpy(s->instances, l->instances, s->instance_count * sizeof(*s->instances));
    memcpy(s->regions, ledger_regions(l, space), l->spaces[space].regions * sizeof(*s->regions));
    barrier();
    s->active = active;
    barrier();
}

void shadow_end_retire(struct ledger *l)
{
    barrier();
    l->shadow->active = 0;
}

/* Was it killed within what the shadow is of? */
static bool interrupted(const struct ledger *l)
{
    uint32_t active = l->shadow->active;

    return active == SHADOW_RETIRE || (active && l->head->messages[active - 1].event);
}

static void put_back(struct ledger *l)
{
    const struct shadow *s = l->shadow;

    l->head->spaces = s->space_count;
    l->head->instances = s->instance_count;
    memcpy(l->spaces, s->spaces, s->space_count * sizeof(*s->spaces));
    memcpy(l->instances, s->instances, s->instance_count * sizeof(*s->instances));
    memcpy(ledger_regions(l, s->space), s->regions, l->spaces[s->space].regions * sizeof(*s->regions));
}

/* --- the sums ---------------------------------------------------------------------------------------------------- */

/* A page that was settled, and its pager killed before it could count it. */
static void count_late(struct ledger *l, uint32_t primary, uint64_t addr, uint8_t *byte)
{
    enum page_state state = page_state(*byte);
    bool counts = (*byte & IN_MAP) || !l->head->map_known;

    if (!counts || (*byte & CLASS_MASK) || ledger_kin_waits(l, primary, addr))
        return;
    if (state == PAGE_DROPPED || state == PAGE_INSTALLED)
        *byte |= (uint8_t)((state == PAGE_DROPPED ? CLASS_DROPPED : CLASS_BULK) << CLASS_SHIFT);
}

static void count_span(struct ledger *l, uint32_t instance, const struct span *span)
{
    struct ledger_head *head = l->head;
    bool primary = l->instances[instance].primary == instance;

    for (uint64_t k = 0; k < span->pages; k++) {
        uint8_t *byte = l->states + span->states + k;
        enum page_class class;

        head->remaining += page_waits(*byte);
        if (!primary)
            continue;
        count_late(l, instance, span->addr + k * PAGE_SIZE, byte);
        class = (*byte & CLASS_MASK) >> CLASS_SHIFT;
        if ((*byte & IN_MAP) && class != CLASS_EAGER) {
            head->total++;
            head->counted[class]++;
        }
    }
}

static void count_anew(struct ledger *l)
{
    struct ledger_head *head = l->head;

    head->remaining = 0;
    head->total = head->counted[CLASS_EAGER];
    for (int class = 0; class < CLASS_COUNT; class++)
        if (class != CLASS_EAGER)
            head->counted[class] = 0;
    for (uint32_t i = 0; i < head->instances; i++)
        for (uint32_t s = 0; s < l->instances[i].spans; s++)
            count_span(l, i, ledger_spans(l, i) + s);
}

void shadow_recover(struct ledger *l)
{
    if (interrupted(l))
        put_back(l);
    barrier();
    l->shadow->active = 0;
    count_anew(l);
}
