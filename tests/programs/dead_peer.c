/* SO_PEERCRED of a pair that a child has made, under another user, and that has ended since: its number is still told. */
#include "check.h"

#include <sys/socket.h>

enum { SOME_UID = 1234, SOME_GID = 1235 };

static int received(int from)
{
    char byte, control[CMSG_SPACE(sizeof(int))];
    struct iovec data = { &byte, 1 };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                              .msg_controllen = sizeof control };
    int fd;

    MUST(recvmsg(from, &message, 0));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

static void make_pair(int to)
{
    char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
    struct iovec data = { &byte, 1 };
    struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
                              .msg_controllen = sizeof control };
    int pair[2];

    MUST(setegid(SOME_GID));
    MUST(seteuid(SOME_UID));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    *CMSG_FIRSTHDR(&message) = (struct cmsghdr){ CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS };
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), pair, sizeof(int));
    MUST(sendmsg(to, &message, 0));
    _exit(0);
}

int main(int argc, char **argv)
{
    int between[2], made;
    pid_t child;

    check_start(argc, argv, 1);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, between));
    child = fork_child();
    if (child == 0)
        make_pair(between[1]);
    made = received(between[0]);
    expect_exit_0(child);
    MUST(close(between[0]));
    MUST(close(between[1]));
    check_running();
    while (!check_stopping) {
        struct ucred peer = { 0 };
        socklen_t size = sizeof peer;

        EXPECT(0, getsockopt(made, SOL_SOCKET, SO_PEERCRED, &peer, &size));
        EXPECT(child, peer.pid);
        EXPECT(SOME_UID, peer.uid);
        EXPECT(SOME_GID, peer.gid);
        check_beat(0);
        check_rest(2000);
    }
    return check_end();
}
