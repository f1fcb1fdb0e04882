/* Sockets over which a program asks its kernel of interfaces and hears of changes.
 *
 * netlink STATUS [hear | plain]: one is bound, a member of groups below and above 32, with options; one was never bound; one was connected.
 * They stay what they are. With `hear` worker 1 beats once for every address that it hears of. In the end the kernel is
 * asked over each. `plain` is without what CRIU does not carry over: options of netlink's own, and SOCK_DGRAM.
 */
#include "check.h"

#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <poll.h>
#include <sys/socket.h>

enum { WORDS_OF_GROUPS = 16 };

static bool hearing, plain;
static int bound, unbound, connected, diag;
static struct sockaddr_nl names[4];
static uint32_t groups[WORDS_OF_GROUPS];

static int new_socket(int type, int protocol)
{
    int fd = socket(AF_NETLINK, type | SOCK_CLOEXEC | SOCK_NONBLOCK, protocol);

    MUST(fd);
    return fd;
}

static void set(int fd, int option, int value)
{
    MUST(setsockopt(fd, SOL_NETLINK, option, &value, sizeof value));
}

static int get(int fd, int level, int option)
{
    int value = -1;
    socklen_t length = sizeof value;

    MUST(getsockopt(fd, level, option, &value, &length));
    return value;
}

static struct sockaddr_nl name_of(int fd)
{
    struct sockaddr_nl name;
    socklen_t length = sizeof name;

    MUST(getsockname(fd, (struct sockaddr *)&name, &length));
    return name;
}

static void read_groups(uint32_t *words)
{
    socklen_t length = WORDS_OF_GROUPS * sizeof *words;

    memset(words, 0, length);
    MUST(getsockopt(bound, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, words, &length));
}

static void set_up(void)
{
    struct sockaddr_nl here = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR};
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    int size = 100000;

    bound = new_socket(SOCK_RAW, NETLINK_ROUTE);
    MUST(bind(bound, (struct sockaddr *)&here, sizeof here));
    set(bound, NETLINK_ADD_MEMBERSHIP, RTNLGRP_MPLS_NETCONF);
    set(bound, NETLINK_ADD_MEMBERSHIP, RTNLGRP_NEXTHOP);
    if (!plain) {
        set(bound, NETLINK_EXT_ACK, 1);
        set(bound, NETLINK_NO_ENOBUFS, 1);
    }
    MUST(setsockopt(bound, SOL_SOCKET, SO_RCVBUF, &size, sizeof size));
    unbound = new_socket(plain ? SOCK_RAW : SOCK_DGRAM, NETLINK_ROUTE);
    connected = new_socket(SOCK_RAW, NETLINK_ROUTE);
    kernel.nl_groups = RTMGRP_LINK;
    MUST(connect(connected, (struct sockaddr *)&kernel, sizeof kernel));
    diag = new_socket(SOCK_RAW, NETLINK_SOCK_DIAG);
    here.nl_groups = 0;
    here.nl_pid = 0x80000000u | (uint32_t)getpid();
    MUST(bind(diag, (struct sockaddr *)&here, sizeof here));
    names[0] = name_of(bound);
    names[1] = name_of(unbound);
    names[2] = name_of(connected);
    names[3] = name_of(diag);
    read_groups(groups);
}

static void check_name(int fd, const struct sockaddr_nl *before)
{
    struct sockaddr_nl now = name_of(fd);

    EXPECT(before->nl_pid, now.nl_pid);
    EXPECT(before->nl_groups, now.nl_groups);
}

static void check_state(void)
{
    uint32_t now[WORDS_OF_GROUPS];
    struct sockaddr_nl peer;
    socklen_t length = sizeof peer;

    check_name(bound, &names[0]);
    check_name(unbound, &names[1]);
    check_name(connected, &names[2]);
    check_name(diag, &names[3]);
    read_groups(now);
    for (int i = 0; i < WORDS_OF_GROUPS; i++)
        EXPECT(groups[i], now[i]);
    EXPECT(0, getpeername(connected, (struct sockaddr *)&peer, &length));
    EXPECT(0, peer.nl_pid);
    EXPECT(RTMGRP_LINK, peer.nl_groups);
    EXPECT(!plain, get(bound, SOL_NETLINK, NETLINK_EXT_ACK));
    EXPECT(!plain, get(bound, SOL_NETLINK, NETLINK_NO_ENOBUFS));
    EXPECT(0, get(unbound, SOL_NETLINK, NETLINK_EXT_ACK));
    EXPECT(200000, get(bound, SOL_SOCKET, SO_RCVBUF));
    EXPECT(plain ? SOCK_RAW : SOCK_DGRAM, get(unbound, SOL_SOCKET, SO_TYPE));
    EXPECT(NETLINK_SOCK_DIAG, get(diag, SOL_SOCKET, SO_PROTOCOL));
}

/* What the kernel has said of itself since. */
static void hear(void)
{
    char buffer[8192] __attribute__((aligned(NLMSG_ALIGNTO)));
    ssize_t n;

    while ((n = recv(bound, buffer, sizeof buffer, 0)) > 0) {
        size_t left = (size_t)n;

        for (struct nlmsghdr *m = (struct nlmsghdr *)buffer; NLMSG_OK(m, left); m = NLMSG_NEXT(m, left)) {
            EXPECT(true, m->nlmsg_type == RTM_NEWADDR || m->nlmsg_type == RTM_NEWLINK);
            if (hearing && m->nlmsg_type == RTM_NEWADDR)
                check_beat(1);
        }
    }
    EXPECT(EAGAIN, errno);
}

/* Asks for all interfaces; the answers have the port that asked. */
static void ask(int fd)
{
    struct {
        struct nlmsghdr header;
        struct rtgenmsg message;
    } request = {
        {.nlmsg_len = NLMSG_LENGTH(sizeof request.message),
         .nlmsg_type = RTM_GETLINK,
         .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP,
         .nlmsg_seq = 7},
        {.rtgen_family = AF_UNSPEC},
    };
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    char buffer[32768] __attribute__((aligned(NLMSG_ALIGNTO)));
    unsigned links = 0;
    bool done = false;

    EXPECT(request.header.nlmsg_len,
           sendto(fd, &request, request.header.nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel));
    while (!done) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        size_t left;

        EXPECT(1, poll(&ready, 1, 5000));
        left = (size_t)recv(fd, buffer, sizeof buffer, 0);
        if ((ssize_t)left <= 0)
            return check_fail(NULL, 0, errno, "no answer");
        for (struct nlmsghdr *m = (struct nlmsghdr *)buffer; NLMSG_OK(m, left); m = NLMSG_NEXT(m, left)) {
            EXPECT(name_of(fd).nl_pid, m->nlmsg_pid);
            EXPECT(7, m->nlmsg_seq);
            done |= m->nlmsg_type == NLMSG_DONE;
            links += m->nlmsg_type == RTM_NEWLINK;
        }
    }
    EXPECT(true, links > 0);
}

int main(int argc, char **argv)
{
    hearing = argc > 2 && strcmp(argv[2], "hear") == 0;
    plain = argc > 2 && strcmp(argv[2], "plain") == 0;
    check_start(argc, argv, 1 + hearing);
    set_up();
    check_running();
    while (!check_stopping) {
        check_state();
        hear();
        check_beat(0);
        check_rest(1000);
    }
    check_state();
    hear();
    ask(bound);
    ask(unbound);
    ask(connected);
    return check_end();
}
