"""Which pages a sleep that is made once more touches before there is a pager."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyproc.kernel.arch_x86_64 import SYS
from lazyproc.model import PAGE, Registers
from lazyproc.pages.eager import POLL_LIMIT, touched_again

BLANK = Registers(*[0] * len(Registers._fields))
BASE = 0x7F0000000000


def pages(nr: str, di: int = 0, si: int = 0, r10: int = 0) -> set[int]:
    return {addr // PAGE for addr in touched_again(BLANK._replace(di=di, si=si, r10=r10), SYS[nr])}


@given(st.integers(BASE, BASE + 4 * PAGE), st.integers(0, 4096), st.sampled_from([0, 1 << 32]))
def test_of_poll_every_page_of_the_array(start: int, count: int, above: int) -> None:
    """The count is an unsigned int: what lies above it in the register is not read."""
    touched = {(start + byte) // PAGE for byte in range(8 * count)}
    assert touched <= pages("poll", di=start, si=count | above) <= touched | {start // PAGE}


def test_of_poll_no_more_than_anybody_may_have_open() -> None:
    assert len(pages("poll", di=BASE, si=(1 << 32) - 1)) == 8 * POLL_LIMIT // PAGE


@given(st.integers(BASE, BASE + PAGE), st.sampled_from(["nanosleep", "clock_nanosleep", "futex"]))
def test_of_the_others_both_ends_of_a_time(start: int, nr: str) -> None:
    whole = {start // PAGE, (start + 15) // PAGE}
    assert whole <= pages(nr, si=start)
    assert whole <= pages(nr, r10=start)
