/* Open files keep their content, position, flags and number, and stay shared where they were.
 *
 * fd_files STATUS: works on STATUS.data, STATUS.log and STATUS.gone (deleted) beside the status block.
 */
#include "check.h"

enum { RECORD = 64, QUEUED = 5, GONE_PAGES = 16, PIPE_SIZE = 1 << 17 };

static struct {
    int data, data_dup, data_again, log, gone, gone_reading, directory, null, zero, memory, reading, writing;
    int cloexec, packets_in, packets_out;
} fds;
static char log_path[512];

static int open_beside(const char *status_path, const char *suffix, int flags)
{
    char path[512];
    int fd;

    snprintf(path, sizeof path, "%s.%s", status_path, suffix);
    MUST(fd = open(path, flags, 0644));
    return fd;
}

static void open_gone(const char *status_path)
{
    char path[512];

    fds.gone = open_beside(status_path, "gone", O_RDWR | O_CREAT | O_TRUNC);
    fds.gone_reading = open_beside(status_path, "gone", O_RDONLY);
    MUST(ftruncate(fds.gone, (off_t)GONE_PAGES * PAGE * 2));
    snprintf(path, sizeof path, "%s.gone", status_path);
    MUST(unlink(path));
}

static void open_all(const char *status_path)
{
    int ends[2];

    fds.data = open_beside(status_path, "data", O_RDWR | O_CREAT | O_TRUNC);
    MUST(fds.data_dup = fcntl(fds.data, F_DUPFD, 200));
    fds.data_again = open_beside(status_path, "data", O_RDONLY | O_NONBLOCK);
    MUST(fds.cloexec = fcntl(fds.data, F_DUPFD_CLOEXEC, 300));
    fds.log = open_beside(status_path, "log", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND);
    snprintf(log_path, sizeof log_path, "%s.log", status_path);
    open_gone(status_path);
    MUST(fds.directory = open("/usr", O_RDONLY | O_DIRECTORY));
    MUST(fds.null = open("/dev/null", O_RDWR));
    MUST(fds.zero = open("/dev/zero", O_RDONLY));
    MUST(fds.memory = memfd_create("fd_files", MFD_ALLOW_SEALING));
    MUST(ftruncate(fds.memory, PAGE));
    MUST(fcntl(fds.memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
    MUST(pipe(ends));
    fds.reading = ends[0];
    fds.writing = ends[1];
    MUST(fcntl(fds.writing, F_SETPIPE_SZ, PIPE_SIZE));
    MUST(pipe2(ends, O_DIRECT));
    fds.packets_out = ends[0];
    fds.packets_in = ends[1];
}

/* One position for the duplicates, another one for the second open. */
static void check_positions(uint64_t round)
{
    off_t at = (off_t)(round % 512 * sizeof round);
    uint64_t found = 0;

    EXPECT(sizeof round, pwrite(fds.data, &round, sizeof round, at));
    EXPECT(at, lseek(fds.data_dup, at, SEEK_SET));
    EXPECT(sizeof found, read(fds.data, &found, sizeof found));
    EXPECT(round, found);
    EXPECT(at + (off_t)sizeof found, lseek(fds.cloexec, 0, SEEK_CUR));
    EXPECT(0, lseek(fds.data_again, 0, SEEK_CUR));
}

static void check_flags(void)
{
    EXPECT(FD_CLOEXEC, fcntl(fds.cloexec, F_GETFD));
    EXPECT(0, fcntl(fds.data, F_GETFD));
    EXPECT(O_NONBLOCK, fcntl(fds.data_again, F_GETFL) & (O_NONBLOCK | O_ACCMODE));
    EXPECT(O_WRONLY | O_APPEND, fcntl(fds.log, F_GETFL) & (O_APPEND | O_ACCMODE));
    EXPECT(PIPE_SIZE, fcntl(fds.writing, F_GETPIPE_SZ));
    EXPECT(O_DIRECT, fcntl(fds.packets_in, F_GETFL) & O_DIRECT);
    EXPECT(F_SEAL_SHRINK | F_SEAL_GROW, fcntl(fds.memory, F_GET_SEALS));
}

/* Every record is in the log once: the file's length says how many were written. */
static void check_log(uint64_t round)
{
    char record[RECORD];
    struct stat info;

    memset(record, 'a' + (int)(round % 26), sizeof record);
    EXPECT(0, lseek(fds.log, 0, SEEK_SET)); /* O_APPEND writes at the end all the same */
    EXPECT(RECORD, write(fds.log, record, sizeof record));
    MUST(stat(log_path, &info));
    EXPECT((round + 1) * RECORD, info.st_size);
}

/* The even pages hold words, the odd ones are holes. */
static void check_gone(uint64_t round)
{
    static uint64_t generations[GONE_PAGES];
    static uint64_t page[WORDS];
    unsigned at = (unsigned)(round % GONE_PAGES);
    struct stat info;

    EXPECT(PAGE, pread(fds.gone_reading, page, PAGE, (off_t)at * 2 * PAGE));
    verify_page(page, at, generations[at]);
    fill_page(page, at, ++generations[at]);
    EXPECT(PAGE, pwrite(fds.gone, page, PAGE, (off_t)at * 2 * PAGE));
    EXPECT(PAGE, pread(fds.gone, page, PAGE, (off_t)(at * 2 + 1) * PAGE));
    verify_page(page, at, 0);
    MUST(fstat(fds.gone, &info));
    EXPECT(0, info.st_nlink);
    EXPECT((off_t)GONE_PAGES * PAGE * 2, info.st_size);
}

static size_t packet_length(uint64_t round)
{
    return round % QUEUED + 1;
}

/* QUEUED words always wait in the pipe, and as many packets of different lengths in the other one. */
static void check_pipes(uint64_t round)
{
    uint64_t earlier = round - QUEUED, found = 0;
    char packet[QUEUED + 2];

    EXPECT(sizeof round, write(fds.writing, &round, sizeof round));
    memset(packet, (char)round, sizeof packet);
    EXPECT(packet_length(round), write(fds.packets_in, packet, packet_length(round)));
    if (round < QUEUED)
        return;
    EXPECT(sizeof found, read(fds.reading, &found, sizeof found));
    EXPECT(earlier, found);
    EXPECT(packet_length(earlier), read(fds.packets_out, packet, sizeof packet));
    EXPECT((char)earlier, packet[0]);
}

static void check_others(uint64_t round)
{
    uint64_t found = 1;
    struct stat info;

    EXPECT(0, fstatat(fds.directory, "bin", &info, 0));
    EXPECT(0, read(fds.null, &found, sizeof found));
    EXPECT(sizeof found, read(fds.zero, &found, sizeof found));
    EXPECT(0, found);
    if (round > 0) {
        EXPECT(sizeof found, pread(fds.memory, &found, sizeof found, 64));
        EXPECT(round - 1, found);
    }
    EXPECT(sizeof round, pwrite(fds.memory, &round, sizeof round, 64));
    EXPECT(-1, ftruncate(fds.memory, 2 * PAGE));
}

static void check_round(uint64_t round)
{
    check_positions(round);
    check_flags();
    check_log(round);
    check_gone(round);
    check_pipes(round);
    check_others(round);
}

int main(int argc, char **argv)
{
    check_start(argc, argv, 1);
    open_all(argv[1]);
    check_running();
    for (uint64_t round = 0;; round++) {
        check_round(round);
        check_beat(0);
        if (check_stopping)
            return check_end();
        check_rest(1000);
    }
}
