/* Whether bulk is asked for compressed: only where the link is the limit, which is tried and not computed.
 *
 * Pages a second are counted without, then with compression, each for a moment, and the better way is kept for a while.
 * Until that is tried a link is taken for the limit over which the pages that somebody waits for take long.
 * Where pages come faster than one processor compresses them nothing is tried. Pages that do not shrink come as they are
 * in any case. Times are CLOCK_MONOTONIC in ns.
 */
#ifndef LAZYPROC_UFFD_PACKING_H
#define LAZYPROC_UFFD_PACKING_H

#include <stdbool.h>
#include <stdint.h>

enum packing_stage { PACKING_HOLDS, PACKING_TRIES_PLAIN, PACKING_TRIES_PACKED };

struct packing {
    bool able;   /* both ends of this link */
    bool packed; /* how pages are asked for now */
    enum packing_stage stage;
    uint64_t until_ns;           /* of a hold; 0: nothing has come yet */
    uint64_t since_ns, pages;    /* of a trial; 0: its first answer has not come yet */
    uint64_t plain_rate;         /* pages a second of the last trial without */
    uint32_t wire_bytes;         /* that a page has taken lately */
};

void packing_init(struct packing *packing, bool able);
/* As long as nothing has come: is the link a slow one? */
void packing_guess(struct packing *packing, bool slow);
/* An answer to a request that was made `packed` or not: so many pages, so many bytes on the wire. */
void packing_note(struct packing *packing, uint64_t now, bool packed, uint32_t pages, uint64_t bytes);

#endif
