/* Two threads that move memory: what one has moved away from, the other one moves to at once.
 *
 * movers PAIRS PAGES: prints its pid, a userfaultfd with all that it will move, and where that is; moves when a byte has
 * come; prints how many pages do not begin with the address at which they were. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096ul
#define FEATURES                                                                                                       \
    (UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |       \
     UFFD_FEATURE_THREAD_ID)

static size_t pairs, length;
static char *first, *second, *third; /* areas; each mapping has a hole behind it */
static int uffd;
static atomic_size_t leaves, came;

static void check(int good, const char *what)
{
    if (good)
        return;
    perror(what);
    _exit(1);
}

static char *at(char *area, size_t pair)
{
    return area + pair * 2 * length;
}

static char *reserve(int prot)
{
    char *area = mmap(NULL, pairs * 2 * length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    check(area != MAP_FAILED, "mmap");
    for (size_t i = 0; prot && i < pairs; i++) {
        struct uffdio_register range = {{(uintptr_t)at(area, i), length}, UFFDIO_REGISTER_MODE_MISSING, 0};

        check(mprotect(at(area, i), length, prot) == 0, "mprotect");
        check(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    }
    return area;
}

static void move(char *from, char *to)
{
    check(mremap(from, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, "mremap");
}

static void *move_away(void *nothing)
{
    for (size_t i = 0; i < pairs; i++) {
        leaves = i + 1;
        move(at(first, i), at(third, i));
        while (came <= i)
            sched_yield();
    }
    return nothing;
}

static void *move_in(void *nothing)
{
    unsigned char resident;

    for (size_t i = 0; i < pairs; i++) {
        while (leaves <= i || mincore(at(first, i), PAGE, &resident) == 0)
            sched_yield();
        move(at(second, i), at(first, i));
        came = i + 1;
    }
    return nothing;
}

static size_t wrong(char *area, char *was)
{
    size_t count = 0;

    for (size_t i = 0; i < pairs; i++)
        for (size_t done = 0; done < length; done += PAGE)
            count += *(uintptr_t *)(at(area, i) + done) != (uintptr_t)at(was, i) + done;
    return count;
}

int main(int argc, char **argv)
{
    struct uffdio_api api = {.api = UFFD_API, .features = FEATURES};
    pthread_t threads[2];

    check(argc == 3, "usage");
    pairs = strtoul(argv[1], NULL, 10);
    length = strtoul(argv[2], NULL, 10) * PAGE;
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    check(uffd >= 0 && ioctl(uffd, UFFDIO_API, &api) == 0, "userfaultfd");
    first = reserve(PROT_READ | PROT_WRITE);
    second = reserve(PROT_READ | PROT_WRITE);
    third = reserve(PROT_NONE);
    printf("%d %d %zu %zu\n", getpid(), uffd, (size_t)first, (size_t)second);
    fflush(stdout);
    getchar();
    close(uffd);
    check(pthread_create(&threads[0], NULL, move_in, NULL) == 0, "pthread_create");
    check(pthread_create(&threads[1], NULL, move_away, NULL) == 0, "pthread_create");
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("%zu\n", wrong(first, second) + wrong(third, first));
    return 0;
}
