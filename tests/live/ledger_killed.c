/* One change of the ledger, by a process that is killed after N instructions of it, for every N of a stride: whoever
 * takes the ledger over must end with the tables of a change that nobody disturbed.
 *
 * ledger_killed CHANGE: prints the number of kills, exit 0; or what differs, exit 1. */
#define _GNU_SOURCE
#include "_shadow.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define KILLS 20
#define PRIVATE (1 << 8 | 1ull) /* object keys: kind 1 is a task's memory */
#define SHARED (7 << 8 | 2ull)
#define HEAP 0x10000000ull
#define STACK 0x20000000ull
#define SHM 0x30000000ull
#define FAR 0x40000000ull

static void check(bool good, const char *what)
{
    if (good)
        return;
    perror(what);
    exit(1);
}

/* Three regions, some of whose pages have come, and a map that names most of them. */
static void make(struct ledger *l)
{
    check(ledger_open(l, -1) == 0, "ledger_open");
    check(ledger_add_space(l, 100, 10, 10) == 0, "space");
    check(ledger_add_region(l, 0, HEAP, 64 * PAGE_SIZE, PRIVATE, HEAP) == 0, "heap");
    check(ledger_add_region(l, 0, STACK, 16 * PAGE_SIZE, PRIVATE, STACK) == 0, "stack");
    check(ledger_add_region(l, 0, SHM, 32 * PAGE_SIZE, SHARED, 0) == 0, "shared");
    for (uint32_t i = 0; i < l->head->instances; i++) {
        bool private = l->instances[i].object == PRIVATE;

        ledger_map_run(l, i, private ? HEAP : 0, private ? 48 : 32);
        for (uint64_t k = 3; k < 9; k++) {
            uint64_t pages, addr = (private ? HEAP : 0) + k * PAGE_SIZE;
            uint8_t *byte = ledger_states(l, i, addr, &pages);

            ledger_settle(l, i, addr, byte, PAGE_INSTALLED, CLASS_URGENT);
        }
    }
}

static void fork_it(struct ledger *l)
{
    check(ledger_fork(l, 0, 101, 1) >= 0, "fork");
}

static bool shows(const struct ledger *l, uint64_t at, uint64_t addr)
{
    const struct region *r = ledger_region_at(l, 0, at);

    return r && r->start == at && r->addr == addr;
}

/* The stack is moved to where the heap was, and that has been moved or unmapped itself, which is heard later. */
static void move_in(struct ledger *l, const char *what)
{
    if (!strcmp(what, "unmap-after-move"))
        check(ledger_remap(l, 0, HEAP, FAR, 16 * PAGE_SIZE) == 0, "move");
    check(ledger_remap(l, 0, STACK, HEAP, 16 * PAGE_SIZE) == 0, "move in");
}

static void change(struct ledger *l, const char *what)
{
    if (!strcmp(what, "unmap-middle"))
        check(ledger_unmap(l, 0, HEAP + 8 * PAGE_SIZE, HEAP + 20 * PAGE_SIZE) == 0, what);
    else if (!strcmp(what, "unmap-all"))
        check(ledger_unmap(l, 0, HEAP, SHM + 16 * PAGE_SIZE) == 0, what);
    else if (!strcmp(what, "move"))
        check(ledger_remap(l, 0, HEAP + 4 * PAGE_SIZE, SHM + 8 * PAGE_SIZE, 16 * PAGE_SIZE) == 0, what);
    else if (!strcmp(what, "double"))
        check(ledger_remap(l, 0, SHM, SHM + 64 * PAGE_SIZE, 0) == 0, what);
    else if (!strcmp(what, "late-move"))
        check(ledger_remap(l, 0, HEAP, FAR, 16 * PAGE_SIZE) == 0 && shows(l, FAR, HEAP) && shows(l, HEAP, STACK), what);
    else if (!strcmp(what, "late-unmap") || !strcmp(what, "unmap-after-move"))
        check(ledger_unmapped(l, 0, HEAP, HEAP + 16 * PAGE_SIZE) == 0 && shows(l, HEAP, STACK), what);
    else if (!strcmp(what, "discard"))
        ledger_remove(l, 0, HEAP, HEAP + 32 * PAGE_SIZE, false);
    else if (!strcmp(what, "remove"))
        ledger_remove(l, 0, SHM, SHM + 32 * PAGE_SIZE, true);
    else if (!strcmp(what, "fork") || !strcmp(what, "fork-again"))
        fork_it(l);
    else if (!strcmp(what, "child-unmap"))
        check(ledger_unmap(l, 1, HEAP, STACK + 16 * PAGE_SIZE) == 0, what);
    else if (!strcmp(what, "retire-child"))
        ledger_retire(l, 1);
    else if (!strcmp(what, "retire"))
        ledger_retire(l, 0);
    else
        check(false, what);
}

static bool needs_child(const char *what)
{
    return !strcmp(what, "child-unmap") || !strcmp(what, "retire-child") || !strcmp(what, "fork-again");
}

