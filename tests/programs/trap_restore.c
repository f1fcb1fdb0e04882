/* What a process can say itself about how it was rebuilt: its threads' numbers, its /proc, its vdso, its break, and
 * pages of files that it has changed.
 *
 * trap_restore STATUS: /proc is looked at in the end, since nothing of it may be open while the program is moved.
 */
#include "check.h"

#include <sys/auxv.h>
#include <sys/syscall.h>

enum { THREADS = 3, PATCHED = 3, PIECES = 8, LINE = 128 };
#define RETURNS_ONE_UNTIL_PATCHED                                                                              \
    ".pushsection .text\n.balign 4096\nanswer: movl $1, %eax\nret\n.fill 4090, 1, 0xcc\n.popsection\n"

__asm__(RETURNS_ONE_UNTIL_PATCHED);
extern uint8_t answer[];

static uint64_t private_words[2][WORDS] __attribute__((aligned(4096))) = { { 1 }, { 2 } };

static struct {
    pthread_t threads[THREADS];
    volatile pid_t tids[THREADS];
    char pieces[PIECES][LINE]; /* lines of /proc/self/maps that belong to the vdso */
    uint8_t *end_of_heap;
} start;

static void *sleep_forever(void *argument)
{
    pid_t tid = gettid();

    start.tids[(uintptr_t)argument] = tid;
    for (;;) {
        check_rest(10000);
        EXPECT(tid, syscall(SYS_gettid));
    }
    return NULL;
}

/* A breakpoint as a debugger sets it: the page of a read-only file mapping becomes the process's own. */
static void patch_text(void)
{
    MUST(mprotect(answer, PAGE, PROT_READ | PROT_WRITE));
    answer[1] = PATCHED;
    MUST(mprotect(answer, PAGE, PROT_READ | PROT_EXEC));
}

static void check_changed_file_pages(void)
{
    uint8_t *at = answer;
    int (*code)(void);

    memcpy(&code, &at, sizeof code);
    EXPECT(PATCHED, code());
    EXPECT(1, private_words[0][0]);
    EXPECT(77, private_words[1][0]);
}

static void read_vdso_lines(char lines[PIECES][LINE])
{
    FILE *maps = fopen("/proc/self/maps", "re");
    char line[512];
    unsigned count = 0;

    if (maps == NULL) {
        check_fail(NULL, 0, (uint64_t)errno, "/proc/self/maps cannot be opened");
        return;
    }
    memset(lines, 0, sizeof start.pieces);
    while (fgets(line, sizeof line, maps) != NULL)
        if ((strstr(line, "[vdso]") != NULL || strstr(line, "[vvar") != NULL) && count < PIECES)
            snprintf(lines[count++], LINE, "%.100s", line);
    fclose(maps);
}

static void check_vdso(void)
{
    char now[PIECES][LINE];

    EXPECT(0, memcmp("\177ELF", (const void *)getauxval(AT_SYSINFO_EHDR), 4));
    read_vdso_lines(now);
    for (unsigned i = 0; i < PIECES; i++)
        if (strcmp(start.pieces[i], now[i]) != 0)
            check_fail(NULL, 0, 0, "%.60s is now %.60s", start.pieces[i], now[i]);
}

/* /proc is that of the process's own pid namespace. */
static void check_proc(void)
{
    char found[32] = { 0 }, wanted[32];

    snprintf(wanted, sizeof wanted, "%d", getpid());
    EXPECT(strlen(wanted), readlink("/proc/self", found, sizeof found - 1));
    EXPECT(0, strcmp(wanted, found));
    for (unsigned i = 0; i < THREADS; i++) {
        snprintf(wanted, sizeof wanted, "/proc/self/task/%d", start.tids[i]);
        EXPECT(0, access(wanted, F_OK));
        EXPECT(0, pthread_kill(start.threads[i], 0)); /* by the number that the C library noted */
        EXPECT(0, syscall(SYS_tgkill, getpid(), start.tids[i], 0));
    }
}

/* Asked of the kernel: the C library has a note of its own. */
static void check_heap(void)
{
    EXPECT((uintptr_t)start.end_of_heap, syscall(SYS_brk, 0));
    EXPECT((uintptr_t)start.end_of_heap, (uintptr_t)sbrk(3 * PAGE));
    fill_page((uint64_t *)(((uintptr_t)start.end_of_heap + PAGE) & -(uintptr_t)PAGE), 0, 1);
    EXPECT((uintptr_t)start.end_of_heap + 3 * PAGE, (uintptr_t)sbrk(-3 * PAGE));
}

int main(int argc, char **argv)
{
    check_start(argc, argv, 1);
    for (uintptr_t i = 0; i < THREADS; i++) {
        start.threads[i] = start_thread(sleep_forever, (void *)i);
        while (start.tids[i] == 0)
            check_rest(100);
    }
    patch_text();
    private_words[1][0] = 77;
    fill_page(malloc(PAGE), 0, 1); /* there is a heap */
    start.end_of_heap = (uint8_t *)sbrk(123) + 123; /* a break in the middle of a page: smaps do not show it */
    read_vdso_lines(start.pieces);
    EXPECT(1, start.pieces[0][0] != 0);
    check_running();
    while (!check_stopping) {
        check_changed_file_pages();
        check_beat(0);
        check_rest(1000);
    }
    status->phase = FINAL;
    check_changed_file_pages();
    check_vdso();
    check_proc();
    check_heap();
    return check_end();
}
