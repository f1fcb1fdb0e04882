/* What the self-checking programs share.
 *
 * A program checks itself without end and reports through a status block: a regular file of 4096 bytes, named by
 * its first argument and mapped MAP_SHARED, so that whoever started it can watch without a word to it, and it needs
 * no descriptor that would have to be moved along. SIGTERM asks for a last, whole check; the exit status is then 0
 * when nothing was ever wrong, 1 otherwise, UNSUPPORTED when this machine lacks what is to be checked.
 *
 * The block, little-endian, read by tests/live/programs.py:
 *
 *   offset size  field
 *        0    8  magic      "LZCHECK1"
 *        8    4  pid        as the program sees itself
 *       12    4  phase      STARTING, RUNNING, FINAL, ENDED
 *       16    8  errors     how many checks failed
 *       24    8  bad_addr   the first failure: address (0: none), value expected, value found
 *       32    8  expected
 *       40    8  found
 *       48    4  flags      set by the starter before the start: EXCLUSIVE
 *       52    4  workers    how many of `beats` are in use
 *       56    8  slowest_ns the longest visit to memory
 *       64  192  what       the first failure in words, NUL-terminated
 *      256  256  beats      u64[32]: one heartbeat for each thread or process that checks
 *      512 3072  stalls     u64[384]: visits to memory of STALL_MIN_NS and longer, see stall_bucket
 */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, WORKERS_MAX = 32, STALL_BUCKETS = 384, STALL_MIN_NS = 5000 };
enum { STARTING, RUNNING, FINAL, ENDED };
enum { EXCLUSIVE = 1 }; /* fail when somebody else moves our heartbeats: two copies run */
enum { UNSUPPORTED = 77 };

struct status {
    char magic[8];
    uint32_t pid;
    uint32_t phase;
    uint64_t errors;
    uint64_t bad_addr;
    uint64_t expected;
    uint64_t found;
    uint32_t flags;
    uint32_t workers;
    uint64_t slowest_ns;
    char what[192];
    uint64_t beats[WORKERS_MAX];
    uint64_t stalls[STALL_BUCKETS];
};
_Static_assert(offsetof(struct status, what) == 64, "the layout is documented");
_Static_assert(offsetof(struct status, beats) == 256, "the layout is documented");
_Static_assert(offsetof(struct status, stalls) == 512, "the layout is documented");

static struct status *status;
static volatile sig_atomic_t check_stopping;

/* Ends a program whose set-up went wrong; no status block may exist yet. */
__attribute__((noreturn)) static inline void check_die(const char *what)
{
    perror(what);
    _exit(2);
}

#define MUST(call) ((call) < 0 ? check_die(#call) : (void)0)

/* Counts a failed check; the first one is kept with its address, values and words. */
__attribute__((format(printf, 4, 5))) static inline void
check_fail(const volatile void *addr, uint64_t expected, uint64_t found, const char *words, ...)
{
    va_list arguments;
    int used;

    if (__atomic_fetch_add(&status->errors, 1, __ATOMIC_ACQ_REL) != 0)
        return;
    status->bad_addr = (uintptr_t)addr;
    status->expected = expected;
    status->found = found;
    used = snprintf(status->what, sizeof status->what, "pid %d: ", (int)getpid());
    va_start(arguments, words);
    vsnprintf(status->what + used, sizeof status->what - (size_t)used, words, arguments);
    va_end(arguments);
}

/* One check of a value that a program can name. */
#define EXPECT(expected, found)                                                                               \
    do {                                                                                                      \
        uint64_t expected_ = (uint64_t)(expected), found_ = (uint64_t)(found);                                \
        if (expected_ != found_)                                                                              \
            check_fail(NULL, expected_, found_, "%s:%d: " #found " is not " #expected, __FILE_NAME__, __LINE__); \
    } while (0)

static inline void check_on_sigterm(int signal)
{
    (void)signal;
    check_stopping = 1;
}

/* Maps the status block and takes SIGTERM. */
static inline void check_start(int argc, char **argv, unsigned workers)
{
    struct sigaction on_term = { .sa_handler = check_on_sigterm };
    int fd;

    if (argc < 2) {
        fprintf(stderr, "usage: %s STATUS [ARGUMENT...]\n", argv[0]);
        _exit(2);
    }
    MUST(fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0666));
    MUST(ftruncate(fd, PAGE));
    status = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (status == MAP_FAILED)
        check_die("mmap of the status block");
    MUST(close(fd));
    MUST(sigaction(SIGTERM, &on_term, NULL));
    memcpy(status->magic, "LZCHECK1", 8);
    status->pid = (uint32_t)getpid();
    status->workers = workers;
}

