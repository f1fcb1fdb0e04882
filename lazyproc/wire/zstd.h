/* Compression of pages by the system's own zstd (RFC 8878), which is looked for when it is wanted: what is used of it is
 * its stable interface (zstd.h, ZSTD_STATIC_LINKING_ONLY not set), and nothing of it is needed to build.
 */
#ifndef LAZYPROC_WIRE_ZSTD_H
#define LAZYPROC_WIRE_ZSTD_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#define ZSTD_LEVEL 1

struct zstd {
    void *library; /* NULL: there is none */
    unsigned (*is_error)(size_t);
    void *(*new_packer)(void);
    size_t (*end_packer)(void *);
    size_t (*pack)(void *, void *, size_t, const void *, size_t, int);
    void *(*new_unpacker)(void);
    size_t (*end_unpacker)(void *);
    size_t (*unpack)(void *, void *, size_t, const void *, size_t);
};

/* ISO C has no conversion of dlsym's result to a function. */
static inline bool zstd_find(const struct zstd *z, const char *name, void *function)
{
    void *found = dlsym(z->library, name);

    memcpy(function, &found, sizeof(found));
    return found;
}

static inline void zstd_unload(struct zstd *z)
{
    if (z->library)
        dlclose(z->library);
    *z = (struct zstd){0};
}

static inline bool zstd_load(struct zstd *z)
{
    *z = (struct zstd){.library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL)};
    if (z->library && zstd_find(z, "ZSTD_isError", &z->is_error) &&
        zstd_find(z, "ZSTD_createCCtx", &z->new_packer) && zstd_find(z, "ZSTD_freeCCtx", &z->end_packer) &&
        zstd_find(z, "ZSTD_compressCCtx", &z->pack) && zstd_find(z, "ZSTD_createDCtx", &z->new_unpacker) &&
        zstd_find(z, "ZSTD_freeDCtx", &z->end_unpacker) && zstd_find(z, "ZSTD_decompressDCtx", &z->unpack))
        return true;
    zstd_unload(z);
    return false;
}

/* Bytes written, 0: it does not fit into `room`, or there is no memory. */
static inline size_t zstd_pack(const struct zstd *z, void *packer, void *to, size_t room, const void *from, size_t size)
{
    size_t n = z->pack(packer, to, room, from, size, ZSTD_LEVEL);

    return z->is_error(n) ? 0 : n;
}

/* Whether it was exactly `size` bytes. */
static inline bool zstd_unpack(const struct zstd *z, void *unpacker, void *to, size_t size, const void *from,
                               size_t packed)
{
    return z->unpack(unpacker, to, size, from, packed) == size;
}

#endif
