"""The cgroups of restored trees: one of their own that outlives the command's, or the one that was named."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from lazyproc.dump.explain import explain
from lazyproc.errors import RestoreError
from lazyproc.hosts import Host, Pair
from lazyproc.kernel import proc
from lazyproc.kernel.cgroup import GRACE_S, V2, hierarchies
from lazyproc.restore.groups import whereabouts
from tests.live.bad_luck import PACED, lazyproc, migrated, moves, says, unchanged, unharmed
from tests.live.moving import checkpoint, receiving, restore, tree_of
from tests.live.programs import running, wait_until
from tests.live.real import ending, move_now
from tests.needs import lacking

MIB = 1 << 20
LIMIT = 70 * MIB  # the program has 10 and 64 are to stay free


@pytest.fixture
def v2() -> str:
    """Where the v2 hierarchy is mounted."""
    found = [each.point for each in hierarchies() if each.controllers == V2]
    if not found:
        lacking("no v2 hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified")
    return found[0]


@contextmanager
def group(*folders: Path) -> Iterator[Path]:
    """New groups, each above the next; removed at the end with what was made in them."""
    for folder in folders:
        folder.mkdir()
    try:
        yield folders[-1]
    finally:
        gone(folders[0])


def gone(folder: Path) -> None:
    wait_until(lambda: removed(folder), f"{folder} is empty")


def removed(folder: Path) -> bool:
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)
    return not folder.exists()


def groups_of(root: int) -> list[dict[str, str]]:
    """The groups of every thread of a tree."""
    return [
        proc.cgroup(proc.read(pid, f"task/{tid}/cgroup"))
        for pid in tree_of(root).values()
        for tid in proc.task_ids(pid)
    ]


def own_groups() -> dict[str, str]:
    return proc.cgroup(proc.read(os.getpid(), "cgroup"))


def left(host: Host, name: str) -> Path:
    """A program of several processes or threads, as images."""
    images = host.scratch / "images"
    with running(name, directory=host.ground.shared, host=host) as program:
        checkpoint(host, program.pid, images)
        program.process.wait()
    return images


def by(script: str) -> tuple[str, ...]:
    """A mount namespace of its own in which `script` has been run."""
    return ("unshare", "--mount", "sh", "-ec", f'{script}\nexec "$@"', "sh")


@pytest.mark.parametrize("name", ["threads", "tree"])
def test_every_thread_is_in_a_new_group_and_elsewhere_in_ours(host: Host, v2: str, name: str) -> None:
    moved = restore(host, left(host, name))
    with ending(moved.pid):
        found = groups_of(moved.pid)
        assert len(found) > 2
        path = found[0].pop(V2)
        assert os.path.basename(path).startswith(f"lazyproc-{moved.report['root_vpid']}-")
        assert all(each.pop(V2, path) == path for each in found)
        own = own_groups()
        own.pop(V2)
        assert all(each == own for each in found)
    gone(Path(f"{v2}{path}"))


def test_nobody_else_makes_groups_in_its_group_whatever_the_umask_is(host: Host, v2: str) -> None:
    images, before = left(host, "threads"), os.umask(0)
    try:
        moved = restore(host, images)
    finally:
        os.umask(before)
    with ending(moved.pid):
        folder = Path(f"{v2}{groups_of(moved.pid)[0][V2]}")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    gone(folder)


def test_who_waits_for_the_tree_removes_its_group(host: Host, v2: str) -> None:
    images, pidfile = left(host, "threads"), host.outside / "pid"
    words = ("-m", "lazyproc.cli.main", "restore", "-D", str(images), "--pidfile", str(host.scratch / "pid"))
    command = host.popen([sys.executable, *words])
    wait_until(lambda: pidfile.exists() and pidfile.read_text() != "", "it runs")
    root = host.pid(int(pidfile.read_text()))
    folder = Path(f"{v2}{groups_of(root)[0][V2]}")
    assert folder.is_dir()
    os.kill(root, signal.SIGKILL)
    command.wait(20)
    assert not folder.exists()


def test_the_next_command_removes_what_was_left_behind(host: Host, v2: str) -> None:
    images = left(host, "threads")
    home = Path(v2, whereabouts(None)[V2].lstrip("/")).parent
    with group(home / "lazyproc-1-00000000") as old, group(home / "lazyproc-1-00000001") as new:
        past = time.time() - GRACE_S - 5
        os.utime(old, (past, past))
        with ending(restore(host, images).pid):
            assert not old.exists()
            assert new.exists()  # somebody may be about to be born there


def test_a_named_group_is_made_and_its_v1_namesake_is_joined(host: Host, v2: str) -> None:
    images = left(host, "threads")
    v1 = next((each for each in hierarchies() if each.controllers == "memory"), None)
    name = f"lazyproc-groups-{os.getpid()}"
    path = f"/{name}/inner"
    with ExitStack() as stack:
        if v1 is not None:
            memory = stack.enter_context(group(Path(v1.point, name), Path(v1.point, name, "inner")))
        moved = restore(host, images, "--cgroup", path)
        stack.callback(gone, Path(v2, name))
        stack.enter_context(ending(moved.pid))
        found = groups_of(moved.pid)
        assert len(found) > 2
        expected = {**own_groups(), V2: path, **({"memory": path} if v1 else {})}
        assert all(each == expected for each in found)
        if v1 is not None:  # from the first page on
            entries = proc.smaps(proc.read(moved.pid, "smaps"))
            anonymous = sum(entry.rss for entry in entries if not entry.entry.path.startswith("/"))
            assert int((memory / "memory.usage_in_bytes").read_text()) >= anonymous
    assert not Path(v2, name).exists()


def test_the_end_of_the_service_is_not_the_end_of_the_tree(pair: Pair, v2: str) -> None:
    """What a service manager does: every process in the service's group is killed."""
    above = Path(v2, f"lazyproc-groups-{os.getpid()}.slice")
    service = above / "receive.service"
    with ExitStack() as stack:
        stack.enter_context(group(above, service))
        program = stack.enter_context(
            running(*PACED, directory=pair.shared, host=pair.source, exclusive=True)
        )
        with receiving(
            pair.destination, by=by(f"echo 0 > {service}/cgroup.procs"), expected=-signal.SIGKILL
        ) as receiver:
            new, _ = move_now(pair.source, receiver, program.pid)
            stack.enter_context(ending(new))
            (home,) = {os.path.dirname(each[V2]) for each in groups_of(new)}
            assert home == f"/{above.name}"
            (service / "cgroup.kill").write_text("1")
            receiver.process.wait(20)
            assert (service / "cgroup.procs").read_text() == ""
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()


