#define _GNU_SOURCE
#include "_children.h"

#include <errno.h>
#include <unistd.h>

#include "_cradle.h"
#include "_shadow.h"

#define PUTS 256u /* until what is not needed any more is taken out */
#define LOST UINT32_MAX

/* --- keeping ----------------------------------------------------------------------------------------------------- */

/* The kernel leaves the rest of a message zero: our id of the child is there. */
uint32_t child_of(const struct uffd_msg *fork)
{
    return (uint32_t)fork->arg.reserved.reserved2;
}

/* A full queue leaves these without: thousands of children that wait, or a user with a small RLIMIT_NOFILE. */
static void put(const struct ledger_head *head, const struct cradled *items, size_t count)
{
    (void)cradle_put(head->cradle, head->cradle_round, items, count);
}

/* The children that live are put in once more, then everything that was put in before is taken out. */
static void renew(struct ledger *l)
{
    struct ledger_head *head = l->head;
    struct cradled living[LEDGER_SPACES];
    size_t count = 0;

    for (uint32_t s = 0; s < head->spaces; s++)
        if (l->spaces[s].live && l->spaces[s].child)
            living[count++] = (struct cradled){l->spaces[s].child, l->spaces[s].uffd};
    head->cradle_round++;
    put(head, living, count);
    cradle_forget(head->cradle, head->cradle_round);
    head->cradle_puts = 0;
}

void children_keep(struct ledger *l, uint32_t count)
{
    struct ledger_head *head = l->head;
    struct cradled forked[LEDGER_MESSAGES];
    size_t forks = 0;

    for (uint32_t i = 0; i < count; i++) {
        struct uffd_msg *msg = &head->messages[i];

        if (msg->event != UFFD_EVENT_FORK)
            continue;
        if (!msg->arg.reserved.reserved2) /* a dead pager may have come so far */
            msg->arg.reserved.reserved2 = ++head->children;
        forked[forks++] = (struct cradled){child_of(msg), (int32_t)msg->arg.fork.ufd};
    }
    if (!forks)
        return;
    put(head, forked, forks);
    if (++head->cradle_puts < PUTS)
        return;
    renew(l);
    put(head, forked, forks); /* they are not in the tables yet */
}

/* --- taking back ------------------------------------------------------------------------------------------------- */

/* Every one of a child that lives, or whose fork was read and not applied, is lost unless it lies in the cradle. */
static void lose_children(struct ledger *l)
{
    for (uint32_t s = 0; s < l->head->spaces; s++)
        if (l->spaces[s].child)
            l->spaces[s].uffd = -1;
    for (uint32_t i = 0; i < LEDGER_MESSAGES; i++)
        if (l->head->messages[i].event == UFFD_EVENT_FORK)
            l->head->messages[i].arg.fork.ufd = LOST;
}

/* False: nobody needs it, or it came before. */
static bool find_child(struct ledger *l, const struct cradled *item)
{
    for (uint32_t i = 0; i < LEDGER_MESSAGES; i++) {
        struct uffd_msg *msg = &l->head->messages[i];

        if (msg->event == UFFD_EVENT_FORK && child_of(msg) == item->id && msg->arg.fork.ufd == LOST) {
            msg->arg.fork.ufd = (uint32_t)item->uffd;
            return true;
        }
    }
    for (uint32_t s = 0; s < l->head->spaces; s++)
        if (l->spaces[s].live && l->spaces[s].child == item->id && l->spaces[s].uffd < 0) {
            l->spaces[s].uffd = item->uffd;
            return true;
        }
    return false;
}

static void forget_lost(struct ledger *l)
{
    for (uint32_t s = 0; s < l->head->spaces; s++)
        if (l->spaces[s].live && l->spaces[s].uffd < 0)
            ledger_retire(l, s);
    for (uint32_t i = 0; i < LEDGER_MESSAGES; i++)
        if (l->head->messages[i].event == UFFD_EVENT_FORK && l->head->messages[i].arg.fork.ufd == LOST)
            l->head->messages[i].event = 0;
}

int children_take_back(struct ledger *l, int cradle)
{
    struct cradled items[CRADLE_BATCH];
    int n = cradle_rewind(cradle);

    l->head->cradle = cradle;
    lose_children(l);
    while (n >= 0) {
        n = cradle_next(cradle, items);
        for (int i = 0; i < n; i++)
            if (!find_child(l, &items[i]))
                close(items[i].uffd);
    }
    if (n != -EAGAIN)
        return n;
    forget_lost(l);
    return 0;
}
