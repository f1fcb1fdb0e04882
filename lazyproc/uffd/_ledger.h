/* The pager's ledger: which process maps which page of which object where, and how far each page has come.
 *
 * Plain tables in one memfd, indexed and without pointers: another process that maps the memfd and shares the
 * descriptor table can go on where a killed pager stopped. Every table has its full address range from the start;
 * the file is sparse, so only what is used takes memory (one byte a page of lazy memory, and some KiB).
 *
 * No locking and no ioctl in here. The caller serialises.
 */
#ifndef LAZYPROC_UFFD_LEDGER_H
#define LAZYPROC_UFFD_LEDGER_H

#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "_pager.h"

#define PAGE_SHIFT 12
#define PAGE_SIZE (1ull << PAGE_SHIFT)

#define LEDGER_SPACES 8192u
#define LEDGER_INSTANCES 8192u
#define LEDGER_REGIONS 131072u /* a space; vm.max_map_count is 65530 unless somebody raised it */
#define LEDGER_SPANS 131072u   /* an instance */
#define LEDGER_STATES (1ull << 37)
#define LEDGER_MESSAGES 64u
#define LEDGER_TRACE 65536u
#define LEDGER_BUCKETS 1024u
#define LEDGER_REMOVALS 8192u /* descriptors, two a processor */
#define LEDGER_DUE 256u      /* messages that are due at the same time */
#define LIMBO (1ull << 62)    /* regions beyond wait for the message that tells where their memory is */
#define NO_KIN UINT32_MAX

/* How far a page has come. Those up to PAGE_ABSENT still wait for their content. */
enum page_state {
    PAGE_MISSING,
    PAGE_ASKED_BULK,
    PAGE_ASKED_URGENT,
    PAGE_ABSENT, /* the source does not have it; right only if the map agrees */
    PAGE_INSTALLED,
    PAGE_HOLE,    /* not in the map: zero, installed when touched */
    PAGE_DROPPED, /* discarded by its process, or nobody maps it any more */
    PAGE_POISONED, /* lost for good: who touches it gets SIGBUS */
};

/* What a page is counted as. */
enum page_class {
    CLASS_NONE,
    CLASS_ZERO,
    CLASS_URGENT,
    CLASS_BULK,
    CLASS_DROPPED,
    CLASS_EAGER,
    CLASS_POISONED,
    CLASS_COUNT,
};

#define STATE_MASK 0x07u
#define CLASS_SHIFT 3
#define CLASS_MASK 0x38u
#define ACKED 0x40u /* of a primary's pages: the source has been told that it is not needed any more */
#define IN_MAP 0x80u

enum outcome { OUTCOME_INSTALLED, OUTCOME_PRESENT, OUTCOME_DEFERRED, OUTCOME_GONE, OUTCOME_COUNT };

/* One process, known by its userfaultfd. */
struct space {
    int32_t uffd;
    uint32_t live;
    uint32_t regions;
    uint32_t vpid; /* 0: not known yet */
    uint32_t pid;  /* in our own pid namespace; 0: not known, as of a forked child */
    uint32_t child; /* of a forked child the id that it has in the cradle, else 0 */
};

/* [start, end) of a space shows an object from `addr` on. Sorted by start within its space. */
struct region {
    uint64_t start;
    uint64_t end;
    uint64_t addr;
    uint32_t instance;
    uint32_t reserved;
};

/* One object's pages as one family of mappings sees them. A fork gives the child an instance of its own of every
 * private object; all instances of an object are kin, chained from the first, the primary, which does the counting. */
struct instance {
    uint64_t object;  /* key on the wire */
    uint64_t regions; /* that refer to it */
    uint64_t block;   /* first state byte of a child's copy, whole 4 KiB blocks */
    uint64_t block_bytes;
    uint32_t live;
    uint32_t primary; /* index; its own for the primary */
    uint32_t kin;     /* next instance of the object, NO_KIN at the end */
    uint32_t home;    /* the space of a private instance */
    uint32_t spans; /* none when it is dead */
    uint32_t reserved;
};

/* A run of pages of an instance and where their state bytes lie. Sorted by addr. */
struct span {
    uint64_t addr;
    uint64_t pages;
    uint64_t states;
};

/* Addresses of which a message is due that is older than what is there now (_remap.c). */
struct due {
    uint64_t start;
    uint64_t end;
    uint32_t space;
    uint8_t late;   /* where what was there has gone; that is in limbo */
    uint8_t reused; /* or else that it is unmapped: is there anything now? */
    uint8_t over;   /* it has come */
    uint8_t reserved;
};

struct ledger_head {
    uint64_t magic;
    uint32_t spaces;    /* slots ever used */
    uint32_t instances; /* slots ever used */
    uint64_t states;    /* bytes of state handed out */
    uint64_t remaining; /* pages of all instances that wait for their content */
    uint64_t total;
    uint64_t counted[CLASS_COUNT];
    uint64_t outcomes[CLASS_COUNT][OUTCOME_COUNT];
    uint64_t faults;
    uint64_t packed; /* pages that came compressed */
    uint64_t fault_max_ns;
    uint64_t fault_ns[LEDGER_BUCKETS]; /* log-linear: 16 buckets to the octave */
    uint64_t traced;                   /* records ever written */
    uint32_t map_known;
    uint32_t served; /* by a pager that was more than its tables: it may have been killed */
    /* Event messages are read straight into here: what a killed pager had read and not applied is not lost. */
    uint32_t messages_space;
    struct uffd_msg messages[LEDGER_MESSAGES];
    int32_t cradle;        /* _cradle.h */
    uint32_t cradle_round;
    uint32_t cradle_puts; /* in this round */
    uint32_t children;    /* ids handed out */
    uint32_t removal_count; /* 0: nobody looks */
    int32_t removal_fds[LEDGER_REMOVALS]; /* _removals.h */
    uint32_t due_count;
    struct due due[LEDGER_DUE];
};

