/* Lets processes go: their memory becomes the kernel's own again. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "_engine.h"

#define PATIENCE_NS 5000000000ull /* a process may be stopped between two steps of a system call */
#define PAUSE_NS 50000
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1; the C library's headers may be older */
#endif

int pager_spaces(struct pager *p, int *uffds, size_t count)
{
    size_t n = 0;

    pthread_mutex_lock(&p->lock);
    for (uint32_t s = 0; s < p->ledger.head->spaces; s++) {
        if (!p->ledger.spaces[s].live)
            continue;
        if (n < count)
            uffds[n] = p->ledger.spaces[s].uffd;
        n++;
    }
    pthread_mutex_unlock(&p->lock);
    return (int)n;
}

/* -ENOMEM: taking part of a mapping out would exceed vm.max_map_count; the ioctl calls it the same when the process is
 * gone. Any other refusal means that nothing is mapped there any more, and the message about that is on its way. */
static int unregister_all(struct pager *p, uint32_t space)
{
    const struct region *regions = ledger_regions(&p->ledger, space);

    for (uint32_t i = 0; i < p->ledger.spaces[space].regions; i++) {
        struct uffdio_range range = {regions[i].start, regions[i].end - regions[i].start};

        if (ioctl(p->ledger.spaces[space].uffd, UFFDIO_UNREGISTER, &range) < 0 && errno == ENOMEM)
            return probe_space(p, space) == -ESRCH ? 0 : -ENOMEM;
    }
    return 0;
}

/* What moves or forks right now takes the registration along, and its message is unread. 1: nothing does. */
static int try_release(struct pager *p)
{
    uint64_t changes = p->changes;
    int quiet = 1, error = 0;

    for (uint32_t s = 0; s < p->ledger.head->spaces && !error; s++)
        if (p->ledger.spaces[s].live)
            error = unregister_all(p, s);
    drain_all(p);
    for (uint32_t s = 0; s < p->ledger.head->spaces; s++)
        if (p->ledger.spaces[s].live && probe_space(p, s) == -EAGAIN)
            quiet = 0;
    return error ? error : quiet && changes == p->changes;
}

int pager_release(struct pager *p)
{
    const struct timespec pause = {.tv_nsec = PAUSE_NS};
    uint64_t until = now_ns() + PATIENCE_NS;
    int result;

    for (;;) {
        pthread_mutex_lock(&p->lock);
        result = p->status == PAGER_DONE ? try_release(p) : -EBUSY;
        pthread_mutex_unlock(&p->lock);
        if (result)
            return result < 0 ? result : 0;
        if (now_ns() > until)
            return -ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
}

int pager_finish(struct pager *p)
{
    int error = pager_release(p);

    if (!error)
        pager_abandon(p);
    return error;
}

void pager_abandon(struct pager *p)
{
    struct ledger_head *head = p->ledger.head;

    pager_stop(p);
    for (uint32_t s = 0; s < head->spaces; s++) {
        if (p->ledger.spaces[s].live)
            close(p->ledger.spaces[s].uffd);
        p->ledger.spaces[s].live = 0;
    }
    if (head->cradle >= 0)
        close(head->cradle);
    head->cradle = -1;
    removals_unmap(&p->removals);
    while (head->removal_count)
        close(head->removal_fds[--head->removal_count]);
}

int pager_collapse(int pidfd, uint64_t start, uint64_t length)
{
    struct iovec range = {(void *)start, length};

    return syscall(SYS_process_madvise, pidfd, &range, 1, MADV_COLLAPSE, 0) < 0 ? -errno : 0;
}
