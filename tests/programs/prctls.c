/* What prctl(2) and /proc/PID/coredump_filter set of a process and nothing else shows: neither writable nor gained
 * execution (PR_SET_MDWE), what a core dump has, merging (KSM), who hears of broken memory, huge pages only where advised.
 */
#include "check.h"

#include <sys/mman.h>

#ifndef PR_SET_MDWE
enum { PR_SET_MDWE = 65, PR_GET_MDWE = 66, PR_MDWE_REFUSE_EXEC_GAIN = 1 };
#endif
#ifndef PR_SET_MEMORY_MERGE
enum { PR_SET_MEMORY_MERGE = 67, PR_GET_MEMORY_MERGE = 68 };
#endif
enum { THP_DISABLE_EXCEPT_ADVISED = 2, CORE = 0x5b };

static int merges, huge_pages; /* as this kernel has it */
static void *plain;

static void *heard_by_a_thread(void *unused)
{
    (void)unused;
    while (!check_stopping) {
        EXPECT(PR_MCE_KILL_EARLY, prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
        check_beat(1);
        check_rest(2000);
    }
    return NULL;
}

static unsigned long core_filter(void)
{
    char text[32] = "";
    int fd;

    MUST(fd = open("/proc/self/coredump_filter", O_RDONLY));
    MUST(read(fd, text, sizeof text - 1));
    MUST(close(fd));
    return strtoul(text, NULL, 16);
}

static void set_up(void)
{
    FILE *file = fopen("/proc/self/coredump_filter", "w");

    if (file == NULL || fprintf(file, "%#x", CORE) < 0 || fclose(file) != 0)
        check_die("coredump_filter");
    MUST(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
    prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0); /* CONFIG_KSM */
    merges = prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0);
    if (prctl(PR_SET_THP_DISABLE, 1, THP_DISABLE_EXCEPT_ADVISED, 0, 0) < 0) /* Linux 6.18 */
        MUST(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
    huge_pages = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
    plain = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (plain == MAP_FAILED)
        check_die("mmap");
}

static void check(void)
{
    EXPECT(CORE, core_filter());
    EXPECT(PR_MCE_KILL_EARLY, prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
    EXPECT(merges, prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0));
    EXPECT(huge_pages, prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
    EXPECT(PR_MDWE_REFUSE_EXEC_GAIN, prctl(PR_GET_MDWE, 0, 0, 0, 0));
    EXPECT(-1, mprotect(plain, PAGE, PROT_READ | PROT_EXEC));
    EXPECT(EACCES, errno);
}

int main(int argc, char **argv)
{
    check_start(argc, argv, 2);
    set_up();
    if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) < 0)
        return UNSUPPORTED; /* Linux 6.3 */
    start_thread(heard_by_a_thread, NULL);
    check_running();
    while (!check_stopping) {
        check();
        check_beat(0);
        check_rest(2000);
    }
    check();
    return check_end();
}
