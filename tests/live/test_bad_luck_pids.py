"""A pid that cannot be moved, and rights that are missing: said in one sentence, and nothing has been touched."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Pair
from tests.live.bad_luck import PACED, ended, lazyproc, says, unchanged, unharmed
from tests.live.moving import CLI
from tests.live.programs import Program, running

NOBODY = "65534"


@pytest.fixture(scope="module")
def alone() -> Iterator[Host]:
    with pair_of_hosts() as pair:
        yield pair.source
