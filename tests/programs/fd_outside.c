/* Standard input and output lead to a process outside: each byte that comes is the successor of the one before it, none
 * is lost or comes twice, and all go back. Standard output may be anything. */
#include "check.h"

#include <poll.h>

int main(int argc, char **argv)
{
    uint8_t expected = 0, byte;

    check_start(argc, argv, 1);
    check_running();
    while (!check_stopping) {
        struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };

        if (poll(&input, 1, 2) == 1) {
            EXPECT(1, read(STDIN_FILENO, &byte, 1));
            EXPECT(expected, byte);
            EXPECT(1, write(STDOUT_FILENO, &byte, 1));
            expected++;
        }
        check_beat(0);
    }
    return check_end();
}
