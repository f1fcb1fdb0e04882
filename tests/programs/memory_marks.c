/* Memory with marks that smaps does not show: guarded pages, huge pages, private copies of a memfd's pages, and a
 * System V segment that was removed while it is attached.
 *
 * Guarded pages (MADV_GUARD_INSTALL, Linux 6.13) fault, the pages beside them keep their words.
 */
#include "check.h"

#include <setjmp.h>
#include <sys/ipc.h>
#include <sys/shm.h>

#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif

enum { PAGES = 16, FIRST_GUARD = 4, GUARDS = 3, HUGE = 2 << 20, KEEP = 2 };

static uint8_t *guarded, *huge, *copied, *segment;
static int object_fd;
static sigjmp_buf after_fault;

static void on_sigsegv(int signal)
{
    (void)signal;
    siglongjmp(after_fault, 1);
}

static bool faults(const volatile uint8_t *at)
{
    if (sigsetjmp(after_fault, 1) != 0)
        return true;
    (void)*at;
    return false;
}

static bool is_guard(unsigned page)
{
    return page >= FIRST_GUARD && page < FIRST_GUARD + GUARDS;
}

static void fill_all(uint8_t *at, unsigned pages)
{
    for (unsigned page = 0; page < pages; page++)
        fill_page((uint64_t *)(at + page * PAGE), (uintptr_t)at + page * PAGE, 1);
}

static void check_all(const uint8_t *at, unsigned pages)
{
    for (unsigned page = 0; page < pages; page++)
        verify_page((const uint64_t *)(at + page * PAGE), (uintptr_t)at + page * PAGE, 1);
}

static void check_guarded(void)
{
    for (unsigned page = 0; page < PAGES; page++) {
        EXPECT(is_guard(page), faults(guarded + page * PAGE));
        if (!is_guard(page))
            check_all(guarded + page * PAGE, 1);
    }
}

/* Page 1 was written through the private mapping, so only there; the object has the others, and its own page 1. */
static void check_copied(void)
{
    uint64_t words[WORDS];

    check_all(copied + PAGE, 1);
    for (unsigned page = 0; page < KEEP; page++) {
        EXPECT(PAGE, pread(object_fd, words, PAGE, page * PAGE));
        verify_page(words, page * PAGE, 2);
    }
    verify_page((uint64_t *)copied, 0, 2);
}

static void map_memfd(void)
{
    uint64_t words[WORDS];

    MUST(object_fd = memfd_create("marks", MFD_CLOEXEC));
    for (unsigned page = 0; page < KEEP; page++) {
        fill_page(words, page * PAGE, 2);
        MUST(pwrite(object_fd, words, PAGE, page * PAGE) - PAGE);
    }
    copied = mmap(NULL, KEEP * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, object_fd, 0);
    if (copied == MAP_FAILED)
        check_die("mmap of the memfd");
    fill_all(copied + PAGE, 1);
}

static uint8_t *map(size_t length)
{
    uint8_t *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

static void attach_segment(void)
{
    int id;

    MUST(id = shmget(IPC_PRIVATE, PAGES * PAGE, IPC_CREAT | 0600));
    segment = shmat(id, NULL, 0);
    if (segment == (void *)-1)
        check_die("shmat");
    MUST(shmctl(id, IPC_RMID, NULL));
    fill_all(segment, PAGES);
}

int main(int argc, char **argv)
{
    struct sigaction on_segv = { .sa_handler = on_sigsegv };

    check_start(argc, argv, 1);
    MUST(sigaction(SIGSEGV, &on_segv, NULL));
    guarded = map(PAGES * PAGE);
    fill_all(guarded, PAGES);
    if (madvise(guarded + FIRST_GUARD * PAGE, GUARDS * PAGE, MADV_GUARD_INSTALL) < 0)
        return UNSUPPORTED;
    huge = map(2 * HUGE);
    huge = (uint8_t *)(((uintptr_t)huge + HUGE - 1) & -(uintptr_t)HUGE);
    MUST(madvise(huge, HUGE, MADV_HUGEPAGE));
    fill_all(huge, HUGE / PAGE);
    map_memfd();
    attach_segment();
    check_running();
    while (!check_stopping) {
        check_guarded();
        check_all(huge, HUGE / PAGE);
        check_copied();
        check_all(segment, PAGES);
        check_beat(0);
        check_rest(2000);
    }
    return check_end();
}
