/* Bytes that are nearly right: for drivers that feed parsers. */
#ifndef MUTATE_H
#define MUTATE_H

#include <stdlib.h>
#include <string.h>

/* Flips bits, cuts a piece out, doubles one or puts noise in its place. `room` is how much `data` may grow to; returns
 * the new length. */
static inline size_t mutate(unsigned char *data, size_t length, size_t room, unsigned *seed)
{
    size_t at = (size_t)rand_r(seed) % (length + 1), n = (size_t)rand_r(seed) % 64;

    n = n < length - at ? n : length - at;
    switch (rand_r(seed) % 4) {
    case 0:
        for (unsigned i = (unsigned)rand_r(seed) % 4 + 1; i > 0; i--)
            data[(size_t)rand_r(seed) % length] ^= (unsigned char)(1u << (rand_r(seed) % 8));
        return length;
    case 1:
        memmove(data + at, data + at + n, length - at - n);
        return length - n;
    case 2:
        n = n < room - length ? n : room - length;
        memmove(data + at + n, data + at, length - at);
        return length + n;
    default:
        for (size_t i = 0; i < n; i++)
            data[at + i] = (unsigned char)(rand_r(seed) >> 8);
        return length;
    }
}

#endif
