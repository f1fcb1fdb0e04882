"""Three of the fifty moves of `make soak`."""

from __future__ import annotations

import pytest

from lazyproc.hosts import Trio
from tests.faults.to_and_fro import to_and_fro


@pytest.mark.long
def test_the_same_redis_again_and_again(trio: Trio) -> None:
    print(to_and_fro(trio, 3))
