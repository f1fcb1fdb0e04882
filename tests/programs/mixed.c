/* Threads and memory, and what else an ordinary service has: a file, a pipe and a socket pair with bytes in them.
 *
 * mixed STATUS MIB [THREADS [PACE_US]]: MIB of private memory that THREADS (2) visit at random as memory_random does,
 * with a rest of PACE_US after every 64 visits. One more thread passes numbers through the pipe, the sockets and the
 * file STATUS.file: in each channel DEPTH numbers are always on their way, and the file's offset is known.
 */
#include "random_memory.h"

#include <sys/socket.h>

enum { DEPTH = 8 };

static int a_pipe[2], sockets[2], file;

static void send_number(uint64_t number)
{
    EXPECT(8, write(a_pipe[1], &number, 8));
    EXPECT(8, write(sockets[number & 1], &number, 8));
}

static void receive_number(uint64_t number)
{
    uint64_t found = 0;

    EXPECT(8, read(a_pipe[0], &found, 8));
    EXPECT(number, found);
    EXPECT(8, read(sockets[!(number & 1)], &found, 8));
    EXPECT(number, found);
}

static void keep_in_file(uint64_t number)
{
    off_t at = (off_t)(number & 511) * 8;
    uint64_t found = 0;

    EXPECT(at, lseek(file, 0, SEEK_CUR));
    EXPECT(8, write(file, &number, 8));
    EXPECT(8, pread(file, &found, 8, at));
    EXPECT(number, found);
    if ((number & 511) == 511)
        EXPECT(0, lseek(file, 0, SEEK_SET));
}

static void *pass_numbers(void *unused)
{
    uint64_t next = 0;

    for (; next < DEPTH; next++)
        send_number(next);
    for (; !check_stopping; next++) {
        receive_number(next - DEPTH);
        send_number(next);
        keep_in_file(next - DEPTH);
        check_beat(memory.threads);
        check_rest(500);
    }
    return unused;
}

static void set_up(int argc, char **argv)
{
    char path[4096];

    memory_options(argc, argv, 2);
    check_start(argc, argv, memory.threads + 1);
    snprintf(path, sizeof path, "%s.file", argv[1]);
    MUST(file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600));
    MUST(pipe(a_pipe));
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
    make_memory();
}

int main(int argc, char **argv)
{
    pthread_t passing;

    set_up(argc, argv);
    passing = start_thread(pass_numbers, NULL);
    visit_all_memory();
    pthread_join(passing, NULL);
    check_all_memory();
    return check_end();
}
