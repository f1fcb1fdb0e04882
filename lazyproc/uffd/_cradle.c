#define _GNU_SOURCE
#include "_cradle.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define QUEUE_BYTES (16 << 20) /* a message takes less than 1 KiB of it */

struct message {
    uint32_t round;
    uint32_t ids[CRADLE_BATCH];
};

union rights {
    char bytes[CMSG_SPACE(CRADLE_BATCH * sizeof(int))];
    struct cmsghdr align;
};

/* From its connect(2) on nobody else may send here (unix_may_send), and what came before is dropped. */
static int connect_to_itself(int fd)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    socklen_t length = sizeof(name);
    char byte;

    if (bind(fd, (struct sockaddr *)&name, sizeof(name.sun_family)) < 0 ||
        getsockname(fd, (struct sockaddr *)&name, &length) < 0 || connect(fd, (struct sockaddr *)&name, length) < 0)
        return -errno;
    while (recv(fd, &byte, 1, MSG_DONTWAIT) >= 0)
        ;
    return errno == EAGAIN ? 0 : -errno;
}

int cradle_open(void)
{
    const int size = QUEUE_BYTES;
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0), error;

    if (fd < 0)
        return -errno;
    error = connect_to_itself(fd);
    /* As much as we may have: the limit of net.core.wmem_max is for those without CAP_NET_ADMIN. */
    if (!error && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0 &&
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)) < 0)
        error = -errno;
    if (!error)
        return fd;
    close(fd);
    return error;
}

static int put_batch(int cradle, uint32_t round, const struct cradled *items, size_t count)
{
    struct message message = {.round = round};
    struct iovec body = {&message, sizeof(uint32_t) * (1 + count)};
    union rights rights = {0};
    struct msghdr header = {
        .msg_iov = &body, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *control = CMSG_FIRSTHDR(&header);

    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(count * sizeof(int));
    for (size_t i = 0; i < count; i++) {
        message.ids[i] = items[i].id;
        memcpy(CMSG_DATA(control) + i * sizeof(int), &items[i].uffd, sizeof(int));
    }
    return sendmsg(cradle, &header, MSG_DONTWAIT) < 0 ? -errno : 0;
}

int cradle_put(int cradle, uint32_t round, const struct cradled *items, size_t count)
{
    int error = 0;

    for (size_t done = 0, n; done < count && !error; done += n) {
        n = count - done < CRADLE_BATCH ? count - done : CRADLE_BATCH;
        error = put_batch(cradle, round, items + done, n);
    }
    return error;
}

static int peek_from(int cradle, int offset)
{
    return setsockopt(cradle, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof(offset)) < 0 ? -errno : 0;
}

void cradle_forget(int cradle, uint32_t round)
{
    uint32_t first;

    if (peek_from(cradle, -1)) /* MSG_PEEK means the first one again */
        return;
    while (recv(cradle, &first, sizeof(first), MSG_PEEK | MSG_DONTWAIT) == sizeof(first) && first < round)
        if (recv(cradle, &first, sizeof(first), MSG_DONTWAIT) < 0) /* without room for them the descriptors go, too */
            return;
}

int cradle_rewind(int cradle)
{
    return peek_from(cradle, 0);
}

int cradle_next(int cradle, struct cradled *items)
{
    struct message message;
    struct iovec body = {&message, sizeof(message)};
    union rights rights;
    struct msghdr header = {
        .msg_iov = &body, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof(rights)};
    ssize_t n = recvmsg(cradle, &header, MSG_PEEK | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *control = n < 0 ? NULL : CMSG_FIRSTHDR(&header);
    size_t count = control ? (control->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;

    if (n < 0)
        return -errno;
    for (size_t i = 0; i < count; i++) {
        items[i].id = message.ids[i];
        memcpy(&items[i].uffd, CMSG_DATA(control) + i * sizeof(int), sizeof(int));
    }
    if (!(header.msg_flags & MSG_CTRUNC))
        return (int)count;
    while (count)
        close(items[--count].uffd);
    return -EMFILE;
}
