/* Memory that compresses well, as most does: numbered lines that differ from page to page.
 *
 * memory_text STATUS MIB: checks them again and again, a page at a time, and all in the end.
 */
#include "check.h"

#include <string.h>

enum { LINE = 16 };

static void write_page(char *page, size_t number)
{
    for (size_t at = 0; at < PAGE; at += LINE)
        snprintf(page + at, LINE, "%07zx.%06zx\n", number & 0xfffffff, at);
}

static void check_page(const char *memory, size_t number)
{
    char expected[PAGE + LINE];

    write_page(expected, number);
    if (memcmp(memory + number * PAGE, expected, PAGE))
        check_fail(memory + number * PAGE, number, 0, "page %zu", number);
}

int main(int argc, char **argv)
{
    size_t pages = (size_t)(argc > 2 ? atoi(argv[2]) : 16) * 256;
    char expected[PAGE + LINE], *memory;

    check_start(argc, argv, 1);
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        check_die("mmap");
    for (size_t page = 0; page < pages; page++) {
        write_page(expected, page);
        memcpy(memory + page * PAGE, expected, PAGE);
    }
    check_running();
    for (size_t page = 0; !check_stopping; page = (page + 1) % pages) {
        check_page(memory, page);
        check_beat(0);
        check_rest(2000);
    }
    for (size_t page = 0; page < pages; page++)
        check_page(memory, page);
    return check_end();
}
