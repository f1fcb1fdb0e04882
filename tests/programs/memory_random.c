/* Threads visit random pages, check every word of a page and often write a new generation of it.
 *
 * memory_random STATUS MIB [THREADS [PACE_US]]: MIB of private memory, THREADS (1) that share them out, a rest of
 * PACE_US (0: none) after every 64 visits. One page in sixteen is not written at the start. How long the first touch
 * of each visit took goes into the histogram: after a move that is what the process itself sees of post-copy.
 */
#include "check.h"

enum { BATCH = 64 };

static struct {
    uint8_t *pages;
    uint32_t *generations;
    size_t count;
    unsigned threads;
    unsigned pace_us;
} memory;

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

static void visit(size_t page, bool rewrite)
{
    volatile uint64_t *first = (uint64_t *)(memory.pages + page * PAGE);
    uint64_t start = now_ns(CLOCK_MONOTONIC);

    (void)*first;
    record_stall(now_ns(CLOCK_MONOTONIC) - start);
    check_page(page);
    if (rewrite)
        rewrite_page(page);
}

/* Worker w owns the pages that are w modulo the number of threads: no page has two writers. */
static void *work(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;
    size_t mine = memory.count / memory.threads;
    uint64_t random = 0x9E3779B97F4A7C15u * (worker + 1);

    while (!check_stopping) {
        for (unsigned i = 0; i < BATCH; i++) {
            uint64_t draw = random_next(&random);

            visit((draw >> 8) % mine * memory.threads + worker, draw & 1);
        }
        check_beat(worker);
        if (memory.pace_us > 0)
            check_rest(memory.pace_us);
    }
    return NULL;
}

static void set_up(int argc, char **argv)
{
    memory.count = (size_t)(argc > 2 ? atoi(argv[2]) : 16) << 8;
    memory.threads = argc > 3 ? (unsigned)atoi(argv[3]) : 1;
    memory.pace_us = argc > 4 ? (unsigned)atoi(argv[4]) : 0;
    if (memory.threads < 1 || memory.threads > WORKERS_MAX || memory.count < memory.threads)
        check_die("1 to 32 threads, at least one page each");
    check_start(argc, argv, memory.threads);
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
    pthread_t threads[WORKERS_MAX];

    set_up(argc, argv);
    for (unsigned worker = 1; worker < memory.threads; worker++)
        threads[worker] = start_thread(work, (void *)(uintptr_t)worker);
    check_running();
    work((void *)0);
    status->phase = FINAL;
    for (unsigned worker = 1; worker < memory.threads; worker++)
        pthread_join(threads[worker], NULL);
    for (size_t page = 0; page < memory.count; page++)
        check_page(page);
    return check_end();
}
