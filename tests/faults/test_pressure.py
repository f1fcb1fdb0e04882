"""Little room at the destination: memory that is swapped out while more of it comes, and a disk that is full."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyproc.hosts import Pair
from tests.faults.helpers import DESTINATION, SOURCE, journals, sessions
from tests.faults.test_lazy_hazards import memory_group, swap_on_zram
from tests.live.moving import receiving
from tests.live.programs import running, wait_until
from tests.live.real import ending, migrating

MIB = 1 << 20

# Says on standard output, a file, whether a deleted file is as it should be: at first, and at each SIGUSR1.
HOLDER = """
import os, signal, sys
content = bytes(range(256)) * 4096
file = open(sys.argv[1], "w+b", buffering=0)
file.write(content)
os.unlink(sys.argv[1])
def look(*_): os.write(1, b"%d" % (os.pread(file.fileno(), len(content) + 1, 0) == content))
signal.signal(signal.SIGUSR1, look)
look()
while True:
    signal.pause()
"""


def swap_of(pid: int) -> int:
    """In bytes (VmSwap of proc_pid_status(5))."""
    found = re.search(r"^VmSwap:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) << 10 if found else 0


def test_a_tree_larger_than_its_group_may_be_is_swapped_out_while_it_comes(pair: Pair) -> None:
    """Every page that it reads is checked, those too that went out before the last ones had come."""
    with (
        swap_on_zram(),
        memory_group() as group,
        running(
            "memory_random", "64", "2", directory=pair.shared, host=pair.source, exclusive=True
        ) as program,
    ):
        program.watch.wait_beats()
        (group / "memory.swappiness").write_text("60")
        (group / "memory.limit_in_bytes").write_text(str(40 * MIB))
        options = ("--cgroup", f"/{group.name}", "--overcommit")
        with (
            receiving(pair.destination, *options) as receiver,
            migrating(pair.source, receiver, program.pid) as journey,
        ):
            new, _ = journey.arrive()
            with ending(new):
                assert swap_of(new) > 10 * MIB
                program.watch.wait_beats()
                os.kill(new, signal.SIGTERM)
                program.watch.wait_ended()
        assert not journals(pair.source, SOURCE)
        assert not journals(pair.destination, DESTINATION)


@contextmanager
def holder(pair: Pair, path: Path) -> Iterator[tuple[int, Path]]:
    """Its pid, and what it has said."""
    log = pair.shared / "holder.log"
    argv = [sys.executable, "-I", "-c", HOLDER, str(path)]
    with log.open("w") as file:
        process = pair.source.popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        wait_until(lambda: log.read_text() == "1", "it has its file")
        yield process.pid, log
    finally:
        process.kill()
        process.wait()


def test_the_disk_has_no_room_for_what_a_deleted_file_held(pair: Pair) -> None:
    place = pair.destination.scratch / "small"
    for host in (pair.source, pair.destination):
        host.run(["mkdir", place], check=True)
    pair.destination.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True)
    with holder(pair, place / "held") as (pid, log):
        with (
            receiving(pair.destination) as receiver,
            migrating(pair.source, receiver, pid) as journey,
        ):
            answer = journey.finish(expected=1)
        assert f"deleted file {place}/held" in answer["error"]
        assert "No space left on device" in answer["error"]
        assert "make room there" in answer["error"] + str(answer["remedy"])
        assert not sessions(pair.source)
        assert {each["state"] for each in sessions(pair.destination)} <= {"aborted"}
        os.kill(pid, signal.SIGUSR1)
        wait_until(lambda: log.read_text() == "11", "it runs on and has it still")
