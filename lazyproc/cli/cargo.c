/* The demo's cargo: threads visit random pages without pause, check every word and often write a new generation.
 *
 * cargo STATUS MIB THREADS. STATUS is a file of one page, mapped shared, so that the demo can watch from outside
 * and the cargo needs no descriptor. SIGTERM asks for a last check of every page; exit status 0 when nothing was
 * ever wrong.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, THREADS_MAX = 16, BATCH = 64 };
enum { STARTING, RUNNING, VERIFIED };

/* Read by demo.py: five little-endian u64. */
struct status {
    uint64_t phase;
    uint64_t bad_words;
    uint64_t visits;
    uint64_t slowest_ns; /* the longest visit to a page */
    uint64_t pages;
};

static struct status *status;
static uint64_t *memory;
static uint32_t *generations;
static unsigned threads;
static volatile sig_atomic_t stopping;

static void stop(int signal)
{
    (void)signal;
    stopping = 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t word(uint64_t place, uint64_t generation)
{
    return ((place ^ generation << 40) * 0x9E3779B97F4A7C15u) | 1;
}

static void check(uint64_t page)
{
    const uint64_t *at = memory + page * WORDS;

    for (unsigned i = 0; i < WORDS; i++)
        if (at[i] != word(page * WORDS + i, generations[page]))
            __atomic_fetch_add(&status->bad_words, 1, __ATOMIC_RELAXED);
}

static void rewrite(uint64_t page)
{
    uint64_t *at = memory + page * WORDS;

    generations[page]++;
    for (unsigned i = 0; i < WORDS; i++)
        at[i] = word(page * WORDS + i, generations[page]);
}

static void visit(uint64_t page, bool write)
{
    uint64_t start = now_ns(), took;

    check(page);
    if (write)
        rewrite(page);
    took = now_ns() - start;
    if (took > status->slowest_ns)
        status->slowest_ns = took;
}

/* Worker w owns the pages that are w modulo the number of threads: no page has two writers. */
static void *work(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;
    uint64_t random = 0x9E3779B97F4A7C15u * (worker + 1);

    while (!stopping) {
        for (unsigned i = 0; i < BATCH; i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            visit((random >> 8) % (status->pages / threads) * threads + worker, random & 1);
        }
        __atomic_fetch_add(&status->visits, BATCH, __ATOMIC_RELAXED);
    }
    return NULL;
}

static bool set_up(char **argv)
{
    struct sigaction on_term = { .sa_handler = stop };
    int fd = open(argv[1], O_RDWR | O_CLOEXEC);
    uint64_t pages = strtoull(argv[2], NULL, 10) << 8;

    threads = (unsigned)atoi(argv[3]);
    if (fd < 0 || threads < 1 || threads > THREADS_MAX || pages < threads)
        return false;
    status = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    generations = calloc(pages, sizeof *generations);
    if (close(fd) < 0 || status == MAP_FAILED || memory == MAP_FAILED || generations == NULL)
        return false;
    status->pages = pages;
    for (uint64_t page = 0; page < pages; page++)
        rewrite(page);
    return sigaction(SIGTERM, &on_term, NULL) == 0;
}

int main(int argc, char **argv)
{
    pthread_t workers[THREADS_MAX];

    if (argc != 4 || !set_up(argv))
        return 2;
    for (unsigned worker = 1; worker < threads; worker++)
        if (pthread_create(&workers[worker], NULL, work, (void *)(uintptr_t)worker) != 0)
            return 2;
    __atomic_store_n(&status->phase, RUNNING, __ATOMIC_RELEASE);
    work(NULL);
    for (unsigned worker = 1; worker < threads; worker++)
        pthread_join(workers[worker], NULL);
    for (uint64_t page = 0; page < status->pages; page++)
        check(page);
    __atomic_store_n(&status->phase, VERIFIED, __ATOMIC_RELEASE);
    return status->bad_words != 0;
}
