/* Drives what the pager does about MADV_REMOVE of shared memory: threads in here remove, let go of and read what is
 * missing of it, while the pager's threads bring it. Run by tests/sanitize/pager.sh.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "_pager.h"
#include "check.h"
#include "page_source.h"
#include "witness.h"

#define OBJECT 0x702u
#define PAGES 2048u
#define PIECE 8u
#define LENGTH (PAGES * 4096ul)
#define WORKERS 3u
#define RATE (32u << 20) /* so that the threads are at it while pages come */

struct worker {
    uint64_t *memory;
    int advice;     /* or -1 */
    unsigned first; /* of its pieces, which are every third */
    pthread_t thread;
};

static int open_userfaultfd(void *memory)
{
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
                                         UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
                                         UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register range = {.range = {(uintptr_t)memory, LENGTH}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), fd;

    check(device >= 0, "/dev/userfaultfd");
    fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
    close(device);
    check(fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &range) == 0, "userfaultfd");
    return fd;
}

static uint64_t *make_shared(void)
{
    int fd = memfd_create("shared", MFD_CLOEXEC);
    void *memory;

    check(fd >= 0 && ftruncate(fd, LENGTH) == 0, "memfd_create");
    memory = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    check(memory != MAP_FAILED, "mmap");
    close(fd);
    return memory;
}

static void *work(void *worker)
{
    const struct worker *w = worker;

    for (size_t page = w->first * PIECE; page + PIECE <= PAGES; page += WORKERS * PIECE) {
        uint64_t *piece = w->memory + page * 512, factor = w->advice == MADV_REMOVE ? 0 : 0x9e3779b97f4a7c15ull;

        check(w->advice < 0 || madvise(piece, PIECE * 4096, w->advice) == 0, "madvise");
        for (size_t i = 0; i < PIECE * 512; i++)
            check(piece[i] == (page * 512 + i + 1) * factor, "what was removed is zero, and nothing else");
    }
    return NULL;
}

static struct pager *make_pager(uint64_t *memory)
{
    const struct pager_run all = {OBJECT, 0, PAGES};
    struct pager *p;

    check(pager_new(-1, true, &p) == 0, "pager_new");
    errno = -pager_watch_removals(p);
    check(errno == 0, "pager_watch_removals");
    check(pager_add_space(p, open_userfaultfd(memory), (uint32_t)getpid(), (uint32_t)getpid()) == 0, "pager_add_space");
    check(pager_add_region(p, 0, (uintptr_t)memory, LENGTH, OBJECT, 0) == 0, "pager_add_region");
    check(pager_apply_map(p, &all, 1) == 0, "pager_apply_map");
    check(pager_set_plan(p, &all, 1) == 0, "pager_set_plan");
    return p;
}

int main(void)
{
    const struct range ranges[2] = {{0, LENGTH}, {LENGTH, 0}};
    const int advice[WORKERS] = {MADV_REMOVE, MADV_DONTNEED, -1};
    uint64_t *memory = make_shared();
    struct pager *p = make_pager(memory);
    struct worker workers[WORKERS];
    static struct witness witness;
    struct channel source[2];

    connect_source(p, source, ranges, -1, 0);
    check(pager_start(p, true, RATE) == 0, "pager_start");
    start_witness(&witness, p, ranges);
    for (unsigned i = 0; i < WORKERS; i++) {
        workers[i] = (struct worker){.memory = memory, .advice = advice[i], .first = i};
        check(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
    }
    for (unsigned i = 0; i < WORKERS; i++)
        pthread_join(workers[i].thread, NULL);
    await_done(&witness);
    errno = -pager_finish(p);
    check(errno == 0, "pager_finish");
    end_witness(&witness);
    check_witness(&witness, true);
    pager_free(p);
    close_source(source);
    munmap(memory, LENGTH);
    return 0;
}
