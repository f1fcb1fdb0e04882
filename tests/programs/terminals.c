/* Terminals of which the tree has both ends.
 *
 * terminals STATUS [session | plain]: a raw one, open twice; one that edits and echoes lines, in packet mode, exclusive; and that of a session
 * with a group in the foreground and one in the background. They stay what they are. Bytes go through them before
 * the start, whenever the host has another name, and in the end: what is under way would be in the way of a move. `session`
 * is without what CRIU does not dump, permissions, and `plain` without what it does not restore: exclusive, and a session's
 * terminal for others than its leader.
 */
#include "check.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/utsname.h>
#include <termios.h>

enum { OWNER, LEADER, FRONT, BACK, WORKERS };
enum { ROUND_US = 2000 };

struct end {
    int fd;
    int flags;
    struct stat stat;
    struct termios modes;
    struct winsize size;
};

static struct end ends[8];
static unsigned ends_count;
static volatile sig_atomic_t interrupted;

static int new_master(unsigned short rows)
{
    struct winsize size = { .ws_row = rows, .ws_col = 91, .ws_xpixel = 3, .ws_ypixel = 4 };
    int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);

    MUST(fd);
    MUST(grantpt(fd));
    MUST(unlockpt(fd));
    MUST(ioctl(fd, TIOCSWINSZ, &size));
    return fd;
}

static int new_slave(int master, int flags)
{
    char name[64];
    int fd;

    errno = ptsname_r(master, name, sizeof name);
    if (errno)
        check_die("ptsname_r");
    MUST(fd = open(name, O_RDWR | O_NOCTTY | flags));
    return fd;
}

static void set_modes(int fd, tcflag_t off, tcflag_t on)
{
    struct termios modes;

    MUST(tcgetattr(fd, &modes));
    modes.c_lflag = (modes.c_lflag & ~off) | on;
    modes.c_cc[VEOL] = 7;
    MUST(tcsetattr(fd, TCSANOW, &modes));
}

static struct end look_at(int fd)
{
    struct end end = { .fd = fd };

    MUST(end.flags = fcntl(fd, F_GETFL));
    MUST(fstat(fd, &end.stat));
    MUST(tcgetattr(fd, &end.modes));
    MUST(ioctl(fd, TIOCGWINSZ, &end.size));
    return end;
}

static void note(int fd)
{
    ends[ends_count++] = look_at(fd);
}

static void check_end_of(const struct end *was)
{
    struct end is = look_at(was->fd);

    EXPECT(was->flags, is.flags);
    EXPECT(was->stat.st_rdev, is.stat.st_rdev);
    EXPECT(was->stat.st_mode, is.stat.st_mode);
    EXPECT(was->stat.st_gid, is.stat.st_gid);
    EXPECT(0, memcmp(&was->modes, &is.modes, sizeof is.modes));
    EXPECT(0, memcmp(&was->size, &is.size, sizeof is.size));
}

static int ask(int fd, unsigned long request)
{
    int value = -1;

    MUST(ioctl(fd, request, &value));
    return value;
}

static void put(int fd, const char *text)
{
    EXPECT(strlen(text), write(fd, text, strlen(text)));
}

/* `skip` bytes come before what each read(2) gives: one in packet mode. */
static void want(int fd, const char *text, size_t skip)
{
    char found[64] = { 0 };
    size_t length = 0;

    while (length < strlen(text)) {
        char piece[32];
        ssize_t got = read(fd, piece, sizeof piece);

        if (got < (ssize_t)skip || length + (size_t)got > sizeof found) {
            check_fail(NULL, strlen(text), (uint64_t)got, "read from fd %d: %s", fd, strerror(errno));
            return;
        }
        memcpy(found + length, piece + skip, (size_t)got - skip);
        length += (size_t)got - skip;
    }
    EXPECT(0, strcmp(text, found));
}

static void on_interrupt(int signal)
{
    (void)signal;
    interrupted = 1;
}

/* Answers each line, and Ctrl-C. */
static void be_in_front(void)
{
    struct sigaction action = { .sa_handler = on_interrupt };
    char line[16];

    MUST(sigaction(SIGINT, &action, NULL));
    while (!check_stopping) {
        struct pollfd waiting = { .fd = 0, .events = POLLIN };

        if (poll(&waiting, 1, 20) > 0) {
            EXPECT(2, read(0, line, sizeof line));
            line[0]++;
            EXPECT(2, write(0, line, 2));
        }
        if (interrupted) {
            interrupted = 0;
            put(0, "interrupted\n");
        }
        EXPECT(getpid(), tcgetpgrp(0));
        check_beat(FRONT);
    }
    _exit(0);
}

