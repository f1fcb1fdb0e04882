/* What the pager's files share. Everything but the links belongs to whoever holds the lock.
 *
 * The rule that makes copies safe: the fault thread takes the lock before it reads messages and keeps it until the
 * ledger reflects them. While a message is unread every copy into that process fails with EAGAIN (mmap_changing in
 * fs/userfaultfd.c), so whoever holds the lock either sees the tables as the kernel does or is told to try again.
 */
#ifndef LAZYPROC_UFFD_ENGINE_H
#define LAZYPROC_UFFD_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "_acknowledge.h"
#include "_ledger.h"
#include "_link.h"
#include "_pace.h"
#include "_packing.h"
#include "_pager.h"
#include "_removals.h"

#define NO_INSTANCE UINT32_MAX
#define FAULTED 1024u
#define PIECE_PAGES 16u /* copied by the bulk thread before it lets go of the lock: 64 KiB */

/* A thread that waits for a page. */
struct fault {
    uint64_t va;
    uint64_t event_ns;
    uint64_t queued_ns; /* asked for, 0: not yet, or by another fault */
    uint64_t sent_ns;
    uint64_t addr; /* in the object of `instance` */
    uint32_t instance;
    uint32_t space;
    uint32_t tid;
};

struct faults {
    struct fault *items;
    uint32_t count;
    uint32_t capacity;
};

/* Calls of MADV_REMOVE, the latest of each thread. */
struct calls {
    struct removal *items;
    uint32_t count;
    uint32_t capacity;
    uint32_t enough; /* with many more those of threads that have ended are looked for */
};

struct segment {
    uint64_t object;
    uint64_t start;
    uint64_t end;
    const uint8_t *data;
};

struct file_map {
    int fd;
    void *base;
    size_t size;
};

struct run {
    uint64_t addr;
    uint64_t pages;
    uint32_t primary;
};

/* A list of runs, and how far along it the bulk thread is. */
struct course {
    struct run *runs;
    size_t count;
    size_t run;
    uint64_t page;
};

/* Where the bulk thread is when both courses are behind it: over whatever is still missing. */
struct walk {
    uint64_t page;
    uint32_t instance;
    uint32_t span;
};

/* The latest pages that were waited for, for whoever plans ahead. */
struct faulted {
    pthread_cond_t more;
    struct pager_page pages[FAULTED];
    uint64_t count; /* ever */
    uint64_t told;  /* of them, when somebody was last woken */
};

struct pager {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    atomic_bool fault_thread_waits;
    atomic_bool stopping;
    enum pager_status status;
    char reason[200];
    bool traced;
    uint64_t changes; /* messages other than faults so far */
    bool retry;       /* a fault was deferred: serve it again soon */
    bool patient;     /* a fault waits for what is under way in bulk */
    uint64_t reaped_ns; /* when it was last looked whether a process has ended */
    pid_t owner;
    pthread_t fault_thread, bulk_thread;
    bool fault_runs, bulk_runs;
    int epoll;
    int fault_kick, bulk_kick; /* eventfds */
    int news;                  /* another: readable while the status is DONE, LOST or FAILED */

    struct ledger ledger;
    struct faults fresh;   /* read and not looked at */
    struct faults waiting; /* for their page */
    struct removals removals;
    struct calls calls;

    struct segment *segments; /* sorted by object and start */
    size_t segment_count;
    struct file_map *files;
    size_t file_count;

    bool online;
    bool has_remote;
    uint32_t generation; /* of the pair of connections */
    uint64_t reconnects;
    bool poisons; /* what neither a segment nor a connection brings */
    bool next_packs;            /* the source of the pair that is given can compress, perhaps */
    int next_urgent, next_bulk; /* given and not yet taken up by their thread, or -1 */
    struct link urgent;         /* the fault thread's */
    uint32_t urgent_generation;
    bool urgent_packs; /* its source can compress, perhaps */
    struct link bulk; /* the bulk thread's */
    uint32_t bulk_generation;
    uint64_t bulk_pages;   /* asked for on it and not taken */
    uint64_t bulk_read_ns; /* when it was last read */

