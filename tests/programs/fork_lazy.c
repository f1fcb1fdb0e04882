/* The address space changes while its pages may still be on their way: fork, vfork and exec, mremap, munmap,
 * madvise, mprotect, brk, and reads and writes by the kernel.
 *
 * fork_lazy STATUS [MIB]: memory in chunks of 256 KiB that wander; a page's words are named by chunk and page, so
 * they stay right wherever a chunk lies. A child is nearly always there that checks all it has inherited.
 */
#include "check.h"

enum { CHUNK_PAGES = 64, CHUNK = CHUNK_PAGES * PAGE, CHUNKS_MAX = 4096, PARENT = 0, CHILD = 1, WORKERS };

static struct chunk {
    uint8_t *at;
    uint32_t generations[CHUNK_PAGES];
} chunks[CHUNKS_MAX];
static unsigned chunk_count;
static uint64_t random_state = 0x6c7a;
static int loop_pipe[2];

static uint64_t place_of(const struct chunk *chunk, unsigned page)
{
    return ((uint64_t)(chunk - chunks) * CHUNK_PAGES + page) * PAGE;
}

static void check_chunk_page(const struct chunk *chunk, unsigned page)
{
    verify_page((uint64_t *)(chunk->at + page * PAGE), place_of(chunk, page), chunk->generations[page]);
}

static void check_chunk(const struct chunk *chunk)
{
    for (unsigned page = 0; page < CHUNK_PAGES; page++)
        check_chunk_page(chunk, page);
}

static void rewrite_page(struct chunk *chunk, unsigned page)
{
    fill_page((uint64_t *)(chunk->at + page * PAGE), place_of(chunk, page), ++chunk->generations[page]);
}

static void check_all(void)
{
    for (unsigned i = 0; i < chunk_count; i++)
        check_chunk(&chunks[i]);
}

static void *map_chunk(void *wanted)
{
    int fixed = wanted == NULL ? 0 : MAP_FIXED_NOREPLACE;
    void *at = mmap(wanted, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);

    if (at == MAP_FAILED)
        check_die("mmap");
    return at;
}

