/* What is done while a process comes to life, by _pace.c. Reads lines of times in ns: `wakes AT`, `fault ASKED ANSWERED`,
 * the same of `packed`, `rests AT`, `packs` and `slow`, to which it answers 1 or 0, and `waits ALONE MORE`, to which it answers
 * how many pages a fault asks for; that takes so long with one page, and so much longer with each other. */
#include "../../lazyproc/uffd/_pace.h"

#include <stdio.h>
#include <string.h>

static unsigned waits(struct pace *pace, uint64_t *now, uint64_t alone, uint64_t more)
{
    uint32_t pages = pace_reach(pace);
    uint64_t asked = *now;

    *now += alone + (pages - 1) * more;
    pace_urgent(pace, *now, asked, pages, true);
    return pages;
}

int main(void)
{
    uint64_t now = 0;
    unsigned long long first, second;
    char word[16], line[64];
    struct pace pace;

    pace_init(&pace);
    while (fgets(line, sizeof(line), stdin)) {
        if (sscanf(line, "%15s %llu %llu", word, &first, &second) < 1)
            return 1;
        if (strcmp(word, "wakes") == 0)
            pace_wakes(&pace, first);
        else if (strcmp(word, "fault") == 0)
            pace_urgent(&pace, second, first, 1, true);
        else if (strcmp(word, "waits") == 0)
            printf("%u\n", waits(&pace, &now, first, second));
        else if (strcmp(word, "packed") == 0)
            pace_urgent(&pace, second, first, 1, false);
        else if (strcmp(word, "packs") == 0)
            printf("%d\n", pace_packs(&pace));
        else if (strcmp(word, "slow") == 0)
            printf("%d\n", pace_is_slow(&pace));
        else
            printf("%d\n", pace_rest(&pace, first) != 0);
    }
    return 0;
}
