"""Whatever dies: a page that has not come is waited for. The process's own descriptor keeps its userfaultfd alive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.live.programs import Watch, running, wait_until

MIB, THREADS = 64, 2

# Is interrupted as soon as the tree runs, before the pager knows which pages have content.
INTERRUPTED = """
import sys
from pathlib import Path
from lazyproc.events import StateChanged
from lazyproc.restore.run import restore
def listener(event):
    if isinstance(event, StateChanged):
        raise KeyboardInterrupt
with restore(Path(sys.argv[1]), lazy=True, pidns="auto", policy="sequential", listener=listener):
    pass
"""

# Brings only what is touched, and tells when the tree runs.
PAGER = """
import sys
from pathlib import Path
from lazyproc.events import ignore
from lazyproc.restore.run import restore
with restore(Path(sys.argv[1]), lazy=True, bulk=False, pidns="auto", policy="sequential", listener=ignore) as restored:
    print(restored.root_pid, flush=True)
    sys.stdin.read()
"""


def checkpointed(directory: Path) -> tuple[Path, Watch]:
    images = directory / "images"
    with running("memory_random", MIB, THREADS, 100, directory=directory) as program:
        command = [
            sys.executable,
            "-m",
            "lazyproc.cli.main",
            "checkpoint",
            str(program.pid),
            "-D",
            str(images),
        ]
        subprocess.run(command, check=True, capture_output=True)
        program.process.wait()
    return images, program.watch


def all_wait_for_pages(pid: int) -> bool:
    threads = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    waiting = [Path(f"/proc/{pid}/task/{tid}/wchan").read_text() == "handle_userfault" for tid in threads]
    return sum(waiting) >= THREADS  # the first thread may only wait for the others


def test_a_killed_pager_leaves_its_process_waiting_and_never_reading_zeros(tmp_path: Path) -> None:
    images, watch = checkpointed(tmp_path)
    pager = subprocess.Popen(
        [sys.executable, "-c", PAGER, str(images)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert pager.stdout is not None
    pid = int(pager.stdout.readline())
    try:
        watch.wait_beats(1)
        pager.kill()
        pager.wait()
        wait_until(lambda: all_wait_for_pages(pid), "every worker waits for a page")
        status = watch.read()
        assert status.errors == 0, str(status)
    finally:
        os.kill(pid, signal.SIGKILL)
        pager.communicate()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process is gone")


def test_a_restore_that_is_interrupted_once_the_tree_runs_leaves_it_waiting(tmp_path: Path) -> None:
    images, watch = checkpointed(tmp_path)
    command = [sys.executable, "-c", INTERRUPTED, str(images)]
    error = subprocess.run(command, stderr=subprocess.PIPE, text=True).stderr
    pid = watch.read().pid
    assert f"Parked: pid {pid}: interrupted when it had begun to run" in error
    try:
        wait_until(lambda: all_wait_for_pages(pid), "every worker waits for a page")
        assert "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text()
        assert watch.read().errors == 0, str(watch.read())
    finally:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process is gone")


def test_the_anchor_goes_with_the_last_page(tmp_path: Path) -> None:
    images, watch = checkpointed(tmp_path)
    command = [sys.executable, "-m", "lazyproc.cli.main", "restore", "-D", str(images), "--lazy", "--detach"]
    subprocess.run(command, check=True, capture_output=True)
    pid = watch.read().pid
    try:
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [link for link in links if "userfaultfd" in link]
        watch.wait_beats(2)
    finally:
        os.kill(pid, signal.SIGTERM)
    watch.wait_ended()
