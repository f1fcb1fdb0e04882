/* How much the bulk connection may have under way, so that a fault's page finds the way nearly empty.
 *
 * The pipe holds rate times delay, and what is asked for beyond that lies in a queue before the urgent page. Rate is the
 * most, and delay the least that answers have shown lately (as BBR has it, draft-ietf-ccwg-bbr). While there are faults
 * bulk has a share of the pipe which shrinks when they take twice as long as they could, and grows when they do not
 * (as LEDBAT, RFC 6817); when nobody faults it fills the pipe four times.
 *
 * Who waits for a processor looks like a queue: answers are late, and faults too. What tells them apart is what more of it
 * brings. While there are faults and less comes in than the link has brought before, requests and window are doubled for a
 * while: when more comes in they stay so, or else that only stood in a queue.
 *
 * Who has just been let run waits for hundreds of pages, one after the other, before he does anything: bulk rests until
 * he has waited for so many, or for few. Over a long way few come in a time, and it is not bulk that he waits for.
 * Meanwhile the pages that follow the one he waits for come with it, where that takes no more than three times as long:
 * what he needs lies together.
 *
 * A page that somebody waits for comes compressed where it takes so long that this does not matter, whatever it is that
 * takes long. One of sixteen comes as it is, to see that it is so still.
 */
#ifndef LAZYPROC_UFFD_PACE_H
#define LAZYPROC_UFFD_PACE_H

#include <stdbool.h>
#include <stdint.h>

/* The greatest of what was seen in this epoch and in the one before. */
struct peak {
    uint64_t current, before, until_ns;
};

/* How many times the requests and the window, and the search for that. */
struct climb {
    uint32_t gain;
    uint32_t before; /* the gain that this one is tried against; 0: none is */
    uint32_t intervals;
    uint64_t rates, rate_before;     /* bytes a second: the sum of so many intervals; the mean of those before */
    uint64_t hold_ns, hold_until_ns; /* after a trial that was not worth it */
    bool begins;                     /* there was none */
};

/* How many pages one fault brings while the process comes to life. */
struct reach {
    uint32_t pages;
    uint32_t answers;  /* with so many, since it was last looked at */
    uint64_t waited_ns; /* for all of them */
    uint64_t alone_ns;  /* for as many with one page; 0: not seen yet */
};

struct pace {
    struct peak rate;   /* bytes a second, of faults too */
    struct peak bulk;   /* UINT64_MAX less the ns from a request to its answer: the least of them */
    struct peak urgent; /* likewise of a fault */
    uint8_t slow; /* of the last eight faults whose page was not compressed: a bit for each that took long */
    uint32_t urgent_asked; /* while most of them have */
    uint64_t since_ns, bytes_in; /* of the rate that is being taken */
    uint64_t drain_until_ns;
    uint64_t fault_ns; /* the last one */
    uint32_t share;    /* of the pipe, in 64ths */
    bool wakes;        /* the process has just been let run, at wakes_ns */
    uint64_t wakes_ns;
    uint32_t faults;   /* since then */
    struct reach reach;
    struct climb climb;
};

struct quota {
    uint64_t window; /* bytes that may be under way */
    uint32_t pages;  /* of one request */
};

void pace_init(struct pace *pace);
/* An answer that arrived `now` and was asked for at `asked`; so many bytes have come in, of faults too. */
void pace_bulk(struct pace *pace, uint64_t now, uint64_t asked, uint64_t bytes_in);
/* All of a fault's answer, which has so many pages; `plain` when they came as they are. */
void pace_urgent(struct pace *pace, uint64_t now, uint64_t asked, uint32_t pages, bool plain);
/* A fault's page has come in bulk. */
void pace_waited(struct pace *pace, uint64_t now);
/* From now on, and until bulk need not rest any more, the process comes to life. */
void pace_wakes(struct pace *pace, uint64_t now);
/* How many pages a fault may ask for at once. */
uint32_t pace_reach(const struct pace *pace);
/* Whether nearly all of the latest faults took long. */
bool pace_is_slow(const struct pace *pace);
/* Whether to ask for them compressed, this time. */
bool pace_packs(struct pace *pace);
/* For how many ns bulk is to ask for nothing, and to ask here again after that; 0: it may. */
uint64_t pace_rest(struct pace *pace, uint64_t now);
/* How many ns to wait for what is under way in bulk before it is asked for over the other connection as well. */
uint64_t pace_patience(const struct pace *pace);
/* `page_bytes`: what a page takes on the wire. */
struct quota pace_quota(const struct pace *pace, uint64_t now, bool faults_wait, uint32_t page_bytes);

#endif
