/* A parent with a zombie and a child that lives, each with memory of its own.
 *
 * zombie STATUS [MIB]: both check all of it again and again; the zombie is waited for at the end.
 */
#include "check.h"

enum { PARENT, CHILD, WORKERS };

static uint8_t *pages;
static size_t count;

static void check_all(unsigned worker)
{
    for (size_t page = 0; page < count && !check_stopping; page++) {
        uint8_t *at = pages + page * PAGE;

        verify_page((uint64_t *)at, (uintptr_t)at, worker + 1);
        if (page % 64 == 0)
            check_rest(500);
    }
    check_beat(worker);
}

static void fill_all(unsigned worker)
{
    for (size_t page = 0; page < count; page++)
        fill_page((uint64_t *)(pages + page * PAGE), (uintptr_t)pages + page * PAGE, worker + 1);
}

static void expect_zombie(pid_t pid, int options)
{
    siginfo_t info = { 0 };

    EXPECT(0, waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | options));
    EXPECT(pid, info.si_pid);
    EXPECT(42, info.si_status);
}

int main(int argc, char **argv)
{
    pid_t zombie, child;
    siginfo_t info;

    check_start(argc, argv, WORKERS);
    count = (argc > 2 ? (size_t)atoi(argv[2]) : 2) << 8;
    pages = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        check_die("mmap");
    fill_all(PARENT);
    zombie = fork_child();
    if (zombie == 0)
        _exit(42);
    MUST(waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT));
    child = fork_child();
    if (child == 0) {
        fill_all(CHILD);
        check_running();
        while (!check_stopping)
            check_all(CHILD);
        _exit(0);
    }
    while (!check_stopping) {
        check_all(PARENT);
        expect_zombie(zombie, WNOWAIT);
    }
    status->phase = FINAL;
    expect_zombie(zombie, 0);
    kill(child, SIGTERM);
    expect_exit_0(child);
    return check_end();
}
