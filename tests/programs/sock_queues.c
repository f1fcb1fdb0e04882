/* Sockets whose queues are never empty: unix stream, datagram and seqpacket, TCP and UDP over loopback.
 *
 * Every message has its number and must arrive once, whole and in order; on the unix sockets it carries an eventfd
 * that counts to its number. A second connection waits at each listening socket and is accepted only at the end.
 */
#include "check.h"

#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { DEPTH = 5, MESSAGE = 600 };

struct channel {
    const char *name;
    int writer, reader;
    bool stream, descriptors;
    uint64_t sent, received;
};

static void fill(uint8_t *message, uint64_t number)
{
    memcpy(message, &number, sizeof number);
    memset(message + sizeof number, (int)(number % 251), MESSAGE - sizeof number);
}

static void put(struct channel *channel)
{
    uint8_t message[MESSAGE];
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = { .header = { CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS } };
    struct iovec data = { message, MESSAGE };
    struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1 };
    int counter = -1;

    fill(message, ++channel->sent);
    if (channel->descriptors) {
        MUST(counter = eventfd((unsigned)channel->sent, EFD_NONBLOCK));
        memcpy(CMSG_DATA(&control.header), &counter, sizeof counter);
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
    }
    EXPECT(0, sendmsg(channel->writer, &header, 0) < 0 ? errno : 0);
    if (counter >= 0)
        MUST(close(counter));
}

static void check_descriptor(struct msghdr *header, uint64_t number)
{
    struct cmsghdr *control = CMSG_FIRSTHDR(header);
    uint64_t value = 0;
    int counter;

    if (control == NULL || control->cmsg_type != SCM_RIGHTS) {
        check_fail(NULL, number, 0, "message %llu has lost its descriptor", (unsigned long long)number);
        return;
    }
    memcpy(&counter, CMSG_DATA(control), sizeof counter);
    EXPECT(sizeof value, read(counter, &value, sizeof value));
    EXPECT(number, value);
    MUST(close(counter));
}

static void get(struct channel *channel)
{
    uint8_t message[MESSAGE + 1], expected[MESSAGE];
    char control[256];
    /* A datagram that is too long must show; a stream would begin the next message. */
    struct iovec data = { message, channel->stream ? MESSAGE : MESSAGE + 1 };
    struct msghdr header = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };

    ssize_t length;

    fill(expected, ++channel->received);
    do /* TCP may have to send again what was on its way; SIGTERM must not end that wait */
        length = recvmsg(channel->reader, &header, channel->stream ? MSG_WAITALL : 0);
    while (length < 0 && errno == EINTR);
    EXPECT(MESSAGE, length);
    if (memcmp(message, expected, MESSAGE) != 0)
        check_fail(NULL, channel->received, *(uint64_t *)message, "%s: another message came", channel->name);
    if (channel->descriptors)
        check_descriptor(&header, channel->received);
}

static struct channel pair(const char *name, int type)
{
    int ends[2];

    MUST(socketpair(AF_UNIX, type, 0, ends));
    return (struct channel){ name, ends[0], ends[1], type == SOCK_STREAM, true, 0, 0 };
}

static struct sockaddr_in loopback(int fd)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof address;

    MUST(bind(fd, (struct sockaddr *)&address, length));
    MUST(getsockname(fd, (struct sockaddr *)&address, &length));
    return address;
}

static int connected(int type, const struct sockaddr_in *address)
{
    int fd;

    MUST(fd = socket(AF_INET, type, 0));
    MUST(connect(fd, (const struct sockaddr *)address, sizeof *address));
    return fd;
}

static struct channel tcp(int *listener, int *waiting)
{
    struct channel channel = { .name = "tcp", .stream = true };
    struct sockaddr_in address;

    MUST(*listener = socket(AF_INET, SOCK_STREAM, 0));
    address = loopback(*listener);
    MUST(listen(*listener, 2));
    channel.writer = connected(SOCK_STREAM, &address);
    MUST(channel.reader = accept(*listener, NULL, NULL));
    *waiting = connected(SOCK_STREAM, &address);
    return channel;
}

static struct channel udp(void)
{
    struct channel channel = { .name = "udp" };
    struct sockaddr_in address;

    MUST(channel.reader = socket(AF_INET, SOCK_DGRAM, 0));
    address = loopback(channel.reader);
    channel.writer = connected(SOCK_DGRAM, &address);
    return channel;
}

static struct channel named(int *listener, int *waiting)
{
    struct channel channel = { .name = "named", .stream = true, .descriptors = true };
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int length = snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "sock_queues-%d", getpid());
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);

    MUST(*listener = socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(bind(*listener, (struct sockaddr *)&address, size));
    MUST(listen(*listener, 2));
    MUST(channel.writer = socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(connect(channel.writer, (struct sockaddr *)&address, size));
    MUST(channel.reader = accept(*listener, NULL, NULL));
    MUST(*waiting = socket(AF_UNIX, SOCK_STREAM, 0));
    MUST(connect(*waiting, (struct sockaddr *)&address, size));
    return channel;
}

/* The connection that waited all the time. */
static void accept_late(const char *name, int listener, int waiting)
{
    struct channel channel = { .name = name, .writer = waiting, .stream = true };

    channel.reader = accept(listener, NULL, NULL);
    EXPECT(true, channel.reader >= 0);
    put(&channel);
    get(&channel);
}

int main(int argc, char **argv)
{
    int listeners[2], waiting[2];

    check_start(argc, argv, 1);
    struct channel channels[] = {
        pair("stream", SOCK_STREAM),
        pair("datagram", SOCK_DGRAM),
        pair("seqpacket", SOCK_SEQPACKET),
        named(&listeners[0], &waiting[0]),
        tcp(&listeners[1], &waiting[1]),
        udp(),
    };
    const unsigned count = sizeof channels / sizeof channels[0];

    for (unsigned i = 0; i < DEPTH * count; i++)
        put(&channels[i % count]);
    check_running();
    while (!check_stopping) {
        for (unsigned i = 0; i < count; i++) {
            put(&channels[i]);
            get(&channels[i]);
        }
        check_beat(0);
        check_rest(500);
    }
    for (unsigned i = 0; i < DEPTH * count; i++)
        get(&channels[i % count]);
    accept_late("late unix", listeners[0], waiting[0]);
    accept_late("late tcp", listeners[1], waiting[1]);
    return check_end();
}
