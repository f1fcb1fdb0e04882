/* Touches its memory only when it is told to, and counts what it finds: SIGBUS is an answer, zeros are not.
 *
 * lost STATUS PAGES: PAGES of private memory and as many of shared memory in a root and a child; the first quarter is
 * what `TOUCH_FIRST` touches. Orders are bits that whoever watches sets in `stalls[0]` of the status block; each process
 * follows each once. What a process has found lies in `stalls` from 16 * (its number + 1) on: right, SIGBUS and wrong
 * pages of private memory, then of shared memory, then the orders that it has followed, and where both lie.
 */
#include "check.h"

#include <setjmp.h>

enum { TOUCH_FIRST = 1, FORK = 2, TOUCH_ALL = 4 };
enum { ROOT, CHILD, WORKERS, LATE = WORKERS };
enum { RIGHT, LOST, WRONG, KINDS, DONE = 2 * KINDS, WHERE };

static struct {
    uint8_t *at[2]; /* private, shared */
    size_t count;
} memory;
static sigjmp_buf way_back;

static void on_sigbus(int signal)
{
    (void)signal;
    siglongjmp(way_back, 1);
}

static unsigned touch(size_t page, unsigned shared)
{
    const uint64_t *at = (const uint64_t *)(memory.at[shared] + page * PAGE);

    if (sigsetjmp(way_back, 1))
        return LOST;
    for (unsigned i = 0; i < WORDS; i++)
        if (((const volatile uint64_t *)at)[i] != word_value((uintptr_t)at + 8 * i, 1))
            return WRONG;
    return RIGHT;
}

static void touch_until(unsigned worker, size_t end)
{
    uint64_t found[2 * KINDS] = { 0 };

    for (unsigned shared = 0; shared < 2; shared++)
        for (size_t page = 0; page < end; page++)
            found[shared * KINDS + touch(page, shared)]++;
    memcpy(&status->stalls[16 * (worker + 1)], found, sizeof found);
}

/* Brings what a fork and a SIGBUS take of the C library's own memory. */
static void rehearse(void)
{
    pid_t child = fork_child();

    if (sigsetjmp(way_back, 1) == 0)
        raise(SIGBUS);
    if (child == 0)
        _exit(0);
    expect_exit_0(child);
}

/* Which survives the others. */
static unsigned become_late(void)
{
    MUST(prctl(PR_SET_PDEATHSIG, 0));
    return LATE;
}

static void follow_orders(unsigned worker, uint64_t seen)
{
    memcpy(&status->stalls[16 * (worker + 1) + WHERE], memory.at, sizeof memory.at);
    while (!check_stopping) {
        uint64_t orders = __atomic_load_n(&status->stalls[0], __ATOMIC_ACQUIRE) & ~seen;

        seen |= orders;
        if (orders & TOUCH_FIRST) {
            rehearse();
            touch_until(worker, memory.count / 4);
        }
        if (orders & FORK && worker == ROOT && fork_child() == 0)
            worker = become_late();
        if (orders & TOUCH_ALL)
            touch_until(worker, memory.count);
        __atomic_store_n(&status->stalls[16 * (worker + 1) + DONE], seen, __ATOMIC_RELEASE);
        check_beat(worker);
        check_rest(2000);
    }
}

int main(int argc, char **argv)
{
    struct sigaction on_bus = { .sa_handler = on_sigbus };
    pid_t child;

    memory.count = argc > 2 ? (size_t)atoi(argv[2]) : 64;
    check_start(argc, argv, WORKERS);
    MUST(sigaction(SIGBUS, &on_bus, NULL));
    for (unsigned shared = 0; shared < 2; shared++) {
        int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS;

        memory.at[shared] = mmap(NULL, memory.count * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (memory.at[shared] == MAP_FAILED)
            check_die("memory");
        for (size_t page = 0; page < memory.count; page++)
            fill_page((uint64_t *)(memory.at[shared] + page * PAGE), (uintptr_t)memory.at[shared] + page * PAGE, 1);
    }
    child = fork_child();
    if (child == 0) {
        follow_orders(CHILD, 0);
        _exit(0);
    }
    check_running();
    follow_orders(ROOT, 0);
    kill(child, SIGTERM);
    return check_end();
}