static uint32_t space_of(const char *what)
{
    return !strncmp(what, "child", 5);
}

/* As the pager does it: a retirement has a shadow of its own, everything else has a message. */
static void apply(struct ledger *l, const char *what)
{
    bool message = strncmp(what, "retire", 6) != 0;

    if (message)
        shadow_begin(l, space_of(what), 1);
    change(l, what);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    l->head->messages[0].event = 0;
    ledger_message_over(l);
}

static void print_space(FILE *f, const struct ledger *l, uint32_t s)
{
    fprintf(f, "space %u live %u uffd %d\n", s, l->spaces[s].live, l->spaces[s].uffd);
    for (uint32_t i = 0; l->spaces[s].live && i < l->spaces[s].regions; i++) {
        const struct region *r = ledger_regions(l, s) + i;

        fprintf(f, "  %llx-%llx at %llx of %u\n", (unsigned long long)r->start, (unsigned long long)r->end,
                (unsigned long long)r->addr, r->instance);
    }
}

static void print_instance(FILE *f, const struct ledger *l, uint32_t n)
{
    const struct instance *i = l->instances + n;

    fprintf(f, "instance %u live %u of %llx regions %llu primary %u kin %u home %u\n", n, i->live,
            (unsigned long long)i->object, (unsigned long long)i->regions, i->primary, i->kin, i->home);
    for (uint32_t s = 0; i->live && s < i->spans; s++) {
        const struct span *span = ledger_spans(l, n) + s;

        fprintf(f, "  %llx:", (unsigned long long)span->addr);
        for (uint64_t k = 0; k < span->pages; k++)
            fprintf(f, " %02x", l->states[span->states + k]);
        fprintf(f, "\n");
    }
}

static char *print(const struct ledger *l)
{
    char *text = NULL;
    size_t size;
    FILE *f = open_memstream(&text, &size);

    check(f, "open_memstream");
    for (uint32_t s = 0; s < l->head->spaces; s++)
        print_space(f, l, s);
    for (uint32_t i = 0; i < l->head->instances; i++)
        print_instance(f, l, i);
    fprintf(f, "remaining %llu total %llu counted", (unsigned long long)l->head->remaining,
            (unsigned long long)l->head->total);
    for (int c = 0; c < CLASS_COUNT; c++)
        fprintf(f, " %llu", (unsigned long long)l->head->counted[c]);
    fclose(f);
    return text;
}

static void prepare(struct ledger *l, const char *what)
{
    make(l);
    if (needs_child(what))
        fork_it(l);
    if (strstr(what, "late") || strstr(what, "after"))
        move_in(l, what);
    l->head->messages[0].event = strncmp(what, "retire", 6) ? 1 : 0;
}

/* Does the change in a child and kills it after `steps` instructions, 0: never. How many it took, or 0 when killed. */
static uint64_t kill_after(struct ledger *l, const char *what, uint64_t steps)
{
    uint64_t done = 0;
    pid_t pid = fork();
    int status;

    check(pid >= 0, "fork(2)");
    if (pid == 0) {
        check(ptrace(PTRACE_TRACEME, 0, 0, 0) == 0, "PTRACE_TRACEME");
        raise(SIGSTOP);
        apply(l, what);
        _exit(0);
    }
    for (;;) {
        check(waitpid(pid, &status, 0) == pid, "waitpid");
        if (!WIFSTOPPED(status)) {
            check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the change itself");
            return done;
        }
        if (steps && done == steps) {
            check(kill(pid, SIGKILL) == 0 && waitpid(pid, &status, 0) == pid, "kill");
            return 0;
        }
        check(ptrace(PTRACE_SINGLESTEP, pid, 0, 0) == 0, "PTRACE_SINGLESTEP");
        done++;
    }
}

/* What a new pager does first. */
static void recover(struct ledger *l, const char *what)
{
    shadow_recover(l);
    if (strncmp(what, "retire", 6) == 0) {
        uint32_t space = !strcmp(what, "retire-child");

        if (l->spaces[space].live)
            ledger_retire(l, space);
    } else if (l->head->messages[0].event) {
        apply(l, what);
    }
}

int main(int argc, char **argv)
{
    const char *what = argc == 2 ? argv[1] : "";
    struct ledger whole;
    uint64_t total, stride;
    char *expected;
    int kills = 0;

    prepare(&whole, what);
    total = kill_after(&whole, what, 0);
    expected = print(&whole);
    ledger_close(&whole);
    stride = total / KILLS ? total / KILLS : 1;
    for (uint64_t n = 1; n < total; n += stride) {
        struct ledger l;
        char *found;

        prepare(&l, what);
        kill_after(&l, what, n);
        recover(&l, what);
        found = print(&l);
        if (strcmp(found, expected)) {
            printf("killed after %llu of %llu instructions of %s:\n%s\nand not\n%s\n", (unsigned long long)n,
                   (unsigned long long)total, what, found, expected);
            return 1;
        }
        free(found);
        ledger_close(&l);
        kills++;
    }
    printf("%d\n", kills);
    free(expected);
    return 0;
}
