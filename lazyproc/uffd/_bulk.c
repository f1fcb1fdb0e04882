/* The bulk thread: brings over what nobody has touched yet, and gives way to the faults. */
#define _GNU_SOURCE
#include "_engine.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#define SCAN_PAGES 65536u /* looked at before the lock is let go */
#define ASK_AT_ONCE 16    /* requests made before the lock is let go */
#define IDLE_NS 50000000ull
#define DEFERRED_NS 50000

struct piece {
    uint64_t addr;
    uint64_t pages;
    const uint8_t *data; /* NULL: remote, or lost */
    uint32_t primary;
    enum page_class as; /* CLASS_NONE: it is not here to be placed */
};

/* pthread mutexes are not fair: without this the thread that copies would take the lock back before the one that
 * serves a fault has woken up. */
static void lock_politely(struct pager *p)
{
    while (atomic_load(&p->fault_thread_waits))
        sched_yield();
    pthread_mutex_lock(&p->lock);
}

/* --- what next --------------------------------------------------------------------------------------------------- */

/* The first missing pages of an instance at or after *addr; moves *addr along. */
static uint64_t find_missing(const struct pager *p, uint32_t instance, uint64_t *addr, uint64_t end, uint64_t limit,
                             uint64_t *budget)
{
    while (*addr < end && *budget) {
        uint64_t run, n = 0, skip = 0;
        const uint8_t *bytes = ledger_states(&p->ledger, instance, *addr, &run);

        run = min_u64(run, (end - *addr) >> PAGE_SHIFT);
        if (!bytes) {
            *addr += run * PAGE_SIZE;
            continue;
        }
        run = min_u64(run, *budget);
        while (skip < run && page_state(bytes[skip]) != PAGE_MISSING)
            skip++;
        while (skip + n < run && n < limit && page_state(bytes[skip + n]) == PAGE_MISSING)
            n++;
        *addr += skip * PAGE_SIZE;
        *budget -= skip + n;
        if (n)
            return n;
    }
    return 0;
}

static uint64_t along(const struct pager *p, struct course *course, struct piece *piece, uint64_t limit, uint64_t *budget)
{
    for (; course->run < course->count && *budget; course->run++, course->page = 0) {
        const struct run *run = &course->runs[course->run];
        uint64_t addr = run->addr + course->page * PAGE_SIZE;
        uint64_t n = find_missing(p, run->primary, &addr, run->addr + run->pages * PAGE_SIZE, limit, budget);

        course->page = (addr - run->addr) >> PAGE_SHIFT;
        piece->primary = run->primary;
        piece->addr = addr;
        if (n || !*budget)
            return n;
    }
    return 0;
}

static uint64_t over_the_rest(struct pager *p, struct piece *piece, uint64_t limit, uint64_t *budget)
{
    struct walk *walk = &p->walk;

    for (; walk->instance < p->ledger.head->instances; walk->instance++, walk->span = 0) {
        const struct instance *i = &p->ledger.instances[walk->instance];

        for (; walk->span < i->spans; walk->span++, walk->page = 0) {
            const struct span *s = ledger_spans(&p->ledger, walk->instance) + walk->span;
            uint64_t addr = s->addr + walk->page * PAGE_SIZE;
            uint64_t n = find_missing(p, walk->instance, &addr, s->addr + s->pages * PAGE_SIZE, limit, budget);

            walk->page = (addr - s->addr) >> PAGE_SHIFT;
            piece->primary = i->primary;
            piece->addr = addr;
            if (n || !*budget)
                return n;
        }
    }
    return 0;
}

/* 1 and a piece; 0 when nothing is missing any more that nobody asked for; -EAGAIN when the search is not at its end.
 * Before the map is known only what the plan names is worth fetching. */
static int next_piece(struct pager *p, uint64_t limit, struct piece *piece)
{
    bool mapped = p->ledger.head->map_known;
    uint64_t budget = SCAN_PAGES, n = mapped ? along(p, &p->ahead, piece, limit, &budget) : 0;

    if (!n && budget)
        n = along(p, &p->plan, piece, limit, &budget);
    if (!n && budget && mapped)
        n = over_the_rest(p, piece, limit, &budget);
    if (!n)
        return budget ? 0 : -EAGAIN;
    piece->data = local_pages(p, p->ledger.instances[piece->primary].object, piece->addr, &n);
    piece->pages = n;
    return 1;
}

/* --- pace -------------------------------------------------------------------------------------------------------- */

static void charge(struct pager *p, uint64_t bytes, uint64_t now)
{
    if (!p->max_rate)
        return;
    if (p->rate_free_ns < now)
        p->rate_free_ns = now;
    p->rate_free_ns += (uint64_t)((double)bytes * 1e9 / (double)p->max_rate);
}

/* --- placing ----------------------------------------------------------------------------------------------------- */

