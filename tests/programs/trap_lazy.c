/* What a process does to its memory before the pages are there, through the kernel above all.
 *
 * trap_lazy STATUS [DEED [UID]]: fills a stretch of memory for each deed and waits, touching nothing of it, until
 * SIGTERM; then it does the deed, or all of them that it survives, and ends. The stretch of deed number n lies at
 * ARENA + n * STRIDE. UID: as that user, without privileges.
 */
#include "check.h"

#include <libgen.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

enum { PAGES = 16, THREADS = PAGES, BLOCK = 512, DEPTH = 16, BEYOND = 256, FOREVER_S = 600 };
#define ARENA 0x610000000000
#define STRIDE 0x100000

static const char *status_path;
static pthread_t threads[THREADS];
static uint8_t *volatile handler_frame;
static pthread_t polling, resting;
static int silent[2]; /* a pipe */

static void check_pages(const uint8_t *at, unsigned first, unsigned count)
{
    for (unsigned page = first; page < first + count; page++)
        verify_page((const uint64_t *)(at + page * PAGE), (uintptr_t)at + page * PAGE, 1);
}

static void hide(uint8_t *at)
{
    MUST(mprotect(at, PAGES / 2 * PAGE, PROT_NONE));
    MUST(mprotect(at + PAGES / 2 * PAGE, PAGES / 2 * PAGE, PROT_READ));
}

static void show(uint8_t *at)
{
    EXPECT(0, mprotect(at, PAGES * PAGE, PROT_READ | PROT_WRITE));
    check_pages(at, 0, PAGES);
}

static void write_from_page(uint8_t *at)
{
    uint64_t copy[WORDS];
    int ends[2];

    EXPECT(0, pipe(ends));
    EXPECT(PAGE, write(ends[1], at, PAGE));
    EXPECT(PAGE, read(ends[0], copy, PAGE));
    verify_page(copy, (uintptr_t)at, 1);
    close(ends[0]);
    close(ends[1]);
}

/* Only the middle is written: what surrounds it has to come from the source. */
static void read_into_page(uint8_t *at)
{
    uint64_t word = 12345;
    int ends[2];

    EXPECT(0, pipe(ends));
    EXPECT(sizeof word, write(ends[1], &word, sizeof word));
    EXPECT(sizeof word, read(ends[0], at + 8 * 100, sizeof word));
    EXPECT(word, ((uint64_t *)at)[100]);
    ((uint64_t *)at)[100] = word_value((uintptr_t)at + 8 * 100, 1);
    check_pages(at, 0, 1);
    close(ends[0]);
    close(ends[1]);
}

/* The device reads and writes pages that the kernel pinned, past the page tables. */
static void direct_io(uint8_t *at)
{
    char path[256];
    uint64_t copy[WORDS];
    int fd;

    snprintf(path, sizeof path, "%s.direct", status_path);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_DIRECT | O_CLOEXEC, 0600);
    EXPECT(1, fd >= 0);
    EXPECT(0, unlink(path));
    EXPECT(2 * PAGE, pwrite(fd, at, 2 * PAGE, 0));
    EXPECT(BLOCK, pread(fd, at + 2 * PAGE + BLOCK, BLOCK, BLOCK));
    EXPECT(0, memcmp(at + BLOCK, at + 2 * PAGE + BLOCK, BLOCK));
    fill_page(copy, (uintptr_t)at + 2 * PAGE, 1);
    EXPECT(0, memcmp(copy, at + 2 * PAGE, BLOCK));
    EXPECT(0, memcmp((uint8_t *)copy + 2 * BLOCK, at + 2 * PAGE + 2 * BLOCK, PAGE - 2 * BLOCK));
    EXPECT(0, fcntl(fd, F_SETFL, 0));
    EXPECT(PAGE, pread(fd, copy, PAGE, PAGE));
    verify_page(copy, (uintptr_t)at + PAGE, 1);
    close(fd);
}

static void splice_page(uint8_t *at)
{
    struct iovec page = { .iov_base = at, .iov_len = PAGE };
    uint64_t copy[WORDS];
    int ends[2];

    EXPECT(0, pipe(ends));
    EXPECT(PAGE, vmsplice(ends[1], &page, 1, 0));
    EXPECT(PAGE, read(ends[0], copy, PAGE));
    verify_page(copy, (uintptr_t)at, 1);
    close(ends[0]);
    close(ends[1]);
}

static void fork_and_look(uint8_t *at)
{
    pid_t child = fork_child();

    if (child == 0) {
        check_pages(at, 0, PAGES);
        _exit(status->errors != 0);
    }
    expect_exit_0(child);
    check_pages(at, 0, PAGES);
}

static void vfork_and_exec(uint8_t *at)
{
    pid_t child = vfork();

    if (child == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(127);
    }
    expect_exit_0(child);
    check_pages(at, 0, PAGES);
}

