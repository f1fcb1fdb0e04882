/* The page frames of the native protocol, as docs/protocol.md describes them: for the C threads at both ends. */
#ifndef LAZYPROC_WIRE_NATIVE_H
#define LAZYPROC_WIRE_NATIVE_H

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian and are sent as they lie in memory"
#endif

#define PAGE_BYTES 4096u
#define FRAME_MAX_PAGES 1024u /* in one GET, and so in one PAGES */

enum frame_type { FRAME_GET = 1, FRAME_PAGES = 2, FRAME_CLOSE = 3 };
/* PACKED: of GET, they may come so; of PAGES, 4 bytes with a length and so many of one zstd frame follow. */
enum frame_flag { FRAME_ZERO = 1, FRAME_LAST = 2, FRAME_ABSENT = 4, FRAME_UNDER_WAY = 8, FRAME_PACKED = 16 };

struct page_frame {
    uint8_t type;
    uint8_t flags;
    uint16_t reserved;
    uint32_t count; /* pages */
    uint64_t object;
    uint64_t addr;
    uint32_t tag;
    uint32_t crc; /* CRC32C of the payload, 0 without one */
};

_Static_assert(sizeof(struct page_frame) == 32, "the header is 32 bytes on the wire");

#endif