@pytest.mark.parametrize(
    "change", ["mount -o remount,bind,ro {v2}", "umount {v2}"], ids=["read-only", "no v2"]
)
def test_without_a_group_of_its_own_the_tree_comes_all_the_same(host: Host, v2: str, change: str) -> None:
    images, place = left(host, "threads"), by(change.format(v2=v2))
    pidfile = host.scratch / "pid"
    options = ("-D", images, "--detach", "--pidfile", pidfile)
    with unchanged(host):
        done = lazyproc(host, "restore", *options, "--cgroup", "/lazyproc-test", by=place)
        says(done, 1, "cgroup /lazyproc-test: the tree cannot be put into it", "leave --cgroup out")
    done = lazyproc(host, "restore", *options, by=place)
    assert done.returncode == 0, done.stderr
    with ending(host.pid(int((host.outside / "pid").read_text()))):
        assert "the tree is in the cgroup of this command and may end with it" in done.stderr
        assert "have a cgroup2 hierarchy mounted writable" in done.stderr
        root = host.pid(int((host.outside / "pid").read_text()))
        assert all(each == own_groups() for each in groups_of(root))
    done = lazyproc(host, "check", by=place)
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("cgroups "))
    assert "degraded" in row


@pytest.mark.parametrize(
    ("file", "text", "below", "words"),
    [
        ("cgroup.max.descendants", "0", "/below", "a limit is reached"),
        ("cgroup.freeze", "1", "", "it is frozen"),
        ("cgroup.type", "threaded", "/below", "it is threaded, or below a threaded one"),
    ],
)
def test_a_group_that_cannot_be_had(
    pair: Pair, v2: str, file: str, text: str, below: str, words: str
) -> None:
    """A restore builds nothing; a migration is refused before the freeze."""
    name = f"lazyproc-groups-{os.getpid()}"
    with group(Path(v2, name)) as folder:
        (folder / file).write_text(text)
        path = f"/{name}{below}"
        images = left(pair.destination, "threads")
        with unchanged(pair.destination):
            done = lazyproc(pair.destination, "restore", "-D", images, "--cgroup", path)
            says(
                done,
                1,
                f"cgroup {path}: the tree cannot be put into it ({words}",
                "name another with --cgroup",
            )
        with (
            running(*PACED, directory=pair.shared, host=pair.source) as program,
            receiving(pair.destination, "--cgroup", path) as receiver,
            unharmed(program),
        ):
            done = migrated(pair, receiver, program.pid)
            says(done, 3, receiver.address, f"cgroup {path}: the tree cannot be put into it ({words}")
            assert "frozen" not in done.stderr.replace(words, "").splitlines()
        assert os.listdir(folder).count("below") == 0


