/* A link in a computer's head: bulk as _bulk.c asks for it, and a fault now and then, in one queue at the far end.
 * pace_link RATE_BYTES_S DELAY_NS FAULT_EVERY_NS(0: none) SECONDS QUIET_SECONDS NEW_RATE_BYTES_S NEW_DELAY_NS WAKE_NS
 * Who sends at the far end falls asleep when he has nothing to do, and is awake again after up to WAKE_NS.
 * Faults begin after QUIET_SECONDS; half-way through the rest the link is another one. Prints for each half: the share of
 * the link that bulk used, the 99th percentile and the greatest delay of a fault in ns, and the greatest window. */
#include "../../lazyproc/uffd/_pace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PAGE = 4096, RING = 1 << 16, FAULTS = 1 << 20 };

struct asked {
    uint64_t at, bytes, arrives;
};

static struct asked ring[RING];
static uint64_t delays[FAULTS];

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* When what gets there at `at` is sent, after what came before it. */
static uint64_t sent(uint64_t at, uint64_t free_at, uint64_t wake)
{
    static uint64_t random = 1;

    if (at <= free_at)
        return free_at;
    random = random * 6364136223846793005 + 1442695040888963407;
    return at + (wake ? (random >> 33) % wake : 0);
}

int main(int argc, char **argv)
{
    uint64_t v[9] = {0}, now = 0, free_at = 0, in_flight = 0, came = 0, urgent = 0, next_fault, half, end, seen = 0, widest = 0, from;
    unsigned head = 0, tail = 0, faults = 0;
    double rate;
    struct pace pace;

    for (int i = 1; i < 9; i++)
        v[i] = i < argc ? strtoull(argv[i], NULL, 10) : 0;
    rate = (double)v[1];
    from = v[5] * 1000000000ull;
    next_fault = v[3] ? from : UINT64_MAX;
    end = v[4] * 1000000000ull + from;
    half = from + (end - from) / 2;
    pace_init(&pace);
    for (int part = 0; part < 2; part++, half = end) {
        while (now < half) {
            struct quota quota = pace_quota(&pace, now, false, PAGE);
            uint64_t window = quota.window, piece = quota.pages * (uint64_t)PAGE;

            if (now >= from && window > widest)
                widest = window;
            while (in_flight + (piece < window ? piece : window) <= window && tail - head < RING) {
                struct asked *a = &ring[tail++ % RING];
                uint64_t start = sent(now + v[2] / 2, free_at, v[8]);

                free_at = start + (uint64_t)((double)piece * 1e9 / rate);
                *a = (struct asked){now, piece, free_at + v[2] / 2};
                in_flight += piece;
            }
            if (ring[head % RING].arrives > next_fault) {
                uint64_t start;

                now = next_fault;
                next_fault += v[3];
                start = sent(now + v[2] / 2, free_at, v[8]);
                free_at = start + (uint64_t)(PAGE * 1e9 / rate);
                delays[faults++ % FAULTS] = free_at + v[2] / 2 - now;
                urgent += PAGE;
                pace_urgent(&pace, free_at + v[2] / 2, now, 1, true);
            } else {
                struct asked *a = &ring[head++ % RING];

                now = a->arrives;
                in_flight -= a->bytes;
                came += a->bytes;
                seen += now >= from ? a->bytes : 0;
                pace_bulk(&pace, now, a->at, came + urgent);
            }
        }
        qsort(delays, faults, sizeof(*delays), by_size);
        printf("%.3f %llu %llu %llu\n", (double)seen / (rate * (double)(end - from) / 2e9),
               (unsigned long long)(faults ? delays[faults - 1 - faults / 100] : 0),
               (unsigned long long)(faults ? delays[faults - 1] : 0), (unsigned long long)widest);
        seen = widest = faults = 0;
        rate = v[6] ? (double)v[6] : rate;
        v[2] = v[7] ? v[7] : v[2];
    }
    return 0;
}