static void unmap_half(uint8_t *at)
{
    EXPECT(0, munmap(at, PAGES / 2 * PAGE));
    check_pages(at, PAGES / 2, PAGES / 2);
}

static void on_signal(int signal)
{
    (void)signal;
    handler_frame = __builtin_frame_address(0);
}

/* The kernel writes the frame of a handler to pages that are not there. */
static void handle_on_alternate_stack(uint8_t *at)
{
    struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_ONSTACK };
    stack_t stack = { .ss_sp = at, .ss_size = PAGES * PAGE };

    EXPECT(0, sigaltstack(&stack, NULL));
    EXPECT(0, sigaction(SIGUSR1, &action, NULL));
    EXPECT(0, raise(SIGUSR1));
    EXPECT(1, handler_frame > at && handler_frame < at + PAGES * PAGE);
    check_pages(at, 0, PAGES / 2);
}

/* Fills that many pages of stack and looks at them on the way back. */
__attribute__((noinline)) static void go_deep(unsigned pages, uint64_t seed)
{
    volatile uint64_t words[WORDS];

    fill_page(words, seed, pages);
    if (pages > 1)
        go_deep(pages - 1, seed);
    verify_page(words, seed, pages);
}

static void dirty_stack(uint8_t *at)
{
    (void)at;
    go_deep(DEPTH, 1);
}

/* First where the stack has been, then below everything that was ever mapped. */
static void use_stack(uint8_t *at)
{
    struct sigaction action = { .sa_handler = on_signal };

    (void)at;
    EXPECT(0, sigaction(SIGUSR2, &action, NULL));
    EXPECT(0, raise(SIGUSR2));
    go_deep(DEPTH, 2);
    go_deep(BEYOND, 3);
}

static void grow_heap(uint8_t *at)
{
    uint8_t *bottom = sbrk(PAGES * PAGE);

    (void)at;
    verify_page((uint64_t *)((uintptr_t)(bottom + PAGE) & -(uintptr_t)PAGE), 0, 0);
    EXPECT((uintptr_t)bottom + PAGES * PAGE, (uintptr_t)sbrk(-PAGES * PAGE));
}

/* A robust mutex on each page; who holds it ends without touching anything more: clear_child_tid and the robust list
 * are the kernel's, where a missing page means that nothing is done (mm_release, exit_robust_list). */
static void *hold_and_vanish(void *mutex)
{
    EXPECT(0, pthread_mutex_lock(mutex));
    while (!check_stopping)
        check_rest(1000);
    __asm__ volatile("syscall" ::"a"(60), "D"(0) : "rcx", "r11", "memory"); /* exit(2) of this thread alone */
    return NULL;
}

static void start_holders(uint8_t *at)
{
    pthread_mutexattr_t attributes;

    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_mutex_t *mutex = (pthread_mutex_t *)(at + i * PAGE);

        pthread_mutex_init(mutex, &attributes);
        threads[i] = start_thread(hold_and_vanish, mutex);
        while (pthread_mutex_trylock(mutex) != EBUSY) {
            pthread_mutex_unlock(mutex);
            check_rest(100);
        }
    }
}

static void join_holders(uint8_t *at)
{
    for (unsigned i = 0; i < THREADS; i++) {
        EXPECT(0, pthread_join(threads[i], NULL));
        EXPECT(EOWNERDEAD, pthread_mutex_lock((pthread_mutex_t *)(at + i * PAGE)));
    }
}

static void wipe_on_fork(uint8_t *at)
{
    MUST(madvise(at, PAGES * PAGE, MADV_WIPEONFORK));
}

static void fork_and_find_zeros(uint8_t *at)
{
    pid_t child = fork_child();

    if (child == 0) {
        for (unsigned page = 0; page < PAGES; page++)
            verify_page((uint64_t *)(at + page * PAGE), 0, 0);
        _exit(status->errors != 0);
    }
    expect_exit_0(child);
    check_pages(at, 0, PAGES);
}

static void *poll_both(void *watched)
{
    EXPECT(2, poll(watched, 2, FOREVER_S * 1000));
    return NULL;
}

/* One lies on either side of a page's end. */
static void start_poll(uint8_t *at)
{
    struct pollfd *watched = (struct pollfd *)(at + PAGE) - 1;

    MUST(pipe2(silent, O_CLOEXEC));
    watched[0] = watched[1] = (struct pollfd){ .fd = silent[0], .events = POLLIN };
    polling = start_thread(poll_both, watched);
}

static void end_poll(uint8_t *at)
{
    struct pollfd *watched = (struct pollfd *)(at + PAGE) - 1;

    EXPECT(1, write(silent[1], "", 1));
    EXPECT(0, pthread_join(polling, NULL));
    EXPECT(POLLIN, watched[0].revents);
    EXPECT(POLLIN, watched[1].revents);
}

