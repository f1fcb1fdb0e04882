/* The children that a tree forks while its pages are missing: what keeps their userfaultfds when all who page are killed,
 * and how who comes then takes them back. _cradle.h is where they lie. */
#ifndef LAZYPROC_UFFD_CHILDREN_H
#define LAZYPROC_UFFD_CHILDREN_H

#include "_ledger.h"

uint32_t child_of(const struct uffd_msg *fork);

/* Of the first `count` messages that were read: before anything is made of them, since a child runs when its fork has been
 * read. */
void children_keep(struct ledger *l, uint32_t count);

/* In a new descriptor table. Those that were lost are retired: nobody holds their memory back any more. */
int children_take_back(struct ledger *l, int cradle);

#endif
