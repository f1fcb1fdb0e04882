/* Pagemap images, for which Python would need a microsecond an entry and a large process has a million. Pure.
 *
 * Numbers and flags are those of CRIU 4.2: images/pagemap.proto, criu/include/pagemap.h. */
#ifndef LAZYPROC_IMAGES_PAGEMAP_H
#define LAZYPROC_IMAGES_PAGEMAP_H

#include <stddef.h>
#include <stdint.h>

/* Reads the records that follow the head, one element of each column an entry, and returns how many there are. The
 * columns must have room for size / 8 entries. -1 for what is wrong, and for what is merely unusual (fields out of
 * order, unknown or twice): those records are for protobuf. */
long lp_pagemap_read(const uint8_t *records, size_t size, uint64_t *starts, uint64_t *ends, uint64_t *offsets,
                     uint8_t *flags);

/* Joins neighbours that are alike in being lazy and in the parent, and returns how many extents that makes. */
size_t lp_pagemap_merge(const uint64_t *starts, const uint64_t *ends, const uint8_t *flags, size_t count,
                        uint64_t *addrs, uint64_t *pages, uint8_t *kinds);

#endif
