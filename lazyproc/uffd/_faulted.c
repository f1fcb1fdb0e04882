/* Tells whoever plans ahead which pages were waited for. The fault thread leaves them here and waits for nobody. */
#define _GNU_SOURCE
#include "_engine.h"

#include <errno.h>

void note_faulted(struct pager *p, uint64_t object, uint64_t addr)
{
    p->faulted.pages[p->faulted.count++ % FAULTED] = (struct pager_page){object, addr};
}

/* Without a waiter this is no system call. */
void tell_faulted(struct pager *p)
{
    if (p->faulted.told == p->faulted.count)
        return;
    p->faulted.told = p->faulted.count;
    pthread_cond_signal(&p->faulted.more);
}

static bool is_over(const struct pager *p)
{
    return p->status == PAGER_DONE || p->status == PAGER_FAILED || p->status == PAGER_STOPPED;
}

int pager_faulted(struct pager *p, uint64_t *next, struct pager_page *pages, size_t most, int timeout_ms)
{
    const struct timespec until = moment_after(timeout_ms);
    uint64_t from, count;
    int error = 0;
    bool over;

    pthread_mutex_lock(&p->lock);
    while (p->faulted.count == *next && !is_over(p) && !error)
        error = pthread_cond_timedwait(&p->faulted.more, &p->lock, &until);
    over = is_over(p);
    count = min_u64(p->faulted.count - *next, min_u64(most, FAULTED));
    from = p->faulted.count - count;
    for (uint64_t i = 0; i < count; i++)
        pages[i] = p->faulted.pages[(from + i) % FAULTED];
    *next = p->faulted.count;
    pthread_mutex_unlock(&p->lock);
    return over ? -ESHUTDOWN : (int)count;
}
