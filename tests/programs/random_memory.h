/* Private memory that threads share out, visit at random and write new generations of, for the programs that do that. */
#ifndef RANDOM_MEMORY_H
#define RANDOM_MEMORY_H

#include "check.h"

enum { BATCH = 64 };

static struct {
    uint8_t *pages;
    uint32_t *generations;
    size_t count;
    unsigned threads;
    unsigned pace_us;
} memory;

static inline bool check_page(size_t page)
{
    uint8_t *at = memory.pages + page * PAGE;

    return verify_page((uint64_t *)at, (uintptr_t)at, memory.generations[page]);
}

static inline void rewrite_page(size_t page)
{
    uint8_t *at = memory.pages + page * PAGE;

    fill_page((uint64_t *)at, (uintptr_t)at, ++memory.generations[page]);
}

static inline void visit(size_t page, bool rewrite)
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
static inline void *visit_memory(void *argument)
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

/* STATUS MIB [THREADS [PACE_US]], `threads` otherwise. */
static inline void memory_options(int argc, char **argv, unsigned threads)
{
    memory.count = (size_t)(argc > 2 ? atoi(argv[2]) : 16) << 8;
    memory.threads = argc > 3 ? (unsigned)atoi(argv[3]) : threads;
    memory.pace_us = argc > 4 ? (unsigned)atoi(argv[4]) : 0;
    if (memory.threads < 1 || memory.threads >= WORKERS_MAX || memory.count < memory.threads)
        check_die("1 to 31 threads, at least one page each");
}

/* One page in sixteen is not written. */
static inline void make_memory(void)
{
    memory.pages = mmap(NULL, memory.count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory.generations = calloc(memory.count, sizeof *memory.generations);
    if (memory.pages == MAP_FAILED || memory.generations == NULL)
        check_die("memory");
    for (size_t page = 0; page < memory.count; page++)
        if (page % 16 != 7)
            rewrite_page(page);
}

/* In all threads, this one too, until the program is to end. */
static inline void visit_all_memory(void)
{
    pthread_t threads[WORKERS_MAX];

    for (unsigned worker = 1; worker < memory.threads; worker++)
        threads[worker] = start_thread(visit_memory, (void *)(uintptr_t)worker);
    check_running();
    visit_memory((void *)0);
    status->phase = FINAL;
    for (unsigned worker = 1; worker < memory.threads; worker++)
        pthread_join(threads[worker], NULL);
}

static inline void check_all_memory(void)
{
    for (size_t page = 0; page < memory.count; page++)
        check_page(page);
}

#endif
