"""A tenth of the kills and cuts of `make soak`. The seed is printed; LAZYPROC_SEED sets it.

One case again: LAZYPROC_SEED=N python -m tests.faults.campaign (kill | cut) NUMBER.
"""

from __future__ import annotations

import datetime
import os

import pytest

from tests.faults.campaign.cases import Case, a_cut, a_kill
from tests.faults.campaign.run import run

KILLS, CUTS = 30, 10
SEED = int(os.environ.get("LAZYPROC_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))


@pytest.mark.long
@pytest.mark.parametrize("number", range(KILLS))
def test_kill(number: int) -> None:
    _run(a_kill(SEED, number))


@pytest.mark.long
@pytest.mark.parametrize("number", range(CUTS))
def test_cut(number: int) -> None:
    _run(a_cut(SEED, number))


def _run(case: Case) -> None:
    print(f"LAZYPROC_SEED={SEED}: {case}")
    print(run(case))


def test_a_seed_says_it_all() -> None:
    assert [a_kill(7, number) for number in range(50)] == [a_kill(7, number) for number in range(50)]
    assert a_kill(7, 1) != a_kill(8, 1)
