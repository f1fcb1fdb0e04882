/* Sockets that could not be bound as they are: two that listen at one port, a UDP socket with another's port, and one
 * with an address of no interface, each of which has taken back what allowed it; a datagram socket that is its own peer.
 */
#include "check.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

static void set(int sock, int level, int option, int value)
{
    MUST(setsockopt(sock, level, option, &value, sizeof value));
}

static int get(int sock, int level, int option)
{
    int value = -1;
    socklen_t size = sizeof value;

    EXPECT(0, getsockopt(sock, level, option, &value, &size));
    return value;
}

/* At the port of `other`, or any; it shares its port at first. */
static int bound(int type, int share, int other)
{
    struct sockaddr_in where = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t size = sizeof where;
    int sock;

    if (other >= 0)
        MUST(getsockname(other, (struct sockaddr *)&where, &size));
    MUST(sock = socket(AF_INET, type, 0));
    set(sock, SOL_SOCKET, share, 1);
    MUST(bind(sock, (struct sockaddr *)&where, sizeof where));
    if (type == SOCK_STREAM)
        MUST(listen(sock, 3));
    return sock;
}

static int far_away(void)
{
    struct sockaddr_in6 where = { .sin6_family = AF_INET6, .sin6_port = htons(56789) };
    int sock;

    MUST(inet_pton(AF_INET6, "2001:db8::ff00:42:8329", &where.sin6_addr));
    MUST(sock = socket(AF_INET6, SOCK_DGRAM, 0));
    set(sock, SOL_IP, IP_FREEBIND, 1);
    MUST(bind(sock, (struct sockaddr *)&where, sizeof where));
    set(sock, SOL_IP, IP_FREEBIND, 0);
    return sock;
}

static int own_peer(void)
{
    struct sockaddr_un where = { .sun_family = AF_UNIX };
    socklen_t size = sizeof where;
    int sock;

    MUST(sock = socket(AF_UNIX, SOCK_DGRAM, 0));
    MUST(bind(sock, (struct sockaddr *)&where, sizeof(sa_family_t))); /* to a name of the kernel's choice */
    MUST(getsockname(sock, (struct sockaddr *)&where, &size));
    MUST(connect(sock, (struct sockaddr *)&where, size));
    return sock;
}

/* Who connects is accepted by one or the other. */
static void check_accepted(int one, int other)
{
    struct sockaddr_in where;
    socklen_t size = sizeof where;
    struct pollfd both[2] = { { .fd = one, .events = POLLIN }, { .fd = other, .events = POLLIN } };
    int client, accepted;

    MUST(client = socket(AF_INET, SOCK_STREAM, 0));
    EXPECT(0, getsockname(one, (struct sockaddr *)&where, &size));
    EXPECT(0, connect(client, (struct sockaddr *)&where, size) < 0 ? errno : 0);
    EXPECT(true, poll(both, 2, 5000) > 0);
    accepted = accept(both[0].revents ? one : other, NULL, NULL);
    EXPECT(true, accepted >= 0);
    MUST(close(accepted));
    MUST(close(client));
}

int main(int argc, char **argv)
{
    int listening, second, udp, second_udp, away, self;
    uint8_t number = 0, got = 0;

    check_start(argc, argv, 1);
    listening = bound(SOCK_STREAM, SO_REUSEPORT, -1);
    second = bound(SOCK_STREAM, SO_REUSEPORT, listening);
    set(listening, SOL_SOCKET, SO_REUSEPORT, 0);
    udp = bound(SOCK_DGRAM, SO_REUSEADDR, -1);
    second_udp = bound(SOCK_DGRAM, SO_REUSEADDR, udp);
    set(udp, SOL_SOCKET, SO_REUSEADDR, 0);
    away = far_away();
    self = own_peer();
    EXPECT(1, write(self, &number, 1));
    check_running();
    while (!check_stopping) {
        EXPECT(0, get(listening, SOL_SOCKET, SO_REUSEPORT));
        EXPECT(1, get(second, SOL_SOCKET, SO_REUSEPORT));
        EXPECT(0, get(udp, SOL_SOCKET, SO_REUSEADDR));
        EXPECT(1, get(second_udp, SOL_SOCKET, SO_REUSEADDR));
        EXPECT(0, get(away, SOL_IP, IP_FREEBIND));
        EXPECT(1, read(self, &got, 1));
        EXPECT(number, got);
        number++;
        EXPECT(1, write(self, &number, 1));
        check_beat(0);
        check_rest(2000);
    }
    check_accepted(listening, second);
    return check_end();
}
