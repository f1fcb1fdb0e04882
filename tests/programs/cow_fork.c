/* A parent with MiB of memory and three children that share it since their fork; each changes a few pages of its own. */
#include "check.h"

enum { MEMBERS = 4, OWN = 16 }; /* the pages that a member changes begin at OWN times its number */

static volatile uint64_t *page_at(char *memory, size_t index)
{
    return (volatile uint64_t *)(void *)(memory + index * PAGE);
}

/* What page `index` holds for a member: the parent's word of before the fork, or the member's own. */
static uint64_t generation_of(unsigned member, size_t index)
{
    return index / OWN == member ? 2 + member : 1;
}

static void run(char *memory, size_t pages, unsigned member)
{
    for (size_t index = (size_t)OWN * member; index < OWN * (member + 1u); index++)
        fill_page(page_at(memory, index), index * PAGE, generation_of(member, index));
    while (!check_stopping) {
        size_t step = 1 + pages / 64;

        for (size_t index = 0; index < pages; index += step)
            verify_page(page_at(memory, index), index * PAGE, generation_of(member, index));
        check_beat(member);
        check_rest(1000);
    }
    for (size_t index = 0; index < pages; index++)
        verify_page(page_at(memory, index), index * PAGE, generation_of(member, index));
}

int main(int argc, char **argv)
{
    size_t pages = (size_t)(argc > 2 ? atol(argv[2]) : 8) << 8;
    pid_t children[MEMBERS - 1];
    char *memory;

    check_start(argc, argv, MEMBERS);
    memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        check_die("mmap");
    for (size_t index = 0; index < pages; index++)
        fill_page(page_at(memory, index), index * PAGE, 1);
    for (unsigned member = 1; member < MEMBERS; member++) {
        children[member - 1] = fork_child();
        if (children[member - 1] == 0) {
            run(memory, pages, member);
            _exit(status->errors != 0);
        }
    }
    check_running();
    run(memory, pages, 0);
    for (unsigned member = 1; member < MEMBERS; member++) {
        kill(children[member - 1], SIGTERM);
        expect_exit_0(children[member - 1]);
    }
    return check_end();
}
