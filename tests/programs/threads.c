/* Threads with everything the kernel keeps for each of them.
 *
 * threads STATUS [THREADS]: every one checks its tid, thread-local storage, gs base, signal mask, alternate stack,
 * vector, mask and x87 registers over a busy loop and over a system call; a mutex and a condition variable pass a
 * turn around. In the end each dies with a robust mutex in its hands, which the main thread must find out.
 */
#include "check.h"

#include <asm/prctl.h>
#include <sys/syscall.h>

enum { STACK = 64 << 10, ALL_VECTORS = 32 * 64 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t turn_passed;
    unsigned turn, count;
} ring = { .lock = PTHREAD_MUTEX_INITIALIZER, .turn_passed = PTHREAD_COND_INITIALIZER };

static pthread_mutex_t robust[WORKERS_MAX];
static __thread unsigned self = ~0u;
static __thread volatile uintptr_t handler_stack;

static void on_usr1(int signal)
{
    (void)signal;
    handler_stack = (uintptr_t)__builtin_frame_address(0);
}

static void check_altstack(const stack_t *wanted)
{
    stack_t found;

    EXPECT(0, sigaltstack(NULL, &found));
    EXPECT((uintptr_t)wanted->ss_sp, (uintptr_t)found.ss_sp);
    EXPECT(wanted->ss_size, found.ss_size);
    handler_stack = 0;
    EXPECT(0, syscall(SYS_tgkill, getpid(), gettid(), SIGUSR1));
    EXPECT(1, handler_stack - (uintptr_t)wanted->ss_sp < wanted->ss_size);
}

/* Between LOAD and STORE: about 30 us of work, or a system call, which preserves all but rax, rcx and r11. */
#define SPIN "mov $600, %%ecx\n1: pause\ndec %%ecx\njnz 1b\n"
#define SLEEP "mov %[nanosleep], %%eax\nmov %[time], %%rdi\nxor %%esi, %%esi\nsyscall\n"
#define REGISTERS_16 "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15"
#define REGISTERS_32 REGISTERS_16 ",16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
#define HOLD(load, width, registers, registers_name, between)                                                 \
    __asm__ volatile(".irp n," registers "\n" load " " width "*\\n(%[in]), %%" registers_name "\\n\n.endr\n"  \
                     between ".irp n," registers "\n" load " %%" registers_name "\\n, " width "*\\n(%[out])\n" \
                     ".endr\n" ::[in] "r"(in), [out] "r"(out), [nanosleep] "i"(SYS_nanosleep), [time] "r"(&time) \
                     : "rax", "rcx", "rdi", "rsi", "r11", "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3",     \
                       "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",    \
                       "xmm14", "xmm15")

__attribute__((target("avx512f"))) static size_t
hold_zmm(const uint8_t *in, uint8_t *out, struct timespec time, bool sleeping)
{
    if (sleeping)
        HOLD("vmovdqu64", "64", REGISTERS_32, "zmm", SLEEP);
    else
        HOLD("vmovdqu64", "64", REGISTERS_32, "zmm", SPIN);
    return 32 * 64;
}

__attribute__((target("avx"))) static size_t
hold_ymm(const uint8_t *in, uint8_t *out, struct timespec time, bool sleeping)
{
    if (sleeping)
        HOLD("vmovdqu", "32", REGISTERS_16, "ymm", SLEEP);
    else
        HOLD("vmovdqu", "32", REGISTERS_16, "ymm", SPIN);
    return 16 * 32;
}

static size_t hold_xmm(const uint8_t *in, uint8_t *out, struct timespec time, bool sleeping)
{
    if (sleeping)
        HOLD("movdqu", "16", REGISTERS_16, "xmm", SLEEP);
    else
        HOLD("movdqu", "16", REGISTERS_16, "xmm", SPIN);
    return 16 * 16;
}

/* All vector registers the machine has, filled with what only this thread and round can have. */
static void check_vectors(uint64_t *random, bool sleeping)
{
    static __thread uint8_t in[ALL_VECTORS], out[ALL_VECTORS];
    struct timespec time = { .tv_nsec = 200000 };
    size_t size;

    for (size_t i = 0; i < ALL_VECTORS / 8; i++)
        ((uint64_t *)in)[i] = random_next(random);
    if (__builtin_cpu_supports("avx512f"))
        size = hold_zmm(in, out, time, sleeping);
    else if (__builtin_cpu_supports("avx"))
        size = hold_ymm(in, out, time, sleeping);
    else
        size = hold_xmm(in, out, time, sleeping);
    for (size_t i = 0; i < size / 8; i++)
        EXPECT(((uint64_t *)in)[i], ((uint64_t *)out)[i]);
}

