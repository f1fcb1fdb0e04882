/* AIO contexts: their rings stay where their ids say, are empty between requests, and still work.
 *
 * SIGUSR1 leaves a request in the first ring: a read, whose completion is there at once, or with MS as second argument
 * a poll that is complete when a timer of that many milliseconds has run out. Nobody fetches it before SIGUSR2. */
#include "check.h"

#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>

enum { RING_MAGIC = 0xa10a10a1 }; /* AIO_RING_MAGIC of fs/aio.c, the fifth word of struct aio_ring */
enum { READ = 7, POLL = 8 };      /* aio_data of our requests */

static volatile sig_atomic_t leave, fetch;
static struct iocb request;
static char magic[4];

static void on_user_signal(int number)
{
    if (number == SIGUSR1)
        leave = 1;
    else
        fetch = 1;
}

static void submit(aio_context_t ring, struct iocb what)
{
    struct iocb *requests[] = { &request };

    request = what;
    EXPECT(1, syscall(SYS_io_submit, ring, 1L, requests));
}

static void submit_read(aio_context_t ring, int fd)
{
    memset(magic, 0, sizeof magic);
    submit(ring, (struct iocb){ .aio_data = READ, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)fd,
                                .aio_buf = (uintptr_t)magic, .aio_nbytes = sizeof magic });
}

static void submit_poll(aio_context_t ring, int timer, long ms)
{
    struct itimerspec after = { .it_value = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 } };

    EXPECT(0, timerfd_settime(timer, 0, &after, NULL));
    submit(ring, (struct iocb){ .aio_data = POLL, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = (uint32_t)timer,
                                .aio_buf = POLLIN });
}

static void expect_done(aio_context_t ring)
{
    struct io_event done;
    long count;

    do
        count = syscall(SYS_io_getevents, ring, 1L, 1L, &done, NULL);
    while (count < 0 && errno == EINTR);
    EXPECT(1, count);
    EXPECT(request.aio_data, done.data);
    EXPECT((uintptr_t)&request, done.obj);
    if (done.data == POLL) {
        EXPECT(POLLIN, done.res);
        return;
    }
    EXPECT(sizeof magic, done.res);
    EXPECT(0, memcmp(magic, "\177ELF", 4));
}

/* No event may be there; a freeze shows as EINTR (fs/aio.c, io_getevents). */
static void expect_idle(aio_context_t ring)
{
    struct timespec now = { 0 };
    struct io_event none;
    long count;

    do
        count = syscall(SYS_io_getevents, ring, 0L, 1L, &none, &now);
    while (count < 0 && errno == EINTR);
    EXPECT(0, count);
    EXPECT(RING_MAGIC, ((const uint32_t *)ring)[4]);
}

/* All that can be checked of idle rings: between a request and its completion a freeze is refused. */
static void use(aio_context_t ring, int fd)
{
    expect_idle(ring);
    submit_read(ring, fd);
    expect_done(ring);
    expect_idle(ring);
}

int main(int argc, char **argv)
{
    const struct sigaction on_user = { .sa_handler = on_user_signal };
    long ms = argc > 2 ? atol(argv[2]) : 0;
    aio_context_t ring = 0, second = 0;
    bool left = false;
    int fd, timer;

    check_start(argc, argv, 1);
    MUST(fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    MUST(timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
    MUST(syscall(SYS_io_setup, 8L, &ring));
    MUST(syscall(SYS_io_setup, 200L, &second));
    MUST(sigaction(SIGUSR1, &on_user, NULL));
    MUST(sigaction(SIGUSR2, &on_user, NULL));
    use(ring, fd);
    use(second, fd);
    check_running();
    while (!check_stopping) {
        if (leave && !left) {
            if (ms != 0)
                submit_poll(ring, timer, ms);
            else
                submit_read(ring, fd);
            left = true;
        }
        if (fetch && left) {
            expect_done(ring);
            leave = fetch = left = false;
            use(ring, fd);
        }
        if (!left)
            expect_idle(ring);
        expect_idle(second);
        check_beat(0);
        check_rest(1000);
    }
    EXPECT(false, left);
    use(ring, fd);
    use(second, fd);
    EXPECT(0, syscall(SYS_io_destroy, ring));
    EXPECT(0, syscall(SYS_io_destroy, second));
    return check_end();
}
