/* Memory in many runs: every other page of a mapping has content, and between them is nothing.
 *
 * scattered STATUS [RUNS]: as many pages with content. It looks at all of them without rest, and at SIGTERM at those in
 * between as well, which are zero.
 */
#include "check.h"

static uint64_t (*pages)[WORDS];
static uint32_t runs;

static void check_full(uint32_t run)
{
    verify_page(pages[2 * run], (uintptr_t)pages[2 * run], 1);
}

static void check_empty(uint32_t run)
{
    for (unsigned word = 0; word < WORDS; word++)
        EXPECT(0, pages[2 * run + 1][word]);
}

static void set_up(int argc, char **argv)
{
    runs = (uint32_t)(argc > 2 ? atoi(argv[2]) : 1000);
    check_start(argc, argv, 1);
    pages = mmap(NULL, (size_t)runs * 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        check_die("memory");
    MUST(madvise(pages, (size_t)runs * 2 * PAGE, MADV_NOHUGEPAGE));
    for (uint32_t run = 0; run < runs; run++)
        fill_page(pages[2 * run], (uintptr_t)pages[2 * run], 1);
    check_running();
}

int main(int argc, char **argv)
{
    set_up(argc, argv);
    for (uint32_t run = 0; !check_stopping; run = (run + 1) % runs) {
        check_full(run);
        check_beat(0);
        if (run % 64 == 0)
            check_rest(200);
    }
    status->phase = FINAL;
    for (uint32_t run = 0; run < runs; run++) {
        check_full(run);
        check_empty(run);
    }
    return check_end();
}
