/* AMX tiles. The kernel gives a process tile state only after it has asked for it, and each thread room for it at its
 * first use (Documentation/arch/x86/xstate.rst). */
#ifndef TILES_H
#define TILES_H

#include "check.h"

#include <immintrin.h>
#include <sys/syscall.h>

enum { ARCH_GET_XCOMP_SUPP = 0x1021, ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM };
enum { XFEATURE_XTILEDATA = 18 };
enum { ROWS = 16, ROW_BYTES = 64, TILE = ROWS * ROW_BYTES };

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Whether the kernel gives tiles (ARCH_GET_XCOMP_SUPP), or this process has its permission (ARCH_GET_XCOMP_PERM). */
static inline bool tiles_bit(int what)
{
    uint64_t mask = 0;

    return syscall(SYS_arch_prctl, what, &mask) == 0 && (mask >> XFEATURE_XTILEDATA & 1);
}

static inline long tiles_ask(void)
{
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

__attribute__((target("amx-tile"))) static inline void tiles_configure(void)
{
    struct tile_config config = { .palette = 1 };

    for (unsigned tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = ROW_BYTES;
        config.rows[tile] = ROWS;
    }
    /* Declared to read 8 bytes only (GCC 12), so that the compiler drops the other stores. */
    __asm__ volatile("" : : "m"(config));
    _tile_loadconfig(&config);
}

/* About a millisecond, without a system call. */
static inline void tiles_wait(void)
{
    uint64_t until = now_ns(CLOCK_MONOTONIC) + 1000000;

    while (now_ns(CLOCK_MONOTONIC) < until)
        continue;
}

/* `wait` between load and store. */
__attribute__((target("amx-tile"))) static inline void
tiles_hold(const uint64_t *in, uint64_t *out, void (*wait)(void))
{
    _tile_loadd(0, in, ROW_BYTES);
    _tile_loadd(7, in + TILE / 8, ROW_BYTES);
    wait();
    _tile_stored(0, out, ROW_BYTES);
    _tile_stored(7, out + TILE / 8, ROW_BYTES);
}

/* Other values each time; the tiles have been configured by this thread. */
static inline void tiles_check(uint64_t *random, void (*wait)(void))
{
    uint64_t in[2 * TILE / 8], out[2 * TILE / 8];

    for (unsigned i = 0; i < 2 * TILE / 8; i++)
        in[i] = random_next(random);
    tiles_hold(in, out, wait);
    for (unsigned i = 0; i < 2 * TILE / 8; i++)
        EXPECT(in[i], out[i]);
}

#endif
