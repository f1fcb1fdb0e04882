/* The fault thread: reads what processes do to their lazy memory and answers faults on demand. */
#define _GNU_SOURCE
#include "_children.h"
#include "_engine.h"
#include "_shadow.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS 64
#define EVENT_URGENT (UINT64_MAX - 1)
#define EVENT_KICK UINT64_MAX
#define TICK_MS 250    /* how soon a process that ended is noticed when nobody touches it */
#define TICK_NS (TICK_MS * 1000000ull)
#define PATIENCE_MS 1 /* between two looks at what should have come in bulk */
#define SPINS 200      /* a copy is deferred while another thread is between two instructions of the kernel... */
#define BACK_OFF_MS 1  /* ...or in a long fork */

/* --- messages ---------------------------------------------------------------------------------------------------- */

static int on_fork(struct pager *p, uint32_t parent, const struct uffd_msg *msg)
{
    int child = ledger_fork(&p->ledger, parent, (int)msg->arg.fork.ufd, child_of(msg));

    return child < 0 ? child : watch_space(p, (uint32_t)child);
}

static int on_fault(struct pager *p, uint32_t space, const struct uffd_msg *msg, uint64_t now)
{
    struct fault f = {
        .va = msg->arg.pagefault.address & ~(PAGE_SIZE - 1),
        .event_ns = now,
        .instance = NO_INSTANCE,
        .space = space,
        .tid = msg->arg.pagefault.feat.ptid,
    };

    /* A forked child is not named by its message; it has one thread at first, whose number is its own. */
    if (!p->ledger.spaces[space].vpid)
        p->ledger.spaces[space].vpid = f.tid;
    return faults_push(&p->fresh, &f);
}

/* MADV_DONTNEED leaves a shared object its content: what has not arrived yet still comes. */
static int on_remove(struct pager *p, uint32_t space, uint64_t start, uint64_t end)
{
    bool removed = false;
    int error = 0;

    if (ledger_shared_in(&p->ledger, space, start, end)) {
        error = collect_calls(p);
        removed = !error && was_remove(p, space, start, end);
    }
    ledger_remove(&p->ledger, space, start, end, removed);
    requeue(p, removed ? -1 : (int64_t)space);
    return error;
}

static int on_message(struct pager *p, uint32_t space, const struct uffd_msg *msg, uint64_t now)
{
    int error = 0;

    if (msg->event == UFFD_EVENT_PAGEFAULT)
        return on_fault(p, space, msg, now);
    p->changes++;
    switch (msg->event) {
    case UFFD_EVENT_FORK:
        return on_fork(p, space, msg);
    case UFFD_EVENT_REMAP:
        error = ledger_remap(&p->ledger, space, msg->arg.remap.from, msg->arg.remap.to, msg->arg.remap.len);
        forget_calls(p, space, msg->arg.remap.to, msg->arg.remap.to + msg->arg.remap.len);
        break;
    case UFFD_EVENT_REMOVE:
        return on_remove(p, space, msg->arg.remove.start, msg->arg.remove.end);
    case UFFD_EVENT_UNMAP:
        error = ledger_unmapped(&p->ledger, space, msg->arg.remove.start, msg->arg.remove.end);
        break;
    }
    /* Who waits for a page in a range that changed waits for something else now, or for nothing. */
    requeue(p, space);
    return error;
}

int apply_messages(struct pager *p, uint32_t count)
{
    struct ledger_head *head = p->ledger.head;
    uint64_t now = now_ns();

    children_keep(&p->ledger, count);
    for (uint32_t i = 0; i < count; i++) {
        int error;

        if (!head->messages[i].event) /* none, or a dead pager has applied it */
            continue;
        if (head->messages[i].event != UFFD_EVENT_PAGEFAULT)
            shadow_begin(&p->ledger, head->messages_space, i + 1);
        error = on_message(p, head->messages_space, &head->messages[i], now);
        if (error)
            return error;
        atomic_signal_fence(memory_order_seq_cst); /* with this store the event is over: _shadow.h */
        head->messages[i].event = 0;
        ledger_message_over(&p->ledger);
    }
    removals_done(&p->removals);
    return 0;
}

