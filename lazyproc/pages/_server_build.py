"""Builds lazyproc.pages._server; the C lies beside it, and the frames and the checksum in the wire room."""

from cffi import FFI

ffi = FFI()

ffi.cdef(
    """
    struct server;

    struct server_segment {
        uint64_t object;
        uint64_t start;
        uint64_t end;
        uint64_t where;
        int32_t pid;
        int32_t pidfd;
        int32_t fd;
    };

    enum server_cause {
        SERVER_RUNNING,
        SERVER_CLOSED,
        SERVER_HUNG_UP,
        SERVER_BAD_FRAME,
        SERVER_SOCKET_ERROR,
        SERVER_SOURCE_GONE,
        SERVER_RELEASED,
        ...
    };

    struct server_status {
        uint64_t requests;
        uint64_t pages;
        uint64_t zero;
        uint64_t absent;
        uint64_t under_way;
        uint64_t bytes_in;
        uint64_t bytes_out;
        int32_t cause;
        int32_t error;
        uint64_t detail;
    };

    int server_new(const struct server_segment *segments, size_t count, bool releasing, struct server **result);
    int server_serve(struct server *server, int fd, int channel);
    int64_t server_release(struct server *server, uint64_t object, uint64_t addr, uint64_t pages);
    void server_new_link(struct server *server);
    int server_status(struct server *server, int connection, struct server_status *status);
    void server_stop(struct server *server);
    void server_free(struct server *server);
    uint32_t server_crc32c(const void *data, size_t pages);
    """
)

ffi.set_source(
    "lazyproc.pages._server",
    '#include "_server.h"',
    sources=["lazyproc/pages/_server.c", "lazyproc/pages/_answer.c", "lazyproc/pages/_source.c"],
    depends=[
        "lazyproc/pages/_server.h",
        "lazyproc/pages/_serving.h",
        "lazyproc/wire/native.h",
        "lazyproc/wire/crc32c.h",
        "lazyproc/wire/zstd.h",
    ],
    include_dirs=["lazyproc/pages", "lazyproc/wire"],
    extra_compile_args=["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread"],
    extra_link_args=["-pthread"],
)
