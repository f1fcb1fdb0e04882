#include "_acknowledge.h"

static bool is_settled(const struct ledger *l, uint32_t primary, uint64_t addr, uint8_t byte)
{
    if ((byte & (IN_MAP | ACKED)) != IN_MAP || page_waits(byte))
        return false;
    return l->instances[primary].kin == NO_KIN || !ledger_kin_waits(l, primary, addr);
}

/* The next run of one span, from *page on. */
static uint64_t settled_run(const struct ledger *l, uint32_t primary, const struct span *s, uint64_t *page,
                            uint64_t *budget)
{
    uint8_t *bytes = l->states + s->states;
    uint64_t n = 0;

    for (; *page < s->pages && *budget; (*page)++, (*budget)--)
        if (is_settled(l, primary, s->addr + *page * PAGE_SIZE, bytes[*page]))
            break;
    for (; *page + n < s->pages && *budget; n++, (*budget)--) {
        if (!is_settled(l, primary, s->addr + (*page + n) * PAGE_SIZE, bytes[*page + n]))
            break;
        bytes[*page + n] |= ACKED;
    }
    return n;
}

size_t ledger_acknowledge(struct ledger *l, struct ledger_place *at, uint64_t *budget, struct pager_run *runs,
                          size_t count)
{
    size_t found = 0;

    for (; at->instance < l->head->instances; at->instance++, at->span = 0) {
        const struct instance *i = &l->instances[at->instance];

        for (; i->primary == at->instance && at->span < i->spans; at->span++, at->page = 0) {
            const struct span *s = ledger_spans(l, at->instance) + at->span;

            while (at->page < s->pages) {
                uint64_t n, first;

                if (found == count || !*budget)
                    return found;
                n = settled_run(l, at->instance, s, &at->page, budget);
                first = at->page;
                at->page += n;
                if (n)
                    runs[found++] = (struct pager_run){i->object, s->addr + first * PAGE_SIZE, n};
            }
        }
    }
    return found;
}

void ledger_forget_acked(struct ledger *l)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            for (uint64_t k = 0; k < span->pages; k++)
                l->states[span->states + k] &= (uint8_t)~ACKED;
        }
}
