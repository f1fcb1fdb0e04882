#!/bin/sh
# The pager's C core under the address, undefined-behaviour and thread sanitizers. Needs gcc and root (/dev/userfaultfd).
set -eu
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
room=lazyproc/uffd
sources="$room/_pager.c $room/_faults.c $room/_bulk.c $room/_place.c $room/_ledger.c $room/_acknowledge.c $room/_link.c $room/_release.c \
    $room/_remove.c $room/_removals.c $room/_shadow.c"
flags="-g -O1 -std=gnu11 -Wall -Wextra -Werror -pthread -I$room -Ilazyproc/wire"

gcc -O2 -pthread tests/live/toucher.c -o "$out/toucher"
gcc $flags -fsanitize=address,undefined -fno-sanitize-recover=all tests/sanitize/pager_driver.c $sources -o "$out/pager_asan"
gcc $flags -fsanitize=thread tests/sanitize/pager_driver.c $sources -o "$out/pager_tsan"
for sanitizer in asan tsan; do
    for what in demand bulk local lost garbage takeover; do
        echo "$sanitizer: $what"
        TSAN_OPTIONS=halt_on_error=1 "$out/pager_$sanitizer" "$out/toucher" "$what"
    done
done
