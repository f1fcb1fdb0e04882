/* Two processes share a sealed memfd: through mappings at different addresses, one of them read-only and with an
 * offset, and through the descriptor itself; see ring.h. Name, size, seals and position are checked as well, and another
 * one without content. */
#include "ring.h"

enum { EMPTY = 20, MEMBERS = 2, SEALS = F_SEAL_GROW | F_SEAL_SHRINK, POSITION = 12345 };

static struct ring *ring;
static const uint64_t (*window)[WORDS]; /* read-only, from the second half of the pages on */
static int fd;

static void check_descriptor(void)
{
    struct stat facts;
    uint64_t word;

    EXPECT(0, fstat(fd, &facts));
    EXPECT(sizeof *ring, facts.st_size);
    EXPECT(SEALS, fcntl(fd, F_GET_SEALS));
    EXPECT(POSITION, lseek(fd, 0, SEEK_CUR));
    EXPECT(8, pread(fd, &word, sizeof word, offsetof(struct ring, pages[RING_PAGES - 1])));
    EXPECT(ring->pages[RING_PAGES - 1][0], word);
    EXPECT(word, window[RING_PAGES / 2 - 1][0]);
    EXPECT(0, fstat(EMPTY, &facts));
    EXPECT(0, facts.st_size);
}

static void map_object(void)
{
    ring = mmap(NULL, sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    window = mmap(NULL, RING_PAGES / 2 * PAGE, PROT_READ, MAP_SHARED, fd, PAGE + RING_PAGES / 2 * PAGE);
    if (ring == MAP_FAILED || window == MAP_FAILED)
        check_die("mmap");
}

int main(int argc, char **argv)
{
    pid_t child;
    int empty;

    check_start(argc, argv, MEMBERS);
    MUST(fd = memfd_create("shared cargo", MFD_ALLOW_SEALING));
    MUST(ftruncate(fd, sizeof *ring));
    MUST(fcntl(fd, F_ADD_SEALS, SEALS));
    MUST(lseek(fd, POSITION, SEEK_SET));
    MUST(empty = memfd_create("empty", 0));
    MUST(dup2(empty, EMPTY));
    MUST(close(empty));
    child = fork_child();
    map_object(); /* not inherited: each process has mappings of its own */
    if (child == 0) {
        ring_run(ring, 1, MEMBERS, check_descriptor);
        _exit(status->errors != 0);
    }
    check_running();
    ring_run(ring, 0, MEMBERS, check_descriptor);
    return ring_end(ring, &child, 1);
}