/* Bytes, or -errno. A fork for whose child no descriptor is free stays unread: those of processes that have ended are. */
static ssize_t read_messages(struct pager *p, uint32_t space)
{
    struct ledger_head *head = p->ledger.head;

    for (;;) {
        ssize_t n;

        head->messages_space = space;
        n = read(p->ledger.spaces[space].uffd, head->messages, sizeof(head->messages));
        if (n >= 0)
            return n;
        if (errno != EMFILE)
            return -errno;
        if (!reap_dead(p))
            return -EMFILE;
        if (!p->ledger.spaces[space].live)
            return -EAGAIN;
    }
}

/* Reads a process's messages until none is left. The kernel hands out faults before events, whatever came first: no
 * fault may be looked at before this. */
static int drain(struct pager *p, uint32_t space)
{
    const ssize_t most = sizeof(p->ledger.head->messages);
    ssize_t n;
    int error = 0;

    do {
        n = read_messages(p, space);
        if (n < 0)
            return n == -EAGAIN || n == -EINTR ? 0 : (int)n;
        error = apply_messages(p, (uint32_t)((size_t)n / sizeof(struct uffd_msg)));
    } while (!error && n == most);
    return error;
}

void drain_all(struct pager *p)
{
    for (uint32_t s = 0; s < p->ledger.head->spaces && p->status != PAGER_FAILED; s++) {
        int error = p->ledger.spaces[s].live ? drain(p, s) : 0;

        if (error)
            failed(p, "reading userfaultfd messages", error);
    }
}

/* --- faults ------------------------------------------------------------------------------------------------------ */

/* Under way in bulk, where little is before it while there are faults (_pace.h): asked for again it would come twice, and
 * take its time from another page. But that connection may stand still while the other one does not. */
static bool is_coming(struct pager *p, const struct fault *f, enum page_state state)
{
    bool coming = state == PAGE_ASKED_BULK && now_ns() < f->event_ns + pace_patience(&p->pace);

    p->patient |= coming;
    return coming;
}

/* How many pages to ask for: those that follow it as well, when that pays and nobody has asked for them. Of a map that is
 * not known yet it is not sure that there are any. */
static uint64_t reach(const struct pager *p, const struct fault *f, uint32_t primary, uint64_t missing)
{
    uint64_t run, pages = 1;
    const uint8_t *bytes = ledger_states(&p->ledger, primary, f->addr, &run);

    if (!bytes || !p->ledger.head->map_known)
        return 1;
    run = min_u64(min_u64(run, missing), pace_reach(&p->pace));
    while (pages < run && page_state(bytes[pages]) == PAGE_MISSING)
        pages++;
    return pages;
}

static bool packs(struct pager *p)
{
    return p->urgent_packs && pace_packs(&p->pace) && link_can_unpack(&p->urgent);
}

/* Waits for its page, which is asked for unless it is on its way on this connection already. */
static int await_page(struct pager *p, struct fault *f, enum page_state state)
{
    const struct instance *i = &p->ledger.instances[f->instance];
    uint32_t primary = i->primary;
    uint64_t pages = LINK_MAX_PAGES, object = i->object;
    const uint8_t *data = local_pages(p, object, f->addr, &pages);
    bool ask = !data && p->online && state < PAGE_ASKED_URGENT && !is_coming(p, f, state);
    int error;

    if (ask) {
        f->queued_ns = now_ns();
        f->sent_ns = 0;
    }
    error = faults_push(&p->waiting, f);
    if (error)
        return error;
    note_faulted(p, object, f->addr);
    if (data)
        return place_pages(p, primary, f->addr, 1, data, CLASS_URGENT);
    if (!p->has_remote && p->poisons)
        return place_pages(p, primary, f->addr, 1, NULL, CLASS_POISONED);
    if (!p->has_remote) {
        if (ledger_absent(&p->ledger, primary, f->addr, 1))
            lacking(p);
        else
            p->retry = p->ledger.head->map_known; /* it was no content, then: zero */
        return 0;
    }
    if (!ask)
        return 0;
    pages = reach(p, f, primary, pages);
    ledger_mark(&p->ledger, primary, f->addr, pages, PAGE_ASKED_URGENT, PAGE_ASKED_URGENT);
    atomic_fetch_add(&p->urgent_outstanding, 1);
    return link_ask(&p->urgent, primary, object, f->addr, (uint32_t)pages, packs(p), f->queued_ns);
}

