"""Eight threads over numpy arrays: numpy_threads.py FILE, where FILE gets one line for every full round.

Each thread changes its own array in place and knows what its sum must be; a matrix product, which goes through
BLAS and its wide registers, must come out the same every time. SIGTERM: a last round, "ok", exit status 0.
"""

from __future__ import annotations

import signal
import sys
import threading

import numpy as np

THREADS = 8
NUMBERS = 1 << 19  # 4 MiB of int64
SIDE = 96
ROUND_S = 0.002

stopping = threading.Event()
rounds = [0] * THREADS
wrong: list[str] = []


def work(index: int) -> None:
    numbers = np.arange(NUMBERS, dtype=np.int64) * (index + 1)
    total = int(numbers.sum())
    matrix = np.random.default_rng(index).random((SIDE, SIDE))
    product = matrix @ matrix
    while not stopping.is_set() and not wrong:
        numbers += 1
        total += NUMBERS
        if int(numbers.sum()) != total:
            wrong.append(f"thread {index}: the sum is {int(numbers.sum())} and not {total}")
        if not np.array_equal(matrix @ matrix, product):
            wrong.append(f"thread {index}: the product has changed")
        if int(numbers[0]) != rounds[index] + 1:
            wrong.append(f"thread {index}: round {rounds[index] + 1} is at {int(numbers[0])}")
        rounds[index] += 1
        stopping.wait(ROUND_S)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopping.set())
    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    written = 0
    with open(sys.argv[1], "a", buffering=1) as heartbeat:
        while not stopping.wait(ROUND_S) and not wrong:
            if min(rounds) > written:
                written = min(rounds)
                print(written, file=heartbeat)
        stopping.set()
        for thread in threads:
            thread.join()
        print(wrong[0] if wrong else "ok", file=heartbeat)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
