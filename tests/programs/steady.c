/* What a freeze must leave alone: every register, vector and flag of a thread, the red zone below its stack pointer, its
 * mask and alternate stack, its sleep, and the process's action for SIGTRAP.
 *
 * steady STATUS [handled|ignored|blocked]: what is done with SIGTRAP, which a debugger's breakpoint would reset.
 */
#include "check.h"

#include <string.h>

enum { WORKERS = 3, SPINS = 400, VECTORS = 32, VECTOR_BYTES = 64 };

struct held {
    uint8_t vectors[VECTORS][VECTOR_BYTES]; /* as many of them, and as much of each, as the processor has */
    uint64_t wrong; /* bits that changed in general registers, flags or the red zone */
};

#define PATTERN(n) "0x5a5a5a5a0000" #n
#define LOAD(reg, n) "movabsq $" PATTERN(n) ", %%" reg "\n"
#define CHECK(reg, n) "movabsq $" PATTERN(n) ", %%rax\nxorq %%rax, %%" reg "\norq %%" reg ", %[wrong]\n"
#define RED_LOAD(at, n) "movabsq $" PATTERN(n) ", %%rax\nmovq %%rax, -" #at "(%%rsp)\n"
#define RED_CHECK(at, n) "movabsq $" PATTERN(n) ", %%rax\nxorq -" #at "(%%rsp), %%rax\norq %%rax, %[wrong]\n"
#define GENERAL(does)                                                                                          \
    does("rbx", 10) does("rdx", 11) does("rsi", 12) does("r8", 13) does("r9", 14) does("r10", 15)              \
        does("r11", 16) does("r12", 17) does("r13", 18) does("r14", 19)
#define RED(does) does(8, 21) does(64, 22) does(128, 23)

/* Spins with carry set and overflow clear, which `dec` and `pause` leave alone or set, and everything else in place.
 * The function calls nothing, so the red zone is the assembler's own. */
#define SPIN                                                                                                   \
    GENERAL(LOAD) RED(RED_LOAD) "movl %[spins], %%ecx\n"                                                        \
    "stc\n"                                                                                                    \
    "1: pause\n"                                                                                               \
    "dec %%ecx\n"                                                                                              \
    "jnz 1b\n"                                                                                                 \
    "cmc\n"                                                                                                    \
    "sbbq %%rax, %%rax\n"                                                                                      \
    "orq %%rax, %[wrong]\n" GENERAL(CHECK) RED(RED_CHECK)
#define EACH16(does) does(0) does(1) does(2) does(3) does(4) does(5) does(6) does(7) does(8) does(9) does(10)   \
    does(11) does(12) does(13) does(14) does(15)
#define EACH32(does) EACH16(does) does(16) does(17) does(18) does(19) does(20) does(21) does(22) does(23)       \
    does(24) does(25) does(26) does(27) does(28) does(29) does(30) does(31)
#define ZMM_IN(n) "vmovdqu64 " #n "*64(%%rdi), %%zmm" #n "\n"
#define ZMM_OUT(n) "vmovdqu64 %%zmm" #n ", " #n "*64(%%rdi)\n"
#define YMM_IN(n) "vmovdqu " #n "*64(%%rdi), %%ymm" #n "\n"
#define YMM_OUT(n) "vmovdqu %%ymm" #n ", " #n "*64(%%rdi)\n"
#define XMM_IN(n) "movdqu " #n "*64(%%rdi), %%xmm" #n "\n"
#define XMM_OUT(n) "movdqu %%xmm" #n ", " #n "*64(%%rdi)\n"
#define HOLD(in, out)                                                                                          \
    __asm__ volatile(in SPIN out                                                                               \
                     : [wrong] "+&r"(wrong)                                                                    \
                     : "D"(held->vectors), [spins] "i"(SPINS)                                                  \
                     : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "cc", \
                       "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",       \
                       "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15")

