/* Seccomp filters: the process may do what it needs and dies of anything else; a thread has one filter more.
 *
 * Two calls are answered with an errno of their own, so that a filter that is lost shows as well as one that is
 * forgotten on the way: the process would live on, unconfined.
 */
#include "check.h"

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/syscall.h>

enum { PPID_ERRNO = 77, SID_ERRNO = 78 };

#define ALLOW(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define ANSWER(nr, number)                         \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, nr, 0, 1), \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (number))
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))

static void install(struct sock_filter *filter, size_t length, unsigned flags)
{
    struct sock_fprog program = { .len = (unsigned short)length, .filter = filter };

    MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program));
}

static void confine_process(void)
{
    struct sock_filter filter[] = {
        LOAD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        LOAD(nr),
        ANSWER(SYS_getppid, PPID_ERRNO),
        ALLOW(SYS_getsid),
        ALLOW(SYS_nanosleep),
        ALLOW(SYS_clock_nanosleep),
        ALLOW(SYS_restart_syscall),
        ALLOW(SYS_clock_gettime),
        ALLOW(SYS_prctl),
        ALLOW(SYS_seccomp),
        ALLOW(SYS_rt_sigreturn),
        ALLOW(SYS_exit_group),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };

    install(filter, sizeof filter / sizeof *filter, SECCOMP_FILTER_FLAG_TSYNC);
}

static void confine_thread(void)
{
    struct sock_filter filter[] = {
        LOAD(nr),
        ANSWER(SYS_getsid, SID_ERRNO),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };

    install(filter, sizeof filter / sizeof *filter, 0);
}

/* `confined`: whether getsid(2) is answered by the thread's own filter. */
static void check_filters(unsigned worker, bool confined)
{
    long session;

    EXPECT(-1, syscall(SYS_getppid));
    EXPECT(PPID_ERRNO, errno);
    session = syscall(SYS_getsid, 0);
    EXPECT(confined, session == -1 && errno == SID_ERRNO);
    EXPECT(SECCOMP_MODE_FILTER, prctl(PR_GET_SECCOMP));
    EXPECT(1, prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
    check_beat(worker);
    check_rest(1000);
}

enum { NOT_BEGUN, BEGUN, CONFINED };

static void wait_for(const int *stage, int wanted)
{
    while (__atomic_load_n(stage, __ATOMIC_ACQUIRE) != wanted)
        check_rest(1000);
}

/* The C library's own calls at the start of a thread are not allowed later: the filter comes after them. */
static void *work(void *argument)
{
    int *stage = argument;

    __atomic_store_n(stage, BEGUN, __ATOMIC_RELEASE);
    wait_for(stage, CONFINED);
    confine_thread();
    for (;;)
        check_filters(1, true);
    return NULL;
}

int main(int argc, char **argv)
{
    int stage = NOT_BEGUN;

    check_start(argc, argv, 2);
    start_thread(work, &stage);
    wait_for(&stage, BEGUN);
    confine_process();
    __atomic_store_n(&stage, CONFINED, __ATOMIC_RELEASE);
    check_running();
    while (!check_stopping)
        check_filters(0, false);
    _exit(check_end());
}
