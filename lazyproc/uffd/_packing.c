#include "_packing.h"

#define PAGE 4096u
#define LEAST_BYTES 256u
#define SETTLE_NS 500000000ull /* a link is slow at first */
#define TRIAL_NS 150000000ull
#define TRIAL_PAGES 128u
#define HOLD_NS 10000000000ull
#define PLENTY 49152u /* pages a second, about 200 MB: one processor does not compress much more than that */

void packing_init(struct packing *packing, bool able)
{
    *packing = (struct packing){.able = able, .wire_bytes = PAGE};
}

void packing_guess(struct packing *packing, bool slow)
{
    if (packing->until_ns == 0)
        packing->packed = packing->able && slow;
}

static void hold(struct packing *p, bool packed, uint64_t until)
{
    p->stage = PACKING_HOLDS;
    p->packed = packed;
    p->until_ns = until;
}

static void try(struct packing *p, enum packing_stage stage)
{
    p->stage = stage;
    p->packed = stage == PACKING_TRIES_PACKED;
    p->since_ns = p->pages = 0;
}

/* A trial is over. */
static void judge(struct packing *p, uint64_t now, uint64_t rate)
{
    if (p->stage == PACKING_TRIES_PACKED) {
        hold(p, rate * 10 > p->plain_rate * 11, now + HOLD_NS);
    } else if (rate >= PLENTY) {
        hold(p, false, now + SETTLE_NS);
    } else {
        p->plain_rate = rate;
        try(p, PACKING_TRIES_PACKED);
    }
}

static void note_bytes(struct packing *p, uint32_t pages, uint64_t bytes)
{
    uint64_t each = pages ? bytes / pages : PAGE;

    each = each < LEAST_BYTES ? LEAST_BYTES : each > PAGE ? PAGE : each;
    p->wire_bytes = (uint32_t)((7ull * p->wire_bytes + each) / 8);
}

void packing_note(struct packing *p, uint64_t now, bool packed, uint32_t pages, uint64_t bytes)
{
    note_bytes(p, pages, packed ? bytes : (uint64_t)pages * PAGE);
    if (!p->able || packed != p->packed) /* asked for before the way was changed */
        return;
    if (p->stage == PACKING_HOLDS) {
        if (p->until_ns == 0)
            p->until_ns = now + SETTLE_NS;
        else if (now >= p->until_ns)
            try(p, PACKING_TRIES_PLAIN);
        return;
    }
    if (p->since_ns == 0) {
        p->since_ns = now;
        return;
    }
    p->pages += pages;
    if (now - p->since_ns >= TRIAL_NS && p->pages >= TRIAL_PAGES)
        judge(p, now, p->pages * 1000000000ull / (now - p->since_ns));
}
