/* Memory that a mremap(2) has moved, which is about to tell of it and has not been heard. `unheard limbo` or `unheard release`.
 * Nobody can hold up a mremap(2) before it tells: what would be heard first is done in the tables alone. */
#define _GNU_SOURCE
#include "_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define OBJECT 0x6401u
#define LENGTH (2 * PAGE_SIZE)

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint8_t *area(int prot)
{
    uint8_t *memory = mmap(NULL, LENGTH, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    check(memory != MAP_FAILED, "mmap");
    return memory;
}

static int watch(const uint8_t *one, const uint8_t *other)
{
    const struct pager_region both[] = {{(uintptr_t)one, LENGTH, OBJECT, 0}, {(uintptr_t)other, LENGTH, OBJECT, 0}};
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP};
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);

    check(device >= 0 && fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && pager_register(fd, both, 2) == 0, "userfaultfd");
    close(device);
    return fd;
}

static void *move(void *areas)
{
    uint8_t **from_to = areas;

    check(mremap(from_to[0], LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, from_to[1]) == from_to[1], "mremap");
    return NULL;
}

struct moving {
    uint8_t *here, *other, *there;
    struct pager *p;
    pthread_t thread;
};

/* What was `here` is `there`, and waits to be heard. */
static void begin(struct moving *m)
{
    static uint8_t *from_to[2];
    struct pollfd told = {.events = POLLIN};

    m->here = from_to[0] = area(PROT_READ | PROT_WRITE);
    m->other = area(PROT_READ | PROT_WRITE);
    m->there = from_to[1] = area(PROT_NONE);
    told.fd = watch(m->here, m->other);
    check(pager_new(-1, false, &m->p) == 0 && pager_add_space(m->p, told.fd, 0, 0) == 0, "pager");
    check(pager_add_region(m->p, 0, (uintptr_t)m->here, LENGTH, OBJECT, (uintptr_t)m->here) == 0, "region");
    check(pager_add_region(m->p, 0, (uintptr_t)m->other, LENGTH, OBJECT, (uintptr_t)m->other) == 0, "region");
    check(pthread_create(&m->thread, NULL, move, from_to) == 0 && poll(&told, 1, -1) == 1, "it moves");
}

static void end(struct moving *m)
{
    pager_abandon(m->p);
    pager_free(m->p);
}

/* Another move, of the other area in its place, was heard first: its pages wait until it is known where they are. */
static void limbo(void)
{
    uint8_t page[PAGE_SIZE] = {1, 2, 3};
    struct moving m;
    uint64_t at;
    int error;

    begin(&m);
    at = (uintptr_t)m.here;
    check(ledger_remap(&m.p->ledger, 0, (uintptr_t)m.other, at, LENGTH) == 0, "the other move");
    check(place_pages(m.p, 0, at, 1, page, CLASS_BULK) == -EAGAIN, "a page was not put off");
    check(m.p->ledger.head->remaining == 4, "a page was given up");
    do { /* what is told of the new place, and that the old one is unmapped */
        drain_all(m.p);
        error = place_pages(m.p, 0, at, 1, page, CLASS_BULK);
    } while (error == -EAGAIN);
    check(error == 0, "a page was not placed");
    check(m.p->ledger.head->counted[CLASS_DROPPED] == 0, "a page was dropped");
    pthread_join(m.thread, NULL);
    check(m.there[0] == 1 && m.there[2] == 3, "a page is not where it was moved");
    end(&m);
}

/* All pages are there, and it is let go: at its new place as well, which is heard of on the way. */
static void release(void)
{
    struct moving m;

    begin(&m);
    m.p->status = PAGER_DONE;
    check(pager_release(m.p) == 0, "it is not let go");
    pthread_join(m.thread, NULL);
    check(m.there[0] == 0, "it is not the kernel's own"); /* or nobody would serve it */
    end(&m);
}

int main(int argc, char **argv)
{
    check(argc == 2, "which?");
    alarm(10);
    if (argv[1][0] == 'l')
        limbo();
    else
        release();
    return 0;
}
