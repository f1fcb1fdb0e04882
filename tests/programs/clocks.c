/* The clocks never go back and never leap.
 *
 * clocks STATUS [LEAP_MS]: LEAP_MS (10000) is the longest step that a freeze may explain. Each clock is read through
 * the vdso and by a system call; both must agree, since they take the time namespace's offset from different places.
 */
#include "check.h"

#include <sys/syscall.h>

static const clockid_t clocks[] = { CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE };
enum { CLOCKS = sizeof clocks / sizeof *clocks };

static uint64_t by_syscall(clockid_t clock)
{
    struct timespec now = { 0 };

    EXPECT(0, syscall(SYS_clock_gettime, clock, &now));
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void check_step(clockid_t clock, uint64_t before, uint64_t after, uint64_t leap_ns)
{
    if (after < before)
        check_fail(NULL, before, after, "clock %d went back", clock);
    else if (after - before > leap_ns)
        check_fail(NULL, before, after, "clock %d leapt ahead", clock);
}

int main(int argc, char **argv)
{
    uint64_t leap_ns = (argc > 2 ? (uint64_t)atoi(argv[2]) : 10000) * 1000000u;
    uint64_t last[CLOCKS];

    check_start(argc, argv, 1);
    for (unsigned i = 0; i < CLOCKS; i++)
        last[i] = now_ns(clocks[i]);
    check_running();
    while (!check_stopping) {
        for (unsigned i = 0; i < CLOCKS; i++) {
            uint64_t vdso = now_ns(clocks[i]), kernel = by_syscall(clocks[i]), again = now_ns(clocks[i]);

            check_step(clocks[i], last[i], vdso, leap_ns);
            check_step(clocks[i], vdso, kernel, leap_ns);
            check_step(clocks[i], kernel, again, leap_ns);
            last[i] = again;
        }
        check_beat(0);
        check_rest(500);
    }
    return check_end();
}