static void wake(int signal)
{
    (void)signal;
}

static void *rest_and_see(void *left)
{
    struct timespec time = { .tv_sec = FOREVER_S };

    EXPECT(-1, syscall(SYS_nanosleep, &time, left));
    EXPECT(EINTR, errno);
    return NULL;
}

/* What is left of the time lies on both sides of a page's end. */
static void start_rest(uint8_t *at)
{
    resting = start_thread(rest_and_see, at + PAGE - sizeof(time_t));
}

static void end_rest(uint8_t *at)
{
    const struct timespec *left = (const struct timespec *)(at + PAGE - sizeof(time_t));
    struct sigaction action = { .sa_handler = wake };

    EXPECT(0, sigaction(SIGUSR2, &action, NULL));
    EXPECT(0, pthread_kill(resting, SIGUSR2));
    EXPECT(0, pthread_join(resting, NULL));
    EXPECT(1, left->tv_sec > 0 && left->tv_sec < FOREVER_S);
}

static void become_another(uint8_t *at)
{
    (void)at;
    execl("/proc/self/exe", "trap_lazy", status_path, "after exec", (char *)NULL);
    check_fail(NULL, 0, (uint64_t)errno, "exec failed");
}

/* Its core file lies with the status block. */
static void allow_core(uint8_t *at)
{
    char path[256];
    struct rlimit unlimited = { RLIM_INFINITY, RLIM_INFINITY };

    (void)at;
    snprintf(path, sizeof path, "%s", status_path);
    MUST(chdir(dirname(path)));
    MUST(setrlimit(RLIMIT_CORE, &unlimited));
}

static void die(uint8_t *at)
{
    check_pages(at, 0, 1);
    abort();
}

static const struct deed {
    const char *name;
    void (*prepare)(uint8_t *at);
    void (*act)(uint8_t *at);
    bool alone; /* only by its name: the process does not survive it, or not a restore by CRIU, which ends sleeps
                 * (EINTR) and lets what a fork wipes come later */
} deeds[] = {
    { "protect", hide, show, false },
    { "write", NULL, write_from_page, false },
    { "read", NULL, read_into_page, false },
    { "direct", NULL, direct_io, false },
    { "vmsplice", NULL, splice_page, false },
    { "fork", NULL, fork_and_look, false },
    { "vfork", NULL, vfork_and_exec, false },
    { "unmap", NULL, unmap_half, false },
    { "altstack", NULL, handle_on_alternate_stack, false },
    { "stack", dirty_stack, use_stack, false },
    { "heap", NULL, grow_heap, false },
    { "threads", start_holders, join_holders, false },
    { "wipe", wipe_on_fork, fork_and_find_zeros, true },
    { "poll", start_poll, end_poll, true },
    { "rest", start_rest, end_rest, true },
    { "exec", NULL, become_another, true },
    { "abort", allow_core, die, true },
    { "nothing", NULL, NULL, true },
};
enum { DEEDS = sizeof deeds / sizeof *deeds };

static bool is_wanted(const struct deed *deed, const char *name)
{
    return name == NULL ? !deed->alone : strcmp(name, deed->name) == 0;
}

static uint8_t *stretch_of(const struct deed *deed)
{
    return (uint8_t *)(ARENA + (deed - deeds) * STRIDE);
}

static void prepare(const struct deed *deed)
{
    uint8_t *at = mmap(stretch_of(deed), PAGES * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

    if (at == MAP_FAILED)
        check_die(deed->name);
    for (unsigned page = 0; page < PAGES; page++)
        fill_page((uint64_t *)(at + page * PAGE), (uintptr_t)at + page * PAGE, 1);
    if (deed->prepare != NULL)
        deed->prepare(at);
}

static void become(const char *uid)
{
    uid_t user = (uid_t)atoi(uid);

    MUST(setresgid(user, user, user));
    MUST(setresuid(user, user, user));
}

int main(int argc, char **argv)
{
    const char *name = argc > 2 ? argv[2] : NULL;

    check_start(argc, argv, 1);
    if (name != NULL && strcmp(name, "after exec") == 0)
        return check_end();
    status_path = argv[1];
    if (argc > 3)
        become(argv[3]);
    for (unsigned i = 0; i < DEEDS; i++)
        if (is_wanted(&deeds[i], name))
            prepare(&deeds[i]);
    check_running();
    while (!check_stopping) {
        check_beat(0);
        check_rest(1000);
    }
    status->phase = FINAL;
    for (unsigned i = 0; i < DEEDS; i++)
        if (is_wanted(&deeds[i], name) && deeds[i].act != NULL)
            deeds[i].act(stretch_of(&deeds[i]));
    return check_end();
}
