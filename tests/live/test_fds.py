"""Our own descriptor table."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import os, resource, sys
from lazyproc.kernel.fds import make_room
hard = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 4 if sys.argv[3] == "soft" else hard, hard))
if sys.argv[3] == "full":
    os.dup2(0, int(sys.argv[2]) - 1)
before = sorted(os.listdir("/proc/self/fd"))
make_room(int(sys.argv[1]))
assert sorted(os.listdir("/proc/self/fd")) == before
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("FDSize")))
"""


@pytest.mark.parametrize(
    ("count", "limit", "state", "least"),
    [(3000, 4096, "", 3000), (3000, 1000, "", 1000), (1000, 1000, "full", 1000), (3000, 4096, "soft", 3000)],
)
def test_there_is_room_for_as_many_descriptors_as_may_be(
    count: int, limit: int, state: str, least: int
) -> None:
    """And none is opened by that, or closed."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < limit and os.geteuid() != 0:
        pytest.skip(f"a limit of {limit} descriptors takes root here")
    argv = [sys.executable, "-c", PROGRAM, str(count), str(limit), state]
    found = subprocess.run(argv, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    assert int(found.stdout) >= least
