"""How much of an interrupted sleep is left, from what was seen before and what the stopped thread shows."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel.proc import BlockedIn
from lazyproc.kernel.sleeps import SleepBefore, interrupted_number, remaining
from lazyproc.model import Registers, Restart

NANOSLEEP, CLOCK_NANOSLEEP = arch.SYS["nanosleep"], arch.SYS["clock_nanosleep"]
POLL, FUTEX, AGAIN = arch.SYS["poll"], arch.SYS["futex"], arch.SYS["restart_syscall"]
REQUEST, REST, CODE = 0x7000, 0x7100, 0x401000
FULL_NS = 5_000_000_001
REST_NS = 2_000_000_003
MEMORY = {REQUEST: struct.pack("<qq", 5, 1), REST: struct.pack("<qq", 2, 3), CODE: b"\xb8\x07\0\0\0\x0f\x05"}
BEGAN, SWITCHES = 10**12, 41

POLL_TWO_SECONDS = (0, 0, 2000, 0, 0, 0)
RELATIVE = {
    "nanosleep": BlockedIn(NANOSLEEP, (REQUEST, 0, 0, 0, 0, 0)),
    "clock_nanosleep": BlockedIn(CLOCK_NANOSLEEP, (1, 0, REQUEST, 0, 0, 0)),
    "futex": BlockedIn(FUTEX, (0x1000, 128, 5, REQUEST, 0, 0)),
}


def read(addr: int, length: int) -> bytes:
    return MEMORY[addr][:length]


def stopped_in(call: BlockedIn) -> Registers:
    di, si, dx, r10, r8, r9 = call.args
    zero = Registers(*[0] * len(Registers._fields))
    return zero._replace(
        orig_ax=call.nr, ip=CODE + 7, ax=2**64 - 516, di=di, si=si, dx=dx, r10=r10, r8=r8, r9=r9
    )


def left(
    call: BlockedIn, slept_ns: int, *, before: BlockedIn | None = None, switches: int = 1
) -> Restart | None:
    seen = SleepBefore(before or call, BEGAN, SWITCHES)
    return remaining(seen, stopped_in(call), SWITCHES + switches, BEGAN + slept_ns, read)


@pytest.mark.parametrize("name", RELATIVE)
@given(slept=st.integers(0, 2 * FULL_NS))
def test_what_was_slept_is_taken_off_and_something_is_always_left(name: str, slept: int) -> None:
    restart = left(RELATIVE[name], slept)
    assert restart is not None
    assert restart.nr == RELATIVE[name].nr
    assert restart.remaining_ns == (FULL_NS - slept if slept < FULL_NS else FULL_NS)


def test_poll_takes_milliseconds_and_negative_is_for_ever() -> None:
    assert left(BlockedIn(POLL, POLL_TWO_SECONDS), 7) == Restart(POLL, 2 * 10**9 - 7)
    for for_ever in (2**32 - 1, 2**64 - 1):  # what an int of -1 leaves in a register
        assert left(BlockedIn(POLL, (0, 0, for_ever, 0, 0, 0)), 7) is None


def test_the_kernels_own_answer_goes_first() -> None:
    assert left(BlockedIn(NANOSLEEP, (REQUEST, REST, 0, 0, 0, 0)), 7) == Restart(NANOSLEEP, REST_NS)
    call = BlockedIn(CLOCK_NANOSLEEP, (2, 0, REQUEST, REST, 0, 0))
    assert remaining(None, stopped_in(call), 0, 0, read) == Restart(CLOCK_NANOSLEEP, REST_NS)


def test_deadlines_need_no_correction() -> None:
    wait_bitset, clock_realtime = 9, 256
    assert left(BlockedIn(FUTEX, (0x1000, 128 | wait_bitset, 5, REQUEST, 0, 0)), 7) is None
    assert left(BlockedIn(FUTEX, (0x1000, wait_bitset | clock_realtime, 5, REQUEST, 0, 0)), 7) is None
    assert left(BlockedIn(CLOCK_NANOSLEEP, (1, 1, REQUEST, 0, 0, 0)), 7) is None


@pytest.mark.parametrize("clock", [2, 3, 2**64 - 6, 2**32 - 6])
def test_cpu_time_does_not_pass(clock: int) -> None:
    restart = left(BlockedIn(CLOCK_NANOSLEEP, (clock, 0, REQUEST, 0, 0, 0)), 7)
    assert restart == Restart(CLOCK_NANOSLEEP, FULL_NS)


def test_a_thread_that_moved_on_starts_afresh() -> None:
    call, other = RELATIVE["nanosleep"], RELATIVE["futex"]
    for restart in (
        left(call, 7, before=other),
        left(call, 7, switches=0),
        left(call, 7, switches=2),
        remaining(None, stopped_in(call), SWITCHES + 1, BEGAN + 7, read),
    ):
        assert restart == Restart(NANOSLEEP, FULL_NS)


def test_a_restarted_call_is_known_by_its_code() -> None:
    call = BlockedIn(AGAIN, POLL_TWO_SECONDS)
    assert interrupted_number(stopped_in(call), read) == POLL
    assert left(call, 7) == Restart(POLL, 2 * 10**9 - 7)


@pytest.mark.parametrize(
    "code", [b"\xb8\x01\0\0\0\x0f\x05", b"\x89\xf8\x90\x90\x90\x0f\x05", b"\x0f\x05", b""]
)
def test_code_that_does_not_say_leaves_the_call_to_end_in_eintr(code: bytes) -> None:
    """write(2), a number from another register, and memory that ends before."""
    registers = stopped_in(BlockedIn(AGAIN, POLL_TWO_SECONDS))
    assert interrupted_number(registers, lambda _addr, _length: code) == AGAIN
    assert remaining(None, registers, 0, 0, lambda _addr, _length: code) is None
