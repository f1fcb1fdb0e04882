/* SO_PEERCRED of unix sockets: pairs that a parent and its child made, and connections between the two. */
#include "check.h"

#include <sys/socket.h>
#include <sys/un.h>

enum { MEMBERS = 2, SOCKETS_MAX = 8, SOME_UID = 1234, SOME_GID = 1235 };

struct known {
    int fd;
    struct ucred peer;
};

static struct known sockets[SOCKETS_MAX];
static unsigned count;

static struct ucred peer_of(int fd)
{
    struct ucred peer = { 0 };
    socklen_t size = sizeof peer;

    MUST(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size));
    return peer;
}

static void know(int fd, pid_t pid, uid_t uid, gid_t gid)
{
    sockets[count++] = (struct known){ fd, { pid, uid, gid } };
}

static void check_all(void)
{
    for (unsigned i = 0; i < count; i++) {
        struct ucred peer = peer_of(sockets[i].fd);

        EXPECT(sockets[i].peer.pid, peer.pid);
        EXPECT(sockets[i].peer.uid, peer.uid);
        EXPECT(sockets[i].peer.gid, peer.gid);
    }
}

/* The file lies where each host has its own: bound on one, its name is free on the other. */
static socklen_t address_of(struct sockaddr_un *address, bool abstract, pid_t root)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    snprintf(address->sun_path + abstract, sizeof address->sun_path - 1, "/tmp/sock_peercred.%d", root);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + abstract + strlen(address->sun_path + abstract) + !abstract);
}

static int socket_of(int type)
{
    int fd = socket(AF_UNIX, type, 0);

    MUST(fd);
    return fd;
}

static void acting_as(uid_t uid, gid_t gid)
{
    if (uid != 0) {
        MUST(setegid(gid));
        MUST(seteuid(uid));
    } else {
        MUST(seteuid(uid));
        MUST(setegid(gid));
    }
}

/* The child listens, abstract as somebody and by a file as root, and makes a pair of its own as somebody. */
static void be_child(int parent, pid_t root)
{
    int listeners[2], pair[2];
    struct sockaddr_un address;
    char word = 0;

    for (int i = 0; i < 2; i++) {
        socklen_t size = address_of(&address, i == 0, root);

        listeners[i] = socket_of(i == 0 ? SOCK_STREAM : SOCK_SEQPACKET);
        MUST(bind(listeners[i], (struct sockaddr *)&address, size));
        if (i == 0)
            acting_as(SOME_UID, SOME_GID);
        MUST(listen(listeners[i], 3));
        acting_as(0, 0);
        know(listeners[i], getpid(), i == 0 ? SOME_UID : 0, i == 0 ? SOME_GID : 0);
    }
    acting_as(SOME_UID, SOME_GID);
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    acting_as(0, 0);
    know(pair[0], getpid(), SOME_UID, SOME_GID);
    know(pair[1], getpid(), SOME_UID, SOME_GID);
    MUST(send(parent, &word, 1, 0));
    know(accept(listeners[0], NULL, NULL), root, 0, 0);
    know(accept(listeners[1], NULL, NULL), root, SOME_UID, SOME_GID);
    MUST(send(parent, &word, 1, 0));
}

static void be_parent(int child_end, pid_t child)
{
    struct sockaddr_un address;
    char word;

    MUST(recv(child_end, &word, 1, 0));
    for (int i = 0; i < 2; i++) {
        socklen_t size = address_of(&address, i == 0, getpid());
        int fd = socket_of(i == 0 ? SOCK_STREAM : SOCK_SEQPACKET);

        if (i == 1) {
            MUST(chmod(address.sun_path, 0666));
            acting_as(SOME_UID, SOME_GID);
        }
        MUST(connect(fd, (struct sockaddr *)&address, size));
        acting_as(0, 0);
        know(fd, child, i == 0 ? SOME_UID : 0, i == 0 ? SOME_GID : 0);
    }
    MUST(chmod(address.sun_path, 0600)); /* who connected could not now */
    MUST(recv(child_end, &word, 1, 0));
}

static void run(unsigned member)
{
    while (!check_stopping) {
        check_all();
        check_beat(member);
        check_rest(1000);
    }
    check_all();
}

int main(int argc, char **argv)
{
    pid_t root = getpid(), child;
    struct sockaddr_un address;
    int pair[2];

    check_start(argc, argv, MEMBERS);
    if (geteuid() != 0)
        return UNSUPPORTED;
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
    know(pair[0], root, 0, 0);
    know(pair[1], root, 0, 0);
    child = fork_child();
    if (child == 0) {
        be_child(pair[1], root);
        run(1);
        _exit(status->errors != 0);
    }
    be_parent(pair[0], child);
    check_running();
    run(0);
    kill(child, SIGTERM);
    expect_exit_0(child);
    (void)address_of(&address, false, root);
    EXPECT(0, unlink(address.sun_path));
    return check_end();
}
