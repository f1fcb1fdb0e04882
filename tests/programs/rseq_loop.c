/* Restartable sequences: threads are nearly always inside one, counting on their CPU without atomic instructions.
 *
 * rseq_loop STATUS [THREADS]: a sequence that was frozen and goes on elsewhere without being aborted loses a count or
 * counts twice; every few milliseconds all threads meet and the sum over the CPUs must be what they did.
 */
#include "check.h"

#include <sys/rseq.h>

enum { CPUS = 4096, ADDITIONS = 2000 };

static struct {
    uint64_t count;
    uint8_t unused[56]; /* a cache line of its own */
} counters[CPUS];
static uint64_t done[WORKERS_MAX];
static unsigned threads;
static pthread_barrier_t meeting;
static bool last_round;

static struct rseq *own_rseq(void)
{
    return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

/* One addition in a sequence of about a microsecond. False when it was aborted or the CPU changed: nothing is added.
 * The signature before the abort handler is what the C library registered, RSEQ_SIG. */
static bool add_one(struct rseq *rseq)
{
    uint32_t cpu = __atomic_load_n(&rseq->cpu_id_start, __ATOMIC_RELAXED);
    uint64_t *count = &counters[cpu].count;

    __asm__ goto(".pushsection __rseq_cs, \"aw\"\n"
                 ".balign 32\n"
                 "3: .long 0, 0\n" /* version, flags */
                 ".quad 1f, 2f - 1f, 4f\n"
                 ".popsection\n"
                 "leaq 3b(%%rip), %%rax\n"
                 "movq %%rax, %[rseq_cs]\n"
                 "1: cmpl %[cpu], %[cpu_id]\n"
                 "jne %l[undone]\n"
                 "movq (%[count]), %%rax\n"
                 "mov $20, %%ecx\n"
                 "5: pause\n"
                 "dec %%ecx\n"
                 "jnz 5b\n"
                 "incq %%rax\n"
                 "movq %%rax, (%[count])\n"
                 "2:\n"
                 ".pushsection __rseq_failure, \"ax\"\n"
                 ".byte 0x0f, 0xb9, 0x3d\n"
                 ".long %c[signature]\n"
                 "4: jmp %l[undone]\n"
                 ".popsection\n"
                 :
                 : [rseq_cs] "m"(rseq->rseq_cs), [cpu] "r"(cpu), [cpu_id] "m"(rseq->cpu_id), [count] "r"(count),
                   [signature] "i"(RSEQ_SIG)
                 : "rax", "rcx", "memory", "cc"
                 : undone);
    return true;
undone:
    return false;
}

static void check_sum(void)
{
    uint64_t counted = 0, added = 0;

    for (unsigned cpu = 0; cpu < CPUS; cpu++)
        counted += counters[cpu].count;
    for (unsigned worker = 0; worker < threads; worker++)
        added += done[worker];
    EXPECT(added, counted);
}

static void *work(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;

    while (!last_round) {
        struct rseq *rseq = own_rseq();

        for (unsigned i = 0; i < ADDITIONS; i++)
            done[worker] += add_one(rseq);
        check_beat(worker);
        pthread_barrier_wait(&meeting);
        if (worker == 0) {
            check_sum();
            last_round = check_stopping;
            check_rest(500);
        }
        pthread_barrier_wait(&meeting);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t others[WORKERS_MAX];

    threads = argc > 2 ? (unsigned)atoi(argv[2]) : 3;
    if (threads < 1 || threads > WORKERS_MAX)
        check_die("1 to 32 threads");
    if (__rseq_size == 0)
        return UNSUPPORTED;
    check_start(argc, argv, threads);
    pthread_barrier_init(&meeting, NULL, threads);
    for (unsigned worker = 1; worker < threads; worker++)
        others[worker] = start_thread(work, (void *)(uintptr_t)worker);
    check_running();
    work((void *)0);
    for (unsigned worker = 1; worker < threads; worker++)
        pthread_join(others[worker], NULL);
    return check_end();
}