    struct course ahead; /* before the plan, once the map is known */
    struct course plan;
    struct walk walk;
    bool bulk_idle; /* it has found nothing more that is known to be worth fetching */
    struct faulted faulted;
    struct ledger_place acked; /* where the next look for what is to be acknowledged begins */
    struct pager_run *held;    /* what that has found, until all requests are answered that had been made by then */
    size_t held_count;
    uint32_t held_urgent, held_bulk; /* how many */
    uint32_t gone_urgent, gone_bulk; /* so many went over links that are no more */
    uint64_t max_rate;
    uint64_t rate_free_ns; /* the next request may leave then */

    atomic_uint urgent_outstanding;
    struct pace pace;
    struct packing packing; /* the bulk thread's, like what follows */
    bool bulk_packs;        /* its source can compress, perhaps */
};

static inline uint64_t min_u64(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* x86 keeps stores in their order, and loads: so has the compiler to. */
static inline void keep_order(void)
{
    atomic_signal_fence(memory_order_seq_cst);
}

static inline void note_packed(struct pager *p, const struct answer *a)
{
    if (a->packed)
        __atomic_fetch_add(&p->ledger.head->packed, a->pages, __ATOMIC_RELAXED);
}

uint64_t now_ns(void);
struct timespec moment_after(int timeout_ms); /* CLOCK_MONOTONIC */
void kick(int eventfd);
void lost(struct pager *p, const char *reason, int error);   /* the source is; asked pages are missing again */
void lacking(struct pager *p); /* there is no source, and no segment has it: it waits, the others come */
void failed(struct pager *p, const char *what, int error);   /* the pager has */
void check_done(struct pager *p);
void begin_again(struct pager *p); /* the bulk thread, with all that is missing */

/* _faulted.c */
void note_faulted(struct pager *p, uint64_t object, uint64_t addr);
void tell_faulted(struct pager *p); /* when the faults themselves have been seen to */

/* _place.c */
int watch_space(struct pager *p, uint32_t space);
/* The pages go into every process that waits for them, without data as zeros or, CLASS_POISONED, as SIGBUS. 0, or -EAGAIN: call again; what was
 * placed already is skipped then. */
int place_pages(struct pager *p, uint32_t primary, uint64_t addr, uint64_t pages, const uint8_t *data,
                enum page_class as);
/* Under a fault that needs no content: CLASS_ZERO, or CLASS_POISONED where it is lost. */
int place_filler(struct pager *p, const struct fault *f, enum page_class as);
void wake(const struct pager *p, uint32_t space, uint64_t va, uint64_t pages);
void retire_space(struct pager *p, uint32_t space);
/* -EAGAIN: its mappings are changing. -ESRCH: it is gone. Anything else: it lives. */
int64_t probe_space(struct pager *p, uint32_t space);
bool reap_dead(struct pager *p); /* whether there were any */
int faults_push(struct faults *list, const struct fault *f);
void requeue(struct pager *p, int64_t space); /* waiting faults are looked at anew; space < 0: all */

/* _given.c: the local pages from addr on, at most *pages of them, or NULL and how many pages are not local. */
const uint8_t *local_pages(const struct pager *p, uint64_t object, uint64_t addr, uint64_t *pages);

/* _faults.c: reads and applies all messages there are. */
void drain_all(struct pager *p);
/* Those that lie in the ledger: on a takeover the rest of a dead pager's, before anything is copied. */
int apply_messages(struct pager *p, uint32_t count);

/* _remove.c: was the event MADV_REMOVE, and not MADV_DONTNEED? Of shared memory only; read the event before. */
bool was_remove(const struct pager *p, uint32_t space, uint64_t start, uint64_t end);
int collect_calls(struct pager *p); /* those made so far */
int note_call(struct pager *p, const struct removal *call);
void forget_ended(struct pager *p); /* calls of threads that are gone, when all events that were read are applied */
/* Other memory was moved to these addresses of a process: calls that are over must not count for it. */
void forget_calls(struct pager *p, uint32_t space, uint64_t start, uint64_t end);

void *fault_main(void *pager);
void *bulk_main(void *pager);

#endif
