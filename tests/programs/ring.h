/* Processes that share memory pass a turn around: whoever has it checks every page, writes the next generation and
 * passes it on. A page that was lost, or sharing that became copying, shows at once: wrong words, or no more turns. */
#ifndef RING_H
#define RING_H

#include "check.h"

#include <linux/futex.h>
#include <sys/syscall.h>

enum { RING_PAGES = 64 };

/* The shared object: one page of bookkeeping, then RING_PAGES pages of words. */
struct ring {
    uint32_t turn; /* counts up; turn % members is the member whose turn it is */
    uint32_t stopping;
    uint8_t unused[PAGE - 8];
    uint64_t pages[RING_PAGES][WORDS];
};

/* A futex of another process's memory: not FUTEX_PRIVATE_FLAG. Wakes at the latest after 20 ms. */
static inline void ring_wait(uint32_t *turn, uint32_t seen)
{
    struct timespec soon = { .tv_nsec = 20000000 };

    (void)syscall(SYS_futex, turn, FUTEX_WAIT, seen, &soon, NULL, 0);
}

static inline void ring_pass(uint32_t *turn)
{
    __atomic_add_fetch(turn, 1, __ATOMIC_RELEASE);
    (void)syscall(SYS_futex, turn, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Words are named by their offset: every member may have the object at another address. */
static inline void ring_check(struct ring *ring, uint32_t turn)
{
    for (unsigned page = 0; page < RING_PAGES; page++)
        verify_page(ring->pages[page], (uint64_t)page * PAGE, turn);
}

static inline void ring_write(struct ring *ring, uint32_t turn)
{
    for (unsigned page = 0; page < RING_PAGES; page++)
        fill_page(ring->pages[page], (uint64_t)page * PAGE, turn);
}

/* Turns of one member until the ring stops; member 0 stops it when SIGTERM has come. `also` is one more check. */
static inline void ring_run(struct ring *ring, unsigned member, unsigned members, void (*also)(void))
{
    for (;;) {
        uint32_t turn = __atomic_load_n(&ring->turn, __ATOMIC_ACQUIRE);

        if (__atomic_load_n(&ring->stopping, __ATOMIC_ACQUIRE))
            return;
        if (turn % members != member) {
            ring_wait(&ring->turn, turn);
            continue;
        }
        ring_check(ring, turn);
        if (also != NULL)
            also();
        if (member == 0 && check_stopping) {
            __atomic_store_n(&ring->stopping, 1, __ATOMIC_RELEASE);
            return;
        }
        ring_write(ring, turn + 1);
        check_beat(member);
        check_rest(200);
        ring_pass(&ring->turn);
    }
}

/* Waits for the other members and checks what they left. */
static inline int ring_end(struct ring *ring, const pid_t *children, unsigned count)
{
    status->phase = FINAL;
    for (unsigned i = 0; i < count; i++)
        expect_exit_0(children[i]);
    ring_check(ring, ring->turn);
    return check_end();
}

#endif
