"""A host whose limits (getrlimit(2), pids.max) are lower than those of the source: of what a tree needs more is said
before it is frozen, what we need ourselves before anything is received, and what it had and cannot have is no secret.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.kernel.cgroup import hierarchies
from tests.live.bad_luck import lazyproc, migrated, says, unchanged
from tests.live.moving import CLI, checkpoint, exit_status, move, receiving, restore
from tests.live.real import ending, move_now
from tests.live.test_cgroups import group
from tests.live.test_needs import asked, cargo
from tests.needs import lacking

HIGH = 5000
DESCRIPTOR = f"os.dup2(beats, {HIGH})"
LARGE = "large = mmap.mmap(-1, 2 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)"
LOCKED = "assert ctypes.CDLL(None).mlockall(1) == 0"
THREADS = "import threading\nfor _ in range(20): threading.Thread(target=time.sleep, args=(999,), daemon=True).start()"
POWERLESS = (
    "setpriv",
    "--bounding-set=-sys_resource",
    "--inh-caps=-sys_resource",
)  # who has it raises what he builds
MANY = """
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG
opened = [os.open("/dev/null", 0) for _ in range(200)]
"""
OBJECTS = """
import signal
objects = [mmap.mmap(-1, 4096) for _ in range(NUMBER)]
for number, each in enumerate(objects):
    each[:4] = number.to_bytes(4, "little")
