/* Every way to sleep, each in a thread of its own: never a spurious EINTR, never too short, never much too long.
 *
 * sleeps STATUS [SLACK_MS]: how much longer than asked for a sleep may take (500): the time of a freeze and what the
 * machine is busy with otherwise. Sleeps last up to a second, so a sleep that starts anew after a move is noticed.
 */
#include "check.h"

#include <linux/futex.h>
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/syscall.h>

enum { LONG_MS = 1000, SHORT_MS = 100 };

static uint64_t slack_ns = 500000000;
static int silent[2], answered[2]; /* pipes: nobody writes to the first */
static volatile sig_atomic_t woken; /* how often on_usr2 ran in the pausing thread */

static struct timespec timespec_of(uint64_t ns)
{
    return (struct timespec){ .tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000) };
}

static void sleep_relative(unsigned ms)
{
    struct timespec time = timespec_of(ms * 1000000u);

    EXPECT(0, nanosleep(&time, NULL));
}

static void sleep_clock_relative(unsigned ms)
{
    struct timespec time = timespec_of(ms * 1000000u);

    EXPECT(0, clock_nanosleep(CLOCK_BOOTTIME, 0, &time, NULL));
}

static void sleep_absolute(unsigned ms)
{
    struct timespec time = timespec_of(now_ns(CLOCK_MONOTONIC) + ms * 1000000u);

    EXPECT(0, clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL));
}

static void sleep_poll(unsigned ms)
{
    struct pollfd silence = { .fd = silent[0], .events = POLLIN };

    EXPECT(0, poll(&silence, 1, (int)ms));
}

static void sleep_select(unsigned ms)
{
    struct timeval time = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 };
    fd_set silence;

    FD_ZERO(&silence);
    FD_SET(silent[0], &silence);
    EXPECT(0, select(silent[0] + 1, &silence, NULL, NULL, &time));
}

static void sleep_epoll(unsigned ms)
{
    static int set = -1;
    struct epoll_event event = { .events = EPOLLIN };

    if (set < 0) {
        MUST(set = epoll_create1(EPOLL_CLOEXEC));
        MUST(epoll_ctl(set, EPOLL_CTL_ADD, silent[0], &event));
    }
    EXPECT(0, epoll_wait(set, &event, 1, (int)ms));
}

static void sleep_futex(unsigned ms)
{
    static uint32_t word;
    struct timespec time = timespec_of(ms * 1000000u);

    EXPECT(-1, syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &time, NULL, 0));
    EXPECT(ETIMEDOUT, errno);
}

static void sleep_semaphore(unsigned ms)
{
    static sem_t never;
    struct timespec time = timespec_of(now_ns(CLOCK_MONOTONIC) + ms * 1000000u);

    EXPECT(-1, sem_clockwait(&never, CLOCK_MONOTONIC, &time));
    EXPECT(ETIMEDOUT, errno);
}

static const struct {
    const char *name;
    void (*sleep)(unsigned ms);
} kinds[] = {
    { "nanosleep", sleep_relative },       { "clock_nanosleep", sleep_clock_relative },
    { "absolute sleep", sleep_absolute },  { "poll", sleep_poll },
    { "select", sleep_select },            { "epoll_wait", sleep_epoll },
    { "futex", sleep_futex },              { "semaphore", sleep_semaphore },
};
enum { TIMED = sizeof kinds / sizeof *kinds, PAUSE = TIMED, READ, WAIT, WORKERS };

static void *sleep_timed(void *argument)
{
    unsigned kind = (unsigned)(uintptr_t)argument;

    for (unsigned round = 0;; round++) {
        uint64_t wanted = (round % 2 ? LONG_MS : SHORT_MS) * 1000000u, start = now_ns(CLOCK_MONOTONIC), took;

        kinds[kind].sleep((unsigned)(wanted / 1000000));
        took = now_ns(CLOCK_MONOTONIC) - start;
        if (took + 1000000 < wanted) /* poll and epoll count in milliseconds */
            check_fail(NULL, wanted, took, "%s was too short", kinds[kind].name);
        if (took > wanted + slack_ns)
            check_fail(NULL, wanted, took, "%s was too long", kinds[kind].name);
        check_beat(kind);
    }
    return NULL;
}

static void on_usr2(int signal)
{
    (void)signal;
    woken++;
}

/* pause(2) without its race: SIGUSR2 is blocked but for the pause itself, so a wake-up cannot slip in before it. */
static void *sleep_pausing(void *argument)
{
    sigset_t none;

    (void)argument;
    sigemptyset(&none);
    for (sig_atomic_t before = 0;; before++) {
        EXPECT(before, woken);
        EXPECT(-1, sigsuspend(&none));
        EXPECT(before + 1, woken);
        check_beat(PAUSE);
    }
    return NULL;
}

static void *sleep_reading(void *argument)
{
    char got;

    (void)argument;
    for (char next = 0;; next++) {
        EXPECT(1, read(answered[0], &got, 1));
        EXPECT(next, got);
        check_beat(READ);
    }
    return NULL;
}

/* The child only sleeps, which is allowed after fork(2) from a thread. */
static void *sleep_waiting(void *argument)
{
    (void)argument;
    for (;;) {
        struct timespec time = timespec_of(SHORT_MS * 1000000u);
        pid_t child = fork_child();
        int how;

        if (child == 0) {
            while (nanosleep(&time, &time) < 0)
                continue;
            _exit(42);
        }
        EXPECT(child, wait4(child, &how, 0, NULL));
        EXPECT(42 << 8, how);
        check_beat(WAIT);
    }
    return NULL;
}

static void set_up(void)
{
    struct sigaction action = { .sa_handler = on_usr2 };
    sigset_t blocked;

    MUST(pipe2(silent, O_CLOEXEC));
    MUST(pipe2(answered, O_CLOEXEC));
    MUST(sigaction(SIGUSR2, &action, NULL));
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    pthread_sigmask(SIG_BLOCK, &blocked, NULL);
}

int main(int argc, char **argv)
{
    pthread_t pausing;

    if (argc > 2)
        slack_ns = (uint64_t)atoi(argv[2]) * 1000000;
    check_start(argc, argv, WORKERS);
    set_up();
    for (uintptr_t kind = 0; kind < TIMED; kind++)
        start_thread(sleep_timed, (void *)kind);
    pausing = start_thread(sleep_pausing, NULL);
    start_thread(sleep_reading, NULL);
    start_thread(sleep_waiting, NULL);
    check_running();
    for (char next = 0; !check_stopping; next++) {
        uint64_t beats = status->beats[PAUSE];

        check_rest(SHORT_MS * 1000);
        EXPECT(1, write(answered[1], &next, 1));
        EXPECT(0, pthread_kill(pausing, SIGUSR2));
        while (status->beats[PAUSE] == beats && !check_stopping)
            check_rest(1000);
    }
    return check_end();
}