/* The set-up is done: from here on anything may be frozen and moved. */
static inline void check_running(void)
{
    __atomic_store_n(&status->phase, RUNNING, __ATOMIC_RELEASE);
}

/* One sign of life of one worker, always from the same process, after each round of checks that it has done. */
static inline void check_beat(unsigned worker)
{
    static uint64_t mine[WORKERS_MAX];
    uint64_t seen = __atomic_load_n(&status->beats[worker], __ATOMIC_RELAXED);

    if ((status->flags & EXCLUSIVE) && seen != mine[worker])
        check_fail(&status->beats[worker], mine[worker], seen, "another copy of this process runs");
    mine[worker] = seen + 1;
    __atomic_store_n(&status->beats[worker], mine[worker], __ATOMIC_RELAXED);
}

static inline int check_end(void)
{
    __atomic_store_n(&status->phase, ENDED, __ATOMIC_RELEASE);
    return status->errors == 0 ? 0 : 1;
}

static inline uint64_t now_ns(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Keeps a machine with few cores usable. How it ends does not matter: a freeze may cut it short. */
static inline void check_rest(unsigned us)
{
    struct timespec time = { .tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000 };

    (void)nanosleep(&time, NULL);
}

/* Starts a thread that leaves SIGTERM to the main thread. */
static inline pthread_t start_thread(void *(*body)(void *), void *argument)
{
    sigset_t term, before;
    pthread_t thread;

    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &term, &before);
    errno = pthread_create(&thread, NULL, body, argument);
    if (errno != 0)
        check_die("pthread_create");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return thread;
}

/* xorshift64*: cheap and good enough to spread visits. `state` must not start as 0. */
static inline uint64_t random_next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Du;
}

/* The value a word should have: different for every address and generation, never 0 for generation > 0. */
static inline uint64_t word_value(uint64_t place, uint64_t generation)
{
    return generation == 0 ? 0 : ((place ^ generation << 40) * 0x9E3779B97F4A7C15u) | 1;
}

static inline void fill_page(volatile uint64_t *page, uint64_t place, uint64_t generation)
{
    for (unsigned i = 0; i < WORDS; i++)
        page[i] = word_value(place + 8 * i, generation);
}

/* Whether every word is the one that `fill_page` wrote; generation 0 is a page never written: zeros. */
static inline bool verify_page(const volatile uint64_t *page, uint64_t place, uint64_t generation)
{
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t found = page[i], expected = word_value(place + 8 * i, generation);

        if (found != expected) {
            check_fail(&page[i], expected, found, "word of page %p, generation %llu", (const void *)page,
                       (unsigned long long)generation);
            return false;
        }
    }
    return true;
}

/* Logarithmic buckets, 16 to an octave from 1024 ns on: bucket b begins at 2^(10 + b/16) * (1 + (b%16)/16) ns. */
static inline unsigned stall_bucket(uint64_t ns)
{
    unsigned octave = 63 - (unsigned)__builtin_clzll(ns | 1024);
    unsigned bucket = (octave - 10) * 16 + (unsigned)(ns >> (octave - 4) & 15);

    return bucket < STALL_BUCKETS ? bucket : STALL_BUCKETS - 1;
}

static inline void record_stall(uint64_t ns)
{
    if (ns < STALL_MIN_NS)
        return;
    __atomic_fetch_add(&status->stalls[stall_bucket(ns)], 1, __ATOMIC_RELAXED);
    if (ns > status->slowest_ns)
        status->slowest_ns = ns;
}

/* A child that dies with its parent, whatever happens. Returns like fork(2). */
static inline pid_t fork_child(void)
{
    pid_t pid = fork();

    if (pid < 0)
        check_die("fork");
    if (pid == 0 && prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        check_die("PR_SET_PDEATHSIG");
    return pid;
}

/* Waits for a child that should exit with 0. */
static inline void expect_exit_0(pid_t pid)
{
    int how;

    while (waitpid(pid, &how, 0) < 0) {
        if (errno != EINTR) {
            check_fail(NULL, 0, (uint64_t)errno, "child %d is gone", pid);
            return;
        }
    }
    if (how != 0)
        check_fail(NULL, 0, (uint64_t)how, "wait status of child %d", pid);
}

#endif