right = lambda: all(each[:4] == number.to_bytes(4, "little") for number, each in enumerate(objects))
signal.signal(signal.SIGUSR1, lambda *_: os._exit(0 if right() else 1))
"""
UNLOCKING = (
    "setpriv",
    "--bounding-set=-ipc_lock",
    "--inh-caps=-ipc_lock",
    "prlimit",
    "--memlock=65536:65536",
)


@pytest.mark.parametrize(
    ("script", "by", "words"),
    [
        (DESCRIPTOR, ("prlimit", "--nofile=1024:1024"), "RLIMIT_NOFILE: no more than 1024"),
        (MANY, ("prlimit", "--nofile=350:350"), "RLIMIT_NOFILE: no more than 350"),
        ("", ("prlimit", "--cpu=1000:1000"), "RLIMIT_CPU: no more than 1000 may be had here, and it takes unlimited"),
        (LARGE, ("prlimit", "--data=300000000"), "RLIMIT_DATA: no more than 300000000"),
        (LOCKED, UNLOCKING, "RLIMIT_MEMLOCK: no more than 65536"),
    ],
    ids=["descriptors", "of all processes", "processor time", "data", "locked"],
)  # fmt: skip
def test_a_limit_that_is_too_low_is_an_obstacle(
    pair: Pair, script: str, by: Sequence[str], words: str
) -> None:
    with cargo(pair, script) as program, receiving(pair.destination, by=(*POWERLESS, *by)) as receiver:
        (obstacle,) = asked(pair, receiver, program.pid, 3)
        assert obstacle["pid"] == pair.source.vpid(program.pid)
        assert obstacle["why"].startswith(f"{receiver.address}: {words}")
        assert "raise the hard limit of who" in obstacle["remedy"]
        with unchanged(pair.source, pair.destination):
            says(migrated(pair, receiver, program.pid), 3, "nothing has been stopped", words)
        program.goes_on()


def test_a_group_with_no_room_for_its_threads_is_an_obstacle(pair: Pair) -> None:
    pids = next((each for each in hierarchies() if "pids" in each.controllers.split(",")), None)
    if pids is None:
        lacking(
            "no pids controller of cgroups v1 is mounted", "mount -t cgroup -o pids pids /sys/fs/cgroup/pids"
        )
    name = f"lazyproc-limits-{os.getpid()}"
    with (
        group(Path(pids.point, name)) as folder,
        cargo(pair, THREADS) as program,
        receiving(pair.destination, "--cgroup", f"/{name}") as receiver,
    ):
        (folder / "pids.max").write_text("20")
        (obstacle,) = asked(pair, receiver, program.pid, 3)
        assert f"takes 23 processes and threads, and cgroup /{name} has room for 20" in obstacle["why"]
        program.goes_on()
        (folder / "pids.max").write_text("23")
        assert asked(pair, receiver, program.pid, 0) == []
        new, _ = move_now(pair.source, receiver, program.pid)
        with ending(new):
            program.goes_on()


def test_what_it_may_not_have_there_is_as_much_as_can_be_and_is_said(pair: Pair) -> None:
    """A soft limit that it had never becomes a higher one, which select(2) may not live with."""
    script = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (512, 8000))"
    with (
        cargo(pair, script) as program,
        receiving(pair.destination, by=("prlimit", "--nofile=1024:4096")) as receiver,
    ):
        new, _ = move_now(pair.source, receiver, program.pid)
        with ending(new):
            soft, hard = resource.prlimit(new, resource.RLIMIT_NOFILE)
            assert (soft, hard) in [(512, 4096), (512, 8000)]
            note = "RLIMIT_NOFILE is 512 (hard 4096) here, and was 512 (hard 8000)"
            assert (note in receiver.notes()) == (hard == 4096)
            program.goes_on()


@pytest.mark.parametrize("limit", ["as=1000000000", "fsize=100000", "nofile=64"])
def test_a_receiver_that_could_take_nothing_in_does_not_begin(host: Host, limit: str) -> None:
    """With a hard limit; a soft one it raises."""
    name, _, value = limit.partition("=")
    words = ("receive", "--listen", f"{host.address}:0", "--insecure")
    done = lazyproc(host, *words, by=(*POWERLESS, "prlimit", f"--{limit}:{value}"))
    says(done, 3, "unlimited" if name != "nofile" else "raise the hard limit")
    if name != "nofile":
        assert f"RLIMIT_{name.upper()} leaves no room" in done.stderr
    argv = [*POWERLESS, "prlimit", f"--{limit}:", *CLI, "check", "--json"]
    found = host.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert '"missing"' not in found.stdout


def test_a_soft_limit_of_the_receiver_is_no_limit_of_the_tree(pair: Pair) -> None:
    low = ("prlimit", "--as=1000000000:", "--data=50000000:", "--fsize=4096:", "--nofile=80:", "--memlock=0:")
    with cargo(pair, f"{DESCRIPTOR}\n{LARGE}") as program, receiving(pair.destination, by=low) as receiver:
        before = _limits(program.pid)
        new, _ = move_now(pair.source, receiver, program.pid)
        with ending(new):
            assert _limits(new) == before
            program.goes_on()


def _limits(pid: int) -> list[tuple[int, int]]:
    return [resource.prlimit(pid, number) for number in range(16)]


def test_a_restore_that_fails_for_a_limit_names_it(pair: Pair) -> None:
    """Images are restored when nothing waits any more, so nobody asks beforehand."""
    images = pair.shared / "images"
    with cargo(pair, DESCRIPTOR) as program:
        checkpoint(pair.source, program.pid, images)
        low = (*POWERLESS, "prlimit", "--nofile=1024:1024")
        with unchanged(pair.destination):
            done = lazyproc(pair.destination, "restore", "-D", images, "--detach", by=low)
        says(done, 1, "RLIMIT_NOFILE: no more than 1024 may be had here, and it takes 5017")
        with ending(restore(pair.destination, images).pid):
            program.goes_on()


def test_more_shared_objects_than_may_be_open_are_an_obstacle(pair: Pair) -> None:
    """At the source, which reads them where they are. As many as may be fit into images, each with two of its own."""
    low = (*POWERLESS, "prlimit", "--nofile=300:300")
    with cargo(pair, OBJECTS.replace("NUMBER", "240")) as program:
        done = lazyproc(pair.source, "explain", pair.source.vpid(program.pid), by=low)
        assert done.returncode == 3, done.stderr
        assert (
            "has 240 shared memory objects, and lazyproc may have 300 descriptors (RLIMIT_NOFILE)"
            in done.stdout
        )
        program.goes_on()
    (pair.shared / "beats").unlink()
    with cargo(pair, OBJECTS.replace("NUMBER", "200")) as program:
        words = ("checkpoint", pair.source.vpid(program.pid), "-D", pair.shared / "images")
        done = lazyproc(pair.source, *words, by=low)
        assert done.returncode == 0, done.stderr
    ends_right(restore(pair.destination, pair.shared / "images").pid)


def test_more_shared_objects_than_a_pager_knows_come_at_once(pair: Pair) -> None:
    with cargo(pair, OBJECTS.replace("NUMBER", "8300")) as program, receiving(pair.destination) as receiver:
        ends_right(move(pair.source, receiver, program.pid).pid)


def ends_right(pid: int) -> None:
    """What is in its objects is as it was."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGUSR1)
        assert select.select([pidfd], [], [], 20)[0]
        assert exit_status(pidfd) == 0
    finally:
        os.close(pidfd)