/* What no region covers is a grown stack, or memory that mremap(2) left behind or added: zero. */
static int serve_fault(struct pager *p, struct fault *f)
{
    const struct region *r = ledger_region_at(&p->ledger, f->space, f->va);
    const uint8_t *byte = NULL;
    uint64_t run;
    int error;

    f->instance = NO_INSTANCE;
    if (r) {
        f->instance = r->instance;
        f->addr = r->addr + (f->va - r->start);
        byte = ledger_states(&p->ledger, f->instance, f->addr, &run);
    }
    if (byte && page_waits(*byte)) {
        error = await_page(p, f, page_state(*byte));
    } else {
        error = place_filler(p, f, byte && page_state(*byte) == PAGE_POISONED ? CLASS_POISONED : CLASS_ZERO);
        if (error == -EAGAIN && faults_push(&p->waiting, f) < 0)
            return -ENOMEM;
    }
    if (error != -EAGAIN)
        return error;
    p->retry = true;
    return 0;
}

static bool asked_in_bulk(const struct pager *p, const struct fault *f)
{
    uint64_t run;
    const uint8_t *byte = f->instance == NO_INSTANCE ? NULL : ledger_states(&p->ledger, f->instance, f->addr, &run);

    return byte && page_state(*byte) == PAGE_ASKED_BULK;
}

/* Whose patience is at its end is looked at anew. */
static void ask_overdue(struct pager *p)
{
    uint64_t late = now_ns() - pace_patience(&p->pace);

    p->patient = false;
    for (uint32_t i = 0; i < p->waiting.count;) {
        struct fault *f = &p->waiting.items[i];
        bool coming = asked_in_bulk(p, f);

        if (!coming || f->event_ns > late) {
            p->patient |= coming;
            i++;
            continue;
        }
        if (faults_push(&p->fresh, f) < 0)
            return failed(p, "no memory for the list of faults", ENOMEM);
        *f = p->waiting.items[--p->waiting.count];
    }
}

static void serve_fresh(struct pager *p)
{
    for (uint32_t i = 0; i < p->fresh.count; i++) {
        struct fault f = p->fresh.items[i];
        int error = p->ledger.spaces[f.space].live ? serve_fault(p, &f) : 0;

        if (error)
            failed(p, "putting a page under a fault", error);
    }
    p->fresh.count = 0;
}

/* --- the urgent connection --------------------------------------------------------------------------------------- */

static void place_answer(struct pager *p, const struct answer *a)
{
    enum page_class as = a->kind == ANSWER_ZERO ? CLASS_ZERO : CLASS_URGENT;
    int error = -EAGAIN;

    for (int i = 0; error == -EAGAIN && i < SPINS; i++) {
        if (i) {
            drain_all(p);
            sched_yield();
        }
        error = place_pages(p, a->request.instance, a->addr, a->pages, a->data, as);
    }
    if (error == -EAGAIN) {
        ledger_mark(&p->ledger, a->request.instance, a->addr, a->pages, PAGE_ABSENT, PAGE_MISSING);
        p->retry = true;
    } else if (error) {
        failed(p, "installing a page", error);
    }
}

static void on_answer(struct pager *p, const struct answer *a)
{
    note_packed(p, a);
    if (a->kind == ANSWER_DATA || a->kind == ANSWER_ZERO) {
        place_answer(p, a);
    } else if (a->kind == ANSWER_ABSENT) {
        if (ledger_absent(&p->ledger, a->request.instance, a->addr, a->pages))
            return lost(p, "the source does not have a page that its map names", 0);
        requeue(p, -1);
    }
    if (!is_last(a))
        return;
    atomic_fetch_sub(&p->urgent_outstanding, 1);
    pace_urgent(&p->pace, now_ns(), a->request.asked_ns, a->request.pages,
                a->kind == ANSWER_DATA && !a->request.packed);
}

static void take_answers(struct pager *p)
{
    struct answer a;
    int result = link_receive(&p->urgent);

    if (result == -EAGAIN)
        return;
    while (result >= 0 && p->online && (result = link_next(&p->urgent, &a)) > 0)
        on_answer(p, &a);
    if (result < 0)
        lost(p, result == -EBADMSG   ? "the page server sent garbage on the urgent connection"
                : result == -EILSEQ ? "a page arrived damaged on the urgent connection"
                                    : "the urgent connection broke",
             result);
}

static void note_sent(struct pager *p)
{
    uint64_t now = now_ns();

    for (uint32_t i = 0; i < p->waiting.count; i++)
        if (p->waiting.items[i].queued_ns && !p->waiting.items[i].sent_ns)
            p->waiting.items[i].sent_ns = now;
}

