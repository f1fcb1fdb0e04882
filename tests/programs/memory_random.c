/* Threads visit random pages, check every word of a page and often write a new generation of it.
 *
 * memory_random STATUS MIB [THREADS [PACE_US]]: MIB of private memory, THREADS (1) that share it out, a rest of
 * PACE_US (0: none) after every 64 visits. One page in sixteen is not written at the start. How long the first touch
 * of each visit took goes into the histogram: after a move that is what the process itself sees of post-copy.
 */
#include "random_memory.h"

int main(int argc, char **argv)
{
    memory_options(argc, argv, 1);
    check_start(argc, argv, memory.threads);
    make_memory();
    visit_all_memory();
    check_all_memory();
    return check_end();
}