struct shadow; /* _shadow.h */

struct ledger {
    int fd;
    struct ledger_head *head;
    struct space *spaces;
    struct instance *instances;
    struct region *regions; /* LEDGER_REGIONS a space */
    struct span *spans;     /* LEDGER_SPANS an instance */
    struct pager_fault *trace;
    struct shadow *shadow;
    uint8_t *states;
};

/* Part of one region: where `pages` pages from `addr` of an instance are mapped. */
struct mapping {
    uint64_t va;
    uint64_t addr;
    uint64_t pages;
    uint32_t space;
};

struct cursor {
    uint32_t space;
    uint32_t region;
};

static inline enum page_state page_state(uint8_t byte)
{
    return (enum page_state)(byte & STATE_MASK);
}

static inline bool page_waits(uint8_t byte)
{
    return page_state(byte) <= PAGE_ABSENT;
}

int ledger_open(struct ledger *l, int fd); /* fd < 0: a new one */
void ledger_close(struct ledger *l);

int ledger_add_space(struct ledger *l, int uffd, uint32_t vpid, uint32_t pid);
int ledger_add_region(struct ledger *l, uint32_t space, uint64_t start, uint64_t length, uint64_t object,
                      uint64_t addr);
int64_t ledger_primary(const struct ledger *l, uint64_t object); /* index or -ENOENT */

/* What the events of userfaultfd(2) mean for the tables. */
int ledger_fork(struct ledger *l, uint32_t parent, int uffd, uint32_t child); /* index of the child's space */
int ledger_remap(struct ledger *l, uint32_t space, uint64_t from, uint64_t to, uint64_t length);
/* Private memory is discarded, and what the objects of shared memory have there only if they lost it, too. */
void ledger_remove(struct ledger *l, uint32_t space, uint64_t start, uint64_t end, bool shared_too);
int ledger_unmap(struct ledger *l, uint32_t space, uint64_t start, uint64_t end);
/* The message of that. It is of what was there first. */
int ledger_unmapped(struct ledger *l, uint32_t space, uint64_t start, uint64_t end);
void ledger_message_over(struct ledger *l);
void ledger_quiet(struct ledger *l, uint32_t space); /* no message of the process was due */
void ledger_retire(struct ledger *l, uint32_t space); /* its process is gone */

/* The first region of shared memory that lies in [start, end), in part at least, or NULL. */
const struct region *ledger_shared_in(const struct ledger *l, uint32_t space, uint64_t start, uint64_t end);

struct region *ledger_region_at(const struct ledger *l, uint32_t space, uint64_t va);

/* The state bytes from `addr` on; *pages is their number. NULL: none, and *pages is the length of the gap. */
uint8_t *ledger_states(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t *pages);

/* Every region that maps part of [addr, addr + pages): begin with a zeroed cursor. */
bool ledger_next_mapping(const struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages, struct cursor *at,
                         struct mapping *found);

/* A page has come to its end: `state` is final, and it is counted as `class` unless it was counted before. */
void ledger_settle(struct ledger *l, uint32_t instance, uint64_t addr, uint8_t *byte, enum page_state state,
                   enum page_class class);

/* Does any process still want this page? */
bool ledger_kin_waits(const struct ledger *l, uint32_t primary, uint64_t addr);

/* The pages whose state comes before `below` become `state`, in every instance of the object. */
void ledger_mark(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages, enum page_state below,
                 enum page_state state);
/* Every page that waits is missing again and, when no map has come, taken for one with content. To a ledger whose
 * pagers are all stopped. */
void ledger_close_map(struct ledger *l);
bool ledger_shares_poison(const struct ledger *l); /* in memory that several mappings may show, now or later */
void ledger_forget_asked(struct ledger *l); /* what was asked for and never came is missing again */

/* The map: these pages have content at the source. */
void ledger_map_run(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages);
/* Nothing more of the map will come for these pages of an instance: what is not in it becomes a hole. -ENODATA: it
 * names a page that the source said it does not have. */
int ledger_map_close(struct ledger *l, uint32_t instance, uint64_t addr, uint64_t pages);
/* The source says that it does not have these pages. -ENODATA: the map says that it does. */
int ledger_absent(struct ledger *l, uint32_t primary, uint64_t addr, uint64_t pages);

static inline struct region *ledger_regions(const struct ledger *l, uint32_t space)
{
    return l->regions + (size_t)space * LEDGER_REGIONS;
}

static inline struct span *ledger_spans(const struct ledger *l, uint32_t instance)
{
    return l->spans + (size_t)instance * LEDGER_SPANS;
}

static inline bool instance_is_private(const struct instance *i)
{
    return (i->object & 0xff) == 1; /* ObjectKind.TASK */
}

#endif
