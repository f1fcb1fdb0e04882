/* Private mappings of /dev/zero, which are anonymous memory to the kernel (mmap_zero, drivers/char/mem.c), with holes:
 * every second page is written, the others stay zeros. One begins within the device, one cannot be written any more.
 */
#include "check.h"

enum { PAGES = 512 };

static uint8_t *maps[2];
static const off_t offsets[2] = { 0, 16 * PAGE };

static void fill(uint8_t *at)
{
    for (unsigned page = 0; page < PAGES; page += 2)
        fill_page((uint64_t *)(at + page * PAGE), page, 1);
}

static void check(const uint8_t *at)
{
    static const uint64_t zeros[WORDS];

    for (unsigned page = 0; page < PAGES; page += 2) {
        verify_page((const uint64_t *)(at + page * PAGE), page, 1);
        EXPECT(0, memcmp(at + (page + 1) * PAGE, zeros, PAGE));
    }
}

int main(int argc, char **argv)
{
    int device;

    check_start(argc, argv, 1);
    MUST(device = open("/dev/zero", O_RDWR | O_CLOEXEC));
    for (unsigned i = 0; i < 2; i++) {
        maps[i] = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, device, offsets[i]);
        if (maps[i] == MAP_FAILED)
            check_die("mmap of /dev/zero");
        fill(maps[i]);
    }
    MUST(mprotect(maps[1], PAGES * PAGE, PROT_READ));
    MUST(close(device));
    check_running();
    while (!check_stopping) {
        for (unsigned i = 0; i < 2; i++)
            check(maps[i]);
        fill(maps[0]);
        check_beat(0);
        check_rest(2000);
    }
    return check_end();
}
