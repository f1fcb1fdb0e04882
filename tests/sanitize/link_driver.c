/* Feeds the pager's side of a page connection (_link.c) with answers that are right, nearly right, and noise: whatever
 * is handed out must have been asked for and be what the source has. Run by tests/sanitize/link.sh.
 *
 * link_driver ROUNDS SEED
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "_link.h"
#include "crc32c.h"
#include "mutate.h"
#include "native.h"

enum { GETS = 6, MOST = 3, ROOM = GETS * (sizeof(struct page_frame) + MOST * PAGE_BYTES) + 4096 };
#define OBJECT 0x6401u
#define FIRST 0x7f0000000000u

#define CHECK(condition)                                                     \
    do {                                                                     \
        if (!(condition)) {                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

/* What the source has: of eight pages one has content and one is not there, so that many mutations meet a header. */
static void fill(uint64_t addr, unsigned char *page)
{
    for (unsigned i = 0; i < PAGE_BYTES; i++)
        page[i] = (unsigned char)((addr >> 12) * 31 + i * 7 + 1);
}

static enum answer_kind kind_at(uint64_t addr)
{
    uint64_t page = addr >> 12;

    return page % 8 == 0 ? ANSWER_ABSENT : page % 8 == 5 ? ANSWER_DATA : ANSWER_ZERO;
}

struct packer {
    const struct zstd *zstd;
    void *context;
};

/* A page becomes its length and one frame of zstd; returns how many bytes. */
static size_t pack(const struct packer *p, unsigned char *page)
{
    unsigned char packed[PAGE_BYTES];
    uint32_t length = (uint32_t)zstd_pack(p->zstd, p->context, packed, sizeof(packed), page, PAGE_BYTES);

    CHECK(length);
    memcpy(page, &length, sizeof(length));
    memcpy(page + sizeof(length), packed, length);
    return sizeof(length) + length;
}

/* The answer to one GET, a frame for each page; returns how many bytes. */
static size_t answer(const struct page_frame *get, const struct packer *packer, unsigned char *out)
{
    size_t at = 0;

    for (uint32_t i = 0; i < get->count; i++) {
        struct page_frame f = *get;
        size_t payload = 0;

        f.type = FRAME_PAGES;
        f.count = 1;
        f.addr += (uint64_t)i * PAGE_BYTES;
        f.flags = i + 1 == get->count ? FRAME_LAST : 0;
        if (kind_at(f.addr) != ANSWER_DATA) {
            f.flags |= kind_at(f.addr) == ANSWER_ZERO ? FRAME_ZERO : FRAME_ABSENT;
        } else {
            fill(f.addr, out + at + sizeof(f));
            f.crc = crc32c_pages(out + at + sizeof(f), 1);
            payload = get->flags & FRAME_PACKED ? pack(packer, out + at + sizeof(f)) : PAGE_BYTES;
            f.flags |= get->flags;
        }
        memcpy(out + at, &f, sizeof(f));
        at += sizeof(f) + payload;
    }
    return at;
}

static size_t answer_all(int fd, const struct packer *packer, unsigned char *out)
{
    struct page_frame get;
    size_t at = 0;

    while (recv(fd, &get, sizeof(get), MSG_DONTWAIT) == (ssize_t)sizeof(get))
        at += answer(&get, packer, out + at);
    return at;
}

static void check_answer(const struct answer *a)
{
    unsigned char expected[PAGE_BYTES];

    CHECK(a->request.object == OBJECT && a->pages >= 1 && a->pages <= a->request.count && a->addr >= FIRST);
    CHECK(a->addr + (uint64_t)a->pages * PAGE_BYTES <= FIRST + (uint64_t)GETS * MOST * PAGE_BYTES);
    CHECK((a->kind == ANSWER_DATA) == (a->data != NULL));
    for (uint32_t i = 0; a->data && i < a->pages; i++) {
        fill(a->addr + (uint64_t)i * PAGE_BYTES, expected);
        CHECK(memcmp(expected, a->data + (size_t)i * PAGE_BYTES, PAGE_BYTES) == 0);
    }
}

/* As long as something is there; adds the pages that were handed out. False: it was refused. */
static bool take(struct link *link, unsigned *pages)
{
    struct answer a;
    int result = 0;

    while (link_receive(link) == 0) {
        while ((result = link_next(link, &a)) == 1) {
            check_answer(&a);
            *pages += a.pages;
        }
        if (result < 0) {
            CHECK(result == -EBADMSG || result == -EILSEQ);
            return false;
        }
    }
    return true;
}

static void one_round(struct link *link, const struct packer *packer, unsigned round, unsigned *seed)
{
    static unsigned char out[ROOM];
    unsigned asked = 0, came = 0;
    bool good = true;
    size_t length;
    int ends[2];

    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    link_connect(link, ends[0]);
    for (uint64_t i = 0; i < GETS; i++) {
        uint32_t pages = (uint32_t)rand_r(seed) % MOST + 1;

        CHECK(link_ask(link, 0, OBJECT, FIRST + i * MOST * PAGE_BYTES, pages, round / 8 % 2, 0) == 0);
        asked += pages;
    }
    CHECK(link_flush(link) == 0);
    length = answer_all(ends[1], packer, out);
    if (round % 8 == 1)
        for (size_t i = 0; i < length; i++)
            out[i] = (unsigned char)(rand_r(seed) >> 8);
    for (unsigned i = round % 8 == 0 ? 0 : (unsigned)rand_r(seed) % 3 + 1; i > 0 && length > 0; i--)
        length = mutate(out, length, ROOM, seed);
    for (size_t at = 0, step; good && at < length; at += step) {
        step = (size_t)rand_r(seed) % length + 1;
        step = step < length - at ? step : length - at;
        CHECK(send(ends[1], out + at, step, MSG_NOSIGNAL) == (ssize_t)step);
        good = take(link, &came);
    }
    close(ends[1]);
    CHECK(came <= asked && (round % 8 != 0 || came == asked));
}

int main(int argc, char **argv)
{
    struct link link;
    struct packer packer;
    unsigned seed;

    CHECK(argc == 3);
    seed = (unsigned)strtoul(argv[2], NULL, 10);
    CHECK(link_init(&link) == 0 && link_can_unpack(&link));
    packer = (struct packer){&link.zstd, link.zstd.new_packer()};
    CHECK(packer.context);
    for (unsigned round = 0; round < strtoul(argv[1], NULL, 10); round++)
        one_round(&link, &packer, round, &seed);
    link.zstd.end_packer(packer.context);
    link_free(&link);
    return 0;
}
