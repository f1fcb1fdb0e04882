/* Threads and memory, and what else an ordinary service has: a file, a pipe and a socket pair with bytes in them.
 *
 * mixed STATUS MIB [THREADS [PACE_US]]: MIB of private memory that THREADS (2) visit at random as memory_random does,
 * with a rest of PACE_US after every 64 visits. One more thread passes numbers through the pipe, the sockets and the
 * file STATUS.file: in each channel DEPTH numbers are always on their way, and the file's offset is known.
 */
#include "check.h"

#include <sys/socket.h>

enum { BATCH = 64, DEPTH = 8 };

static struct {
    uint8_t *pages;
    uint32_t *generations;
    size_t count;
    unsigned threads;
    unsigned pace_us;
} memory;

static int a_pipe[2], sockets[2], file;

static bool check_page(size_t page)
{
    uint8_t *at = memory.pages + page * PAGE;

    return verify_page((uint64_t *)at, (uintptr_t)at, memory.generations[page]);
}

static void rewrite_page(size_t page)
{
    uint8_t *at = memory.pages + page * PAGE;

    fill_page((uint64_t *)at, (uintptr_t)at, ++memory.generations[page]);
}

/* Worker w owns the pages that are w modulo the number of threads: no page has two writers. */
static void *visit_memory(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;
    size_t mine = memory.count / memory.threads;
    uint64_t random = 0x9E3779B97F4A7C15u * (worker + 1);

    while (!check_stopping) {
        for (unsigned i = 0; i < BATCH; i++) {
            uint64_t draw = random_next(&random);
            size_t page = (draw >> 8) % mine * memory.threads + worker;

            check_page(page);
            if (draw & 1)
                rewrite_page(page);
        }
        check_beat(worker);
        if (memory.pace_us > 0)
            check_rest(memory.pace_us);
    }
    return NULL;
}

static void send_number(uint64_t number)
{
    EXPECT(8, write(a_pipe[1], &number, 8));
    EXPECT(8, write(sockets[number & 1], &number, 8));
}

static void receive_number(uint64_t number)
{
    uint64_t found = 0;

    EXPECT(8, read(a_pipe[0], &found, 8));
    EXPECT(number, found);
    EXPECT(8, read(sockets[!(number & 1)], &found, 8));
    EXPECT(number, found);
}

static void keep_in_file(uint64_t number)
{
    off_t at = (off_t)(number & 511) * 8;
    uint64_t found = 0;

    EXPECT(at, lseek(file, 0, SEEK_CUR));
    EXPECT(8, write(file, &number, 8));
    EXPECT(8, pread(file, &found, 8, at));
    EXPECT(number, found);
    if ((number & 511) == 511)
        EXPECT(0, lseek(file, 0, SEEK_SET));
}

static void *pass_numbers(void *unused)
{
    uint64_t next = 0;

    for (; next < DEPTH; next++)
        send_number(next);
    for (; !check_stopping; next++) {
        receive_number(next - DEPTH);
        send_number(next);
        keep_in_file(next - DEPTH);
        check_beat(memory.threads);
        check_rest(500);
    }
    return unused;
}

static void set_up(int argc, char **argv)
{
    char path[4096];

    memory.count = (size_t)(argc > 2 ? atoi(argv[2]) : 16) << 8;
    memory.threads = argc > 3 ? (unsigned)atoi(argv[3]) : 2;
    memory.pace_us = argc > 4 ? (unsigned)atoi(argv[4]) : 0;
    if (memory.threads < 1 || memory.threads >= WORKERS_MAX || memory.count < memory.threads)
        check_die("1 to 31 threads, at least one page each");
    check_start(argc, argv, memory.threads + 1);
    snprintf(path, sizeof path, "%s.file", argv[1]);
    MUST(file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600));
    MUST(pipe(a_pipe));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
    memory.pages = mmap(NULL, memory.count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory.generations = calloc(memory.count, sizeof *memory.generations);
    if (memory.pages == MAP_FAILED || memory.generations == NULL)
        check_die("memory");
    for (size_t page = 0; page < memory.count; page++)
        if (page % 16 != 7)
            rewrite_page(page);
}

int main(int argc, char **argv)
{
    pthread_t threads[WORKERS_MAX], passing;

    set_up(argc, argv);
    for (unsigned worker = 1; worker < memory.threads; worker++)
        threads[worker] = start_thread(visit_memory, (void *)(uintptr_t)worker);
    passing = start_thread(pass_numbers, NULL);
    check_running();
    visit_memory((void *)0);
    status->phase = FINAL;
    for (unsigned worker = 1; worker < memory.threads; worker++)
        pthread_join(threads[worker], NULL);
    pthread_join(passing, NULL);
    for (size_t page = 0; page < memory.count; page++)
        check_page(page);
    return check_end();
}
