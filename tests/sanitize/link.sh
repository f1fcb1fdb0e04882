#!/bin/sh
# What the pager and the page server understand of noise and of frames that are nearly right, under the address and
# undefined-behaviour sanitizers. Needs gcc. LAZYPROC_SEED sets the seed, which is printed; ROUNDS how many.
set -eu
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
seed=${LAZYPROC_SEED:-$(date +%s)}
flags="-g -O1 -std=gnu11 -Wall -Wextra -Werror -pthread -Ilazyproc/uffd -Ilazyproc/pages -Ilazyproc/wire -Itests/sanitize"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all"

gcc $flags tests/sanitize/link_driver.c lazyproc/uffd/_link.c -o "$out/link_asan"
gcc $flags tests/sanitize/server_driver.c lazyproc/pages/_server.c lazyproc/pages/_answer.c lazyproc/pages/_source.c -o "$out/server_asan"
echo "LAZYPROC_SEED=$seed"
"$out/link_asan" "${ROUNDS:-20000}" "$seed"
"$out/server_asan" mutated "${ROUNDS:-20000}" "$seed"