static void move_chunk(struct chunk *chunk)
{
    uint8_t *before = chunk->at, *room = map_chunk(NULL);

    /* By halves: memory that is new since the move does not merge with memory whose pages are missing, and
     * mremap(2) over two mappings of which one has a userfaultfd is EFAULT. */
    chunk->at = mremap(before, CHUNK / 2, CHUNK / 2, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    EXPECT((uintptr_t)room, (uintptr_t)chunk->at);
    EXPECT((uintptr_t)room + CHUNK / 2, (uintptr_t)mremap(before + CHUNK / 2, CHUNK / 2, CHUNK / 2,
                                                          MREMAP_MAYMOVE | MREMAP_FIXED, room + CHUNK / 2));
    check_chunk_page(chunk, 0);
}

/* Gone and new at the same place: whatever was still to come for it must not come. */
static void renew_chunk(struct chunk *chunk)
{
    EXPECT(0, munmap(chunk->at, CHUNK));
    EXPECT((uintptr_t)chunk->at, (uintptr_t)map_chunk(chunk->at));
    memset(chunk->generations, 0, sizeof chunk->generations);
    check_chunk_page(chunk, 1);
}

static void drop_half(struct chunk *chunk)
{
    EXPECT(0, madvise(chunk->at, CHUNK / 2, MADV_DONTNEED));
    memset(chunk->generations, 0, sizeof chunk->generations / 2);
    rewrite_page(chunk, 2);
    check_chunk(chunk);
}

static void shrink_and_grow(struct chunk *chunk)
{
    EXPECT((uintptr_t)chunk->at, (uintptr_t)mremap(chunk->at, CHUNK, CHUNK / 2, 0));
    EXPECT((uintptr_t)chunk->at + CHUNK / 2,
           (uintptr_t)mmap(chunk->at + CHUNK / 2, CHUNK / 2, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
    memset(chunk->generations + CHUNK_PAGES / 2, 0, sizeof chunk->generations / 2);
    check_chunk(chunk);
}

static void protect_and_release(struct chunk *chunk)
{
    EXPECT(0, mprotect(chunk->at, CHUNK / 2, PROT_READ));
    check_chunk_page(chunk, 3);
    EXPECT(0, mprotect(chunk->at, CHUNK / 2, PROT_READ | PROT_WRITE));
    rewrite_page(chunk, 3);
}

/* write(2) from one page and read(2) into another: faults that the kernel takes for us. */
static void copy_through_pipe(struct chunk *chunk)
{
    uint8_t *from = chunk->at + 5 * PAGE, *to = chunk->at + 6 * PAGE;

    EXPECT(PAGE, write(loop_pipe[1], from, PAGE));
    EXPECT(PAGE, read(loop_pipe[0], to, PAGE));
    verify_page((uint64_t *)to, place_of(chunk, 5), chunk->generations[5]);
    rewrite_page(chunk, 6);
}

static void grow_heap(struct chunk *chunk)
{
    uint8_t *bottom = sbrk(CHUNK);

    (void)chunk;
    verify_page((uint64_t *)(bottom + CHUNK - PAGE), 0, 0);
    fill_page((uint64_t *)bottom, 0, 1);
    EXPECT((uintptr_t)bottom + CHUNK, (uintptr_t)sbrk(-CHUNK));
}

static void fork_and_check(struct chunk *chunk)
{
    pid_t child = fork_child();

    if (child == 0) {
        check_chunk(chunk);
        rewrite_page(chunk, 7); /* its own copy only */
        check_chunk(chunk);
        _exit(0);
    }
    expect_exit_0(child);
    check_chunk(chunk);
}

static void vfork_and_exec(struct chunk *chunk)
{
    pid_t child = vfork();

    if (child == 0) {
        execl("/bin/true", "true", (char *)NULL);
        _exit(127);
    }
    expect_exit_0(child);
    check_chunk_page(chunk, 8);
}

static void check_and_rewrite(struct chunk *chunk)
{
    check_chunk(chunk);
    for (unsigned page = 0; page < CHUNK_PAGES; page += 2)
        rewrite_page(chunk, page);
}

static void (*const deeds[])(struct chunk *) = {
    move_chunk,        renew_chunk, drop_half,      shrink_and_grow, protect_and_release,
    copy_through_pipe, grow_heap,   fork_and_check, vfork_and_exec,  check_and_rewrite,
};
enum { DEEDS = sizeof deeds / sizeof *deeds };

/* Looks at everything it has inherited, slowly, while the parent goes on. */
static pid_t start_observer(void)
{
    pid_t child = fork_child();

    if (child != 0)
        return child;
    for (unsigned i = 0; i < chunk_count; i++) {
        check_chunk(&chunks[i]);
        check_rest(200);
    }
    _exit(0);
}

static bool observer_is_done(pid_t child)
{
    int how = 0;

    if (waitpid(child, &how, WNOHANG) != child)
        return false;
    EXPECT(0, how);
    check_beat(CHILD);
    return true;
}

int main(int argc, char **argv)
{
    pid_t observer;

    chunk_count = (argc > 2 ? (unsigned)atoi(argv[2]) : 4) * 4;
    if (chunk_count < 1 || chunk_count > CHUNKS_MAX)
        check_die("1 to 1024 MiB");
    check_start(argc, argv, WORKERS);
    MUST(pipe2(loop_pipe, O_CLOEXEC));
    for (unsigned i = 0; i < chunk_count; i++) {
        chunks[i].at = map_chunk(NULL);
        for (unsigned page = 0; page < CHUNK_PAGES; page++)
            if (page % 8 != 7)
                rewrite_page(&chunks[i], page);
    }
    observer = start_observer();
    check_running();
    while (!check_stopping) {
        uint64_t draw = random_next(&random_state);

        deeds[(draw >> 32) % DEEDS](&chunks[(draw >> 8) % chunk_count]);
        check_beat(PARENT);
        if (observer_is_done(observer))
            observer = start_observer();
        check_rest(500);
    }
    status->phase = FINAL;
    expect_exit_0(observer);
    check_all();
    return check_end();
}
