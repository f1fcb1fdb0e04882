/*
 * What a test guest runs as /init: it checks its memory and beats on the serial line.
 *
 * The kernel hands us what it does not know of its command line as environment: wmb= (MiB of pages that are visited),
 * rate= (visits a second of all visitors; 0: as many as can be), visitors= (threads), disk=1, net=1.
 * A beat is a line "beat NUMBER VISITS BAD BLOCKS" every 5 ms, NUMBER growing by one: BAD counts pages and blocks of
 * the disk that did not hold what was written last, BLOCKS how many of the disk were written and read back.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / sizeof(uint64_t))
#define MILLISECOND 1000000L
#define BEAT (5 * MILLISECOND)
#define MODULES "/modules"

struct work {
    uint64_t *pages;
    uint32_t *generations;
    size_t first, count; /* of the pages that this visitor has to itself */
    long rate;           /* visits a second */
    uint64_t seed;
};

static atomic_ulong visits, bad, blocks;

static void give_up(const char *what)
{
    printf("guest: %s: %s\n", what, strerror(errno));
    fflush(stdout);
    reboot(RB_POWER_OFF);
    _exit(1);
}

static long option(const char *name, long otherwise)
{
    const char *value = getenv(name);
    return value ? strtol(value, NULL, 10) : otherwise;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint64_t word_of(uint64_t page, uint64_t generation, size_t at)
{
    return (page << 32 ^ generation) * 0x9e3779b97f4a7c15u + at * 0x100000001b3u + 1;
}

static void fill(uint64_t *words, uint64_t page, uint64_t generation)
{
    for (size_t at = 0; at < WORDS; at++)
        words[at] = word_of(page, generation, at);
}

static int holds(const uint64_t *words, uint64_t page, uint64_t generation)
{
    uint64_t differences = 0;
    for (size_t at = 0; at < WORDS; at++)
        differences |= words[at] ^ word_of(page, generation, at);
    return differences == 0;
}

/* Sleeps for a period after *due, which moves on; who is late starts anew from now and makes nothing up. */
static void pause_until(struct timespec *due, long period)
{
    struct timespec now;
    due->tv_nsec += period;
    due->tv_sec += due->tv_nsec / (1000 * MILLISECOND);
    due->tv_nsec %= 1000 * MILLISECOND;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > due->tv_sec || (now.tv_sec == due->tv_sec && now.tv_nsec > due->tv_nsec))
        *due = now;
    else
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, due, NULL);
}

static void visit(struct work *work)
{
    uint64_t random = next_random(&work->seed);
    size_t page = work->first + (random >> 1) % work->count;
    uint64_t *words = work->pages + page * WORDS;
    if (!holds(words, page, work->generations[page]))
        bad++;
    if (random & 1)
        fill(words, page, ++work->generations[page]);
    visits++;
}

static void *visitor(void *argument)
{
    struct work *work = argument;
    struct timespec due;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (;;) {
        for (long left = work->rate ? (work->rate + 999) / 1000 : 1; left > 0; left--)
            visit(work);
        if (work->rate)
            pause_until(&due, MILLISECOND);
    }
    return NULL;
}

/* Writes the disk's blocks in turn, and reads back what was written a round ago. */
static void *disk_user(void *argument)
{
    (void)argument;
    int fd = open("/dev/vda", O_RDWR | O_DIRECT);
    off_t count = fd < 0 ? -1 : lseek(fd, 0, SEEK_END) / PAGE;
    uint64_t *words = aligned_alloc(PAGE, PAGE);
    if (count <= 0 || !words)
        give_up("/dev/vda");
    struct timespec due;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (uint64_t number = 0;; number++) {
        off_t block = (off_t)(number % (uint64_t)count);
        if (number >= (uint64_t)count) {
            if (pread(fd, words, PAGE, block * PAGE) != PAGE)
                give_up("reading /dev/vda");
            if (!holds(words, (uint64_t)block, number - (uint64_t)count))
                bad++;
        }
        fill(words, (uint64_t)block, number);
        if (pwrite(fd, words, PAGE, block * PAGE) != PAGE)
            give_up("writing /dev/vda");
        blocks++;
        pause_until(&due, 4 * BEAT);
    }
    return NULL;
}

/* The modules' names begin with the order in which they are wanted. */
static void load_modules(void)
{
    struct dirent **names;
    int count = scandir(MODULES, &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[PATH_MAX];
        if (names[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, MODULES "/%s", names[i]->d_name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
            give_up(path);
        close(fd);
    }
}

static void raise_network(void)
{
    struct ifreq request = {.ifr_name = "eth0", .ifr_flags = IFF_UP};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        give_up("eth0");
    close(fd);
}

static void start(void *(*run)(void *), void *argument)
{
    pthread_t thread;
    errno = pthread_create(&thread, NULL, run, argument);
    if (errno)
        give_up("a thread");
}

static void start_visitors(size_t count, long threads, long rate)
{
    uint64_t *pages = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *generations = calloc(count, sizeof *generations);
    struct work *works = calloc((size_t)threads, sizeof *works);
    if (pages == MAP_FAILED || !generations || !works || madvise(pages, count * PAGE, MADV_NOHUGEPAGE) != 0)
        give_up("memory");
    for (size_t page = 0; page < count; page++)
        fill(pages + page * WORDS, page, 0);
    size_t share = count / (size_t)threads;
    for (long i = 0; i < threads; i++) {
        works[i] = (struct work){pages, generations, (size_t)i * share, share, rate / threads, 88172645463325252u + (uint64_t)i};
        start(visitor, works + i);
    }
}

int main(void)
{
    long threads = option("visitors", 1);
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL) != 0 && errno != EBUSY)
        give_up("/dev");
    if (option("disk", 0) || option("net", 0))
        load_modules();
    if (option("net", 0))
        raise_network();
    start_visitors((size_t)option("wmb", 32) << 8, threads, option("rate", 2000));
    if (option("disk", 0))
        start(disk_user, NULL);
    struct timespec due;
    clock_gettime(CLOCK_MONOTONIC, &due);
    for (unsigned long number = 0;; number++) {
        char line[96];
        int size = snprintf(line, sizeof line, "beat %lu %lu %lu %lu\n", number, visits, bad, blocks);
        if (write(STDOUT_FILENO, line, (size_t)size) != size)
            give_up("the serial line");
        pause_until(&due, BEAT);
    }
}
