/* Memory that two processes share, of each kind: mappings alone can reach it, or a descriptor, or anybody with its key.
 *
 * trap_shared STATUS: at SIGTERM the child looks at the shared anonymous memory, whenever it gets the signal, and so
 * does the parent; then both look at the other objects.
 */
#include "check.h"

#include <sys/ipc.h>
#include <sys/shm.h>

enum { PAGES = 16, FIRST = 3, PARENT = 0, CHILD = 1, WORKERS, NAMED = 0x10000, NAMELESS = 0x20000, SEGMENT = 0x30000 };

static struct {
    uint8_t *anonymous;
    uint8_t *named;    /* a memfd with a descriptor */
    uint8_t *nameless; /* a memfd whose descriptor is closed */
    uint8_t *segment;
    int fd;
    int shmid;
} shared;

static void fill(uint8_t *at, uint64_t place)
{
    for (unsigned page = 0; page < PAGES; page++)
        fill_page((uint64_t *)(at + page * PAGE), place + page * PAGE, 1);
}

static void check(const uint8_t *at, uint64_t place)
{
    for (unsigned page = 0; page < PAGES; page++)
        verify_page((const uint64_t *)(at + page * PAGE), place + page * PAGE, 1);
}

static void *map(int flags, int fd)
{
    void *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | flags, fd, 0);

    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

static uint8_t *map_memfd(const char *name, int *fd)
{
    MUST(*fd = memfd_create(name, 0));
    MUST(ftruncate(*fd, PAGES * PAGE));
    return map(0, *fd);
}

static void set_up(void)
{
    int passing;

    shared.anonymous = map(MAP_ANONYMOUS, -1);
    shared.named = map_memfd("named", &shared.fd);
    shared.nameless = map_memfd("nameless", &passing);
    MUST(close(passing));
    MUST(shared.shmid = shmget(IPC_PRIVATE, PAGES * PAGE, IPC_CREAT | 0600));
    shared.segment = shmat(shared.shmid, NULL, 0);
    if (shared.segment == (void *)-1)
        check_die("shmat");
    fill(shared.anonymous, 0);
    fill(shared.named, NAMED);
    fill(shared.nameless, NAMELESS);
    fill(shared.segment, SEGMENT);
}

/* Past every mapping: read(2), and a mapping that is made only now. */
static void check_other_ways(void)
{
    uint64_t words[WORDS];
    uint8_t *late = map(0, shared.fd), *attached = shmat(shared.shmid, NULL, SHM_RDONLY);

    EXPECT(PAGE, pread(shared.fd, words, PAGE, 5 * PAGE));
    verify_page(words, NAMED + 5 * PAGE, 1);
    check(late, NAMED);
    check(attached, SEGMENT);
    EXPECT(0, munmap(late, PAGES * PAGE));
    EXPECT(0, shmdt(attached));
}

/* What was said before the first look is the last thing that is touched before it. */
static void check_all(uint32_t phase)
{
    const uint64_t *first = (const uint64_t *)(shared.anonymous + FIRST * PAGE);

    __atomic_store_n(&status->phase, phase, __ATOMIC_RELEASE);
    verify_page(first, FIRST * PAGE, 1);
    check(shared.anonymous, 0);
    check_other_ways();
    check(shared.named, NAMED);
    check(shared.nameless, NAMELESS);
    check(shared.segment, SEGMENT);
}

static void wait_for_the_signal(unsigned worker)
{
    while (!check_stopping) {
        check_beat(worker);
        check_rest(1000);
    }
}

int main(int argc, char **argv)
{
    pid_t child;

    check_start(argc, argv, WORKERS);
    set_up();
    child = fork_child();
    if (child == 0) {
        wait_for_the_signal(CHILD);
        check_all(RUNNING);
        _exit(status->errors != 0);
    }
    check_running();
    wait_for_the_signal(PARENT);
    (void)kill(child, SIGTERM); /* it may have had it already */
    check_all(FINAL);
    expect_exit_0(child);
    MUST(shmctl(shared.shmid, IPC_RMID, NULL));
    return check_end();
}
