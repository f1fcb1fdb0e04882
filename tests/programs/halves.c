/* Only one half of the memory is looked at until SIGUSR1 comes: after a move without bulk that half is what has followed.
 *
 * halves STATUS [MIB]: MIB of private memory, which the parent checks and rewrites, and MIB of shared anonymous memory,
 * which parent and child check. At SIGTERM both check all of it.
 */
#include "check.h"

enum { MEMBERS = 2 };

struct shared {
    uint32_t open; /* pages that may be touched */
    uint32_t stopping;
    uint8_t unused[PAGE - 8];
    uint64_t pages[][WORDS];
};

static struct shared *shared;
static uint64_t (*private)[WORDS];
static uint32_t count;
static uint64_t generation;

static void on_sigusr1(int signal)
{
    (void)signal;
    __atomic_store_n(&shared->open, count, __ATOMIC_RELEASE);
}

static void check_shared(uint32_t open)
{
    for (uint32_t page = 0; page < open; page++)
        verify_page(shared->pages[page], (uint64_t)page * PAGE, 1);
}

/* Pages that are closed still have the first generation. */
static void check_private(uint32_t open, uint64_t expected, bool rewrite)
{
    for (uint32_t page = 0; page < open; page++) {
        verify_page(private[page], (uintptr_t)private[page], expected);
        if (rewrite)
            fill_page(private[page], (uintptr_t)private[page], expected + 1);
    }
}

static void check_child(void)
{
    while (!__atomic_load_n(&shared->stopping, __ATOMIC_ACQUIRE)) {
        check_shared(__atomic_load_n(&shared->open, __ATOMIC_ACQUIRE));
        check_beat(1);
        check_rest(200);
    }
    check_shared(count);
    _exit(status->errors != 0);
}

static void set_up(int argc, char **argv)
{
    struct sigaction on_usr1 = { .sa_handler = on_sigusr1, .sa_flags = SA_RESTART };
    size_t bytes;

    count = (uint32_t)(argc > 2 ? atoi(argv[2]) : 2) << 8;
    bytes = (size_t)count * PAGE;
    check_start(argc, argv, MEMBERS);
    private = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    shared = mmap(NULL, sizeof *shared + bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (private == MAP_FAILED || shared == MAP_FAILED)
        check_die("memory");
    for (uint32_t page = 0; page < count; page++)
        fill_page(shared->pages[page], (uint64_t)page * PAGE, 1);
    shared->open = count / 2;
    MUST(sigaction(SIGUSR1, &on_usr1, NULL));
}

int main(int argc, char **argv)
{
    uint32_t open, rest;
    pid_t child;

    set_up(argc, argv);
    child = fork_child();
    if (child == 0)
        check_child();
    for (uint32_t page = 0; page < count; page++) /* after the fork: the parent's alone */
        fill_page(private[page], (uintptr_t)private[page], 1);
    check_running();
    open = shared->open;
    for (generation = 1; !check_stopping && __atomic_load_n(&shared->open, __ATOMIC_ACQUIRE) == open; generation++) {
        check_private(open, generation, true);
        check_shared(open);
        check_beat(0);
        check_rest(200);
    }
    for (rest = open; rest < count; rest++)
        verify_page(private[rest], (uintptr_t)private[rest], 1);
    while (!check_stopping) {
        check_private(open, generation, false);
        check_beat(0);
        check_rest(200);
    }
    status->phase = FINAL;
    check_private(open, generation, false);
    check_shared(count);
    __atomic_store_n(&shared->stopping, 1, __ATOMIC_RELEASE);
    expect_exit_0(child);
    return check_end();
}