/* What finds no room in the socket leaves when answers come: those that fill it are on their way. */
static void send_requests(struct pager *p)
{
    int error;

    if (!p->online || p->urgent.unsent == p->urgent.tail)
        return;
    error = link_flush(&p->urgent);
    if (error)
        return lost(p, "the urgent connection broke", error);
    if (p->traced && p->urgent.unsent == p->urgent.tail)
        note_sent(p);
}

/* Closing takes a connection out of the epoll set only if nobody else has it, and its end is an event for ever. */
static void connect_urgent(struct pager *p, int fd)
{
    if (p->urgent.fd >= 0)
        epoll_ctl(p->epoll, EPOLL_CTL_DEL, p->urgent.fd, NULL);
    link_connect(&p->urgent, fd);
}

/* Lets go of a lost connection and takes up a new one. */
static void renew_link(struct pager *p)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = EVENT_URGENT};

    if (!p->online && p->urgent.fd >= 0) {
        connect_urgent(p, -1);
        atomic_store(&p->urgent_outstanding, 0);
    }
    if (!p->online || p->urgent_generation == p->generation)
        return;
    connect_urgent(p, p->next_urgent);
    p->next_urgent = -1;
    p->urgent_packs = p->next_packs;
    p->urgent_generation = p->generation;
    atomic_store(&p->urgent_outstanding, 0);
    if (epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->urgent.fd, &event) < 0)
        failed(p, "watching the urgent connection", errno);
    requeue(p, -1);
}

/* --- the thread -------------------------------------------------------------------------------------------------- */

static void read_ready(struct pager *p, const struct epoll_event *events, int count, bool *answers)
{
    for (int i = 0; i < count; i++) {
        uint64_t what = events[i].data.u64, ticks;
        int error = 0;

        if (what == EVENT_URGENT)
            *answers = true;
        else if (what == EVENT_KICK)
            (void)!read(p->fault_kick, &ticks, sizeof(ticks));
        else if (p->ledger.spaces[what].live)
            error = drain(p, (uint32_t)what);
        if (error)
            return failed(p, "reading userfaultfd messages", error);
    }
}

/* The rings are for everybody on this machine, and must not overflow. */
static void empty_rings(struct pager *p)
{
    forget_ended(p);
    if (collect_calls(p))
        failed(p, "no memory for the list of calls", ENOMEM);
    removals_done(&p->removals);
}

static void turn(struct pager *p, const struct epoll_event *events, int count)
{
    bool answers = false;

    renew_link(p);
    empty_rings(p);
    read_ready(p, events, count, &answers);
    if (p->retry) {
        p->retry = false;
        requeue(p, -1);
    }
    if (p->patient)
        ask_overdue(p);
    serve_fresh(p);
    send_requests(p);
    if (answers && p->online)
        take_answers(p);
    serve_fresh(p);
    send_requests(p);
    if (now_ns() >= p->reaped_ns + TICK_NS)
        reap_dead(p);
    tell_faulted(p);
    check_done(p);
}

static int start_watching(struct pager *p)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = EVENT_KICK};

    return epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->fault_kick, &event) < 0 ? -errno : 0;
}

void *fault_main(void *pager)
{
    struct pager *p = pager;
    struct epoll_event events[EVENTS];
    bool going;
    int spins = 0, timeout, count, error;

    pthread_mutex_lock(&p->lock);
    error = start_watching(p);
    if (error)
        failed(p, "starting the fault thread", error);
    drain_all(p);
    turn(p, events, 0);
    do {
        spins = p->retry ? spins + 1 : 0;
        timeout = p->retry ? (spins < SPINS ? 0 : BACK_OFF_MS) : p->patient ? PATIENCE_MS : TICK_MS;
        going = p->status != PAGER_FAILED;
        pthread_mutex_unlock(&p->lock);
        if (timeout == 0)
            sched_yield();
        count = going ? epoll_wait(p->epoll, events, EVENTS, timeout) : 0;
        atomic_store(&p->fault_thread_waits, true);
        pthread_mutex_lock(&p->lock);
        atomic_store(&p->fault_thread_waits, false);
        if (going && !atomic_load(&p->stopping))
            turn(p, events, count > 0 ? count : 0);
    } while (going && !atomic_load(&p->stopping));
    pthread_mutex_unlock(&p->lock);
    return NULL;
}
