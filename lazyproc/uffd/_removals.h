/* Every call of madvise(MADV_REMOVE) on this machine, known before its UFFD_EVENT_REMOVE can be read.
 *
 * The event is the same for MADV_DONTNEED, after which a shared object still has its content, and names no thread. The
 * tracepoint at the entry of madvise(2) is passed before the event is queued, and the thread goes on only when the
 * event has been read: whoever reads the records right after the event has missed none. docs/adr/0013. A call that fails
 * is recorded once more: it may never have had an event.
 */
#ifndef LAZYPROC_UFFD_REMOVALS_H
#define LAZYPROC_UFFD_REMOVALS_H

#include <stdbool.h>
#include <stdint.h>

struct removal {
    uint64_t start; /* as called: [start, end) of the caller's addresses */
    uint64_t end;
    uint32_t pid; /* in the pid namespace of who opened the records */
    uint32_t tid;
    bool failed; /* the thread's last call, whatever it was; it has no range */
};

struct removals_ring {
    struct perf_event_mmap_page *page;
    uint64_t at; /* read up to here */
};

/* The records, one ring a processor. */
struct removals {
    struct removals_ring *rings;
    uint32_t count;
};

/* Two descriptors for each processor that is online, at most `most`: their number or -errno. Any process that has them
 * may read; what nobody has read stays while somebody maps it. */
int removals_open(int32_t *fds, uint32_t most);

int removals_map(struct removals *r, const int32_t *fds, uint32_t count);
void removals_unmap(struct removals *r);

bool removals_next(struct removals *r, struct removal *removal);
void removals_done(struct removals *r); /* those handed out are not handed out again, to nobody */

#endif
