/*
 * A guest without a kernel, for a KVM under which none starts: it is loaded as a multiboot image, checks its memory and
 * beats on the serial line as guest.c does, but of each page some words only, since such a KVM emulates every single
 * instruction, and by its visits, since it has no clock.
 *
 * Its command line: wmb= (MiB of pages that are visited).
 */
#include <stdint.h>

#define PAGE 4096u
#define WORDS (PAGE / sizeof(uint32_t))
#define CHECKED 8 /* words of a page */
#define VISITS_A_BEAT 100
#define SERIAL 0x3f8
#define READY 0x20 /* of its line status: the next byte can be written */

struct multiboot {
    uint32_t flags, lower, upper, boot_device;
    const char *command_line;
};

/* First of the file: multiboot looks for its header (magic number, flags, checksum) in the first 8 KiB. */
__asm__(".section .multiboot, \"ax\"\n"
        ".long 0x1badb002, 2, -(0x1badb002 + 2)\n"
        ".globl _start\n"
        "_start: mov $stack_end, %esp\n"
        "push %ebx\n"
        "call run\n");

static uint8_t stack[1 << 14] __attribute__((aligned(16), used));
__asm__(".globl stack_end\n.set stack_end, stack + 16384\n");

static uint32_t *const pages = (uint32_t *)(32u << 20); /* clear of ourselves */
static uint32_t generations[1 << 16];
static uint32_t seed = 2463534242u;

static uint8_t in(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void out(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void say(const char *text)
{
    for (; *text; text++) {
        while (!(in(SERIAL + 5) & READY))
            ;
        out(SERIAL, (uint8_t)*text);
    }
}

static void say_number(uint32_t number)
{
    char digits[12], *first = digits + sizeof digits - 1;
    *first = 0;
    do
        *--first = (char)('0' + number % 10);
    while (number /= 10);
    say(first);
}

static uint32_t next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed;
}

static uint32_t word_of(uint32_t page, uint32_t generation, uint32_t at)
{
    return (page << 16 ^ generation) * 2654435761u + at * 16777619u + 1;
}

static void fill(uint32_t page)
{
    for (uint32_t at = 0; at < WORDS; at += WORDS / CHECKED)
        pages[page * WORDS + at] = word_of(page, generations[page], at);
}

static int holds(uint32_t page)
{
    uint32_t differences = 0;
    for (uint32_t at = 0; at < WORDS; at += WORDS / CHECKED)
        differences |= pages[page * WORDS + at] ^ word_of(page, generations[page], at);
    return differences == 0;
}

static uint32_t pages_wanted(const char *words)
{
    uint32_t mib = 0;
    for (; *words; words++)
        if (words[0] == 'w' && words[1] == 'm' && words[2] == 'b' && words[3] == '=') {
            for (words += 4; *words >= '0' && *words <= '9'; words++)
                mib = mib * 10 + (uint32_t)(*words - '0');
            break;
        }
    return mib << 8;
}

static void beat(uint32_t number, uint32_t visits, uint32_t bad)
{
    say("beat ");
    say_number(number);
    say(" ");
    say_number(visits);
    say(" ");
    say_number(bad);
    say(" 0\n");
}

__attribute__((used, noreturn)) void run(const struct multiboot *found)
{
    uint32_t count = pages_wanted(found->command_line), bad = 0;
    for (uint32_t page = 0; page < count; page++)
        fill(page);
    for (uint32_t visits = 0;; visits++) {
        uint32_t random = next_random(), page = (random >> 1) % count;
        if (visits % VISITS_A_BEAT == 0)
            beat(visits / VISITS_A_BEAT, visits, bad);
        bad += !holds(page);
        if (random & 1) {
            generations[page]++;
            fill(page);
        }
    }
}
