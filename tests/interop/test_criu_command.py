"""`lazyproc-criu` in CRIU's place: what CRIU's own test driver relies on, with real programs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lazyproc.dump.walk import tree_of
from lazyproc.kernel import proc
from lazyproc.model import PAGE
from tests import peer
from tests.live.programs import Program, Watch, compile_program, running, stands_still, wait_until
from tests.needs import require_root

DEADLINE_S = 60.0
LOGGED = "Error (lazyproc): "


@pytest.fixture(autouse=True)
def _root() -> None:
    require_root()


@dataclass
class Place:
    """A folder of images, and what was restored from it."""

    images: Path
    restored: int = 0  # pid
    reaper: int = 0  # its parent, and our child: we are the reaper of orphans
    handed: tuple[int, ...] = ()  # descriptors that the next commands inherit

    def start(self, action: str, *options: object, close_fds: bool = True) -> subprocess.Popen[bytes]:
        words = [
            "--no-default-config",
            "--log-file",
            f"{action}.log",
            "--images-dir",
            self.images,
            "--verbosity=4",
        ]
        return subprocess.Popen(
            [sys.executable, "-m", "lazyproc.criu.main", action, *map(str, (*words, *options))],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=close_fds,
            pass_fds=self.handed,
        )  # fmt: skip

    def run(self, action: str, *options: object) -> int:
        return self.start(action, *options).wait(DEADLINE_S)

    def done(self, action: str, *options: object) -> None:
        assert self.run(action, *options) == 0, self.log(action)

    def log(self, action: str) -> str:
        return (self.images / f"{action}.log").read_text()

    def errors(self, action: str) -> list[str]:
        return [line.partition(LOGGED)[2] for line in self.log(action).splitlines() if LOGGED in line]

    def restore(self, *options: object) -> None:
        pidfile = self.images / "pid"
        self.done("restore", "--restore-detached", "--pidfile", pidfile, *options)
        self.restored = int(pidfile.read_text())
        self.reaper = proc.stat(proc.read(self.restored, "stat")).ppid

    def verify(self, program: Program) -> None:
        """It is the same process, checks itself on, and ends well."""
        assert self.restored == program.pid
        program.watch.wait_beats()
        os.kill(self.restored, signal.SIGTERM)
        _, status = os.waitpid(self.reaper, 0)
        assert os.waitstatus_to_exitcode(status) == 0, str(program.watch.read())
        program.watch.wait_ended()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    (tmp_path / "images").mkdir()
    made = Place(tmp_path / "images")
    yield made
    if made.reaper:
        for pid in (made.restored, made.reaper):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def dumped(place: Place, program: Program, *options: object) -> None:
    others = tree_of(program.pid)[1:]
    place.done("dump", "--tree", program.pid, "--timeout", 10, "--pre-dump-mode", "splice", *options)
    assert program.process.wait(DEADLINE_S) == -signal.SIGKILL
    for pid in others:  # orphans are ours, and keep their numbers until then
        gone(pid)


def gone(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    assert not Path(f"/proc/{pid}").exists()


def state(pid: int) -> str:
    return proc.stat(proc.read(pid, "stat")).state


@pytest.mark.parametrize("name", ["threads", "small_state", "file_locks", "dead_peer", "sock_odd", "netlink"])
def test_dump_and_restore(name: str, place: Place, tmp_path: Path) -> None:
    with running(name, directory=tmp_path) as program:
        program.watch.wait_beats()
        dumped(place, program, "--file-locks")
        place.restore("--file-locks")
        place.verify(program)


def test_crit_shows_the_figures_of_a_dump(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        place.done("dump", "--tree", program.pid, "--leave-running")
        program.stop_and_verify()
    shown = subprocess.run(
        [*peer.crit(), "show", place.images / "stats-dump"], capture_output=True, check=True
    )
    dump = json.loads(shown.stdout)["entries"][0]["dump"]
    assert dump["pages_written"] * PAGE == sum(path.stat().st_size for path in place.images.glob("pages-*"))
    assert dump["frozen_time"] >= dump["freezing_time"] + dump["memwrite_time"]


def test_what_it_writes_is_nobody_elses(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        program.watch.wait_beats()
        before = os.umask(0)
        try:
            dumped(place, program)
            place.restore()
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o077 for path in place.images.iterdir()}
        assert modes.keys() >= {"dump.log", "restore.log", "stats-dump", "pid", "inventory.img"}
        assert not any(modes.values()), modes
        place.verify(program)


def test_figures_that_cannot_be_written_are_no_failure(place: Place, tmp_path: Path) -> None:
    """The tree has ended by then: exit 1 would say that it runs."""
    (place.images / "stats-dump").mkdir()
    with running("threads", directory=tmp_path) as program:
        program.watch.wait_beats()
        dumped(place, program)
        assert "stats-dump: cannot be written (is a directory)" in place.log("dump")
        place.restore()
        place.verify(program)


def test_a_work_folder_that_is_none_is_said_before_anything_is_stopped(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        where = ("--images-dir", str(place.images), "--work-dir", "none")
        command = [sys.executable, "-m", "lazyproc.criu.main", "dump", "--no-default-config", *where]
        done = subprocess.run(
            [*command, "--tree", str(program.pid)],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 1
        assert "--work-dir none: is no folder" in done.stderr
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_log_that_cannot_be_written_changes_nothing(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        program.watch.wait_beats()
        dumped(place, program, "--log-file", "/dev/full")
        place.restore("--log-file", "/dev/full")
        place.verify(program)


def test_a_log_names_files_whose_names_are_no_text(tmp_path: Path) -> None:
    place = Place(tmp_path / os.fsdecode(b"images\xff"))
    (place.images / "inventory.img").mkdir(parents=True)
    assert place.run("restore") == 1
    log = (place.images / "restore.log").read_bytes()
    assert b"images\xff/inventory.img: not a regular file" in log


@pytest.mark.parametrize("daemon", ["ours", "criu's"])
def test_a_lazy_restore_has_its_pages_from_the_daemon(daemon: str, place: Place, tmp_path: Path) -> None:
    with running("memory_random", 16, 2, 100, directory=tmp_path) as program:
        program.watch.wait_beats()
        dumped(place, program)
        with lazy_pages(daemon, place) as process:
            place.restore("--lazy-pages")
            program.watch.wait_beats()
            assert process.wait(DEADLINE_S) == 0
        place.verify(program)


class lazy_pages:
    """The daemon of one or the other, ready."""

    def __init__(self, whose: str, place: Place, *more: object) -> None:
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        options = ["--status-fd", str(writing)]
        if whose == "ours":
            self._process = place.start("lazy-pages", *options, *more, close_fds=False)
        else:
            command = [
                *peer.criu(),
                "lazy-pages",
                "--no-default-config",
                "-D",
                str(place.images),
                "-o",
                "lp.log",
            ]
            self._process = subprocess.Popen([*command, *options], close_fds=False)
        os.close(writing)
        try:
            assert os.read(reading, 1) == b"\0"
        finally:
            os.close(reading)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def test_without_a_daemon_a_lazy_restore_says_so(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        dumped(place, program)
    assert place.run("restore", "--restore-detached", "--lazy-pages") == 1
    assert "lazy-pages.socket: nobody answers" in place.errors("restore")[0]


def test_left_running(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        place.done("dump", "--tree", program.pid, "--leave-running")
        program.watch.wait_beats()
        program.stop_and_verify()


def test_left_stopped_and_restored_stopped(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        place.done("dump", "--tree", program.pid, "--leave-stopped")
        wait_until(lambda: state(program.pid) == "T", "it is stopped")
        assert stands_still(program)
        program.process.kill()
        program.process.wait()
        place.restore("--leave-stopped")
        assert state(place.restored) == "T"
        assert stands_still(program)
        os.kill(place.restored, signal.SIGCONT)
        place.verify(program)


@pytest.mark.parametrize(("name", "lazy"), [("threads", False), ("tree", False), ("threads", True)])
def test_a_sibling_is_the_child_of_who_called(name: str, lazy: bool, place: Place, tmp_path: Path) -> None:
    with running(name, directory=tmp_path) as program, ExitStack() as stack:
        program.watch.wait_beats()
        dumped(place, program, "--shell-job")
        if lazy:
            stack.enter_context(lazy_pages("ours", place))
        place.restore("--restore-sibling", *(["--lazy-pages"] if lazy else []))
        assert place.reaper == os.getpid()
        place.reaper = place.restored
        place.verify(program)
        gone(place.restored)


def test_a_sibling_whose_number_is_taken_is_not_restored(place: Place, tmp_path: Path) -> None:
    with running("threads", directory=tmp_path) as program:
        place.done("dump", "--tree", program.pid, "--leave-running")
        assert place.run("restore", "--restore-detached", "--restore-sibling") == 1
        assert "its number is taken" in place.errors("restore")[0]
        assert place.run("restore", "--restore-sibling") == 1
        assert "add --restore-detached" in place.errors("restore")[0]
        program.stop_and_verify()


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--track-mem"], "--track-mem is not supported"), (["--empty-ns", "net"], "--empty-ns net is not supported"),
     (["--network-lock", "iptables"], "--network-lock iptables is not supported"),
     (["--lazy-pages", "--port", 7000, "-R"], "the tree would run in two places"),
     (["--tree", "1"], "pid 1"), ([], "it holds a file lock")],
)  # fmt: skip
def test_what_is_refused_is_in_the_log_and_the_program_runs(
    options: list[str], words: str, place: Place, tmp_path: Path
) -> None:
    with running("file_locks", directory=tmp_path) as program:
        assert place.run("dump", "--tree", program.pid, *options) == 1
        assert words in place.errors("dump")[0]
        assert [path.name for path in place.images.iterdir()] == ["dump.log"]
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_namespace_of_which_not_all_packets_are_held_back_is_refused(place: Place, tmp_path: Path) -> None:
    start = tmp_path / "start"
    start.write_text(f'#!/bin/sh\nexec unshare -n {compile_program("threads")} "$@"\n')
    start.chmod(0o755)
    with running("threads", directory=tmp_path, binary=start) as program:
        assert place.run("dump", "--tree", program.pid, "--network-lock", "nftables") == 1
        assert "leave out --network-lock" in place.errors("dump")[0]
        program.stop_and_verify()


def test_features_are_answered_by_the_exit_code() -> None:
    def check(*words: str) -> int:
        command = [sys.executable, "-m", "lazyproc.criu.main", "check", "--no-default-config", "-verbosity=0"]
        return subprocess.run([*command, *words], stderr=subprocess.DEVNULL, check=False).returncode

    assert check("--feature", "uffd") == 0
    assert check("--feature", "mem_dirty_track") == 1
    assert check("--feature", "no_such_feature") == 1
    assert check() == 0


SCRIPT = """#!/bin/sh
echo "$CRTOOLS_SCRIPT_ACTION ${CRTOOLS_INIT_PID:-none} $CRTOOLS_IMAGE_DIR" >> %s
[ "$CRTOOLS_SCRIPT_ACTION" != "%s" ]
"""


def script(tmp_path: Path, failing: str) -> tuple[Path, Path]:
    told, path = tmp_path / "told", tmp_path / "a script's"
    path.write_text(SCRIPT % (told, failing))
    path.chmod(0o755)
    return path, told


def test_scripts_are_run_at_their_stages(place: Place, tmp_path: Path) -> None:
    path, told = script(tmp_path, "")
    with running("threads", directory=tmp_path) as program:
        dumped(place, program, "--action-script", path)
        place.restore("--action-script", path)
        place.verify(program)
    assert told.read_text().splitlines() == [
        f"{stage} {'none' if stage == 'pre-restore' else place.restored} {place.images}"
        for stage in ("pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume")
    ]


@pytest.mark.parametrize("stage", ["pre-dump", "post-dump"])
def test_a_script_that_fails_leaves_the_program_as_it_was(stage: str, place: Place, tmp_path: Path) -> None:
    path, _ = script(tmp_path, stage)
    with running("threads", directory=tmp_path) as program:
        assert place.run("dump", "--tree", program.pid, "--action-script", path) == 1
        assert f"returned 1 for {stage}" in place.errors("dump")[0]
        program.watch.wait_beats()
        program.stop_and_verify()


def test_a_restore_whose_script_fails_leaves_nothing(place: Place, tmp_path: Path) -> None:
    path, _ = script(tmp_path, "post-restore")
    with running("threads", directory=tmp_path) as program:
        dumped(place, program)
    assert place.run("restore", "--restore-detached", "--action-script", path) == 1
    gone(program.pid)
    place.restore()
    place.verify(program)


def rooted(directory: Path, name: str) -> Path:
    """A root directory with a program and its libraries, and a script that starts it there."""
    binary = compile_program(name)
    shutil.copy(binary, directory / name)
    listed = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
    for library in (word for word in listed.split() if word.startswith("/")):
        inside = directory / library.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, inside)
    start = directory / "start"
    start.write_text(f"#!/bin/sh\nexec chroot {directory} /{name} /{name}.status\n")
    start.chmod(0o755)
    return start


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tree_in_another_root_directory(lazy: bool, place: Place, tmp_path: Path) -> None:
    """Its paths are from there, symbolic links are followed within it, and it may have moved."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    start = rooted(before, "threads")
    with ExitStack() as stack:
        streams = {"stdin": stack.enter_context(start.open()).fileno()}  # a file that is in there
        program = stack.enter_context(running("threads", directory=before, binary=start, streams=streams))
        program.watch.wait_beats()
        dumped(place, program, "--root", before)
        before.rename(after)
        (after / "lib").rename(after / "elsewhere")
        (after / "lib").symlink_to("/elsewhere")
        assert place.run("restore", "--restore-detached") == 1
        assert "is not on this host" in place.errors("restore")[0]
        gone(program.pid)
        assert place.run("restore", "--restore-detached", "--root", before) == 1
        assert "is no folder" in place.errors("restore")[0]
        if lazy:
            stack.enter_context(lazy_pages("ours", place))
        place.restore("--root", after, *(["--lazy-pages"] if lazy else []))
        assert os.readlink(f"/proc/{place.restored}/root") == str(after)
        place.verify(replace(program, watch=Watch(after / "threads.status")))
