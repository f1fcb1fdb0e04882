"""What of remote calls is decided without a process: holes, the ending signal, the code that takes a thread home."""

from __future__ import annotations

import ctypes
import mmap
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import TraceeError
from lazyproc.kernel import arch_x86_64 as arch
from lazyproc.kernel.remote import ENDINGS, STACK_GAP, ending_signal, find_hole
from lazyproc.model import PAGE, Registers

WORD = st.integers(0, 2**64 - 1)
REGISTERS = st.builds(Registers, *[WORD] * len(Registers._fields))
PAGES = st.integers(0, arch.TASK_SIZE // PAGE // 2)  # so that there is a hole above


def interrupted(registers: Registers, nr: int, code: int) -> Registers:
    return registers._replace(orig_ax=nr, ax=2**64 - code)


@given(st.sets(PAGES, max_size=20), st.integers(1, 1000))
def test_a_hole_touches_no_mapping_and_no_stack_that_grows(edges: set[int], pages: int) -> None:
    ordered = [page * PAGE for page in sorted(edges)]
    maps = list(zip(ordered[::2], ordered[1::2], strict=False))
    size = pages * PAGE
    hole = find_hole(maps, size)
    assert STACK_GAP <= hole <= arch.TASK_SIZE - size
    assert hole % PAGE == 0
    assert all(hole + size + STACK_GAP <= start or end + STACK_GAP <= hole for start, end in maps)


def test_where_there_is_no_hole_the_user_is_told() -> None:
    with pytest.raises(TraceeError, match="no hole in the address space"):
        find_hole([(0, arch.TASK_SIZE)], PAGE)


def bits(*signals: int) -> int:
    return sum(1 << (sig - 1) for sig in signals)


@given(st.sets(st.sampled_from(ENDINGS)), st.sets(st.sampled_from(ENDINGS)))
def test_programs_end_by_a_signal_that_is_neither_handled_nor_pending(
    caught: set[int], pending: set[int]
) -> None:
    chosen = ending_signal(bits(*caught), bits(*pending))
    free = [sig for sig in ENDINGS if sig not in caught | pending]
    assert chosen == (free[0] if free else signal.SIGURG)


@given(REGISTERS, WORD)
def test_every_way_home_is_known_again(registers: Registers, blocked: int) -> None:
    code = arch.way_home(registers, blocked)
    assert len(code) == arch.HOME_SIZE
    assert arch.HOME.fullmatch(code)
    assert not arch.HOME.fullmatch(bytes(arch.HOME_SIZE))


@pytest.mark.parametrize("code", [arch.ERESTARTSYS, arch.ERESTARTNOINTR, arch.ERESTARTNOHAND])
@given(REGISTERS, st.integers(0, 500))
def test_an_interrupted_call_is_made_again(code: int, registers: Registers, nr: int) -> None:
    stopped = interrupted(registers._replace(ip=max(2, registers.ip)), nr, code)
    again = arch.continued(stopped)
    assert (again.ax, again.ip, again.orig_ax) == (nr, stopped.ip - 2, arch.MASK64)


def test_a_sleep_goes_on_to_its_own_deadline() -> None:
    zero = Registers(*[0] * len(Registers._fields))
    again = arch.continued(
        interrupted(zero._replace(ip=2), arch.SYS["nanosleep"], arch.ERESTART_RESTARTBLOCK)
    )
    assert (again.ax, again.ip) == (arch.SYS["restart_syscall"], 0)


@given(st.integers(0, 2**64 - 1), st.booleans(), st.booleans())
def test_the_way_home_runs_and_gives_registers_and_flags(value: int, carry: bool, overflow: bool) -> None:
    """Called like a function of C, whose own result comes from r11 and the flags it has gone home with."""
    zero = Registers(*[0] * len(Registers._fields))
    with mmap.mmap(-1, PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        # save what C expects to be kept, go home, and come back with r11 + 2 * carry + overflow
        keep, give = bytes.fromhex("53 4154 4155 4156 4157"), bytes.fromhex("415f 415e 415d 415c 5b")
        landing = len(keep) + arch.HOME_SIZE
        flags = (1 if carry else 0) | (0x800 if overflow else 0)
        home = arch.way_home(
            zero._replace(ip=start + landing, r11=value, flags=flags, orig_ax=arch.MASK64), 0
        )
        # setc %al; seto %cl; movzbl %al,%eax; movzbl %cl,%ecx; lea (%rcx,%rax,2),%rax; add %r11,%rax
        count = bytes.fromhex("0f92c0 0f90c1 0fb6c0 0fb6c9 488d0441 4c01d8")
        page.write(keep + home + count + give + b"\xc3")
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        got = ctypes.CFUNCTYPE(ctypes.c_uint64)(start)()
        assert got == (value + 2 * carry + overflow) % 2**64
        assert signal.pthread_sigmask(signal.SIG_SETMASK, mask) == set()
        ctypes.memset(start, 0, PAGE)
