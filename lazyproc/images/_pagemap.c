#include "_pagemap.h"

#include <stdbool.h>
#include <string.h>

#define PAGE_SIZE 4096u
#define PE_PARENT 1u
#define PE_LAZY 2u
#define PE_PRESENT 4u
#define PE_ALL (PE_PARENT | PE_LAZY | PE_PRESENT)

/* Tags: the field's number << 3, and 0 for a varint. */
#define VADDR 0x08
#define COMPAT_NR_PAGES 0x10
#define IN_PARENT 0x18
#define FLAGS 0x20
#define NR_PAGES 0x28

struct cursor {
    const uint8_t *at;
    const uint8_t *end;
};

struct entry {
    uint64_t addr;
    uint64_t pages;
    uint64_t flags;
};

static bool varint(struct cursor *c, uint64_t *value)
{
    *value = 0;
    for (unsigned int shift = 0; shift < 64 && c->at < c->end; shift += 7) {
        uint8_t byte = *c->at++;

        if (shift == 63 && byte > 1)
            return false;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return true;
    }
    return false;
}

static bool is_next(const struct cursor *c, uint8_t tag)
{
    return c->at < c->end && *c->at == tag;
}

static bool required(struct cursor *c, uint8_t tag, uint64_t *value)
{
    if (!is_next(c, tag))
        return false;
    c->at++;
    return varint(c, value);
}

static bool optional(struct cursor *c, uint8_t tag, uint64_t *value)
{
    return !is_next(c, tag) || required(c, tag, value);
}

static bool read_entry(struct cursor c, struct entry *e)
{
    uint64_t compat, in_parent = 0, pages = 0;

    if (!required(&c, VADDR, &e->addr) || !required(&c, COMPAT_NR_PAGES, &compat) ||
        !optional(&c, IN_PARENT, &in_parent))
        return false;
    e->flags = in_parent ? PE_PARENT : PE_PRESENT; /* unless it has flags: CRIU before 2.0 wrote none */
    if (!optional(&c, FLAGS, &e->flags) || !optional(&c, NR_PAGES, &pages) || c.at != c.end)
        return false;
    e->pages = pages ? pages : compat;
    return compat <= UINT32_MAX && e->flags <= PE_ALL;
}

/* Whole pages at or behind `end`, that do not leave the address space. */
static bool is_possible(const struct entry *e, uint64_t end)
{
    return e->pages && e->addr % PAGE_SIZE == 0 && e->addr >= end && e->pages <= (UINT64_MAX - e->addr) / PAGE_SIZE;
}

static bool record(struct cursor *c, struct cursor *body)
{
    uint32_t size;

    if ((size_t)(c->end - c->at) < sizeof(size))
        return false;
    memcpy(&size, c->at, sizeof(size));
    c->at += sizeof(size);
    if ((size_t)(c->end - c->at) < size)
        return false;
    *body = (struct cursor){c->at, c->at + size};
    c->at += size;
    return true;
}

long lp_pagemap_read(const uint8_t *records, size_t size, uint64_t *starts, uint64_t *ends, uint64_t *offsets,
                     uint8_t *flags)
{
    struct cursor c = {records, records + size}, body;
    uint64_t end = 0, offset = 0;
    struct entry e;
    long count = 0;

    for (; c.at < c.end; count++) {
        if (!record(&c, &body) || !read_entry(body, &e) || !is_possible(&e, end))
            return -1;
        end = e.addr + e.pages * PAGE_SIZE;
        starts[count] = e.addr;
        ends[count] = end;
        offsets[count] = offset;
        flags[count] = (uint8_t)e.flags;
        if (e.flags & PE_PRESENT)
            offset += e.pages * PAGE_SIZE;
    }
    return count;
}

size_t lp_pagemap_merge(const uint64_t *starts, const uint64_t *ends, const uint8_t *flags, size_t count,
                        uint64_t *addrs, uint64_t *pages, uint8_t *kinds)
{
    size_t merged = 0;

    for (size_t i = 0; i < count; i++) {
        uint8_t kind = flags[i] & (PE_PARENT | PE_LAZY);

        if (!i || starts[i] != ends[i - 1] || kind != kinds[merged - 1]) {
            addrs[merged] = starts[i];
            pages[merged] = 0;
            kinds[merged++] = kind;
        }
        pages[merged - 1] += (ends[i] - starts[i]) / PAGE_SIZE;
    }
    return merged;
}
