"""A practised freeze leaves nothing to be done for the first time while a process stands still."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.programs import running
from tests.needs import require_root

CONNECTED = """
import os, select, socket, time
listener = socket.create_server(("127.0.0.1", 0))
own = socket.create_connection(listener.getsockname()), listener.accept()[0]
watching = select.epoll()
watching.register(own[0])
os.close(1)
time.sleep(60)
"""
REHEARSED_TWICE = """
from lazyproc import facts
from lazyproc.kernel.netfilter import leftovers
from lazyproc.migrate.identity import identity
from lazyproc.restore.rehearsal import rehearse

compiled, real = [], facts._compiled_init
def noted(cls, frozen):
    compiled.append(cls.__qualname__)
    return real(cls, frozen)
facts._compiled_init = noted
rehearse(print, identity, connected=True)
assert {"InetSocket", "TcpState", "InetSockets", "Epoll"} <= set(compiled)
compiled.clear()
rehearse(print, identity, connected=True)
print(*compiled, *leftovers())
"""


@pytest.mark.parametrize("program", [("memory_random", "4", "2"), ("threads",), ("sleeps",)])
def test_nothing_is_compiled_or_imported_while_a_process_stands_still(
    program: tuple[str, ...], tmp_path: Path
) -> None:
    require_root()
    with running(*program, directory=tmp_path) as it:
        argv = [sys.executable, "-m", "tests.live.practised", str(it.pid)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        it.stop_and_verify()
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_nor_of_a_process_with_a_connection() -> None:
    require_root()
    program = [sys.executable, "-c", CONNECTED]
    with subprocess.Popen(
        program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as it:
        assert it.stdout is not None
        it.stdout.read()  # until it closes its end, which nobody outside of the tree may have
        it.stdout.close()
        argv = [sys.executable, "-m", "tests.live.practised", str(it.pid)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        it.kill()
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_a_rehearsed_restore_of_connections_leaves_nothing_behind_or_to_be_compiled() -> None:
    require_root()
    argv = [sys.executable, "-c", REHEARSED_TWICE]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
