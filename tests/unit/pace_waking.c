/* When bulk rests, by _pace.c. Reads lines of times in ns: `wakes AT`, `fault ASKED ANSWERED`, and `rests AT`, to which it
 * answers 1 or 0. */
#include "../../lazyproc/uffd/_pace.h"

#include <stdio.h>
#include <string.h>

int main(void)
{
    unsigned long long first, second;
    char word[16], line[64];
    struct pace pace;

    pace_init(&pace);
    while (fgets(line, sizeof(line), stdin)) {
        if (sscanf(line, "%15s %llu %llu", word, &first, &second) < 2)
            return 1;
        if (strcmp(word, "wakes") == 0)
            pace_wakes(&pace, first);
        else if (strcmp(word, "fault") == 0)
            pace_urgent(&pace, second, first);
        else
            printf("%d\n", pace_rest(&pace, first) != 0);
    }
    return 0;
}
