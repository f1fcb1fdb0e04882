/* A copy of what an event is about to change, in the ledger itself: a pager that is killed in the middle of it leaves
 * tables that the next one puts back as they were, and then it applies the event once more.
 *
 * An event is over with one store: its message is cleared, or SHADOW_RETIRE is. Stores of a killed process are seen in
 * program order, so compiler barriers are enough. State bytes are not copied: settling a page twice is settling it
 * once, and the sums are counted anew. */
#ifndef LAZYPROC_UFFD_SHADOW_H
#define LAZYPROC_UFFD_SHADOW_H

#include "_ledger.h"

#define SHADOW_RETIRE UINT32_MAX

struct shadow {
    uint32_t active; /* 0: nothing; the index of a message and 1; or SHADOW_RETIRE */
    uint32_t space;  /* whose regions these are */
    uint32_t space_count;
    uint32_t instance_count;
    struct space spaces[LEDGER_SPACES];
    struct instance instances[LEDGER_INSTANCES];
    struct region regions[LEDGER_REGIONS];
};

/* Before the message of index `active` - 1 is applied to a space, or the space is retired. */
void shadow_begin(struct ledger *l, uint32_t space, uint32_t active);
void shadow_end_retire(struct ledger *l);

/* Of a ledger whose pager was killed: before anything else is done with it. */
void shadow_recover(struct ledger *l);

#endif
