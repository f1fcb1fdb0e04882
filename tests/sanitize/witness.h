/* A thread that looks at a pager while it works: the trace, the counters, and which pages may be acknowledged. */
#ifndef WITNESS_H
#define WITNESS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "_pager.h"
#include "page_source.h"

#define WITNESS_PAGES 8192u /* that both ranges together may have */

struct witness {
    struct pager *pager;
    const struct range *ranges; /* two */
    atomic_bool ends;
    atomic_uint links; /* that have begun: each page is acknowledged once for each, at most */
    uint64_t next, seen, lost; /* of the trace */
    unsigned given[WITNESS_PAGES];
    pthread_t thread;
};

void start_witness(struct witness *w, struct pager *p, const struct range ranges[2]);
void begin_link(struct witness *w); /* what was acknowledged is so once more */
/* Until the pager is done; links come and go meanwhile. */
void await_done(struct witness *w);
void end_witness(struct witness *w);
/* The pager has stopped. Whole: it has traced all faults of its ledger. */
void check_witness(struct witness *w, bool whole);

#endif
