/* Signals: blocked and pending, queued with values, handled, ignored, waited for, and masks of each thread.
 *
 * Each round queues real-time signals with values to the process and to one thread, all blocked, leaves them pending
 * over a rest, and takes them out again in order. A second thread waits in sigwaitinfo(2) for what the main thread
 * sends. A third is nearly always inside a handler, on its alternate stack.
 */
#include "check.h"

#include <sys/syscall.h>

enum { QUEUED = 5, STACK = 64 << 10, SIGNALS = 65 };
#define SHARED_SIGNAL (SIGRTMIN + 1)
#define THREAD_SIGNAL (SIGRTMIN + 2)
#define WAITED_SIGNAL (SIGRTMIN + 3)
#define NESTED_SIGNAL (SIGRTMIN + 4)

static struct sigaction actions[SIGNALS];
static volatile uint64_t handled;
static uint64_t waited_for;
static uint8_t nested_stack[STACK];

static void on_usr1(int signal, siginfo_t *info, void *context)
{
    (void)context;
    EXPECT(SIGUSR1, signal);
    EXPECT(getpid(), info->si_pid);
    handled++;
}

/* Runs for a millisecond with one more signal blocked: the place to be frozen in. */
static void on_nested(int signal, siginfo_t *info, void *context)
{
    uint64_t until = now_ns(CLOCK_MONOTONIC) + 1000000;
    volatile uint64_t words[WORDS / 8];
    sigset_t mask;

    (void)context;
    EXPECT(NESTED_SIGNAL, signal);
    EXPECT(SI_TKILL, info->si_code);
    EXPECT(1, (uintptr_t)words - (uintptr_t)nested_stack < STACK);
    for (unsigned i = 0; i < WORDS / 8; i++)
        words[i] = word_value(i, until);
    while (now_ns(CLOCK_MONOTONIC) < until)
        continue;
    for (unsigned i = 0; i < WORDS / 8; i++)
        EXPECT(word_value(i, until), words[i]);
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    EXPECT(1, sigismember(&mask, SIGUSR2));
}

static sigset_t set_of(int first, int second)
{
    sigset_t set;

    sigemptyset(&set);
    sigaddset(&set, first);
    sigaddset(&set, second);
    return set;
}

static void take(int signal, int code, uint64_t value)
{
    sigset_t set = set_of(signal, signal);
    struct timespec at_once = { 0 };
    siginfo_t info;

    EXPECT(signal, sigtimedwait(&set, &info, &at_once));
    EXPECT(code, info.si_code);
    EXPECT(getpid(), info.si_pid);
    EXPECT(getuid(), info.si_uid);
    EXPECT(value, (uintptr_t)info.si_value.sival_ptr);
}

/* Values must come back in the order in which they were queued; the thread's own and the process's queue differ. */
static void check_queues(uint64_t round)
{
    sigset_t pending;

    for (unsigned i = 0; i < QUEUED; i++) {
        union sigval value = { .sival_ptr = (void *)(uintptr_t)word_value(i, round) };

        EXPECT(0, sigqueue(getpid(), SHARED_SIGNAL, value));
        EXPECT(0, pthread_sigqueue(pthread_self(), THREAD_SIGNAL, value));
    }
    EXPECT(0, kill(getpid(), SIGUSR2));
    check_rest(2000);
    EXPECT(0, sigpending(&pending));
    EXPECT(1, sigismember(&pending, SHARED_SIGNAL));
    EXPECT(1, sigismember(&pending, THREAD_SIGNAL));
    for (unsigned i = 0; i < QUEUED; i++) {
        take(SHARED_SIGNAL, SI_QUEUE, word_value(i, round));
        take(THREAD_SIGNAL, SI_QUEUE, word_value(i, round));
    }
    take(SIGUSR2, SI_USER, 0);
}

static void check_actions(void)
{
    for (int signal = 1; signal < SIGNALS; signal++) {
        struct sigaction found;

        if (sigaction(signal, NULL, &found) < 0)
            continue; /* 32 and 33 belong to the C library */
        EXPECT((uintptr_t)actions[signal].sa_sigaction, (uintptr_t)found.sa_sigaction);
        EXPECT(actions[signal].sa_flags, found.sa_flags);
        EXPECT(0, memcmp(&actions[signal].sa_mask, &found.sa_mask, 8));
    }
}

static void check_mask(const sigset_t *wanted)
{
    sigset_t found;

    pthread_sigmask(SIG_SETMASK, NULL, &found);
    EXPECT(0, memcmp(wanted, &found, 8));
}

static void *wait_for_signals(void *argument)
{
    sigset_t set = set_of(WAITED_SIGNAL, WAITED_SIGNAL), mask;
    siginfo_t info;

    (void)argument;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (;;) {
        if (sigwaitinfo(&set, &info) < 0) {
            EXPECT(EINTR, errno); /* a stop alone may do that: signal(7) */
            continue;
        }
        __atomic_store_n(&waited_for, (uintptr_t)info.si_value.sival_ptr, __ATOMIC_RELEASE);
        check_mask(&mask);
        check_beat(1);
    }
    return NULL;
}

static void *stay_in_handler(void *argument)
{
    stack_t stack = { .ss_sp = nested_stack, .ss_size = STACK };
    sigset_t nested = set_of(NESTED_SIGNAL, NESTED_SIGNAL), mask;

    (void)argument;
    EXPECT(0, sigaltstack(&stack, NULL));
    pthread_sigmask(SIG_UNBLOCK, &nested, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (;;) {
        EXPECT(0, syscall(SYS_tgkill, getpid(), gettid(), NESTED_SIGNAL));
        check_mask(&mask);
        check_beat(2);
        check_rest(500);
    }
    return NULL;
}

static void set_actions(void)
{
    struct sigaction action = { .sa_sigaction = on_usr1, .sa_flags = SA_SIGINFO | SA_RESTART };

    sigaddset(&action.sa_mask, SIGRTMAX);
    MUST(sigaction(SIGUSR1, &action, NULL));
    action = (struct sigaction){ .sa_sigaction = on_nested, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    sigaddset(&action.sa_mask, SIGUSR2);
    MUST(sigaction(NESTED_SIGNAL, &action, NULL));
    action = (struct sigaction){ .sa_handler = SIG_IGN };
    MUST(sigaction(SIGHUP, &action, NULL));
    MUST(sigaction(SIGRTMAX, &action, NULL));
    for (int signal = 1; signal < SIGNALS; signal++)
        (void)sigaction(signal, NULL, &actions[signal]);
}

int main(int argc, char **argv)
{
    sigset_t blocked = set_of(SHARED_SIGNAL, THREAD_SIGNAL);
    uint64_t round = 1;

    check_start(argc, argv, 3);
    set_actions();
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, WAITED_SIGNAL);
    sigaddset(&blocked, NESTED_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    start_thread(wait_for_signals, NULL);
    start_thread(stay_in_handler, NULL);
    check_running();
    for (; !check_stopping; round++) {
        union sigval value = { .sival_ptr = (void *)(uintptr_t)round };

        check_queues(round);
        check_actions();
        check_mask(&blocked);
        EXPECT(0, raise(SIGUSR1));
        EXPECT(0, raise(SIGHUP));
        EXPECT(round, handled);
        EXPECT(0, sigqueue(getpid(), WAITED_SIGNAL, value));
        while (__atomic_load_n(&waited_for, __ATOMIC_ACQUIRE) != round && !check_stopping)
            check_rest(100);
        check_beat(0);
    }
    return check_end();
}
