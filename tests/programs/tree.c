/* A family of processes: sessions, process groups, zombies, a stopped child, a group whose leader is dead.
 *
 *   root ─┬─ leader of its own session ─── grandchild in a process group of its own
 *         ├─ child in the root's process group
 *         ├─ zombie that exited with 42, leader of a process group ┐
 *         ├─ member of that group                                 ┘
 *         ├─ zombie that was killed by SIGKILL
 *         ├─ member of a process group whose leader is gone altogether
 *         └─ stopped child
 */
#include "check.h"

enum { ROOT, SESSION, GRANDCHILD, CHILD, MEMBER, ORPHAN, WORKERS };

struct kinship {
    pid_t pid, ppid, pgid, sid;
};

static struct kinship kinship(void)
{
    return (struct kinship){ getpid(), getppid(), getpgrp(), getsid(0) };
}

static void check_kinship(const struct kinship *mine)
{
    struct kinship found = kinship();

    EXPECT(mine->pid, found.pid);
    EXPECT(mine->ppid, found.ppid);
    EXPECT(mine->pgid, found.pgid);
    EXPECT(mine->sid, found.sid);
}

/* What a child does until SIGTERM; `below` is its own child, 0 none. */
__attribute__((noreturn)) static void live(unsigned worker, pid_t below)
{
    struct kinship mine = kinship();

    while (!check_stopping) {
        check_kinship(&mine);
        check_beat(worker);
        check_rest(2000);
    }
    if (below != 0) {
        kill(below, SIGTERM);
        expect_exit_0(below);
    }
    _exit(0);
}

static pid_t start_session(void)
{
    pid_t leader = fork_child(), grandchild;

    if (leader != 0)
        return leader;
    MUST(setsid());
    grandchild = fork_child();
    if (grandchild == 0) {
        MUST(setpgid(0, 0));
        live(GRANDCHILD, 0);
    }
    live(SESSION, grandchild);
}

static pid_t start_child(unsigned worker, pid_t group)
{
    pid_t child = fork_child();

    if (child != 0)
        return child;
    if (group != 0)
        MUST(setpgid(0, group));
    live(worker, 0);
}

/* Ends at once, by SIGKILL or by itself with 42, and stays a zombie. */
static pid_t start_zombie(bool killed)
{
    pid_t child = fork_child();
    siginfo_t info;

    if (child == 0) {
        MUST(setpgid(0, 0));
        if (killed)
            kill(getpid(), SIGKILL);
        _exit(42);
    }
    MUST(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT));
    return child;
}

static pid_t start_stopped(void)
{
    pid_t child = fork_child();
    siginfo_t info;

    if (child == 0) {
        raise(SIGSTOP);
        _exit(7);
    }
    MUST(waitid(P_PID, (id_t)child, &info, WSTOPPED | WNOWAIT));
    return child;
}

/* CRIU lets the parent go before it has stopped a child: that is waited for, and with WNOHANG in `options` it is not. */
static void expect_wait(pid_t pid, int options, int code, int value)
{
    siginfo_t info = { 0 };

    EXPECT(0, waitid(P_PID, (id_t)pid, &info, options | WNOWAIT));
    EXPECT(pid, info.si_pid);
    EXPECT(code, info.si_code);
    EXPECT(value, info.si_status);
}

static void finish(pid_t pid, int signal, int wanted)
{
    int how = -1;

    if (signal != 0)
        kill(pid, signal);
    EXPECT(pid, waitpid(pid, &how, 0));
    EXPECT(wanted, how);
}

/* A child has its place in session and group before its first beat. */
static void wait_for_family(void)
{
    for (unsigned worker = ROOT + 1; worker < WORKERS; worker++)
        while (__atomic_load_n(&status->beats[worker], __ATOMIC_ACQUIRE) == 0)
            check_rest(1000);
}

int main(int argc, char **argv)
{
    pid_t session, child, exited, member, killed, stopped, gone, orphan;
    struct kinship mine;

    check_start(argc, argv, WORKERS);
    mine = kinship();
    session = start_session();
    child = start_child(CHILD, 0);
    exited = start_zombie(false);
    member = start_child(MEMBER, exited);
    killed = start_zombie(true);
    stopped = start_stopped();
    gone = start_zombie(false);
    orphan = start_child(ORPHAN, gone);
    wait_for_family();
    finish(gone, 0, 42 << 8);
    check_running();
    while (!check_stopping) {
        mine.ppid = getppid(); /* the root's parent stays behind when the tree is moved */
        check_kinship(&mine);
        EXPECT(session, getsid(session));
        EXPECT(exited, getpgid(member));
        EXPECT(gone, getpgid(orphan));
        EXPECT(mine.pgid, getpgid(child));
        expect_wait(exited, WEXITED | WNOHANG, CLD_EXITED, 42);
        expect_wait(killed, WEXITED | WNOHANG, CLD_KILLED, SIGKILL);
        expect_wait(stopped, WSTOPPED, CLD_STOPPED, SIGSTOP);
        check_beat(ROOT);
        check_rest(2000);
    }
    status->phase = FINAL;
    finish(session, SIGTERM, 0);
    finish(child, SIGTERM, 0);
    finish(member, SIGTERM, 0);
    finish(orphan, SIGTERM, 0);
    finish(exited, 0, 42 << 8);
    finish(killed, 0, SIGKILL);
    finish(stopped, SIGCONT, 7 << 8);
    return check_end();
}
