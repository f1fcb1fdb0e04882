/* What the tables say of memory whose moves are heard in another order than they were made, by _remap.c. */
#include "_shadow.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OWN (1 << 8 | 1ull) /* object keys: kind 1 is a task's memory */
#define SHARED (7 << 8 | 2ull)
#define PAGES 4u
#define LENGTH (PAGES * PAGE_SIZE)
#define HERE 0x10000000ull
#define OTHER 0x20000000ull
#define THIRD 0x30000000ull
#define THERE 0x40000000ull

static const char *now = "";

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s: %s\n", now, what);
    exit(1);
}

/* Three areas; with `shared` the first is of an object from 0 on, else each shows the addresses that it has. */
static void make(struct ledger *l, bool shared)
{
    check(ledger_open(l, -1) == 0 && ledger_add_space(l, 100, 10, 10) == 0, "ledger");
    check(ledger_add_region(l, 0, HERE, LENGTH, shared ? SHARED : OWN, shared ? 0 : HERE) == 0, "here");
    check(ledger_add_region(l, 0, OTHER, LENGTH, OWN, OTHER) == 0, "other");
    check(ledger_add_region(l, 0, THIRD, LENGTH, OWN, THIRD) == 0, "third");
}

static void heard(struct ledger *l, int error)
{
    check(error == 0, "an error");
    ledger_message_over(l);
}

static void moved(struct ledger *l, uint64_t from, uint64_t to, uint64_t length)
{
    heard(l, ledger_remap(l, 0, from, to, length));
}

static void unmapped(struct ledger *l, uint64_t at, uint64_t length)
{
    heard(l, ledger_unmapped(l, 0, at, at + length));
}

static void shows(const struct ledger *l, uint64_t at, uint64_t addr, unsigned pages)
{
    for (uint64_t off = 0; off < pages * PAGE_SIZE; off += PAGE_SIZE) {
        const struct region *r = ledger_region_at(l, 0, at + off);

        check(r && r->addr + (at + off - r->start) == addr + off, "a page is not where it should be");
    }
}

/* So many pages are mapped, those in limbo too, and nothing is due any more. */
static void is_all(struct ledger *l, uint64_t pages)
{
    const struct region *regions = ledger_regions(l, 0);

    for (uint32_t i = 0; i < l->spaces[0].regions; i++)
        pages -= (regions[i].end - regions[i].start) / PAGE_SIZE;
    check(pages == 0, "something is mapped that is not, or the other way round");
    check(l->head->due_count == 0, "a message is waited for");
    ledger_close(l);
}

static void in_the_other_order(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, OTHER, HERE, LENGTH);
    moved(&l, HERE, THERE, LENGTH);
    shows(&l, THERE, shared ? 0 : HERE, PAGES);
    unmapped(&l, OTHER, LENGTH);
    unmapped(&l, HERE, LENGTH);
    shows(&l, HERE, OTHER, PAGES);
    is_all(&l, 3 * PAGES);
}

static void into_its_middle(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, OTHER, HERE + PAGE_SIZE, 2 * PAGE_SIZE);
    moved(&l, HERE, THERE, LENGTH);
    shows(&l, THERE, shared ? 0 : HERE, PAGES);
    unmapped(&l, OTHER, 2 * PAGE_SIZE);
    unmapped(&l, HERE, LENGTH);
    shows(&l, HERE + PAGE_SIZE, OTHER, 2);
    is_all(&l, 3 * PAGES);
}

/* The end of it is told when other memory has come. */
static void before_its_end(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, HERE, THERE, LENGTH);
    moved(&l, OTHER, HERE, LENGTH);
    unmapped(&l, HERE, LENGTH);
    unmapped(&l, OTHER, LENGTH);
    shows(&l, HERE, OTHER, PAGES);
    shows(&l, THERE, shared ? 0 : HERE, PAGES);
    is_all(&l, 3 * PAGES);
}

static void to_what_is_unmapped(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, OTHER, HERE, LENGTH);
    unmapped(&l, HERE, LENGTH);
    unmapped(&l, OTHER, LENGTH);
    shows(&l, HERE, OTHER, PAGES);
    is_all(&l, 2 * PAGES);
}

/* Two have come to one place, and of what had been there nothing is told: it has gone unseen. */
static void one_after_the_other(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, OTHER, HERE, LENGTH);
    moved(&l, THIRD, HERE, LENGTH);
    shows(&l, HERE, THIRD, PAGES);
    check(l.spaces[0].regions == 2, "two are in limbo at the same address");
    ledger_quiet(&l, 0);
    is_all(&l, PAGES);
}

static void doubled(bool shared)
{
    struct ledger l;

    make(&l, shared);
    moved(&l, HERE, OTHER + PAGE_SIZE, 0); /* where there is something, to say nothing of its length */
    shows(&l, OTHER, OTHER, PAGES);
    if (shared) {
        moved(&l, HERE, OTHER - 2 * PAGE_SIZE, 0);
        shows(&l, OTHER - 2 * PAGE_SIZE, 0, 2);
        shows(&l, OTHER, OTHER, PAGES);
    }
    is_all(&l, 3 * PAGES + 2 * shared);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(bool shared);
    } cases[] = {
        {"in the other order", in_the_other_order},
        {"into its middle", into_its_middle},
        {"before its end", before_its_end},
        {"to what is unmapped", to_what_is_unmapped},
        {"one after the other", one_after_the_other},
        {"doubled", doubled},
    };

    for (unsigned i = 0; i < 2 * sizeof(cases) / sizeof(*cases); i++) {
        now = cases[i / 2].name;
        cases[i / 2].run(i % 2);
    }
    return 0;
}
