/* File locks of each kind, held by the parent and tried by the child, who must not get them: of the process (fcntl),
 * of an open file description (fcntl F_OFD_SETLK and flock), and a lease, which the parent asks for itself. Files lie
 * next to the status block. */
#include "check.h"

#include <sys/file.h>

enum { WHOLE = 4, PARTS = 5, LEASED = 6 }; /* descriptors */
enum { HELD_BY_PROCESS = 0, HELD_BY_FILE = 100, FREE = 200, LENGTH = 10 };

static char paths[3][4096];

static struct flock range(short type, off_t start)
{
    return (struct flock){ .l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = LENGTH };
}

static void open_at(int fd, char *path, const char *beside, const char *suffix)
{
    int opened;

    snprintf(path, sizeof paths[0], "%s.%s", beside, suffix);
    MUST(opened = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    MUST(dup2(opened, fd));
    if (opened != fd)
        MUST(close(opened));
}

static void take_all(void)
{
    struct flock mine = range(F_WRLCK, HELD_BY_PROCESS), ours = range(F_RDLCK, HELD_BY_FILE);

    MUST(flock(WHOLE, LOCK_EX));
    MUST(fcntl(PARTS, F_SETLK, &mine));
    MUST(fcntl(PARTS, F_OFD_SETLK, &ours));
    MUST(fcntl(LEASED, F_SETLEASE, F_RDLCK));
}

/* In another process: whoever holds a lock is asked by name, and what is free can be had. */
static void try_all(pid_t holder, int fd, int parts)
{
    struct flock its = range(F_RDLCK, HELD_BY_PROCESS), theirs = range(F_WRLCK, HELD_BY_FILE);
    struct flock nobodys = range(F_WRLCK, FREE);

    EXPECT(-1, flock(fd, LOCK_SH | LOCK_NB));
    EXPECT(0, fcntl(parts, F_GETLK, &its));
    EXPECT(F_WRLCK, its.l_type);
    EXPECT(holder, its.l_pid);
    EXPECT(LENGTH, its.l_len);
    EXPECT(0, fcntl(parts, F_GETLK, &theirs));
    EXPECT(F_RDLCK, theirs.l_type);
    EXPECT(HELD_BY_FILE, theirs.l_start);
    EXPECT(0, fcntl(parts, F_GETLK, &nobodys));
    EXPECT(F_UNLCK, nobodys.l_type);
}

static void watch(pid_t holder)
{
    int fd = open(paths[0], O_RDWR | O_CLOEXEC), parts = open(paths[1], O_RDWR | O_CLOEXEC);

    while (!check_stopping) {
        try_all(holder, fd, parts);
        check_beat(1);
        check_rest(2000);
    }
    _exit(status->errors != 0);
}

int main(int argc, char **argv)
{
    pid_t child, self = getpid();

    check_start(argc, argv, 2);
    open_at(WHOLE, paths[0], argv[1], "whole");
    open_at(PARTS, paths[1], argv[1], "parts");
    open_at(LEASED, paths[2], argv[1], "leased");
    MUST(close(LEASED));
    EXPECT(3, open(paths[2], O_RDONLY | O_CLOEXEC)); /* a lease for reading wants nobody who writes */
    MUST(dup2(3, LEASED));
    MUST(close(3));
    child = fork_child();
    if (child == 0) {
        MUST(close(WHOLE));
        MUST(close(PARTS));
        MUST(close(LEASED));
        while (status->phase != RUNNING)
            check_rest(1000);
        watch(self);
    }
    take_all();
    check_running();
    while (!check_stopping) {
        EXPECT(F_RDLCK, fcntl(LEASED, F_GETLEASE));
        check_beat(0);
        check_rest(2000);
    }
    MUST(kill(child, SIGTERM));
    expect_exit_0(child);
    for (unsigned i = 0; i < 3; i++)
        MUST(unlink(paths[i]));
    return check_end();
}
