/* AMX tiles, state that is more than CRIU's images hold, in two threads: over a busy loop, and over a signal handler,
 * whose frame has the tiles while the thread has none. */
#include "tiles.h"

static void on_usr1(int signal)
{
    (void)signal;
    tiles_wait();
}

static void wait_in_handler(void)
{
    MUST(syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1));
}

static void (*const waits[])(void) = { tiles_wait, wait_in_handler };

static void *use(void *worker)
{
    unsigned self = (unsigned)(uintptr_t)worker;
    uint64_t random = self + 1;

    tiles_configure();
    while (!check_stopping) {
        tiles_check(&random, waits[self]);
        check_beat(self);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct sigaction on_signal = { .sa_handler = on_usr1 };
    pthread_t thread;

    if (tiles_ask() < 0)
        return UNSUPPORTED;
    check_start(argc, argv, 2);
    MUST(sigaction(SIGUSR1, &on_signal, NULL));
    thread = start_thread(use, (void *)1);
    check_running();
    use((void *)0);
    pthread_join(thread, NULL);
    return check_end();
}
