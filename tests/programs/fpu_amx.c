/* AMX tiles over a busy loop: the kernel gives a process tile state only after it has asked for it
 * (Documentation/arch/x86/xstate.rst), and the state is more than CRIU's images hold. */
#include "check.h"

#include <immintrin.h>
#include <sys/syscall.h>

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18, ROWS = 16, ROW_BYTES = 64, TILE = ROWS * ROW_BYTES };

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

__attribute__((target("amx-tile"))) static void configure(void)
{
    struct tile_config config = { .palette = 1 };

    for (unsigned tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = ROW_BYTES;
        config.rows[tile] = ROWS;
    }
    _tile_loadconfig(&config);
}

/* About a millisecond between load and store, without a system call. */
__attribute__((target("amx-tile"))) static void hold(const uint8_t *in, uint8_t *out)
{
    uint64_t until;

    _tile_loadd(0, in, ROW_BYTES);
    _tile_loadd(7, in + TILE, ROW_BYTES);
    until = now_ns(CLOCK_MONOTONIC) + 1000000;
    while (now_ns(CLOCK_MONOTONIC) < until)
        continue;
    _tile_stored(0, out, ROW_BYTES);
    _tile_stored(7, out + TILE, ROW_BYTES);
}

int main(int argc, char **argv)
{
    static uint8_t in[2 * TILE], out[2 * TILE];
    uint64_t random = 1;

    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) != 0)
        return UNSUPPORTED;
    check_start(argc, argv, 1);
    configure();
    check_running();
    while (!check_stopping) {
        for (unsigned i = 0; i < 2 * TILE / 8; i++)
            ((uint64_t *)in)[i] = random_next(&random);
        hold(in, out);
        for (unsigned i = 0; i < 2 * TILE / 8; i++)
            EXPECT(((uint64_t *)in)[i], ((uint64_t *)out)[i]);
        check_beat(0);
    }
    return check_end();
}