/* A deferred copy waits for the fault thread to read a message and for the process to go on. */
static void place_patiently(struct pager *p, uint32_t primary, uint64_t addr, uint64_t pages, const uint8_t *data,
                            enum page_class as)
{
    const struct timespec pause = {.tv_nsec = DEFERRED_NS};
    int error;

    do {
        lock_politely(p);
        error = p->status == PAGER_FAILED ? 0 : place_pages(p, primary, addr, pages, data, as);
        if (error && error != -EAGAIN)
            failed(p, "installing pages in bulk", error);
        check_done(p);
        pthread_mutex_unlock(&p->lock);
        if (error == -EAGAIN)
            nanosleep(&pause, NULL);
    } while (error == -EAGAIN && !atomic_load(&p->stopping));
}

static void place_answer(struct pager *p, const struct answer *a)
{
    for (uint64_t i = 0; i < a->pages && !atomic_load(&p->stopping); i += PIECE_PAGES)
        place_patiently(p, a->request.instance, a->addr + i * PAGE_SIZE, min_u64(PIECE_PAGES, a->pages - i),
                        a->data ? a->data + i * PAGE_SIZE : NULL, a->kind == ANSWER_ZERO ? CLASS_ZERO : CLASS_BULK);
}

/* --- the bulk connection ----------------------------------------------------------------------------------------- */

static void declare_lost(struct pager *p, const char *reason, int error)
{
    pthread_mutex_lock(&p->lock);
    if (p->online && p->bulk_generation == p->generation)
        lost(p, reason, error);
    pthread_mutex_unlock(&p->lock);
}

static void on_answer(struct pager *p, const struct answer *a)
{
    if (a->kind == ANSWER_DATA || a->kind == ANSWER_ZERO) {
        place_answer(p, a);
    } else {
        lock_politely(p);
        /* What came over the other connection and could not be placed is asked for once more, on another round. */
        if (a->kind == ANSWER_UNDER_WAY)
            ledger_mark(&p->ledger, a->request.instance, a->addr, a->pages, PAGE_ASKED_URGENT, PAGE_MISSING);
        else if (ledger_absent(&p->ledger, a->request.instance, a->addr, a->pages))
            lost(p, "the source does not have a page that its map names", 0);
        p->retry = true;
        pthread_mutex_unlock(&p->lock);
        kick(p->fault_kick);
    }
}

static void note_delay(struct pager *p, uint64_t now, uint64_t asked)
{
    lock_politely(p);
    pace_bulk(&p->pace, now, asked, atomic_load(&p->bulk.bytes_in) + atomic_load(&p->urgent.bytes_in));
    pthread_mutex_unlock(&p->lock);
}

/* What they bring is placed when the next requests have left, so that the source has something to do meanwhile. */
static void read_answers(struct pager *p)
{
    int error = link_receive(&p->bulk);

    p->bulk_read_ns = now_ns();
    if (error && error != -EAGAIN)
        declare_lost(p, "the bulk connection broke", error);
}

/* True when there were any. */
static bool take_answers(struct pager *p)
{
    struct answer a;
    int result = 0;
    uint64_t asked = 0, before = p->bulk_pages;

    while (!atomic_load(&p->stopping) && (result = link_next(&p->bulk, &a)) > 0) {
        p->bulk_pages -= a.pages;
        note_packed(p, &a);
        packing_note(&p->packing, p->bulk_read_ns, a.request.packed, a.pages, a.bytes);
        if (a.kind == ANSWER_DATA && a.pages == a.request.count)
            asked = a.request.asked_ns;
        on_answer(p, &a);
    }
    if (asked)
        note_delay(p, p->bulk_read_ns, asked);
    if (result < 0)
        declare_lost(p,
                     result == -EBADMSG ? "the page server sent garbage on the bulk connection"
                                        : "a page arrived damaged on the bulk connection",
                     result);
    return p->bulk_pages != before;
}

static void renew_link(struct pager *p)
{
    if (!p->online && p->bulk.fd >= 0) {
        link_connect(&p->bulk, -1);
        p->bulk_pages = 0;
    }
    if (!p->online || p->bulk_generation == p->generation)
        return;
    link_connect(&p->bulk, p->next_bulk);
    p->next_bulk = -1;
    p->bulk_pages = 0;
    p->bulk_packs = p->next_packs;
    packing_init(&p->packing, p->bulk_packs && p->bulk.unpacker);
    p->bulk_generation = p->generation;
}

/* --- the thread -------------------------------------------------------------------------------------------------- */

enum next { NEXT_AT_ONCE, NEXT_WAIT, NEXT_END };

/* Pages that are asked for and have not been read yet: what the way and the source hold. */
static uint64_t under_way(const struct pager *p)
{
    uint64_t here = link_unread(&p->bulk) / p->packing.wire_bytes;

    return p->bulk_pages > here ? p->bulk_pages - here : 0;
}

