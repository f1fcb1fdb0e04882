/* A parent and two children share MAP_SHARED | MAP_ANONYMOUS memory; see ring.h. One child has moved its mapping. Another
 * object is locked by the parent, the children just map it. */
#include "ring.h"

enum { MEMBERS = 3, LOCKED_PAGES = 16 };

static uint64_t (*locked)[WORDS];

static void lock_some(void)
{
    locked = mmap(NULL, LOCKED_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (locked == MAP_FAILED)
        check_die("mmap");
    for (unsigned page = 0; page < LOCKED_PAGES; page++)
        fill_page(locked[page], (uint64_t)page * PAGE, 1);
    MUST(mlock(locked, LOCKED_PAGES * PAGE));
}

/* Locked memory refuses to be invalidated (msync(2)). */
static void check_locked(void)
{
    bool mine = (uint32_t)getpid() == status->pid;

    for (unsigned page = 0; page < LOCKED_PAGES; page++) {
        verify_page(locked[page], (uint64_t)page * PAGE, 1);
        EXPECT(mine ? -1 : 0, msync(locked[page], PAGE, MS_INVALIDATE));
        if (mine)
            EXPECT(EBUSY, errno);
    }
}

int main(int argc, char **argv)
{
    struct ring *ring;
    pid_t children[MEMBERS - 1];

    check_start(argc, argv, MEMBERS);
    ring = mmap(NULL, sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ring == MAP_FAILED)
        check_die("mmap");
    lock_some();
    for (unsigned member = 1; member < MEMBERS; member++) {
        children[member - 1] = fork_child();
        if (children[member - 1] != 0)
            continue;
        if (member == 1)
            ring = mremap(ring, sizeof *ring, sizeof *ring, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)0x600000000000);
        if (ring == MAP_FAILED)
            check_die("mremap");
        ring_run(ring, member, MEMBERS, check_locked);
        _exit(status->errors != 0);
    }
    check_running();
    ring_run(ring, 0, MEMBERS, check_locked);
    return ring_end(ring, children, MEMBERS - 1);
}
