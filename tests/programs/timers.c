/* Timers of all kinds keep their identity, their interval and their remaining time.
 *
 * timers STATUS [SLACK_MS]: how far expirations may lag behind the clock (500). Interval timers must have fired as
 * often as their clock says; one-shot timers an hour ahead must keep the moment of their expiry.
 */
#include "check.h"

#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

enum { INTERVAL_MS = 20, HOUR_S = 3600 };
enum { REAL, MONOTONIC, BOOTTIME, REALTIME, TO_THREAD, DESCRIPTOR, COUNTED };

static const char *const names[COUNTED] = { "ITIMER_REAL", "CLOCK_MONOTONIC timer", "CLOCK_BOOTTIME timer",
                                            "CLOCK_REALTIME timer", "SIGEV_THREAD_ID timer", "timerfd" };
static volatile uint64_t fired[COUNTED];
static volatile uint64_t virtual_fired, profile_fired;
static int slack_ms = 500;

static void on_alarm(int signal)
{
    if (signal == SIGALRM)
        fired[REAL]++;
    else if (signal == SIGVTALRM)
        virtual_fired++;
    else
        profile_fired++;
}

/* The kernel merges expirations while a signal is pending: what was merged is in si_overrun. */
static void on_timer(int signal, siginfo_t *info, void *context)
{
    (void)signal;
    (void)context;
    EXPECT(SI_TIMER, info->si_code);
    fired[info->si_value.sival_int] += 1 + (uint64_t)info->si_overrun;
}

static timer_t start_timer(clockid_t clock, int kind, int notify, struct itimerspec times)
{
    struct sigevent event = { .sigev_notify = notify, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = kind };
    timer_t timer;

    event.sigev_notify_thread_id = gettid();
    MUST(timer_create(clock, &event, &timer));
    MUST(timer_settime(timer, 0, &times, NULL));
    return timer;
}

static struct itimerspec every(unsigned ms)
{
    struct timespec time = { .tv_nsec = ms * 1000000 };

    return (struct itimerspec){ .it_value = time, .it_interval = time };
}

static struct {
    timer_t hour_ahead, disarmed, silent;
    uint64_t hour_end; /* on CLOCK_MONOTONIC */
    int descriptor, hour_descriptor;
    uint64_t started;
} timers;

static void set_itimer(int which, unsigned ms)
{
    struct timeval time = { .tv_usec = ms * 1000 };
    struct itimerval times = { .it_value = time, .it_interval = time };

    MUST(setitimer(which, &times, NULL));
}

static void set_handlers(void)
{
    struct sigaction alarm = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    struct sigaction timer = { .sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART };

    MUST(sigaction(SIGALRM, &alarm, NULL));
    MUST(sigaction(SIGVTALRM, &alarm, NULL));
    MUST(sigaction(SIGPROF, &alarm, NULL));
    MUST(sigaction(SIGRTMIN, &timer, NULL));
}

static void set_up(void)
{
    struct itimerspec hour = { .it_value.tv_sec = HOUR_S }, never = { 0 };
    timer_t spare;

    set_handlers();
    timers.started = now_ns(CLOCK_MONOTONIC);
    set_itimer(ITIMER_REAL, INTERVAL_MS);
    set_itimer(ITIMER_VIRTUAL, INTERVAL_MS / 2);
    set_itimer(ITIMER_PROF, INTERVAL_MS / 2);
    MUST(timer_create(CLOCK_MONOTONIC, NULL, &spare));
    start_timer(CLOCK_MONOTONIC, MONOTONIC, SIGEV_SIGNAL, every(INTERVAL_MS));
    start_timer(CLOCK_BOOTTIME, BOOTTIME, SIGEV_SIGNAL, every(INTERVAL_MS));
    MUST(timer_delete(spare)); /* leaves a gap in the ids */
    start_timer(CLOCK_REALTIME, REALTIME, SIGEV_SIGNAL, every(INTERVAL_MS));
    start_timer(CLOCK_MONOTONIC, TO_THREAD, SIGEV_THREAD_ID, every(INTERVAL_MS));
    timers.silent = start_timer(CLOCK_MONOTONIC, 0, SIGEV_NONE, every(INTERVAL_MS));
    timers.disarmed = start_timer(CLOCK_MONOTONIC, 0, SIGEV_SIGNAL, never);
    timers.hour_ahead = start_timer(CLOCK_MONOTONIC, 0, SIGEV_SIGNAL, hour);
    timers.hour_end = now_ns(CLOCK_MONOTONIC) + HOUR_S * 1000000000ull;
    MUST(timers.descriptor = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
    hour.it_interval = every(INTERVAL_MS).it_interval;
    MUST(timerfd_settime(timers.descriptor, 0, &(struct itimerspec){ hour.it_interval, hour.it_interval }, NULL));
    MUST(timers.hour_descriptor = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC));
    MUST(timerfd_settime(timers.hour_descriptor, 0, &hour, NULL));
}

