/* CRC32C (Castagnoli) of whole pages with the instructions of SSE4.2 and PCLMULQDQ.
 *
 * One chain of crc32 is bound by the instruction's latency of 3 cycles for 8 bytes. Three chains side by side over
 * thirds of the page run at its throughput; a carry-less product then shifts the first two over what follows them.
 */
#ifndef LAZYPROC_WIRE_CRC32C_H
#define LAZYPROC_WIRE_CRC32C_H

#include <nmmintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <wmmintrin.h>

#define CRC32C_PAGE 4096u
#define CRC32C_LANE 170u /* 8-byte words; three lanes and two words make a page */

/* x^(8n - 33) mod P, bit-reflected, for n bytes that follow: the product of two reflected 32-bit numbers comes out
 * one bit low and crc32 of it multiplies by x^32, hence the 33. */
#define CRC32C_OVER_ONE_LANE 0x3f70cc6fu
#define CRC32C_OVER_TWO_LANES 0x5aa1f3cfu

static inline int crc32c_supported(void)
{
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
}

static inline uint64_t crc32c_word(const unsigned char *page, size_t index)
{
    uint64_t word;

    memcpy(&word, page + 8 * index, sizeof(word));
    return word;
}

__attribute__((target("sse4.2,pclmul")))
static inline uint32_t crc32c_shift(uint64_t crc, uint32_t factor)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc), _mm_cvtsi32_si128((int)factor), 0);

    return (uint32_t)_mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(product));
}

__attribute__((target("sse4.2,pclmul")))
static inline uint64_t crc32c_one_page(uint64_t crc, const unsigned char *page)
{
    uint64_t first = crc, second = 0, third = 0;

    for (size_t i = 0; i < CRC32C_LANE; i++) {
        first = _mm_crc32_u64(first, crc32c_word(page, i));
        second = _mm_crc32_u64(second, crc32c_word(page, i + CRC32C_LANE));
        third = _mm_crc32_u64(third, crc32c_word(page, i + 2 * CRC32C_LANE));
    }
    third ^= crc32c_shift(first, CRC32C_OVER_TWO_LANES) ^ crc32c_shift(second, CRC32C_OVER_ONE_LANE);
    for (size_t i = 3 * CRC32C_LANE; i < CRC32C_PAGE / 8; i++)
        third = _mm_crc32_u64(third, crc32c_word(page, i));
    return third;
}

/* Ask crc32c_supported() once before. */
__attribute__((target("sse4.2,pclmul")))
static inline uint32_t crc32c_pages(const void *data, size_t pages)
{
    const unsigned char *page = data;
    uint64_t crc = 0xffffffffu;

    for (size_t i = 0; i < pages; i++, page += CRC32C_PAGE)
        crc = crc32c_one_page(crc, page);
    return (uint32_t)crc ^ 0xffffffffu;
}

#endif
