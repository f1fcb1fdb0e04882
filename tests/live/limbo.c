/* Pages of memory that was moved away, when that is heard later than what was moved in its place: they wait for the message
 * that is still to come. The kernel does not let anybody hold up a mremap(2) before it tells, so the other move is made in
 * the tables alone. */
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

int main(void)
{
    uint8_t *here = area(PROT_READ | PROT_WRITE), *other = area(PROT_READ | PROT_WRITE), *there = area(PROT_NONE);
    uint8_t *from_to[] = {here, there}, page[PAGE_SIZE] = {1, 2, 3};
    uint64_t at = (uintptr_t)here, from = (uintptr_t)other;
    struct pollfd told = {.fd = watch(here, other), .events = POLLIN};
    struct pager *p;
    pthread_t mover;
    int error;

    check(pager_new(-1, false, &p) == 0 && pager_add_space(p, told.fd, 0, 0) == 0, "pager");
    check(pager_add_region(p, 0, at, LENGTH, OBJECT, at) == 0, "region");
    check(pager_add_region(p, 0, from, LENGTH, OBJECT, from) == 0, "region");
    check(pthread_create(&mover, NULL, move, from_to) == 0 && poll(&told, 1, -1) == 1, "it moves");
    check(ledger_remap(&p->ledger, 0, from, at, LENGTH) == 0, "the other move");
    check(place_pages(p, 0, at, 1, page, CLASS_BULK) == -EAGAIN, "a page was not put off");
    check(p->ledger.head->remaining == 4, "a page was given up");
    do { /* what is told of the new place, and that the old one is unmapped */
        drain_all(p);
        error = place_pages(p, 0, at, 1, page, CLASS_BULK);
    } while (error == -EAGAIN);
    check(error == 0, "a page was not placed");
    check(p->ledger.head->counted[CLASS_DROPPED] == 0, "a page was dropped");
    pthread_join(mover, NULL);
    check(there[0] == 1 && there[2] == 3, "a page is not where it was moved");
    pager_abandon(p);
    pager_free(p);
    return 0;
}
