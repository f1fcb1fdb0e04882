/* Visits every page of lazy memory in random order with several threads and verifies every word, while another thread
 * forks, discards, moves and unmaps lazy memory as fast as it can.
 *
 * toucher MIB THREADS: prints "UFFD ADDRESS LENGTH SIDE_ADDRESS SIDE_LENGTH" once both ranges are registered, starts at
 * a byte on standard input, exits 0 when every word was right. Word i of either range is (i + 1) * 0x9e3779b97f4a7c15,
 * or zero once discarded. With 0 threads the first range is moved away and back, a piece at a time and again and again,
 * while it comes, and nothing else is done to it; every other page of it is looked at.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define SIDE_PAGES 1024ul
#define PIECE 8ul
#define MOVES 3000

static uint64_t *memory, *side;
static size_t pages;

static void die(const char *what)
{
    perror(what);
    _exit(2);
}

static int wrong(const uint64_t *base, size_t page)
{
    for (size_t i = page * WORDS; i < (page + 1) * WORDS; i++)
        if (base[i] != (i + 1) * 0x9e3779b97f4a7c15ull)
            return 1;
    return 0;
}

static uint64_t next(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 33;
}

/* An odd step walks all of a power of two of pages. */
static void *touch(void *seed)
{
    uint64_t state = (uintptr_t)seed;
    size_t step = next(&state) | 1, page = next(&state) % pages;

    for (size_t i = 0; i < pages; i++, page = (page + step) & (pages - 1))
        if (wrong(memory, page)) {
            fprintf(stderr, "page %zu is wrong\n", page);
            _exit(1);
        }
    return NULL;
}

static void check_in_a_child(uint64_t *state)
{
    size_t page = next(state) & (pages - 1);
    pid_t pid = fork();
    int status;

    if (pid < 0)
        die("fork");
    if (pid == 0)
        _exit(wrong(memory, page));
    if (waitpid(pid, &status, 0) < 0 || status) {
        fprintf(stderr, "page %zu is wrong in a child\n", page);
        _exit(1);
    }
}

/* Piece by piece over the side range: away and back, verify; discard, verify zero; unmap. */
static void *disturb(void *seed)
{
    uint64_t state = (uintptr_t)seed;
    char *away = mmap(NULL, PIECE * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    for (size_t page = 0; page < SIDE_PAGES; page += PIECE) {
        char *piece = (char *)side + page * PAGE;

        if (page % (16 * PIECE) == 0)
            check_in_a_child(&state);
        if (mremap(piece, PIECE * PAGE, PIECE * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, away) != away)
            die("mremap");
        if (mremap(away, PIECE * PAGE, PIECE * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, piece) != piece)
            die("mremap back");
        if (wrong(side, page + 1)) {
            fprintf(stderr, "side page %zu is wrong\n", page + 1);
            _exit(1);
        }
        if (madvise(piece, 4 * PAGE, MADV_DONTNEED) < 0)
            die("madvise");
        if (side[page * WORDS + next(&state) % (4 * WORDS)]) {
            fprintf(stderr, "side page %zu is not zero\n", page);
            _exit(1);
        }
        if (munmap(piece + 6 * PAGE, 2 * PAGE) < 0)
            die("munmap");
    }
    return NULL;
}

/* With pauses of any length between the moves: whoever copies is then in step with none. */
static void move_all(void)
{
    size_t half = pages / 2 * PAGE;
    char *place = (char *)memory + half;
    char *away = mmap(NULL, half, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uint64_t state = 99;

    for (int i = 0; i < MOVES; i++) {
        char *from = i % 2 ? away : place, *to = i % 2 ? place : away;

        for (volatile uint64_t pause = next(&state) % 60000; pause; pause--)
            ;
        if (mremap(from, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
            die("mremap");
    }
    for (size_t page = 0; page < pages; page += 2)
        if (wrong(memory, page)) {
            fprintf(stderr, "page %zu is wrong\n", page);
            _exit(1);
        }
}

static void *lazy(int uffd, size_t length)
{
    struct uffdio_register range = {.mode = UFFDIO_REGISTER_MODE_MISSING};
    void *made = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (made == MAP_FAILED)
        die("mmap");
    range.range.start = (uintptr_t)made;
    range.range.len = length;
    if (ioctl(uffd, UFFDIO_REGISTER, &range) < 0)
        die("UFFDIO_REGISTER");
    return made;
}

int main(int argc, char **argv)
{
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
                                         UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
                                         UFFD_FEATURE_THREAD_ID};
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), uffd, threads = argc > 2 ? atoi(argv[2]) : 1;
    pthread_t ids[16], disturber;

    pages = argc > 1 ? (size_t)atoi(argv[1]) << 8 : 256;
    uffd = device < 0 ? -1 : ioctl(device, _IO(0xAA, 0), O_CLOEXEC);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0)
        die("userfaultfd");
    memory = lazy(uffd, pages * PAGE);
    side = lazy(uffd, SIDE_PAGES * PAGE);
    printf("%d %lu %lu %lu %lu\n", uffd, (uintptr_t)memory, pages * PAGE, (uintptr_t)side, SIDE_PAGES * PAGE);
    fflush(stdout);
    if (getchar() == EOF)
        return 2;
    if (threads == 0) {
        move_all();
        while (getchar() != EOF) /* what it never looks at is still to come */
            ;
        return 0;
    }
    if (pthread_create(&disturber, NULL, disturb, (void *)77))
        die("pthread_create");
    for (long i = 0; i < threads && i < 16; i++)
        if (pthread_create(&ids[i], NULL, touch, (void *)(i + 1)))
            die("pthread_create");
    for (int i = 0; i < threads && i < 16; i++)
        pthread_join(ids[i], NULL);
    pthread_join(disturber, NULL);
    return 0;
}
