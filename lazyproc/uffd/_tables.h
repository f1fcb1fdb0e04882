/* The ledger's tables from inside: for what changes them (_ledger.c, _events.c, _remap.c). */
#ifndef LAZYPROC_UFFD_TABLES_H
#define LAZYPROC_UFFD_TABLES_H

#include "_ledger.h"

/* Index of the first region of the space that ends above va. */
uint32_t region_above(const struct ledger *l, uint32_t space, uint64_t va);
int insert_region(struct ledger *l, uint32_t space, struct region region);
void erase_region(struct ledger *l, uint32_t space, uint32_t i);
int cut_region(struct ledger *l, uint32_t space, uint32_t i, uint64_t start, uint64_t end);
void forget_due(struct ledger *l, uint32_t space); /* whatever message of the space is due */

int new_instance(struct ledger *l, struct instance instance);
int64_t allot_states(struct ledger *l, uint64_t bytes, uint64_t align); /* where, or -ENOSPC */

#endif
