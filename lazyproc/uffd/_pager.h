/* The destination side of post-copy: two threads that put pages where they are missing and never take the GIL.
 *
 * The fault thread answers userfaultfd messages, on demand, over the urgent connection. The bulk thread walks a plan
 * over the other one and gives way. No policy in here: Python gives tables, a plan and limits, and reads counters.
 * Functions return 0 or a count, or a negative errno; all but new and free may be called from any thread.
 */
#ifndef LAZYPROC_UFFD_PAGER_H
#define LAZYPROC_UFFD_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct pager;

enum pager_status {
    PAGER_IDLE, /* not started */
    PAGER_RUNNING,
    PAGER_DONE,   /* the map is known and no page waits for its content */
    PAGER_LOST,   /* the source is gone or talks garbage: missing pages stay missing, who touches them waits */
    PAGER_FAILED, /* the kernel refused something: as LOST, and for good */
    PAGER_STOPPED,
};

struct pager_segment {
    uint64_t object;
    uint64_t start; /* addresses within the object */
    uint64_t end;
    uint64_t fd; /* so wide that Python has rows of one kind of number */
    uint64_t offset; /* of `start` in the file */
};

struct pager_region { /* `length` bytes from `start` of a process show `object` from `addr` on */
    uint64_t start, length;
    uint64_t object, addr;
};

struct pager_run {
    uint64_t object;
    uint64_t addr;
    uint64_t count; /* pages */
};

struct pager_counters {
    uint64_t total, zero, eager, urgent, bulk, dropped, poisoned; /* pages of the map; at the end total is the sum */
    uint64_t remaining;                                           /* pages of all processes, forked ones included */
    uint64_t outcomes[3][4];                            /* zero, urgent, bulk x installed, present, deferred, gone */
    uint64_t bytes_in, bytes_out, packed, reconnects; /* packed: pages that came compressed */
    uint64_t faults, fault_max_ns;
    uint64_t fault_ns[1024]; /* log-linear, 16 buckets to the octave, 0 to 15 ns one each */
};

struct pager_page {
    uint64_t object;
    uint64_t addr;
};

/* As it lies in a trace file (docs/trace.md). Times are CLOCK_MONOTONIC, 0: it did not happen. */
struct pager_fault {
    uint64_t event_ns, queued_ns, sent_ns, installed_ns;
    uint64_t va, object, addr;
    uint32_t vpid, tid, outcome, page_class;
};

/* ledger_fd < 0: a new ledger; else goes on with that one, whose pager must have ended. */
int pager_new(int ledger_fd, bool trace, struct pager **result);
/* The userfaultfds of a ledger whose pagers are all gone, by the order in which they were added; those of children that
 * were forked since lie in the cradle. Before pager_new. */
int pager_rebind(int ledger_fd, int cradle, const int *uffds, size_t count);
int64_t pager_remaining(int ledger_fd); /* pages that still wait; the descriptor may be for reading only */
void pager_free(struct pager *p); /* stops; closes no userfaultfd */
int pager_ledger_fd(const struct pager *p);
int pager_cradle(const struct pager *p); /* for each process to hold, before it runs: _cradle.h */

/* Owns uffd until pager_spaces after a stop hands it back. vpid 0: not known, as of a forked child; its first fault's
 * tid is taken for it. pid is ours of the same process, 0: not known. */
int pager_add_space(struct pager *p, int uffd, uint32_t vpid, uint32_t pid);
int pager_add_region(struct pager *p, int space, uint64_t start, uint64_t length, uint64_t object, uint64_t addr);
/* Several; those before one that is refused have been added. */
int pager_add_regions(struct pager *p, int space, const struct pager_region *regions, size_t count);
/* UFFDIO_REGISTER of them, for missing pages. */
int pager_register(int uffd, const struct pager_region *regions, size_t count);
int pager_add_eager(struct pager *p, uint64_t pages);
int pager_mark_installed(struct pager *p, uint64_t object, uint64_t addr, uint64_t pages);

/* From now on MADV_REMOVE of shared memory is told from MADV_DONTNEED. Before the processes run; by every later pager of
 * the ledger as well. */