/* May not read: so it is known to be in the background of its own terminal. */
static void be_in_back(pid_t leader)
{
    char line[16];

    signal(SIGTTIN, SIG_IGN);
    while (!check_stopping) {
        errno = 0;
        EXPECT(-1, read(0, line, sizeof line));
        EXPECT(check_stopping ? errno : EIO, errno);
        EXPECT(leader, tcgetsid(0));
        check_beat(BACK);
        check_rest(ROUND_US);
    }
    _exit(0);
}

static void lead(int master)
{
    pid_t front, back;
    int own;

    MUST(setsid());
    MUST(dup2(new_slave(master, O_CLOEXEC), 0));
    MUST(ioctl(0, TIOCSCTTY, 0));
    set_modes(0, ECHO, NOFLSH);
    signal(SIGTTOU, SIG_IGN);
    MUST(close(master));
    back = fork_child();
    if (back == 0) {
        MUST(setpgid(0, 0));
        be_in_back(getsid(0));
    }
    front = fork_child();
    if (front == 0) {
        MUST(setpgid(0, 0));
        MUST(tcsetpgrp(0, getpid()));
        be_in_front();
    }
    while (tcgetpgrp(0) != front || getpgid(back) != back)
        check_rest(ROUND_US);
    check_beat(LEADER);
    while (!check_stopping) {
        MUST(own = open("/dev/tty", O_RDWR | O_CLOEXEC));
        EXPECT(front, tcgetpgrp(own));
        EXPECT(getpid(), tcgetsid(own));
        MUST(close(own));
        check_beat(LEADER);
        check_rest(ROUND_US);
    }
    kill(front, SIGTERM);
    kill(back, SIGTERM);
    expect_exit_0(front);
    expect_exit_0(back);
    _exit(0);
}

int main(int argc, char **argv)
{
    int raw, lines, session, slaves[3];
    struct utsname seen, here;
    pid_t leader;
    bool plain;

    plain = argc > 2 && strcmp(argv[2], "plain") == 0;
    check_start(argc, argv, plain ? LEADER : WORKERS);
    raw = new_master(11), lines = new_master(22), session = new_master(33);
    slaves[0] = new_slave(raw, 0), slaves[1] = new_slave(raw, O_NONBLOCK | O_CLOEXEC);
    slaves[2] = new_slave(lines, 0);
    set_modes(slaves[0], ICANON | ECHO | ISIG | IEXTEN, 0);
    set_modes(slaves[2], 0, ICANON | ECHO);
    if (argc < 3)
        MUST(fchmod(slaves[2], 0602));
    MUST(fchown(slaves[2], 1, 7));
    if (!plain)
        MUST(ioctl(slaves[2], TIOCEXCL));
    MUST(ioctl(lines, TIOCPKT, &(int){ 1 }));
    MUST(fcntl(raw, F_SETFL, O_NONBLOCK));
    MUST(fcntl(raw, F_SETFL, 0));
    leader = plain ? 0 : fork_child();
    if (leader == 0 && !plain)
        lead(session);
    while (!plain && __atomic_load_n(&status->beats[LEADER], __ATOMIC_RELAXED) == 0)
        check_rest(ROUND_US);
    note(raw), note(lines), note(session), note(slaves[0]), note(slaves[1]), note(slaves[2]);
    memset(&seen, 0, sizeof seen);
    for (bool last = false; !last;) {
        last = check_stopping;
        for (unsigned i = 0; i < ends_count; i++)
            check_end_of(&ends[i]);
        EXPECT(1, ask(lines, TIOCGPKT));
        EXPECT(0, ask(raw, TIOCGPKT));
        EXPECT(!plain, ask(slaves[2], TIOCGEXCL));
        EXPECT(0, ask(slaves[0], TIOCGEXCL));
        MUST(uname(&here));
        if (last || strcmp(here.nodename, seen.nodename) != 0) {
            seen = here;
            put(raw, "\3in"), want(slaves[0], "\3in", 0);
            put(slaves[1], "out\n"), want(raw, "out\r\n", 0);
            put(lines, "onf\177e\n"), want(slaves[2], "one\n", 0);
            want(lines, "onf\b \be\r\n", 1);
            if (!plain) {
                put(session, "7\n"), want(session, "8\r\n", 0);
                put(session, "\3"), want(session, "interrupted\r\n", 0);
            }
            check_running();
        }
        check_beat(OWNER);
        check_rest(ROUND_US);
    }
    status->phase = FINAL;
    if (!plain) {
        kill(leader, SIGTERM);
        expect_exit_0(leader);
    }
    return check_end();
}
