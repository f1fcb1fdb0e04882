/* Mappings of every kind keep their place, their protection, their flags and their content.
 *
 * Each region stands alone between unmapped pages. Its words are compared again and again, its lines of
 * /proc/self/smaps (protection, offset, path, VmFlags) at the end with those of the start: no file of /proc is open
 * while the program may be moved.
 */
#include "check.h"

#include <sys/resource.h>

enum { PAGES = 8, LINE = 256, LOW = 0x10000, GROWTH = 64 };

#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

enum content { NONE, WORDS_ALL, HIDDEN, SPARSE, FILE_COPY, FILE_SHARED, CODE };

static struct region {
    const char *name;
    enum content content;
    int prot;
    int flags;  /* besides MAP_PRIVATE | MAP_ANONYMOUS */
    int advice; /* 0 none */
    uint8_t *at;
    char smaps[LINE]; /* what was there at the start */
} regions[] = {
    { .name = "plain", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE },
    { .name = "low address", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .at = (uint8_t *)LOW },
    { .name = "read-only", .content = WORDS_ALL, .prot = PROT_READ },
    { .name = "PROT_NONE with content", .content = HIDDEN, .prot = PROT_NONE },
    { .name = "guard", .content = NONE, .prot = PROT_NONE },
    { .name = "never touched", .content = NONE, .prot = PROT_READ | PROT_WRITE },
    { .name = "sparse", .content = SPARSE, .prot = PROT_READ | PROT_WRITE },
    { .name = "not reserved", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .flags = MAP_NORESERVE },
    { .name = "code", .content = CODE, .prot = PROT_READ | PROT_EXEC },
    { .name = "locked", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .flags = MAP_LOCKED },
    { .name = "grows down", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .flags = MAP_GROWSDOWN },
    { .name = "MADV_DONTFORK", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_DONTFORK },
    { .name = "MADV_DONTDUMP", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_DONTDUMP },
    { .name = "MADV_WIPEONFORK", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_WIPEONFORK },
    { .name = "MADV_MERGEABLE", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_MERGEABLE },
    { .name = "MADV_HUGEPAGE", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_HUGEPAGE },
    { .name = "MADV_NOHUGEPAGE", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_NOHUGEPAGE },
    { .name = "MADV_SEQUENTIAL", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_SEQUENTIAL },
    { .name = "MADV_RANDOM", .content = WORDS_ALL, .prot = PROT_READ | PROT_WRITE, .advice = MADV_RANDOM },
    { .name = "private file", .content = FILE_COPY, .prot = PROT_READ | PROT_WRITE },
    { .name = "shared file", .content = FILE_SHARED, .prot = PROT_READ },
};
enum { REGIONS = sizeof regions / sizeof *regions };

static int program_fd;

/* The pages on both sides stay unmapped, so that nothing merges with the region. */
static void *place_for(const struct region *region)
{
    size_t around = (size_t)(region->flags & MAP_GROWSDOWN ? GROWTH + PAGES + 2 : PAGES + 2) * PAGE;
    uint8_t *hole;

    if (region->at != NULL)
        return region->at;
    hole = mmap(NULL, around, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (hole == MAP_FAILED)
        check_die(region->name);
    MUST(munmap(hole, around));
    return hole + around - (PAGES + 1) * PAGE;
}

static void fill(const struct region *region)
{
    static const uint8_t return_77[] = { 0xb8, 77, 0, 0, 0, 0xc3 }; /* mov $77, %eax; ret */

    for (unsigned page = 0; page < PAGES; page++) {
        uint8_t *at = region->at + page * PAGE;

        if (region->content == CODE)
            memcpy(at, return_77, sizeof return_77);
        else if (region->content == WORDS_ALL || region->content == HIDDEN ||
                 (region->content == SPARSE && page % 3 == 0) || (region->content == FILE_COPY && page == 1))
            fill_page((uint64_t *)at, (uintptr_t)at, 1);
    }
    if (region->content == SPARSE) /* had content, has none any more */
        MUST(madvise(region->at + 3 * PAGE, PAGE, MADV_DONTNEED));
}

static void map_region(struct region *region)
{
    bool file = region->content == FILE_COPY || region->content == FILE_SHARED;
    int flags = MAP_FIXED_NOREPLACE | region->flags | (region->content == FILE_SHARED ? MAP_SHARED : MAP_PRIVATE) |
                (file ? 0 : MAP_ANONYMOUS);
    int prot = region->content == FILE_SHARED ? PROT_READ : PROT_READ | PROT_WRITE;

    region->at = mmap(place_for(region), PAGES * PAGE, prot, flags, file ? program_fd : -1, 0);
    if (region->at == MAP_FAILED)
        check_die(region->name);
    if (region->advice != 0)
        (void)madvise(region->at, PAGES * PAGE, region->advice); /* some kernels lack some */
    fill(region);
    MUST(mprotect(region->at, PAGES * PAGE, region->prot));
}

static void check_code(const uint8_t *at)
{
    int (*code)(void);

    memcpy(&code, &at, sizeof code);
    EXPECT(77, code());
}

static void check_content(const struct region *region)
{
    static uint64_t original[WORDS];

    if (region->content == HIDDEN)
        EXPECT(0, mprotect(region->at, PAGES * PAGE, PROT_READ));
    for (unsigned page = 0; page < PAGES; page++) {
        uint8_t *at = region->at + page * PAGE;
        bool written = region->content != SPARSE || (page % 3 == 0 && page != 3);

        if (region->content == CODE) {
            check_code(at);
        } else if (region->content == FILE_SHARED || (region->content == FILE_COPY && page != 1)) {
            EXPECT(PAGE, pread(program_fd, original, PAGE, page * PAGE));
            EXPECT(0, memcmp(original, at, PAGE));
        } else if (region->content != NONE) {
            verify_page((uint64_t *)at, (uintptr_t)at, written);
        }
    }
    if (region->content == HIDDEN)
        EXPECT(0, mprotect(region->at, PAGES * PAGE, PROT_NONE));
}

/* Flags that come and go with tracking, locking, lazy arrival and accounting (which a mapping that may not be written
 * is given or not, depending on its past), not with what the process asked for. */
static void strip_passing_flags(char *flags)
{
    static const char *const passing[] = { " sd", " um", " uw", " ui", " lf", " ac" };

    for (size_t i = 0; i < sizeof passing / sizeof *passing; i++) {
        char *found = strstr(flags, passing[i]);

        if (found != NULL)
            memmove(found, found + 3, strlen(found + 3) + 1);
    }
}

/* Whether a line of smaps begins a mapping; if so, where. */
static bool mapping_starts(const char *line, uintptr_t *start)
{
    unsigned long end;

    return sscanf(line, "%lx-%lx ", start, &end) == 2;
}

/* Writes the first line and the VmFlags of each region's mapping. */
static void read_smaps(char noted[REGIONS][LINE])
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    struct region *region = NULL;
    char line[512];
    uintptr_t start;

    if (smaps == NULL)
        check_die("/proc/self/smaps");
    while (fgets(line, sizeof line, smaps) != NULL) {
        if (mapping_starts(line, &start)) {
            region = NULL;
            for (unsigned i = 0; i < REGIONS; i++)
                if (start == (uintptr_t)regions[i].at)
                    region = &regions[i];
            if (region != NULL)
                snprintf(noted[region - regions], LINE, "%.160s", line);
        } else if (region != NULL && strncmp(line, "VmFlags:", 8) == 0) {
            size_t used = strlen(noted[region - regions]);

            strip_passing_flags(line);
            snprintf(noted[region - regions] + used, LINE - used, "%.80s", line);
        }
    }
    fclose(smaps);
}