def test_a_process_in_a_frozen_group_is_not_waited_for(v2: str, tmp_path: Path) -> None:
    with group(Path(v2, "lazyproc-test-frozen")) as folder, running("steady", directory=tmp_path) as program:
        (folder / "cgroup.procs").write_text(str(program.pid))
        (folder / "cgroup.freeze").write_text("1")
        wait_until(lambda: "frozen 1" in (folder / "cgroup.events").read_text(), "it is frozen")
        (obstacle,) = explain(program.pid)
        assert f"is in a frozen cgroup, {folder}" in obstacle.why
        (folder / "cgroup.freeze").write_text("0")
        assert explain(program.pid) == ()
        program.stop_and_verify()


def test_no_path_of_a_group(host: Host) -> None:
    done = lazyproc(host, "restore", "-D", left(host, "threads"), "--cgroup", "/a/../b")
    says(done, 2, "cgroup '/a/../b': is no path of a cgroup")


@pytest.mark.parametrize("overcommit", [False, True])
def test_a_group_with_too_little_memory(pair: Pair, v2: str, overcommit: bool) -> None:
    """It counts like too little memory of the host: before the freeze, and --overcommit goes on."""
    v1 = next((each for each in hierarchies() if each.controllers == "memory"), None)
    if v1 is None:
        lacking("no memory cgroup can be made here", "mount the memory controller at /sys/fs/cgroup/memory")
    name = f"lazyproc-groups-{os.getpid()}"
    options = ("--cgroup", f"/{name}", *(["--overcommit"] if overcommit else []))
    with (
        group(Path(v1.point, name)) as memory,
        group(Path(v2, name)),
        running(*PACED, directory=pair.shared, host=pair.source) as program,
        receiving(pair.destination, *options) as receiver,
    ):
        (memory / "memory.limit_in_bytes").write_text(str(LIMIT))
        if overcommit:
            moves(pair, receiver, program)
            return
        with unchanged(pair.source, pair.destination), unharmed(program):
            done = migrated(pair, receiver, program.pid)
            says(
                done,
                3,
                receiver.address,
                f"cgroup /{name} ",
                "MiB available",
                "raise its memory.limit_in_bytes",
            )


def test_trying_leaves_nothing_behind(v2: str) -> None:
    name = f"lazyproc-groups-{os.getpid()}"
    home = Path(v2, whereabouts(None)[V2].lstrip("/")).parent
    before = set(os.listdir(home))
    assert whereabouts(f"/{name}/a/b")[V2] == f"/{name}/a/b"
    with group(Path(v2, name)) as folder:
        (folder / "cgroup.max.depth").write_text("1")
        with pytest.raises(RestoreError, match=f"cgroup /{name}/a/b: .*a limit is reached"):
            whereabouts(f"/{name}/a/b")
        assert not (folder / "a").exists()
    assert {entry for entry in set(os.listdir(home)) - before if "groups" in entry} == set()
