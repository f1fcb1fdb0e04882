#!/bin/sh
# The pager's C core under the address, undefined-behaviour and thread sanitizers. Needs gcc and root (/dev/userfaultfd,
# tracepoints).
set -eu
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
room=lazyproc/uffd
parts="tests/sanitize/page_source.c tests/sanitize/witness.c $(echo $room/_*.c)"
flags="-g -O1 -std=gnu11 -Wall -Wextra -Werror -pthread -I$room -Ilazyproc/wire -Itests/sanitize"

gcc -O2 -pthread tests/live/toucher.c -o "$out/toucher"
for driver in pager removals; do
    sources="tests/sanitize/${driver}_driver.c $parts"
    gcc $flags -fsanitize=address,undefined -fno-sanitize-recover=all $sources -o "$out/${driver}_asan"
    gcc $flags -fsanitize=thread $sources -o "$out/${driver}_tsan"
done
for sanitizer in asan tsan; do
    for what in demand bulk local lost garbage takeover; do
        echo "$sanitizer: $what"
        TSAN_OPTIONS=halt_on_error=1 "$out/pager_$sanitizer" "$out/toucher" "$what"
    done
    echo "$sanitizer: removals"
    TSAN_OPTIONS=halt_on_error=1 "$out/removals_$sanitizer"
done
