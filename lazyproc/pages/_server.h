/* The page server: threads that answer GET frames from frozen processes and from images, without Python. */
#ifndef LAZYPROC_PAGES_SERVER_H
#define LAZYPROC_PAGES_SERVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct server;

/* Pages [start, end) of an object and where they lie. Descriptors are borrowed and outlive the server. */
struct server_segment {
    uint64_t object;
    uint64_t start;
    uint64_t end;
    uint64_t where; /* remote address, or file offset */
    int32_t pid;    /* 0: `fd` is a file */
    int32_t pidfd;  /* of `pid` */
    int32_t fd;     /* the file, or /proc/PID/mem */
};

enum server_cause {
    SERVER_RUNNING = 0,
    SERVER_CLOSED,       /* the client said CLOSE */
    SERVER_HUNG_UP,      /* the client's stream ended without CLOSE */
    SERVER_BAD_FRAME,    /* `detail` is the frame's type */
    SERVER_SOCKET_ERROR, /* `error` is the errno */
    SERVER_SOURCE_GONE,  /* `detail` is the pid that ended */
    SERVER_RELEASED,     /* a page was asked for that had been acknowledged and is freed; `detail` is its address */
};

struct server_status {
    uint64_t requests;
    uint64_t pages;  /* sent with content */
    uint64_t zero;   /* pages announced as zero */
    uint64_t absent; /* pages that no segment has, or that cannot be read */
    uint64_t under_way; /* pages that were on their way over the other channel */
    uint64_t bytes_in;
    uint64_t bytes_out;
    int32_t cause;
    int32_t error;
    uint64_t detail;
};

/* All functions return 0 or more, or a negative errno.
 *
 * server_new: `segments` are copied; they must be page-aligned, not empty, sorted by (object, start) and must not
 * overlap (-EINVAL). -ENOTSUP: the processor has no SSE4.2 or PCLMULQDQ. `releasing`: pages are freed as they are
 * acknowledged, and one that is on its way over the other channel of a link is not sent a second time. */
int server_new(const struct server_segment *segments, size_t count, bool releasing, struct server **result);

/* Answers the connected stream socket `fd` in a thread of its own, and owns it from now on; on error it does not.
 * Returns the connection's number, counted from 0. `channel` is 0 or 1: the two of a link. Call from one thread at a
 * time. */
int server_serve(struct server *server, int fd, int channel);

/* When releasing: these pages are freed right after this call. None of them is read from here on, and what is being read
 * now is not sent. Returns how many of them the server has. */
int64_t server_release(struct server *server, uint64_t object, uint64_t addr, uint64_t pages);

/* Ends every connection and waits for the threads; nothing is on its way any more. Then the next link is served. */
void server_new_link(struct server *server);

/* The counters of a connection, running or ended, and how it ended. */
int server_status(struct server *server, int connection, struct server_status *status);

/* Ends every connection and waits for the threads. Status can still be read. */
void server_stop(struct server *server);

void server_free(struct server *server);

/* CRC32C of whole pages, for a client in Python. */
uint32_t server_crc32c(const void *data, size_t pages);

#endif