static void check_smaps(void)
{
    static char found[REGIONS][LINE];

    memset(found, 0, sizeof found);
    read_smaps(found);
    for (unsigned i = 0; i < REGIONS; i++)
        if (strcmp(regions[i].smaps, found[i]) != 0)
            check_fail(regions[i].at, 0, 0, "%s: %.60s is now %.60s", regions[i].name, regions[i].smaps, found[i]);
}

/* The heap by brk(2) and the C library's own; both may still grow. */
static void check_heap(uint8_t *bottom, uint8_t *const *blocks, unsigned count)
{
    uint8_t *more;

    EXPECT((uintptr_t)bottom + PAGES * PAGE, (uintptr_t)sbrk(0));
    for (unsigned page = 0; page < PAGES; page++)
        verify_page((uint64_t *)(bottom + page * PAGE), (uintptr_t)bottom + page * PAGE, 1);
    for (unsigned i = 0; i < count; i++)
        verify_page((uint64_t *)blocks[i], (uintptr_t)blocks[i], 2);
    more = sbrk(PAGE);
    verify_page((uint64_t *)more, 0, 0);
    fill_page((uint64_t *)more, 0, 1);
    EXPECT((uintptr_t)more + PAGE, (uintptr_t)sbrk(-PAGE));
}

/* At the end, since it changes the map: a touch below still makes a stack grow, untouched memory is still zero. */
static void check_untouched(const struct region *region)
{
    if (region->flags & MAP_GROWSDOWN)
        verify_page((uint64_t *)(region->at - PAGE), 0, 0);
    for (unsigned page = 0; page < PAGES; page++)
        if (region->content == NONE && region->prot != PROT_NONE)
            verify_page((uint64_t *)(region->at + page * PAGE), 0, 0);
}

static void note_smaps(void)
{
    static char noted[REGIONS][LINE];

    read_smaps(noted);
    for (unsigned i = 0; i < REGIONS; i++)
        memcpy(regions[i].smaps, noted[i], LINE);
}

int main(int argc, char **argv)
{
    uint8_t *bottom, *blocks[PAGES];

    check_start(argc, argv, 1);
    MUST(program_fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    for (unsigned i = 0; i < PAGES; i++) {
        blocks[i] = malloc(PAGE);
        fill_page((uint64_t *)blocks[i], (uintptr_t)blocks[i], 2);
    }
    for (unsigned i = 0; i < REGIONS; i++)
        map_region(&regions[i]);
    note_smaps();
    bottom = sbrk(PAGES * PAGE);
    for (unsigned page = 0; page < PAGES; page++)
        fill_page((uint64_t *)(bottom + page * PAGE), (uintptr_t)bottom + page * PAGE, 1);
    check_running();
    while (!check_stopping) {
        for (unsigned i = 0; i < REGIONS; i++)
            check_content(&regions[i]);
        check_heap(bottom, blocks, PAGES);
        check_beat(0);
        check_rest(2000);
    }
    status->phase = FINAL;
    check_smaps();
    for (unsigned i = 0; i < REGIONS; i++)
        check_untouched(&regions[i]);
    return check_end();
}
