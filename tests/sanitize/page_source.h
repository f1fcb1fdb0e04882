/* A page server of two threads, for drivers of the pager. Word i of a range is (i + 1) * 0x9e3779b97f4a7c15. */
#ifndef PAGE_SOURCE_H
#define PAGE_SOURCE_H

#include <pthread.h>
#include <stdint.h>

#include "_pager.h"

/* Of an object's addresses, in bytes. */
struct range {
    uint64_t addr, length;
};

struct channel {
    const struct range *ranges; /* two */
    int fd;
    int answers; /* before it hangs up or talks garbage; < 0: for ever */
    int garbage;
    pthread_t thread;
};

int fill_page(const struct range ranges[2], uint64_t addr, uint64_t *page); /* 0: no range has it */

/* `answers` and `garbage` are of the bulk channel. */
void connect_source(struct pager *p, struct channel channels[2], const struct range ranges[2], int answers,
                    int garbage);
void close_source(struct channel channels[2]); /* when the pager has hung up */

#endif
