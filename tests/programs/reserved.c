/* Address space by the terabyte, of which hardly anything is in use: as databases and runtimes have it.
 *
 * reserved STATUS [TERABYTES]: nobody may access it, but for the pieces that are opened one after the other, checked to be
 * zeros, written and checked again and again. Beside it lies a gigabyte to which access was taken away again when it had
 * content: that must be there still.
 */
#include "check.h"

enum { PIECES = 64, PIECE = 16 * PAGE };

static const size_t HIDDEN = 1ull << 30;
static uint8_t *pieces[PIECES];

static uint8_t *reserve(size_t size)
{
    uint8_t *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED) {
        perror("mmap");
        exit(errno == ENOMEM ? UNSUPPORTED : 2);
    }
    return at;
}

static void check_piece(const uint8_t *piece, uint64_t generation)
{
    for (size_t at = 0; at < PIECE; at += PAGE)
        if (!verify_page((const volatile uint64_t *)(piece + at), (uintptr_t)piece + at, generation))
            check_fail(piece + at, generation, 0, "a page of generation %u", (unsigned)generation);
}

static void fill_piece(uint8_t *piece)
{
    for (size_t at = 0; at < PIECE; at += PAGE)
        fill_page((volatile uint64_t *)(piece + at), (uintptr_t)piece + at, 1);
}

static void open_piece(unsigned number, uint8_t *space, size_t size, uint64_t *random)
{
    uint8_t *piece = space + (random_next(random) % (size / PIECES / PIECE) + number * (size / PIECES / PIECE)) * PIECE;

    MUST(mprotect(piece, PIECE, PROT_READ | PROT_WRITE));
    check_piece(piece, 0);
    fill_piece(piece);
    pieces[number] = piece;
}

int main(int argc, char **argv)
{
    size_t size = (size_t)(argc > 2 ? atoi(argv[2]) : 8) << 40;
    uint64_t random = 7;
    unsigned opened = 0, round = 0;
    uint8_t *space, *hidden;

    check_start(argc, argv, 1);
    space = reserve(size);
    hidden = reserve(HIDDEN);
    MUST(mprotect(hidden + HIDDEN / 2, PIECE, PROT_READ | PROT_WRITE));
    fill_piece(hidden + HIDDEN / 2);
    MUST(mprotect(hidden + HIDDEN / 2, PIECE, PROT_NONE));
    while (opened < PIECES / 2)
        open_piece(opened++, space, size, &random);
    check_running();
    while (!check_stopping) {
        if (opened < PIECES && ++round % 8 == 0)
            open_piece(opened++, space, size, &random);
        for (unsigned i = 0; i < opened; i++)
            check_piece(pieces[i], 1);
        check_beat(0);
        check_rest(1000);
    }
    MUST(mprotect(hidden + HIDDEN / 2, PIECE, PROT_READ));
    check_piece(hidden + HIDDEN / 2, 1);
    for (unsigned i = 0; i < opened; i++)
        check_piece(pieces[i], 1);
    return check_end();
}
