/* An AIO context: its ring stays where its id says, is empty between requests, and still works. */
#include "check.h"

#include <linux/aio_abi.h>
#include <sys/syscall.h>

enum { RING_MAGIC = 0xa10a10a1 }; /* AIO_RING_MAGIC of fs/aio.c, the fifth word of struct aio_ring */

static void read_through_ring(aio_context_t ring, int fd)
{
    char magic[4] = "";
    struct iocb request = { .aio_data = 7, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)fd,
                            .aio_buf = (uintptr_t)magic, .aio_nbytes = sizeof magic };
    struct iocb *requests[] = { &request };
    struct io_event done;
    long count;

    EXPECT(1, syscall(SYS_io_submit, ring, 1L, requests));
    do
        count = syscall(SYS_io_getevents, ring, 1L, 1L, &done, NULL);
    while (count < 0 && errno == EINTR);
    EXPECT(1, count);
    EXPECT(7, done.data);
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

int main(int argc, char **argv)
{
    aio_context_t ring = 0, second = 0;
    int fd;

    check_start(argc, argv, 1);
    MUST(fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    MUST(syscall(SYS_io_setup, 8L, &ring));
    MUST(syscall(SYS_io_setup, 200L, &second));
    check_running();
    while (!check_stopping) {
        expect_idle(ring);
        expect_idle(second);
        read_through_ring(ring, fd);
        read_through_ring(second, fd);
        check_beat(0);
        check_rest(1000);
    }
    EXPECT(0, syscall(SYS_io_destroy, ring));
    EXPECT(0, syscall(SYS_io_destroy, second));
    return check_end();
}
