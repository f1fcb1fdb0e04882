/* How far pages have come, and what they are counted as. */
#include <errno.h>

#include "_ledger.h"

/* --- counting ----------------------------------------------------------------------------------------------------- */

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
        for (uint32_t s = 0; s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;
            uint8_t *bytes = l->states + span->states;

            for (uint64_t k = 0; k < span->pages; k++)
                if (page_waits(bytes[k]))
                    bytes[k] &= (uint8_t)~STATE_MASK;
        }
}

/* --- the map ------------------------------------------------------------------------------------------------------ */

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
        for (uint32_t s = 0; s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            if (!l->head->map_known && l->instances[i].primary == i)
                ledger_map_run(l, i, span->addr, span->pages);
        }
    ledger_forget_asked(l);
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; s < l->instances[i].spans; s++) {
            const struct span *span = ledger_spans(l, i) + s;

            /* Nothing is absent any more, so it cannot fail. */
            (void)ledger_map_close(l, i, span->addr, span->pages);
        }
    l->head->map_known = 1;
}

bool ledger_shares_poison(const struct ledger *l)
{
    for (uint32_t i = 0; i < l->head->instances; i++)
        for (uint32_t s = 0; s < l->instances[i].spans; s++) {
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
