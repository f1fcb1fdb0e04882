/* How much the bulk connection may have under way, so that a fault's page finds the way nearly empty.
 *
 * The pipe holds rate times delay, and what is asked for beyond that lies in a queue before the urgent page. Rate is the
 * most, and delay the least that answers have shown lately (as BBR has it, draft-ietf-ccwg-bbr). While there are faults
 * bulk has a share of the pipe which shrinks when they take twice as long as they could, and grows when they do not
 * (as LEDBAT, RFC 6817); when nobody faults it fills the pipe twice.
 */
#ifndef LAZYPROC_UFFD_PACE_H
#define LAZYPROC_UFFD_PACE_H

#include <stdbool.h>
#include <stdint.h>

/* The greatest of what was seen in this epoch and in the one before. */
struct peak {
    uint64_t current, before, until_ns;
};

struct pace {
    struct peak rate;   /* bytes a second */
    struct peak bulk;   /* UINT64_MAX less the ns from a request to its answer: the least of them */
    struct peak urgent; /* likewise of a fault */
    uint64_t since_ns, bytes_in; /* of the rate that is being taken */
    uint64_t drain_until_ns;
    uint64_t fault_ns; /* the last one */
    uint32_t share;    /* of the pipe, in 64ths */
};

struct quota {
    uint64_t window; /* bytes that may be under way */
    uint32_t pages;  /* of one request */
};

void pace_init(struct pace *pace);
/* An answer that arrived `now` and was asked for at `asked`; so many bytes have come in on this connection. */
void pace_bulk(struct pace *pace, uint64_t now, uint64_t asked, uint64_t bytes_in);
void pace_urgent(struct pace *pace, uint64_t now, uint64_t asked);
/* A fault's page has come in bulk. */
void pace_waited(struct pace *pace, uint64_t now);
/* How many ns to wait for what is under way in bulk before it is asked for over the other connection as well. */
uint64_t pace_patience(const struct pace *pace);
struct quota pace_quota(const struct pace *pace, uint64_t now, bool faults_wait);

#endif
