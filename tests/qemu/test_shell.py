"""The empty QEMU at the destination."""

from __future__ import annotations

import json
import os
import select
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from lazyproc.events import ignore
from lazyproc.kernel import family
from lazyproc.qemu.shell import empty_shell
from tests.live.real import ending
from tests.qemu.guests import AS_NOBODY, Shape


@pytest.mark.parametrize("options", [pytest.param((), id="root"), pytest.param(AS_NOBODY, id="nobody")])
def test_it_ends_with_who_has_started_it(options: tuple[str, ...], tmp_path: Path) -> None:
    """A change of its uid takes PR_SET_PDEATHSIG back, so that it would stay for ever."""
    command = Shape(options=options).command(tmp_path / "serial", tmp_path / "qmp")
    reading, writing = os.pipe()

    def hold() -> None:
        with empty_shell(command, None, (), ignore) as ready:
            shell = ready()
            os.write(writing, json.dumps([shell.pid, list(shell.groups)]).encode())
            signal.pause()

    holder = family.child(hold, "holder")
    os.close(writing)
    try:
        pid, groups = json.loads(os.read(reading, 4096))
        with ending(pid):
            pidfd = os.pidfd_open(pid)
            os.kill(holder, signal.SIGKILL)
            assert select.select([pidfd], [], [], 5)[0], "it has outlived who started it"
            os.close(pidfd)
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    for group in groups:
        os.rmdir(group)
