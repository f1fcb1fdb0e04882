"""Fixtures for tests of live processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.live.sockets import Network


@pytest.fixture
def network() -> Iterator[Network]:
    """The test runs in a network of its own: ports are free, resets are countable."""
    with ExitStack() as stack:
        own = Network(stack)
        with own.inside():
            yield own
