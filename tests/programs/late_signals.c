/* Signals that end the calls in which threads wait. Nothing of it happens but when somebody else sends a signal: each
 * worker beats once for each of its own, and waits for ever when one is lost, or taken before its call begins again.
 */
#include "check.h"

#define PAUSING_SIGNAL SIGUSR1
#define READING_SIGNAL SIGUSR2
#define QUEUED_SIGNAL (SIGRTMIN + 1)

enum { PAUSING, READING, QUEUED, WORKERS };

static int silent[2];
static volatile sig_atomic_t heard[WORKERS];

static void on_signal(int signal)
{
    heard[signal == PAUSING_SIGNAL ? PAUSING : READING]++;
}

static void leave_only(int signal)
{
    sigset_t others;

    sigemptyset(&others);
    for (int each = 0; each < 3; each++)
        sigaddset(&others, (int[]){ PAUSING_SIGNAL, READING_SIGNAL, QUEUED_SIGNAL }[each]);
    if (signal)
        sigdelset(&others, signal);
    pthread_sigmask(SIG_SETMASK, &others, NULL);
}

static void *read_silence(void *argument)
{
    char byte;

    (void)argument;
    leave_only(READING_SIGNAL);
    for (int round = 1;; round++) {
        EXPECT(-1, read(silent[0], &byte, 1));
        EXPECT(EINTR, errno);
        EXPECT(round, heard[READING]);
        check_beat(READING);
    }
    return NULL;
}

static void *take_queued(void *argument)
{
    sigset_t set;
    siginfo_t info;

    (void)argument;
    leave_only(0);
    sigemptyset(&set);
    sigaddset(&set, QUEUED_SIGNAL);
    for (int round = 1;; round++) {
        while (sigwaitinfo(&set, &info) < 0)
            EXPECT(EINTR, errno);
        EXPECT(SI_QUEUE, info.si_code);
        EXPECT(round, info.si_value.sival_int);
        check_beat(QUEUED);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    struct sigaction action = { .sa_handler = on_signal };

    check_start(argc, argv, WORKERS);
    MUST(pipe2(silent, O_CLOEXEC));
    MUST(sigaction(PAUSING_SIGNAL, &action, NULL));
    MUST(sigaction(READING_SIGNAL, &action, NULL));
    leave_only(0);
    start_thread(read_silence, NULL);
    start_thread(take_queued, NULL);
    leave_only(PAUSING_SIGNAL);
    check_running();
    for (int round = 1; !check_stopping; round++) {
        EXPECT(-1, pause());
        EXPECT(EINTR, errno);
        if (!check_stopping) {
            EXPECT(round, heard[PAUSING]);
            check_beat(PAUSING);
        }
    }
    return check_end();
}
