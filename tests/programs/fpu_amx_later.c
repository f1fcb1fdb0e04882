/* AMX tiles that a process has asked for and uses at its end only: it, a thread and a child that it makes then. Its
 * parent has not asked and must not be given any.
 *
 * Its alternate signal stack is the smallest that the kernel takes from a process with tiles. */
#include "tiles.h"

#include <sys/auxv.h>

static void set_smallest_stack(void)
{
    stack_t stack = { .ss_size = getauxval(AT_MINSIGSTKSZ) };

    stack.ss_sp = malloc(stack.ss_size);
    MUST(sigaltstack(&stack, NULL));
    while (sigaltstack(&stack, NULL) == 0)
        stack.ss_size--;
}

static void expect_until_stopped(unsigned worker, bool granted)
{
    while (!check_stopping) {
        EXPECT(granted, tiles_bit(ARCH_GET_XCOMP_PERM));
        check_beat(worker);
        check_rest(1000);
    }
}

static void *use(void *random)
{
    tiles_configure();
    tiles_check(random, tiles_wait);
    return NULL;
}

static void with_permission(void)
{
    uint64_t random = 1;
    pid_t child;

    MUST(tiles_ask());
    set_smallest_stack();
    check_running();
    expect_until_stopped(1, true);
    child = fork_child();
    if (child == 0) {
        use(&random);
        _exit(0);
    }
    expect_exit_0(child);
    pthread_join(start_thread(use, &random), NULL);
    use(&random);
}

int main(int argc, char **argv)
{
    pid_t child;

    if (!tiles_bit(ARCH_GET_XCOMP_SUPP))
        return UNSUPPORTED;
    check_start(argc, argv, 2);
    child = fork_child();
    if (child == 0) {
        with_permission();
        _exit(0);
    }
    expect_until_stopped(0, false);
    MUST(kill(child, SIGTERM));
    expect_exit_0(child);
    return check_end();
}
