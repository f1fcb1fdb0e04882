"""The self-checking programs themselves: each runs, beats, ends with 0, and notices what is wrong."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from lazyproc.hosts import Host

from .programs import SOURCES, UNSUPPORTED, Phase, running, stall_floor_ns, wait_until

ELSEWHERE = ("fd_", "late_", "sock_")  # tested with what they are for
PROGRAMS = sorted(path.stem for path in SOURCES.glob("*.c") if not path.stem.startswith(ELSEWHERE))


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs_beats_and_ends_well(name: str, host: Host) -> None:
    with running(name, directory=host.ground.shared, host=host, exclusive=True) as program:
        if program.process.poll() == UNSUPPORTED:
            pytest.skip(f"this machine lacks what {name} checks")
        program.watch.wait_beats(3)
        program.stop_and_verify()


def test_a_stop_is_noticed_by_sleepers(tmp_path: Path) -> None:
    """epoll_wait(2) fails with EINTR after SIGCONT (signal(7)), and after a careless freeze as well."""
    with running("sleeps", directory=tmp_path) as program:
        program.watch.wait_beats(1)
        program.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, program.pid, os.WSTOPPED | os.WNOWAIT)
        program.process.send_signal(signal.SIGCONT)
        wait_until(lambda: program.watch.read().errors > 0, "the spurious EINTR is noticed")
        assert "sleeps.c" in program.watch.read().what


def test_a_changed_word_is_noticed_and_named(tmp_path: Path) -> None:
    with running("memory_random", 1, 1, 100, directory=tmp_path) as program:
        addr = _largest_anonymous_mapping(program.pid) + 5 * 4096 + 8 * 17
        with open(f"/proc/{program.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(addr)
            memory.write(b"\0" * 8)
        wait_until(lambda: program.watch.read().errors > 0, "the changed word is noticed")
        assert program.stop() == 1
        status = program.watch.read()
        assert status.phase is Phase.ENDED
        assert status.bad_addr == addr
        assert status.found == 0


def test_a_second_copy_is_noticed(tmp_path: Path) -> None:
    with running("memory_random", 1, 1, 100, directory=tmp_path, exclusive=True) as program:
        program.watch.wait_beats()
        with open(program.watch.path, "r+b") as block:
            block.seek(256)
            block.write(bytes(8))
        wait_until(lambda: program.watch.read().errors > 0, "the foreign heartbeat is noticed")
        assert "another copy" in program.watch.read().what
        assert program.stop() == 1


def test_stalls_are_recorded_from_5_us_on(tmp_path: Path) -> None:
    with running("memory_random", 4, directory=tmp_path) as program:
        wait_until(lambda: sum(program.watch.read().stalls) > 0, "a preempted visit")
        program.stop_and_verify()
        stalls = program.watch.read().stalls
        shortest = next(bucket for bucket, count in enumerate(stalls) if count)
        longest = max(bucket for bucket, count in enumerate(stalls) if count)
        assert stall_floor_ns(shortest + 1) > 5000
        assert stall_floor_ns(longest) <= program.watch.read().slowest_ns < stall_floor_ns(longest + 1)


def _largest_anonymous_mapping(pid: int) -> int:
    """The start of the largest private mapping without a name: the pages that memory_random visits."""
    anonymous = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        start, end = (int(word, 16) for word in fields[0].split("-"))
        if len(fields) == 5 and fields[1] == "rw-p":
            anonymous.append((end - start, start))
    return max(anonymous)[1]