static void check_counts(void)
{
    for (unsigned kind = 0; kind < COUNTED; kind++) {
        int64_t due = (int64_t)((now_ns(CLOCK_MONOTONIC) - timers.started) / 1000000 / INTERVAL_MS);
        int64_t behind = due - (int64_t)fired[kind];

        if (behind * INTERVAL_MS > slack_ms || behind * INTERVAL_MS < -slack_ms)
            check_fail(&fired[kind], (uint64_t)due, fired[kind], "expirations of the %s", names[kind]);
    }
}

/* Expirations that merge without an overrun count (ITIMER_REAL's, and all during a freeze) must not add up. */
static void resynchronize(void)
{
    timers.started = now_ns(CLOCK_MONOTONIC);
    for (unsigned kind = 0; kind < COUNTED; kind++)
        fired[kind] = 0;
}

static void check_end_of_hour(const char *name, const struct itimerspec *left)
{
    uint64_t end = now_ns(CLOCK_MONOTONIC) + (uint64_t)left->it_value.tv_sec * 1000000000u +
                   (uint64_t)left->it_value.tv_nsec;
    int64_t shift_ms = (int64_t)(end - timers.hour_end) / 1000000;

    if (shift_ms > slack_ms || shift_ms < -slack_ms)
        check_fail(NULL, timers.hour_end, end, "%s: the moment of expiry moved", name);
}

static void check_settings(void)
{
    struct itimerspec left;
    struct itimerval user;

    EXPECT(0, timer_gettime(timers.hour_ahead, &left));
    EXPECT(0, left.it_interval.tv_nsec);
    check_end_of_hour("timer", &left);
    EXPECT(0, timerfd_gettime(timers.hour_descriptor, &left));
    EXPECT(INTERVAL_MS * 1000000, left.it_interval.tv_nsec);
    check_end_of_hour("timerfd", &left);
    EXPECT(0, timer_gettime(timers.disarmed, &left));
    EXPECT(0, left.it_value.tv_sec + left.it_value.tv_nsec);
    EXPECT(0, timer_gettime(timers.silent, &left));
    EXPECT(INTERVAL_MS * 1000000, left.it_interval.tv_nsec);
    for (int which = ITIMER_VIRTUAL; which <= ITIMER_PROF; which++) {
        EXPECT(0, getitimer(which, &user));
        EXPECT(INTERVAL_MS / 2 * 1000, user.it_interval.tv_usec);
    }
}

/* Both clocks of used time move only here. */
static void burn(unsigned ms)
{
    uint64_t until = now_ns(CLOCK_MONOTONIC) + ms * 1000000u;

    while (now_ns(CLOCK_MONOTONIC) < until)
        continue;
}

static void check_used_time(void)
{
    uint64_t virtual_before = virtual_fired, profile_before = profile_fired;

    for (unsigned tries = 0; tries < 50; tries++) {
        burn(INTERVAL_MS);
        if (virtual_fired != virtual_before && profile_fired != profile_before)
            return;
    }
    check_fail(NULL, 1, 0, "ITIMER_VIRTUAL or ITIMER_PROF no longer fires");
}

int main(int argc, char **argv)
{
    if (argc > 2)
        slack_ms = atoi(argv[2]);
    check_start(argc, argv, 1);
    set_up();
    check_running();
    for (unsigned round = 1; !check_stopping; round++) {
        uint64_t expirations;

        check_rest(5000);
        if (read(timers.descriptor, &expirations, sizeof expirations) == sizeof expirations)
            fired[DESCRIPTOR] += expirations;
        check_counts();
        check_settings();
        check_beat(0);
        if (round % 100 == 0) {
            check_used_time();
            resynchronize();
        }
    }
    return check_end();
}