__attribute__((noinline)) static void hold_zmm(struct held *held)
{
    uint64_t wrong = 0;

    HOLD(EACH32(ZMM_IN), EACH32(ZMM_OUT) "vzeroupper\n");
    held->wrong = wrong;
}

__attribute__((noinline)) static void hold_ymm(struct held *held)
{
    uint64_t wrong = 0;

    HOLD(EACH16(YMM_IN), EACH16(YMM_OUT) "vzeroupper\n");
    held->wrong = wrong;
}

__attribute__((noinline)) static void hold_xmm(struct held *held)
{
    uint64_t wrong = 0;

    HOLD(EACH16(XMM_IN), EACH16(XMM_OUT));
    held->wrong = wrong;
}

static void check_registers(uint64_t seed)
{
    static _Thread_local struct held before, held;

    memset(&before, 0, sizeof before);
    for (unsigned v = 0; v < VECTORS; v++)
        for (unsigned i = 0; i < VECTOR_BYTES; i++)
            before.vectors[v][i] = (uint8_t)random_next(&seed);
    held = before;
    if (__builtin_cpu_supports("avx512f"))
        hold_zmm(&held);
    else if (__builtin_cpu_supports("avx2"))
        hold_ymm(&held);
    else
        hold_xmm(&held);
    EXPECT(0, held.wrong);
    EXPECT(0, memcmp(before.vectors, held.vectors, sizeof held.vectors));
}

static void on_trap(int signal)
{
    check_fail(NULL, 0, (uint64_t)signal, "a signal that nobody sent");
}

static struct sigaction trap_action;

static void check_signal_state(const sigset_t *mask, const stack_t *stack)
{
    struct sigaction action;
    sigset_t blocked;
    stack_t now;

    MUST(sigaction(SIGTRAP, NULL, &action));
    EXPECT((uintptr_t)trap_action.sa_handler, (uintptr_t)action.sa_handler);
    pthread_sigmask(SIG_BLOCK, NULL, &blocked);
    EXPECT(0, memcmp(mask, &blocked, 8));
    MUST(sigaltstack(NULL, &now));
    EXPECT((uintptr_t)stack->ss_sp, (uintptr_t)now.ss_sp);
    EXPECT(stack->ss_size, now.ss_size);
}

static uint8_t stacks[WORKERS][1 << 16];

static void *work(void *argument)
{
    unsigned worker = (unsigned)(uintptr_t)argument;
    stack_t stack = { .ss_sp = stacks[worker], .ss_size = sizeof stacks[worker] };
    sigset_t mask;

    MUST(sigaltstack(&stack, NULL));
    sigemptyset(&mask);
    sigaddset(&mask, SIGRTMIN + (int)worker); /* a mask of its own */
    pthread_sigmask(SIG_BLOCK, &mask, NULL);
    pthread_sigmask(SIG_BLOCK, NULL, &mask);
    for (uint64_t round = 1; !check_stopping; round++) {
        struct timespec moment = { .tv_nsec = 200000 };

        check_registers(round);
        check_signal_state(&mask, &stack);
        if (nanosleep(&moment, NULL) < 0 && !check_stopping)
            check_fail(NULL, 0, (uint64_t)errno, "a sleep was interrupted");
        check_beat(worker);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const char *trap = argc > 2 ? argv[2] : "handled";
    pthread_t others[WORKERS];
    sigset_t set;

    check_start(argc, argv, WORKERS);
    trap_action.sa_handler = strcmp(trap, "ignored") == 0 ? SIG_IGN : on_trap;
    MUST(sigaction(SIGTRAP, &trap_action, NULL));
    sigemptyset(&set);
    sigaddset(&set, SIGTRAP);
    if (strcmp(trap, "blocked") == 0)
        pthread_sigmask(SIG_BLOCK, &set, NULL);
    for (uintptr_t worker = 1; worker < WORKERS; worker++)
        others[worker] = start_thread(work, (void *)worker);
    check_running();
    work((void *)0);
    for (unsigned worker = 1; worker < WORKERS; worker++)
        pthread_join(others[worker], NULL);
    return check_end();
}
