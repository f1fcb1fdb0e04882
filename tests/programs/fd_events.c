/* eventfd, timerfd, signalfd, epoll and inotify go on with what they had counted and watched.
 *
 * fd_events STATUS: watches the directory STATUS.watched, which it makes.
 */
#include "check.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>

enum { INTERVAL_MS = 20, HOUR_S = 3600, WATCHES = 3 };

/* What epoll says about each; not the descriptors' numbers. */
static const uint64_t ON_COUNTER = 0x1122334455667788, ON_SIGNAL = 2, ON_CLOSED = 3, ON_INNER = 4;

static struct {
    int counter, semaphore, timer, hour, signals, outer, inner, closed, inotify, watch;
    uint64_t started, ticks, hour_end;
    char directory[512];
} events;

static void watch(int epfd, int fd, uint32_t mask, uint64_t data)
{
    struct epoll_event event = { .events = mask, .data.u64 = data };

    MUST(epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &event));
}

static void start_timers(void)
{
    struct timespec interval = { .tv_nsec = INTERVAL_MS * 1000000 };
    struct itimerspec periodic = { interval, interval };
    struct itimerspec hour = { .it_value.tv_sec = HOUR_S };

    MUST(events.timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    MUST(events.hour = timerfd_create(CLOCK_MONOTONIC, 0));
    events.started = now_ns(CLOCK_MONOTONIC);
    events.hour_end = events.started + HOUR_S * 1000000000ull;
    MUST(timerfd_settime(events.timer, 0, &periodic, NULL));
    MUST(timerfd_settime(events.hour, 0, &hour, NULL));
}

/* The last watch has a number that the kernel would not give it at once. */
static void start_watching(const char *status_path)
{
    MUST(events.inotify = inotify_init1(IN_NONBLOCK));
    snprintf(events.directory, sizeof events.directory, "%s.watched", status_path);
    if (mkdir(events.directory, 0755) < 0 && errno != EEXIST)
        check_die("mkdir");
    for (int i = 0; i < WATCHES; i++) {
        MUST(events.watch = inotify_add_watch(events.inotify, events.directory, IN_CREATE | IN_DELETE));
        if (i + 1 < WATCHES)
            MUST(inotify_rm_watch(events.inotify, events.watch));
    }
}

static void drain(int fd)
{
    char buffer[4096];

    while (read(fd, buffer, sizeof buffer) > 0)
        ;
}

/* An entry whose number is closed lives on as long as a duplicate is open. */
static void start_epoll(void)
{
    int gone;

    MUST(events.outer = epoll_create1(0));
    MUST(events.inner = epoll_create1(EPOLL_CLOEXEC));
    MUST(events.closed = eventfd(0, EFD_NONBLOCK));
    MUST(gone = fcntl(events.closed, F_DUPFD, 150));
    watch(events.inner, gone, EPOLLIN, ON_CLOSED);
    MUST(close(gone));
    watch(events.inner, events.counter, EPOLLIN, ON_COUNTER);
    watch(events.inner, events.signals, EPOLLIN, ON_SIGNAL);
    watch(events.outer, events.inner, EPOLLIN, ON_INNER);
}

static void start_all(const char *status_path)
{
    sigset_t user;

    sigemptyset(&user);
    sigaddset(&user, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &user, NULL));
    MUST(events.signals = signalfd(-1, &user, SFD_NONBLOCK));
    MUST(events.counter = eventfd(0, EFD_NONBLOCK));
    MUST(events.semaphore = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK));
    start_timers();
    start_epoll();
    start_watching(status_path);
    drain(events.inotify);
}

static void check_wakes(uint64_t data)
{
    struct epoll_event found[4] = { 0 };

    EXPECT(1, epoll_wait(events.outer, found, 4, 0));
    EXPECT(ON_INNER, found[0].data.u64);
    EXPECT(1, epoll_wait(events.inner, found, 4, 0));
    EXPECT(data, found[0].data.u64);
}

static void check_epoll(uint64_t round)
{
    struct signalfd_siginfo info = { 0 };
    eventfd_t count = 0;

    EXPECT(0, eventfd_write(events.counter, round + 1));
    check_wakes(ON_COUNTER);
    EXPECT(0, eventfd_read(events.counter, &count));
    EXPECT(round + 1, count);
    EXPECT(0, eventfd_write(events.closed, 1));
    check_wakes(ON_CLOSED);
    EXPECT(0, eventfd_read(events.closed, &count));
    EXPECT(0, kill(getpid(), SIGUSR1));
    check_wakes(ON_SIGNAL);
    EXPECT(sizeof info, read(events.signals, &info, sizeof info));
    EXPECT(SIGUSR1, info.ssi_signo);
}

static void check_semaphore(void)
{
    eventfd_t count = 0;

    for (int i = 0; i < 3; i++) {
        EXPECT(0, eventfd_read(events.semaphore, &count));
        EXPECT(1, count);
    }
    EXPECT(-1, eventfd_read(events.semaphore, &count));
    EXPECT(0, eventfd_write(events.semaphore, 3));
}

/* The periodic timer never counts more than the clock says; the other keeps the moment of its end. */
static void check_timers(void)
{
    struct itimerspec left;
    uint64_t ticks = 0, now, end;

    if (read(events.timer, &ticks, sizeof ticks) < 0)
        EXPECT(EAGAIN, errno);
    events.ticks += ticks;
    now = now_ns(CLOCK_MONOTONIC);
    if (events.ticks > (now - events.started) / (INTERVAL_MS * 1000000ull) + 1)
        check_fail(NULL, (now - events.started) / (INTERVAL_MS * 1000000ull), events.ticks, "too many ticks");
    MUST(timerfd_gettime(events.hour, &left));
    end = now + (uint64_t)left.it_value.tv_sec * 1000000000 + (uint64_t)left.it_value.tv_nsec;
    if (end + 1000000000 < events.hour_end || end > events.hour_end + 1000000000)
        check_fail(NULL, events.hour_end, end, "the timer an hour ahead has moved");
}

static void expect_event(uint32_t mask)
{
    char buffer[4096] __attribute__((aligned(8))) = { 0 };
    struct inotify_event *event = (struct inotify_event *)buffer;

    EXPECT(sizeof *event + 16, read(events.inotify, buffer, sizeof buffer));
    EXPECT(events.watch, event->wd);
    EXPECT(mask, event->mask);
    EXPECT(0, strcmp(event->name, "new"));
}

/* Only before the first beat and after the last: a process cannot be moved while file events wait. */
static void check_inotify(void)
{
    char path[600];
    int fd;

    snprintf(path, sizeof path, "%s/new", events.directory);
    MUST(fd = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0644));
    MUST(close(fd));
    expect_event(IN_CREATE);
    MUST(unlink(path));
    expect_event(IN_DELETE);
}

int main(int argc, char **argv)
{
    check_start(argc, argv, 1);
    start_all(argv[1]);
    check_inotify();
    check_running();
    for (uint64_t round = 0;; round++) {
        check_epoll(round);
        check_semaphore();
        check_timers();
        check_beat(0);
        if (check_stopping) {
            check_inotify();
            return check_end();
        }
        check_rest(1000);
    }
}
