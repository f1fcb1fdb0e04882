/* Drives the page server from C, for the sanitizers: server.sh builds and runs it. Exit status 0: all is well. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "_server.h"
#include "crc32c.h"
#include "mutate.h"
#include "native.h"
#include "zstd.h"

#define AREA_PAGES 600u
#define OBJECT (42u << 8 | 1u)

#define CHECK(condition)                                                     \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            _exit(1);                                                        \
        }                                                                    \
    } while (0)

static unsigned char *area;

/* A third of the pages is zero, in runs of every length up to 7. */
static void fill_area(void)
{
    area = mmap(NULL, AREA_PAGES * PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(area != MAP_FAILED);
    for (unsigned page = 0; page < AREA_PAGES; page++)
        for (unsigned i = 0; page % 21 >= 7 && i < PAGE_BYTES; i++)
            area[page * PAGE_BYTES + i] = (unsigned char)(page * 31 + i * 7);
}

/* A stopped copy of this process in which page 5 is unmapped and page 6 has lost its permissions. */
static pid_t stopped_child(void)
{
    pid_t pid = fork();
    int status;

    CHECK(pid >= 0);
    if (pid == 0) {
        CHECK(munmap(area + 5 * PAGE_BYTES, PAGE_BYTES) == 0);
        CHECK(mprotect(area + 6 * PAGE_BYTES, PAGE_BYTES, PROT_NONE) == 0);
        raise(SIGSTOP);
        _exit(1);
    }
    CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
    return pid;
}

static void end_child(pid_t pid)
{
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
}

static struct server *new_server(pid_t pid, struct server_segment *segment)
{
    struct server *server;
    char path[64];

    snprintf(path, sizeof(path), "/proc/%d/mem", pid);
    *segment = (struct server_segment){
        .object = OBJECT,
        .start = (uint64_t)area,
        .end = (uint64_t)area + AREA_PAGES * PAGE_BYTES,
        .where = (uint64_t)area,
        .pid = pid,
        .pidfd = (int)syscall(SYS_pidfd_open, pid, 0),
        .fd = open(path, O_RDONLY),
    };
    CHECK(segment->pidfd >= 0 && segment->fd >= 0);
    CHECK(server_new(segment, 1, false, &server) == 0);
    return server;
}

static void free_server(struct server *server, const struct server_segment *segment)
{
    server_free(server);
    close(segment->pidfd);
    close(segment->fd);
}

static int connect_over(struct server *server, int channel, int *number)
{
    int ends[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    *number = server_serve(server, ends[1], channel);
    CHECK(*number >= 0);
    return ends[0];
}

static int connect_to(struct server *server, int *number)
{
    return connect_over(server, 0, number);
}

static void ask(int fd, uint64_t addr, uint32_t pages)
{
    struct page_frame get = {.type = FRAME_GET, .count = pages, .object = OBJECT, .addr = addr, .tag = pages};

    CHECK(send(fd, &get, sizeof(get), MSG_NOSIGNAL) == sizeof(get));
}

static void check_answer(int fd, uint64_t addr, uint32_t pages)
{
    static _Thread_local unsigned char data[FRAME_MAX_PAGES * PAGE_BYTES];
    struct page_frame frame;

    for (uint64_t end = addr + (uint64_t)pages * PAGE_BYTES; addr < end; addr += (uint64_t)frame.count * PAGE_BYTES) {
        size_t length;

        CHECK(recv(fd, &frame, sizeof(frame), MSG_WAITALL) == sizeof(frame));
        CHECK(frame.type == FRAME_PAGES && frame.tag == pages && frame.addr == addr);
        length = (size_t)frame.count * PAGE_BYTES;
        CHECK(addr + length <= end && !!(frame.flags & FRAME_LAST) == (addr + length == end));
        if (frame.flags & FRAME_ABSENT) {
            CHECK(frame.count == 1 && addr == (uint64_t)area + 5 * PAGE_BYTES);
            continue;
        }
        memset(data, 0, length);
        if (!(frame.flags & FRAME_ZERO)) {
            CHECK(recv(fd, data, length, MSG_WAITALL) == (ssize_t)length);
            CHECK(frame.crc == crc32c_pages(data, frame.count));
        }
        CHECK(memcmp(data, (void *)addr, length) == 0);
    }
}

static void *stream(void *argument)
{
    int fd = *(int *)argument;

    for (unsigned round = 0; round < 50; round++) {
        ask(fd, (uint64_t)area, AREA_PAGES);
        check_answer(fd, (uint64_t)area, AREA_PAGES);
    }
    return NULL;
}

/* Bulk and urgent at once, with somebody reading the counters. */
static void serve_pages(struct server *server)
{
    int bulk_number, urgent_number;
    int bulk = connect_to(server, &bulk_number), urgent = connect_to(server, &urgent_number);
    struct server_status status;
    pthread_t thread;

    CHECK(pthread_create(&thread, NULL, stream, &bulk) == 0);
    for (unsigned page = 10; page < AREA_PAGES - 10; page++) {
        for (unsigned i = 0; i < 10; i++)
            ask(urgent, (uint64_t)area + (page + i) * PAGE_BYTES, 1);
        for (unsigned i = 0; i < 10; i++)
            check_answer(urgent, (uint64_t)area + (page + i) * PAGE_BYTES, 1);
        CHECK(server_status(server, bulk_number, &status) == 0 && status.cause == SERVER_RUNNING);
    }
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(server_status(server, bulk_number, &status) == 0 && status.requests == 50 && status.absent == 50);
    close(bulk);
    close(urgent);
}

static void expect_end(struct server *server, int fd, int number, enum server_cause cause)
{
    struct server_status status;
    char byte;

    CHECK(recv(fd, &byte, 1, 0) == 0);
    CHECK(server_status(server, number, &status) == 0 && status.cause == (int32_t)cause);
    close(fd);
}

/* Frames of noise; each ends its connection or is answered, and the table of connections grows and shrinks. */
static void serve_bad_requests(struct server *server)
{
    unsigned seed = 1;

    for (unsigned round = 0; round < 200; round++) {
        struct page_frame frame;
        int number, fd = connect_to(server, &number);

        for (size_t i = 0; i < sizeof(frame); i++)
            ((unsigned char *)&frame)[i] = (unsigned char)(rand_r(&seed) >> 8);
        frame.type = FRAME_GET;
        CHECK(send(fd, &frame, sizeof(frame), MSG_NOSIGNAL) == sizeof(frame));
        expect_end(server, fd, number, SERVER_BAD_FRAME);
    }
}

struct unpacker {
    struct zstd zstd;
    void *context;
};

static void make_unpacker(struct unpacker *u)
{
    CHECK(zstd_load(&u->zstd));
    u->context = u->zstd.new_unpacker();
    CHECK(u->context);
}

static void end_unpacker(struct unpacker *u)
{
    u->zstd.end_unpacker(u->context);
    zstd_unload(&u->zstd);
}

static void receive_packed(const struct unpacker *u, int fd, unsigned char *data, size_t length)
{
    static unsigned char packed[FRAME_MAX_PAGES * PAGE_BYTES];
    uint32_t size;

    CHECK(recv(fd, &size, sizeof(size), MSG_WAITALL) == (ssize_t)sizeof(size) && size && size < length);
    CHECK(recv(fd, packed, size, MSG_WAITALL) == (ssize_t)size);
    CHECK(zstd_unpack(&u->zstd, u->context, data, length, packed, size));
}

/* Until the server hangs up: whatever is answered is whole, and content is what the area has. */
static void check_answers(const struct unpacker *u, int fd)
{
    static unsigned char data[FRAME_MAX_PAGES * PAGE_BYTES];
    struct page_frame frame;
    ssize_t n;

    while ((n = recv(fd, &frame, sizeof(frame), MSG_WAITALL)) == (ssize_t)sizeof(frame)) {
        size_t length = (size_t)frame.count * PAGE_BYTES;

        CHECK(frame.type == FRAME_PAGES && frame.count >= 1 && frame.count <= FRAME_MAX_PAGES);
        if (frame.flags & (FRAME_ZERO | FRAME_ABSENT))
            continue;
        CHECK(frame.object == OBJECT && frame.addr >= (uint64_t)area && frame.addr % PAGE_BYTES == 0);
        CHECK(frame.addr + length <= (uint64_t)area + AREA_PAGES * PAGE_BYTES);
        if (frame.flags & FRAME_PACKED)
            receive_packed(u, fd, data, length);
        else
            CHECK(recv(fd, data, length, MSG_WAITALL) == (ssize_t)length);
        CHECK(memcmp(data, (void *)frame.addr, length) == 0);
    }
    CHECK(n == 0);
}

/* Requests that are nearly right. */
static void serve_mutated_requests(struct server *server, unsigned rounds, unsigned seed)
{
    enum { GETS = 4, ROOM = GETS * sizeof(struct page_frame) + 256 };
    unsigned char out[ROOM];
    struct unpacker unpacker;

    make_unpacker(&unpacker);
    for (unsigned round = 0; round < rounds; round++) {
        int number, fd = connect_to(server, &number);
        size_t length = 0;

        for (; length < GETS * sizeof(struct page_frame); length += sizeof(struct page_frame)) {
            uint32_t pages = (uint32_t)rand_r(&seed) % 3 + 1, page = (uint32_t)rand_r(&seed) % AREA_PAGES;
            struct page_frame get = {.type = FRAME_GET,
                                     .flags = round % 2 ? FRAME_PACKED : 0,
                                     .count = pages,
                                     .object = OBJECT,
                                     .addr = (uint64_t)area + (uint64_t)page * PAGE_BYTES,
                                     .tag = round};

            memcpy(out + length, &get, sizeof(get));
        }
        for (unsigned i = (unsigned)rand_r(&seed) % 3 + 1; i > 0 && length > 0; i--)
            length = mutate(out, length, ROOM, &seed);
        CHECK(send(fd, out, length, MSG_NOSIGNAL) == (ssize_t)length);
        CHECK(shutdown(fd, SHUT_WR) == 0);
        check_answers(&unpacker, fd);
        close(fd);
    }
    end_unpacker(&unpacker);
}

/* --- releasing --------------------------------------------------------------------------------------------------- */

#define FILE_PAGES 4096u
#define ASK_PAGES 16u
#define AGAIN 3u

enum { COME = 1, FREED };

/* One channel of a link whose client says what has come. No page of the file is zero before it is released. */
struct reader {
    int fd;
    atomic_uchar *came; /* of each page of the file: COME, or FREED */
    unsigned step;      /* odd: the order in which the channel asks */
    pthread_t thread;
};

/* Every byte of a page is its number modulo 255, and 1. */
static unsigned char byte_of(uint64_t page)
{
    return (unsigned char)(page % 255 + 1);
}

static int make_file(void)
{
    unsigned char page[PAGE_BYTES];
    int fd = memfd_create("pages", MFD_CLOEXEC);

    CHECK(fd >= 0);
    for (unsigned i = 0; i < FILE_PAGES; i++) {
        memset(page, byte_of(i), sizeof(page));
        CHECK(write(fd, page, sizeof(page)) == (ssize_t)sizeof(page));
    }
    return fd;
}

/* It may come once more after it was freed: it was on its way then. */
static void note_came(atomic_uchar *came)
{
    unsigned char before = 0;

    atomic_compare_exchange_strong(came, &before, COME);
}

/* What is freed is never taken for zeros: it has come before, or comes over the other channel. */
static void take_pages(const struct reader *r, uint64_t addr, unsigned pages)
{
    static _Thread_local unsigned char data[FRAME_MAX_PAGES * PAGE_BYTES];
    struct page_frame frame;

    for (uint64_t end = addr + (uint64_t)pages * PAGE_BYTES; addr < end; addr += (uint64_t)frame.count * PAGE_BYTES) {
        CHECK(recv(r->fd, &frame, sizeof(frame), MSG_WAITALL) == sizeof(frame) && frame.addr == addr);
        CHECK(!(frame.flags & (FRAME_ZERO | FRAME_ABSENT)));
        if (frame.flags & FRAME_UNDER_WAY)
            continue;
        CHECK(recv(r->fd, data, (size_t)frame.count * PAGE_BYTES, MSG_WAITALL) == (ssize_t)frame.count * PAGE_BYTES);
        for (uint64_t i = 0; i < (uint64_t)frame.count * PAGE_BYTES; i++)
            CHECK(data[i] == byte_of((addr + i) / PAGE_BYTES));
        for (uint64_t i = 0; i < frame.count; i++)
            note_came(&r->came[addr / PAGE_BYTES + i]);
    }
}

/* Asks for each page more than once: by the second answer it may be released. */
static void *read_file(void *reader)
{
    const struct reader *r = reader;

    for (unsigned i = 0; i < FILE_PAGES / ASK_PAGES; i++) {
        uint64_t addr = (uint64_t)(i * r->step % (FILE_PAGES / ASK_PAGES)) * ASK_PAGES * PAGE_BYTES;

        for (unsigned k = 0; k < AGAIN; k++)
            ask(r->fd, addr, ASK_PAGES);
        for (unsigned k = 0; k < AGAIN; k++)
            take_pages(r, addr, ASK_PAGES);
    }
    return NULL;
}

/* Frees what has come, until all has. */
static void release_all(struct server *server, int file, atomic_uchar *came)
{
    for (unsigned left = FILE_PAGES; left > 0;)
        for (uint64_t i = 0; i < FILE_PAGES; i++) {
            if (atomic_load(&came[i]) != COME)
                continue;
            CHECK(server_release(server, OBJECT, i * PAGE_BYTES, 1) == 1);
            CHECK(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(i * PAGE_BYTES),
                            PAGE_BYTES) == 0);
            atomic_store(&came[i], FREED);
            left--;
        }
}

static void serve_what_is_released(void)
{
    static atomic_uchar came[FILE_PAGES];
    int file = make_file(), number;
    const struct server_segment segment = {.object = OBJECT, .end = FILE_PAGES * PAGE_BYTES, .fd = file};
    struct reader readers[2] = {{.came = came, .step = 1}, {.came = came, .step = 7}};
    struct server *server;

    CHECK(server_new(&segment, 1, true, &server) == 0);
    for (int i = 0; i < 2; i++) {
        readers[i].fd = connect_over(server, i, &number);
        CHECK(pthread_create(&readers[i].thread, NULL, read_file, &readers[i]) == 0);
    }
    release_all(server, file, came);
    for (int i = 0; i < 2; i++)
        CHECK(pthread_join(readers[i].thread, NULL) == 0);
    server_new_link(server);
    for (int i = 0; i < 2; i++)
        close(readers[i].fd);
    readers[0].fd = connect_over(server, 0, &number);
    ask(readers[0].fd, 0, 1);
    expect_end(server, readers[0].fd, number, SERVER_RELEASED);
    server_free(server);
    close(file);
}

/* --- processes that end ------------------------------------------------------------------------------------------ */

static void serve_a_dead_process(struct server *server, pid_t pid)
{
    int number, fd = connect_to(server, &number);

    end_child(pid);
    ask(fd, (uint64_t)area, AREA_PAGES);
    expect_end(server, fd, number, SERVER_SOURCE_GONE);
}

/* While one client waits and another has stopped reading. */
static void stop_in_the_middle(struct server *server)
{
    int idle_number, number, idle = connect_to(server, &idle_number), fd = connect_to(server, &number);
    char byte;

    for (unsigned i = 0; i < 20; i++)
        ask(fd, (uint64_t)area, AREA_PAGES);
    CHECK(recv(fd, &byte, 1, 0) == 1);
    server_stop(server);
    expect_end(server, idle, idle_number, SERVER_HUNG_UP);
    close(fd);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    struct server_segment segment;
    struct server *server;
    pid_t pid;

    fill_area();
    pid = stopped_child();
    server = new_server(pid, &segment);
    if (!strcmp(what, "pages"))
        serve_pages(server);
    else if (!strcmp(what, "bad"))
        serve_bad_requests(server);
    else if (!strcmp(what, "mutated") && argc == 4)
        serve_mutated_requests(server, (unsigned)atoi(argv[2]), (unsigned)strtoul(argv[3], NULL, 10));
    else if (!strcmp(what, "gone"))
        serve_a_dead_process(server, pid);
    else if (!strcmp(what, "stop"))
        stop_in_the_middle(server);
    else if (!strcmp(what, "release"))
        serve_what_is_released();
    else
        CHECK(!"one of pages, bad, mutated ROUNDS SEED, gone, stop, release");
    free_server(server, &segment);
    end_child(pid);
    return 0;
}
