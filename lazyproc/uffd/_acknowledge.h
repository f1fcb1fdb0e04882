/* Which pages of a ledger the source need not keep any longer: those of the map that no process waits for.
 *
 * A bit of each state byte says that a page has been given out. No locking in here. The caller serialises.
 */
#ifndef LAZYPROC_UFFD_ACKNOWLEDGE_H
#define LAZYPROC_UFFD_ACKNOWLEDGE_H

#include "_ledger.h"

/* A page of a span of an instance. */
struct ledger_place {
    uint32_t instance;
    uint32_t span;
    uint64_t page;
};

/* Pages of the map that no instance waits for and that have not been given out: at most `count` runs of primaries, from
 * *at on, over at most *budget pages; *at and *budget move along. Returns the number of runs. */
size_t ledger_acknowledge(struct ledger *l, struct ledger_place *at, uint64_t *budget, struct pager_run *runs,
                          size_t count);
void ledger_forget_acked(struct ledger *l); /* all of them are to be given out again */

#endif
