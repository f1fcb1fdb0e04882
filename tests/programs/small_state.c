/* What is easily forgotten: registrations of membarrier(2), MAP_DROPPABLE memory, the flags of a pipe's own ends, a memfd
 * that is executed, /proc itself and an entry of it about the program, a removed directory, a list of robust futexes that
 * leads to where nothing is, and a seccomp filter that two threads share, to which one of them adds in both. */
#include "check.h"

#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <sys/syscall.h>

enum { READING = 4, WRITING = 5, SCRIPT = 6, MYSELF = 7, GONE = 8, PROC = 9 }; /* descriptors */
enum { REGISTER_GLOBAL = 1 << 2, REGISTER_PRIVATE = 1 << 4, GET_REGISTRATIONS = 1 << 9 };
enum { DROPPABLE = 0x08, LARGEFILE = 0100000 };

static const char script[] = "#!/bin/true\n";
static uint64_t *droppable;
static struct robust_list_head robust = { .list.next = (struct robust_list *)PAGE };

static int membarrier(int command)
{
    return (int)syscall(SYS_membarrier, command, 0, 0);
}

/* `forbidden` fails with `error`, all else is allowed. */
static long add_filter(int forbidden, int error, unsigned flags)
{
    struct sock_filter rows[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)forbidden, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { .len = sizeof rows / sizeof *rows, .filter = rows };

    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static void *follower(void *unused)
{
    (void)unused;
    while (__atomic_load_n(&status->phase, __ATOMIC_ACQUIRE) != RUNNING)
        check_rest(1000);
    while (!check_stopping) {
        EXPECT(-1, syscall(SYS_getpgid, 0));
        EXPECT(EXDEV, errno);
        check_beat(1);
        check_rest(2000);
    }
    /* What the other thread has added last. */
    while (status->phase != FINAL)
        check_rest(1000);
    EXPECT(-1, syscall(SYS_getsid, 0));
    EXPECT(EDOM, errno);
    return NULL;
}

static void execute(void)
{
    static char *const arguments[] = { "true", NULL };
    pid_t child = fork_child();

    if (child == 0) {
        syscall(SYS_execveat, SCRIPT, "", arguments, arguments + 1, AT_EMPTY_PATH);
        _exit(1);
    }
    expect_exit_0(child);
}

static void at(int number, int fd)
{
    if (fd == number)
        return;
    MUST(dup2(fd, number));
    MUST(close(fd));
}

static void check(void)
{
    char text[32] = "";
    struct robust_list_head *head;
    struct stat gone;
    size_t length;

    EXPECT(true, pread(MYSELF, text, sizeof text - 1, 0) > 0);
    EXPECT(getpid(), atoi(text));
    EXPECT(true, readlinkat(PROC, "self", text, sizeof text) > 0);
    EXPECT(getpid(), atoi(text));
    EXPECT(0, fstat(GONE, &gone));
    EXPECT(S_IFDIR | 0750, gone.st_mode);
    EXPECT(0, gone.st_nlink);
    EXPECT(0, syscall(SYS_get_robust_list, 0, &head, &length));
    EXPECT(&robust, head);
    EXPECT(sizeof robust, length);
    EXPECT(REGISTER_GLOBAL | REGISTER_PRIVATE, membarrier(GET_REGISTRATIONS));
    EXPECT(0, fcntl(READING, F_GETFL) & LARGEFILE);
    EXPECT(0, fcntl(WRITING, F_GETFL) & LARGEFILE);
    if (droppable[0] != 0) /* what is there is right; it may go at any time */
        EXPECT(7, droppable[0]);
}

static void set_up(const char *beside)
{
    static char directory[4096];
    int ends[2], file;

    MUST(syscall(SYS_set_robust_list, &robust, sizeof robust));
    MUST(membarrier(REGISTER_GLOBAL));
    MUST(membarrier(REGISTER_PRIVATE));
    MUST(pipe(ends));
    MUST(dup2(ends[1], 20));
    at(READING, ends[0]);
    MUST(dup2(20, WRITING));
    MUST(close(20));
    MUST(file = memfd_create("script", 0));
    MUST(write(file, script, sizeof script - 1));
    at(SCRIPT, file);
    at(MYSELF, open("/proc/self/stat", O_RDONLY));
    at(PROC, open("/proc", O_RDONLY | O_DIRECTORY));
    snprintf(directory, sizeof directory, "%s.gone", beside);
    MUST(mkdir(directory, 0750));
    at(GONE, open(directory, O_RDONLY | O_DIRECTORY));
    MUST(rmdir(directory));
    MUST(add_filter(SYS_getpgid, EXDEV, 0));
}

int main(int argc, char **argv)
{
    pthread_t thread;

    check_start(argc, argv, 2);
    droppable = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, DROPPABLE | MAP_ANONYMOUS, -1, 0);
    if (droppable == MAP_FAILED || membarrier(GET_REGISTRATIONS) < 0)
        return UNSUPPORTED; /* Linux 6.11 and 6.3 */
    droppable[0] = 7;
    set_up(argv[1]);
    thread = start_thread(follower, NULL);
    check_running();
    while (!check_stopping) {
        check();
        check_beat(0);
        check_rest(2000);
    }
    check();
    execute();
    EXPECT(0, add_filter(SYS_getsid, EDOM, SECCOMP_FILTER_FLAG_TSYNC));
    __atomic_store_n(&status->phase, FINAL, __ATOMIC_RELEASE);
    errno = pthread_join(thread, NULL);
    EXPECT(0, errno);
    return check_end();
}