/* Rounding modes of their own for SSE and x87, and a value left on the x87 stack. */
static void check_control_words(unsigned worker)
{
    uint32_t mxcsr = 0x1f80 | (worker & 3) << 13, mxcsr_found;
    uint16_t control = (uint16_t)(0x037f | (worker & 3) << 10), control_found;
    double pushed = worker + 0.5, popped;

    __asm__ volatile("ldmxcsr %[mxcsr]\nfldcw %[control]\nfldl %[pushed]\n" SPIN
                     "stmxcsr %[mxcsr_found]\nfnstcw %[control_found]\nfstpl %[popped]\nfninit\n"
                     : [mxcsr_found] "=m"(mxcsr_found), [control_found] "=m"(control_found), [popped] "=m"(popped)
                     : [mxcsr] "m"(mxcsr), [control] "m"(control), [pushed] "m"(pushed)
                     : "rcx", "cc");
    mxcsr_found &= ~0x3fu; /* sticky exception flags */
    EXPECT(mxcsr, mxcsr_found);
    EXPECT(control, control_found);
    EXPECT(2 * worker + 1, 2 * popped);
    mxcsr = 0x1f80;
    __asm__ volatile("ldmxcsr %0" ::"m"(mxcsr));
}

static void take_turn(unsigned worker)
{
    pthread_mutex_lock(&ring.lock);
    while (ring.turn % ring.count != worker && !check_stopping)
        pthread_cond_wait(&ring.turn_passed, &ring.lock);
    ring.turn++;
    pthread_cond_broadcast(&ring.turn_passed);
    pthread_mutex_unlock(&ring.lock);
}

struct identity {
    pid_t tid;
    uint64_t gs_word;
    sigset_t mask;
    stack_t altstack;
};

static void take_identity(struct identity *mine, unsigned worker)
{
    memset(mine, 0, sizeof *mine);
    mine->tid = gettid();
    mine->gs_word = 0x6c7a000000000000u + worker;
    mine->altstack = (stack_t){ .ss_sp = malloc(STACK), .ss_size = STACK };
    self = worker;
    MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, &mine->gs_word));
    MUST(sigaltstack(&mine->altstack, NULL));
    pthread_sigmask(SIG_SETMASK, NULL, &mine->mask);
    sigaddset(&mine->mask, SIGRTMIN + (int)worker % 16);
    pthread_sigmask(SIG_SETMASK, &mine->mask, NULL);
}

static void check_identity(const struct identity *mine, unsigned worker)
{
    uint64_t gs_word;
    sigset_t mask;

    EXPECT(worker, self);
    EXPECT(mine->tid, syscall(SYS_gettid));
    __asm__ volatile("movq %%gs:0, %0" : "=r"(gs_word));
    EXPECT(mine->gs_word, gs_word);
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    EXPECT(0, memcmp(&mine->mask, &mask, 8));
    check_altstack(&mine->altstack);
}

static void *work(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;
    uint64_t random = 0x9E3779B97F4A7C15u * (worker + 1);
    struct identity mine;

    take_identity(&mine, worker);
    if (worker != 0)
        pthread_mutex_lock(&robust[worker]); /* until this thread dies */
    while (!check_stopping) {
        check_identity(&mine, worker);
        check_vectors(&random, false);
        check_vectors(&random, true);
        check_control_words(worker);
        take_turn(worker);
        check_beat(worker);
    }
    return NULL;
}

static void set_up(unsigned count)
{
    struct sigaction action = { .sa_handler = on_usr1, .sa_flags = SA_ONSTACK };
    pthread_mutexattr_t attributes;

    ring.count = count;
    MUST(sigaction(SIGUSR1, &action, NULL));
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    for (unsigned i = 1; i < count; i++)
        pthread_mutex_init(&robust[i], &attributes);
}

int main(int argc, char **argv)
{
    unsigned count = argc > 2 ? (unsigned)atoi(argv[2]) : 4;
    pthread_t threads[WORKERS_MAX];

    if (count < 1 || count > WORKERS_MAX)
        check_die("1 to 32 threads");
    check_start(argc, argv, count);
    set_up(count);
    for (unsigned worker = 1; worker < count; worker++)
        threads[worker] = start_thread(work, (void *)(uintptr_t)worker);
    check_running();
    work((void *)0);
    status->phase = FINAL;
    for (unsigned worker = 1; worker < count; worker++) {
        take_turn(0); /* wakes those that wait for theirs */
        EXPECT(0, pthread_join(threads[worker], NULL));
        EXPECT(EOWNERDEAD, pthread_mutex_lock(&robust[worker]));
    }
    return check_end();
}
