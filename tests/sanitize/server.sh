#!/bin/sh
# The page server's C core under the address, undefined-behaviour and thread sanitizers. Needs gcc.
set -eu
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
room=lazyproc/pages
parts="$room/_server.c $room/_answer.c $room/_source.c"
flags="-g -O1 -std=gnu11 -Wall -Wextra -Werror -pthread -I$room -Ilazyproc/wire -Itests/sanitize"

gcc $flags -fsanitize=address,undefined -fno-sanitize-recover=all tests/sanitize/server_driver.c $parts -o "$out/server_asan"
gcc $flags -fsanitize=thread tests/sanitize/server_driver.c $parts -o "$out/server_tsan"
for sanitizer in asan tsan; do
    for what in pages bad gone stop release; do
        echo "$sanitizer: $what"
        TSAN_OPTIONS=halt_on_error=1 "$out/server_$sanitizer" "$what"
    done
done