int pager_watch_removals(struct pager *p);
/* A thread is in MADV_REMOVE already, and nobody watched when it called. Before start. */
int pager_note_removal(struct pager *p, uint32_t pid, uint32_t tid, uint64_t start, uint64_t length);

int pager_set_segments(struct pager *p, const struct pager_segment *sorted, size_t count); /* before start */
/* Owns both sockets. `packs`: bulk may be asked for compressed, where that is faster (_packing.h). */
int pager_set_remote(struct pager *p, int urgent, int bulk, bool packs);
int pager_set_plan(struct pager *p, const struct pager_run *runs, size_t count);
/* These before the plan, in place of those that were to come before it until now. What is not missing, or in no region, is
 * passed over. */
int pager_set_ahead(struct pager *p, const struct pager_run *runs, size_t count);
/* The latest pages that were waited for, behind number *next, which moves to the last of them: at most `most`, and 1024,
 * in their order; older ones are left out. Waits for one; 0: none in time. -ESHUTDOWN: none will come, it is DONE, FAILED
 * or STOPPED. */
int pager_faulted(struct pager *p, uint64_t *next, struct pager_page *pages, size_t most, int timeout_ms);
/* Until the bulk thread has brought all that it knows of: before the map that is the plan. 0, -ETIMEDOUT, or -ESHUTDOWN
 * when the state is another than RUNNING. */
int pager_wait_plan(struct pager *p, int timeout_ms);
int pager_apply_map(struct pager *p, const struct pager_run *runs, size_t count);

/* The next runs of pages that the source may free: no process waits for them, and they were not returned since
 * pager_forget_acked, which a new link begins with. 0: none for now. */
int pager_acknowledge(struct pager *p, struct pager_run *runs, size_t count);
int pager_forget_acked(struct pager *p);
/* No connection is expected. A map that has not come will not: every page may have content. With `poison` what no
 * segment brings is lost: who touches it gets SIGBUS (Linux 6.6) instead of waiting. Before pager_start. */
void pager_alone(struct pager *p, bool poison);
/* DONE and some of it lies in shared memory: whoever maps that anew is served only as long as the threads go on. */
bool pager_shares_poison(struct pager *p);

bool pager_map_known(struct pager *p); /* to this pager or an earlier one of its ledger */
int pager_start(struct pager *p, bool bulk, uint64_t max_rate); /* bytes a second, 0: as fast as faults allow */
/* What was started without; -EBUSY: it was not, or is bulk already. `wakes`: the process has just been let run (_pace.h). */
int pager_start_bulk(struct pager *p, bool wakes);
int pager_wait(struct pager *p, int timeout_ms); /* enum pager_status, at once when it is not RUNNING; -ETIMEDOUT */
/* A descriptor of the pager's that is readable while it is DONE, LOST or FAILED. */
int pager_news(const struct pager *p);
int pager_status(struct pager *p, char *reason, size_t size);
void pager_counters(struct pager *p, struct pager_counters *counters);
/* Copies at most `count` records from number *next on and returns how many; *next moves behind them, and *lost grows by
 * those that were overwritten before. Takes no lock. One caller at a time. */
size_t pager_trace(const struct pager *p, uint64_t *next, uint64_t *lost, struct pager_fault *records, size_t count);
void pager_stop(struct pager *p);

int pager_spaces(struct pager *p, int *uffds, size_t count); /* userfaultfds of the processes that live */
/* DONE: registrations end, so later faults are the kernel's own. The threads go on for what the tables do not know
 * (memory that grew). -EBUSY: not DONE. -ETIMEDOUT: a process is stopped in the middle of a fork, mremap...
 * -ENOMEM: too many mappings. */
int pager_release(struct pager *p);
int pager_finish(struct pager *p);    /* the same, then pager_abandon */
void pager_abandon(struct pager *p); /* stops, closes the userfaultfds and what watches: what is missing reads as zeros */

int pager_collapse(int pidfd, uint64_t start, uint64_t length); /* process_madvise(MADV_COLLAPSE) */
bool pager_has_zstd(void);
uint32_t pager_crc32c(const void *pages, size_t count);         /* as the page protocol has it */

#endif
