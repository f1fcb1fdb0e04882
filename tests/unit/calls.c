/* Which calls of MADV_REMOVE are remembered, and of whom they are taken to be, by _remove.c. */
#define _GNU_SOURCE
#include "_engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define OBJECT (7 << 8 | 2ull) /* shared */
#define AT 0x10000000ull
#define LENGTH (8 * PAGE_SIZE)
#define NOBODY 0x7ffffff0u /* no number that a thread has */

static struct pager p;
static uint32_t one, other;

static void check(bool good, const char *what)
{
    if (good)
        return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static uint32_t add(uint32_t pid)
{
    int space = ledger_add_space(&p.ledger, 100, 10, pid);

    check(space >= 0 && ledger_add_region(&p.ledger, (uint32_t)space, AT, LENGTH, OBJECT, 0) == 0, "space");
    return (uint32_t)space;
}

static void call(uint32_t pid, uint32_t tid)
{
    const struct removal removal = {.start = AT, .end = AT + LENGTH, .pid = pid, .tid = tid};

    check(note_call(&p, &removal) == 0, "note_call");
}

static bool removed_in(uint32_t space)
{
    return was_remove(&p, space, AT, AT + PAGE_SIZE);
}

int main(void)
{
    uint32_t gone;

    check(ledger_open(&p.ledger, -1) == 0, "ledger");
    one = add(NOBODY);
    other = add(NOBODY + 1);
    call(NOBODY, NOBODY);
    check(removed_in(one), "a call is not known");
    check(!removed_in(other), "a call of a process that is known is taken for another's");
    forget_calls(&p, one, AT + LENGTH, AT + 2 * LENGTH);
    check(removed_in(one), "forgotten because memory was moved to elsewhere");
    forget_calls(&p, other, AT, AT + LENGTH);
    check(removed_in(one), "forgotten because another process has moved memory");
    forget_calls(&p, one, AT, AT + PAGE_SIZE);
    check(!removed_in(one), "not forgotten");

    gone = add(NOBODY + 2);
    ledger_retire(&p.ledger, gone);
    call(NOBODY + 2, NOBODY);
    check(removed_in(one), "a number that is used again is taken for who had it");

    call((uint32_t)getpid(), (uint32_t)gettid());
    for (uint32_t i = 0; i < 64; i++)
        call(NOBODY, NOBODY + i);
    forget_ended(&p);
    check(p.calls.count == 1, "those of threads that have ended are kept, or others are not");
    return 0;
}
