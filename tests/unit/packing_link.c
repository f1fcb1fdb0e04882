/* A link and a processor that compresses, in a computer's head.
 * packing_link RATE_BYTES_S SIZE_PERCENT PACK_BYTES_S SECONDS NEW_RATE_BYTES_S(0: the same) SLOW: a page that comes packed
 * takes SIZE_PERCENT of its bytes; half-way the link is another one. SLOW 1: faults have said that it is slow. Prints for each half the share of the pages that were asked for packed,
 * and the bytes a page is said to take at its end. */
#include "../../lazyproc/uffd/_packing.h"

#include <stdio.h>
#include <stdlib.h>

enum { PAGES = 64, BYTES = PAGES * 4096 };

int main(int argc, char **argv)
{
    double v[7] = {0}, now = 1e9, end;
    struct packing packing;

    for (int i = 1; i < 7; i++)
        v[i] = i < argc ? atof(argv[i]) : 0;
    packing_init(&packing, true);
    for (int half = 0; half < 2; half++) {
        double rate = half && v[5] ? v[5] : v[1], all = 0, packed = 0;

        for (end = now + v[4] / 2 * 1e9; now < end; all++) {
            packing_guess(&packing, v[6] != 0);
            bool asked = packing.packed;
            double bytes = asked ? BYTES * v[2] / 100 : BYTES, wire = bytes / rate, work = asked ? BYTES / v[3] : 0;

            now += (wire > work ? wire : work) * 1e9;
            packed += asked;
            packing_note(&packing, (uint64_t)now, asked, PAGES, (uint64_t)bytes);
        }
        printf("%.4f %u\n", packed / all, packing.wire_bytes);
    }
    return 0;
}
