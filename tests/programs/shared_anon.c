/* A parent and two children share MAP_SHARED | MAP_ANONYMOUS memory; see ring.h. One child has moved its mapping. */
#include "ring.h"

enum { MEMBERS = 3 };

int main(int argc, char **argv)
{
    struct ring *ring;
    pid_t children[MEMBERS - 1];

    check_start(argc, argv, MEMBERS);
    ring = mmap(NULL, sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ring == MAP_FAILED)
        check_die("mmap");
    for (unsigned member = 1; member < MEMBERS; member++) {
        children[member - 1] = fork_child();
        if (children[member - 1] != 0)
            continue;
        if (member == 1)
            ring = mremap(ring, sizeof *ring, sizeof *ring, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)0x600000000000);
        if (ring == MAP_FAILED)
            check_die("mremap");
        ring_run(ring, member, MEMBERS, NULL);
        _exit(status->errors != 0);
    }
    check_running();
    ring_run(ring, 0, MEMBERS, NULL);
    return ring_end(ring, children, MEMBERS - 1);
}