/* Under the lock: makes requests, or finds one piece that is here already. */
static enum next plan_turn(struct pager *p, struct piece *local)
{
    uint64_t now = now_ns(), rest;
    int found = 1;

    renew_link(p);
    packing_guess(&p->packing, pace_is_slow(&p->pace));
    local->as = CLASS_NONE;
    if (p->status == PAGER_DONE || p->status == PAGER_FAILED)
        return NEXT_END;
    if (p->has_remote && (rest = pace_rest(&p->pace, now)) && p->rate_free_ns < now + rest)
        p->rate_free_ns = now + rest;
    for (int i = 0; i < ASK_AT_ONCE && p->rate_free_ns <= now; i++) {
        bool faults_wait = p->patient || atomic_load(&p->urgent_outstanding);
        uint32_t bytes = p->packing.wire_bytes;
        struct quota quota = pace_quota(&p->pace, now, faults_wait, bytes);
        struct piece piece = {.as = CLASS_NONE};

        if (p->has_remote && (under_way(p) + quota.pages) * bytes > quota.window)
            return NEXT_WAIT;
        if (p->has_remote && !p->online)
            return NEXT_WAIT;
        found = next_piece(p, p->has_remote ? quota.pages : PIECE_PAGES, &piece);
        if (found <= 0)
            break;
        charge(p, piece.pages * PAGE_SIZE, now);
        if (piece.data || (p->poisons && !p->has_remote)) {
            *local = piece;
            local->as = piece.data ? CLASS_BULK : CLASS_POISONED;
            return NEXT_AT_ONCE;
        }
        if (!p->has_remote) {
            if (ledger_absent(&p->ledger, piece.primary, piece.addr, piece.pages))
                lacking(p);
            continue;
        }
        ledger_mark(&p->ledger, piece.primary, piece.addr, piece.pages, PAGE_ASKED_BULK, PAGE_ASKED_BULK);
        p->bulk_pages += piece.pages;
        if (link_ask(&p->bulk, piece.primary, p->ledger.instances[piece.primary].object, piece.addr,
                     (uint32_t)piece.pages, p->packing.packed, now))
            failed(p, "no memory for requests", -ENOMEM);
    }
    if (found == 0 && p->bulk_pages == 0) {
        /* What is missing still or again (a connection was lost, a process forked) is found on another round. */
        p->walk = (struct walk){0};
        p->bulk_idle = true;
        pthread_cond_broadcast(&p->changed);
        return NEXT_WAIT;
    }
    return found == 0 || p->rate_free_ns > now ? NEXT_WAIT : NEXT_AT_ONCE;
}

static void wait_turn(struct pager *p, enum next next)
{
    bool connected = p->bulk.fd >= 0;
    struct pollfd fds[2] = {{.fd = p->bulk_kick, .events = POLLIN}, {.fd = p->bulk.fd, .events = POLLIN}};
    uint64_t now = now_ns(), wait = next == NEXT_AT_ONCE ? 0 : IDLE_NS, ticks;
    struct timespec timeout;

    if (wait && p->rate_free_ns > now)
        wait = min_u64(wait, p->rate_free_ns - now);
    if (connected && p->bulk.unsent != p->bulk.tail)
        fds[1].events |= POLLOUT;
    timeout = (struct timespec){.tv_nsec = (long)wait};
    if (ppoll(fds, connected ? 2 : 1, &timeout, NULL) <= 0)
        return;
    if (fds[0].revents)
        (void)!read(p->bulk_kick, &ticks, sizeof(ticks));
    if (connected && fds[1].revents & ~POLLOUT)
        read_answers(p);
}

/* Without the lock, and while the first answers are on their way: looking for a library takes milliseconds. */
static void find_unpacker(struct pager *p)
{
    p->packing.able = p->bulk_packs && link_can_unpack(&p->bulk); /* without it pages are asked for as they are */
}

void *bulk_main(void *pager)
{
    struct pager *p = pager;
    struct piece local;
    enum next next;
    int error;

    for (;;) {
        lock_politely(p);
        next = plan_turn(p, &local);
        pthread_mutex_unlock(&p->lock);
        if (next == NEXT_END || atomic_load(&p->stopping))
            return NULL;
        for (uint64_t i = 0; local.as != CLASS_NONE && i < local.pages; i += PIECE_PAGES)
            place_patiently(p, local.primary, local.addr + i * PAGE_SIZE, min_u64(PIECE_PAGES, local.pages - i),
                            local.data ? local.data + i * PAGE_SIZE : NULL, local.as);
        error = p->bulk.fd >= 0 ? link_flush(&p->bulk) : 0;
        if (error)
            declare_lost(p, "the bulk connection broke", error);
        find_unpacker(p);
        if (take_answers(p) && p->bulk_pages == 0)
            next = NEXT_AT_ONCE; /* nothing is under way that would wake us */
        wait_turn(p, next);
    }
}
