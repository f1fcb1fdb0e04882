"""The commands as a user gives them, on real processes: results, exit codes, what runs on and what does not."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lazyproc.facts import annotations_of
from lazyproc.images.files import SUMS, Folder, ImageWriter, record
from lazyproc.images.pb import process_pb2 as pb
from lazyproc.migrate.report import MigrateReport
from tests.live.programs import Program, Watch, running, wait_until
from tests.needs import require_root

LAZYPROC = (sys.executable, "-m", "lazyproc.cli.main")
PACED = ("memory_random", 8, 2, 1000)  # a guest on a machine with few cores


@pytest.fixture(autouse=True)
def _root() -> None:
    require_root()


def lazyproc(*argv: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command, which must end with `code`."""
    words = [*LAZYPROC, *map(str, argv)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr}"
    return done


def result(*argv: object, code: int = 0) -> dict[str, Any]:
    """The one object that --json prints, on the last line of standard output."""
    (line,) = lazyproc(*argv, "--json", code=code).stdout.splitlines()
    fields: dict[str, Any] = json.loads(line)
    return fields


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    with running(*PACED, directory=tmp_path) as started:
        yield started


@pytest.fixture
def images(tmp_path: Path, program: Program) -> Path:
    """A checkpoint of the program, which is gone."""
    lazyproc("checkpoint", program.pid, "-D", tmp_path / "images")
    assert program.process.wait(10) == -signal.SIGKILL
    return tmp_path / "images"


@contextlib.contextmanager
def killed_at_the_end(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def stop_and_verify(pid: int, watch: Watch) -> None:
    """It beats, and its last check finds nothing wrong."""
    with killed_at_the_end(pid):
        watch.wait_beats()
        os.kill(pid, signal.SIGTERM)
        watch.wait_ended()


# --- checkpoint and show ----------------------------------------------------------------------------------


def test_a_checkpoint_ends_the_tree_and_says_what_it_wrote(tmp_path: Path, program: Program) -> None:
    fields = result("checkpoint", program.pid, "-D", tmp_path / "images")
    assert (fields["root_pid"], fields["root_vpid"]) == (program.pid, program.pid)
    assert (fields["tasks"], fields["threads"]) == (1, 2)
    assert fields["bytes"] > fields["pages_total"] * 4096 > 7 << 20
    assert 0 < fields["frozen_ms"] < fields["total_ms"]
    assert program.process.wait(10) == -signal.SIGKILL


def test_left_running_it_runs(tmp_path: Path, program: Program) -> None:
    done = lazyproc("checkpoint", program.pid, "-D", tmp_path / "images", "--leave-running")
    assert done.stdout.startswith("1 task with 2 threads and 8")
    program.watch.wait_beats()
    program.stop_and_verify()


def test_ctrl_c_comes_too_late_when_the_tree_has_ended(tmp_path: Path, program: Program) -> None:
    """It was told that the process runs on as before, and that the checkpoint failed."""
    command = [*LAZYPROC, "checkpoint", str(program.pid), "-D", str(tmp_path / "images")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as saving:
        assert program.process.wait(20) == -signal.SIGKILL
        while saving.poll() is None:
            saving.send_signal(signal.SIGINT)
        words, complaint = saving.communicate()
    assert (saving.returncode, complaint) == (0, "")
    assert words.startswith("1 task with")


def test_an_obstacle_is_exit_3_and_nothing_has_happened(tmp_path: Path) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, start_new_session=True) as process:
        fields = result("checkpoint", process.pid, "-D", tmp_path / "images", code=3)
        assert fields["exit_code"] == 3
        assert {"pid": process.pid, "where": "fd 0"}.items() <= fields["obstacles"][0].items()
        assert not (tmp_path / "images").exists()
        done = lazyproc("explain", process.pid, code=3)
        assert f"pid {process.pid}: fd 0: " in done.stdout
        assert process.poll() is None


def test_explain_says_so_when_nothing_stands_in_the_way(program: Program) -> None:
    assert (
        lazyproc("explain", program.pid).stdout
        == f"nothing stops a checkpoint or a move of pid {program.pid}\n"
    )
    assert result("explain", program.pid) == {
        "pid": program.pid,
        "peer": None,
        "obstacles": [],
        "notes": [],
    }


def test_show_lists_what_is_in_the_images(images: Path, program: Program) -> None:
    fields = result("show", images)
    (task,) = fields["tasks"]
    assert (task["vpid"], task["comm"], task["state"]) == (program.pid, "memory_random", "alive")
    assert task["threads"] == [program.pid, *task["threads"][1:]]
    assert task["mappings"]["anon"]["bytes"] > 8 << 20
    assert fields["pages_lazy"] == task["pages_lazy"] > 1900
    text = lazyproc("show", images).stdout
    assert text.startswith("1 task, 2 threads")
    assert f"{program.pid} memory_random (alive)" in text


def test_names_that_are_no_text_are_shown_and_no_terminal_obeys_them(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\xff\n\x1b[31m")
    odd.touch()
    quiet = subprocess.DEVNULL
    with (
        odd.open() as file,
        subprocess.Popen(
            ["sleep", "60"], stdin=file, stdout=quiet, stderr=quiet, start_new_session=True
        ) as process,
        killed_at_the_end(process.pid),
    ):
        lazyproc("checkpoint", process.pid, "-D", tmp_path / "images")
    done = subprocess.run(
        [*LAZYPROC, "show", str(tmp_path / "images")],
        capture_output=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"/a\xff\n\x1b[31m" in done.stdout


def test_show_of_no_images_is_exit_1(tmp_path: Path) -> None:
    assert "inventory.img: missing" in lazyproc("show", tmp_path, code=1).stderr


# --- many of everything -----------------------------------------------------------------------------------

MANY = """
import ctypes, os, resource, select, signal, sys, threading
files, threads, sets, watched, queued, timers = map(int, sys.argv[3:])
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
opened = [os.open(__file__, os.O_RDONLY) for _ in range(files)]
for place, fd in enumerate(opened):
    os.lseek(fd, place, os.SEEK_SET)
events = [os.eventfd(0) for _ in range(watched)]
epolls = [select.epoll() for _ in range(sets)]
for fd in events:
    for epoll in epolls:
        epoll.register(fd, select.EPOLLIN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM, signal.SIGRTMIN})
for _ in range(queued):
    os.kill(os.getpid(), signal.SIGRTMIN)
for _ in range(timers):
    assert ctypes.CDLL(None).timer_create(1, None, ctypes.byref(ctypes.c_void_p())) == 0
threading.stack_size(64 << 10)
over = threading.Event()
workers = [threading.Thread(target=over.wait) for _ in range(threads)]
for worker in workers:
    worker.start()
open(sys.argv[1], "w").close()
signal.sigwait({signal.SIGTERM})
over.set()
for worker in workers:
    worker.join()
for fd in events:
    os.eventfd_write(fd, 1)
found = [
    [os.lseek(fd, 0, os.SEEK_CUR) for fd in opened] == list(range(files)),
    all(len(epoll.poll(0, watched + 1)) == watched for epoll in epolls),
    sum(signal.sigtimedwait({signal.SIGRTMIN}, 0) is not None for _ in range(queued)) == queued,
    open("/proc/self/timers").read().count("notify:") == timers,
]
open(sys.argv[2], "w").write(str(found))
"""


class Many(NamedTuple):
    """What the program has; `limit` is the number of descriptors that the shell of the commands allows at first."""

    files: int = 1
    threads: int = 1
    epoll_sets: int = 0
    watched: int = 0
    queued: int = 0
    timers: int = 0
    limit: int = 4096


@pytest.mark.parametrize(
    "many",
    [
        Many(files=100),
        Many(files=600, limit=256),
        Many(threads=300, limit=256),
        Many(threads=1000),
        Many(epoll_sets=10, watched=800),
        Many(queued=3000),
        Many(timers=3000),
    ],
    ids=lambda many: str(many)[5:-1],
)
def test_as_many_of_everything_as_a_server_has(many: Many, tmp_path: Path) -> None:
    def limited(*words: object) -> None:
        command = ["sh", "-c", f'ulimit -Sn {many.limit}; exec "$@"', "sh", *LAZYPROC, *map(str, words)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr

    ready, end, images, pid = (tmp_path / name for name in ("ready", "end", "images", "pid"))
    (tmp_path / "many.py").write_text(MANY)
    os.mkfifo(ready)
    command = [sys.executable, str(tmp_path / "many.py"), str(ready), str(end), *map(str, many[:-1])]
    quiet = subprocess.DEVNULL
    with (
        subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True) as started,
        killed_at_the_end(started.pid),
    ):
        ready.read_bytes()  # its end
        limited("checkpoint", started.pid, "-D", images)
    limited("restore", "-D", images, "--detach", "--pidfile", pid)
    root = int(pid.read_text())
    with killed_at_the_end(root):
        assert len(os.listdir(f"/proc/{root}/task")) == many.threads + 1
        waiting = os.pidfd_open(root)
        os.kill(root, signal.SIGTERM)
        assert select.select([waiting], [], [], 20)[0]
        os.close(waiting)
    assert end.read_text() == str([True] * 4)


# --- restore ----------------------------------------------------------------------------------------------


def test_a_detached_restore_runs_on(images: Path, program: Program, tmp_path: Path) -> None:
    fields = result("restore", "-D", images, "--lazy", "--detach", "--pidfile", tmp_path / "pid")
    assert (tmp_path / "pid").read_text() == f"{fields['root_pid']}\n"
    ways = ("zero", "eager", "urgent", "bulk", "dropped", "poisoned")
    of_a_move = {name for name in annotations_of(MigrateReport) if "pages" in name}
    assert {name for name in fields if "pages" in name} == of_a_move
    assert fields["pages_total"] == sum(fields[f"pages_{way}"] for way in ways) > 1900
    assert fields["ended"] is False
    with killed_at_the_end(fields["root_pid"]):
        lazyproc("explain", fields["root_pid"])  # it could be moved again
        stop_and_verify(fields["root_pid"], program.watch)


def test_an_attached_restore_passes_signals_and_the_status_on(images: Path, program: Program) -> None:
    command = [*LAZYPROC, "restore", "-D", str(images)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as restoring:
        try:
            before = program.watch.read().beats
            wait_until(lambda: program.watch.read().beats > before or restoring.poll() is not None, "it runs")
            program.watch.wait_beats()
            restoring.send_signal(signal.SIGTERM)
            assert restoring.wait(20) == 0
            program.watch.wait_ended()
        finally:
            restoring.kill()


def test_a_pidfile_that_cannot_be_written_is_known_before_the_tree_runs(images: Path, tmp_path: Path) -> None:
    """The command failed, and the tree ran all the same."""
    for pidfile, words in (
        (tmp_path / "none" / "pid", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        failed = lazyproc("restore", "-D", images, "--detach", "--pidfile", pidfile, code=1)
        assert failed.stderr == (
            f"lazyproc: {pidfile}: cannot be written: {words}; name another file with --pidfile\n"
        )
    pidfile = tmp_path / "pid"
    lazyproc("restore", "-D", tmp_path, "--pidfile", pidfile, code=1)
    assert not pidfile.exists()
    full = result("restore", "-D", images, "--detach", "--pidfile", "/dev/full")
    os.kill(full["root_pid"], signal.SIGKILL)


def test_numbers_that_no_process_has_are_an_error_of_the_images(images: Path, program: Program) -> None:
    (images / SUMS).unlink()
    name = f"core-{program.pid}.img"
    core = record(Folder(images).read(), name, pb.core_entry)
    core.tc.timers.real.vsec = (1 << 64) - 1
    writer = ImageWriter()
    writer.add(name, core)
    (images / name).write_bytes(writer.finish()[name])
    fields = result("restore", "-D", images, code=1)
    assert fields["where"] == f"tree of pid {program.pid}"
    assert "images may be garbled" in str(fields["remedy"])


def test_a_restore_that_cannot_be_is_exit_1(tmp_path: Path) -> None:
    fields = result("restore", "-D", tmp_path, code=1)
    assert fields["error"] == "missing"
    assert fields["where"] == "inventory.img"
    fields = result("restore", "-D", tmp_path, "--policy", "no-such", code=2)
    assert "smallest-first" in fields["remedy"]


# --- migrate, receive, serve ------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(*argv: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command with --listen on a free port: the process, and HOST:PORT once it listens."""
    command = [*LAZYPROC, argv[0], "--listen", "127.0.0.1:0", *argv[1:]]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            words = server.stderr.readline()
            assert "listening on port" in words, words
            yield server, f"127.0.0.1:{words.split()[-1]}"
        finally:
            server.kill()


def test_a_migration_counts_each_page_once(program: Program) -> None:
    with listening("receive", "--once", "--json") as (receiver, target):
        fields = result("migrate", program.pid, target)
        assert program.process.wait(10) == -signal.SIGKILL
        stop_and_verify(fields["root_pid"], program.watch)
        assert json.loads(receiver.communicate(timeout=20)[0]) == {"committed": 1}
        assert receiver.returncode == 0
    ways = ("zero", "eager", "urgent", "bulk", "dropped")
    assert fields["pages_total"] == sum(fields[f"pages_{way}"] for way in ways) > 1900
    assert 0 < fields["frozen_ms"] <= fields["blackout_ms"] <= fields["total_ms"]
    assert sum(fields["steps_ms"].values()) == pytest.approx(fields["blackout_ms"])
    assert fields["bytes_wire"] > 1900 * 4096
    assert fields["fault_us"].keys() == {"count", "p50", "p90", "p99", "max"}
    assert fields["mode"] == "postcopy"
    there = fields["steps_there_ms"]
    assert there.keys() >= {"receive", "decode", "processes", "threads", "durable", "release"}
    assert 0 < sum(there.values()) < fields["blackout_ms"]


def test_nobody_there_is_exit_1_and_it_runs_on(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    fields = result("migrate", program.pid, f"127.0.0.1:{port}", code=1)
    assert fields["exit_code"] == 1
    program.watch.wait_beats()
    program.stop_and_verify()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_before_the_hand_over_it_runs_on(program: Program, number: signal.Signals) -> None:
    """The receiver takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        command = [*LAZYPROC, "migrate", str(program.pid), f"127.0.0.1:{silent.getsockname()[1]}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as migrating, silent.accept()[0]:
            migrating.send_signal(number)
            _, words = migrating.communicate(timeout=20)
    assert migrating.returncode == 1
    assert words == "lazyproc: interrupted; the process runs here as before\n"
    program.watch.wait_beats()
    program.stop_and_verify()


def test_an_interrupted_receiver_is_exit_0() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        with listening("receive", "--json") as (receiver, _):
            receiver.send_signal(number)
            assert json.loads(receiver.communicate(timeout=20)[0]) == {"committed": 0}
            assert receiver.returncode == 0


def test_serve_and_restore_from_it(program: Program) -> None:
    with listening("serve", program.pid) as (server, target):
        program.watch.wait_beats()  # frozen only for a client
        fields = result("restore", "--from", target, "--detach")
        assert program.process.wait(10) == -signal.SIGKILL
        stop_and_verify(fields["root_pid"], program.watch)
        assert server.wait(20) == 0


def test_what_the_manual_says_of_python(program: Program, tmp_path: Path) -> None:
    manual = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    code = manual.partition("```python\n")[2].partition("```")[0]
    assert "lazyproc.migrate(" in code
    with listening("receive", "--once") as (_, target):
        code = f"pid = {program.pid}\n{code}\nprint(report.root_pid)".replace("127.0.0.1:7700", target)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        saved, restored, _, root = done.stdout.splitlines()
        assert saved.startswith(f"CheckpointReport(root_pid={program.pid}")
        assert restored.startswith("RestoreReport(")
        stop_and_verify(int(root), program.watch)


def test_an_interrupted_server_lets_the_tree_run(program: Program) -> None:
    with listening("serve", program.pid) as (server, _):
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    program.watch.wait_beats()
    program.stop_and_verify()


# --- everywhere -------------------------------------------------------------------------------------------


def test_the_log_file_has_events_and_the_failure_and_is_private(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lazyproc("restore", "-D", tmp_path, "--log-file", log, code=1)
    with running(*PACED, directory=tmp_path) as program:
        lazyproc("checkpoint", program.pid, "-D", tmp_path / "images", "--leave-running", "--log-file", log)
    lines = log.read_text().splitlines()
    assert "failed: ImageError: inventory.img: missing" in lines[0]
    assert any(line.endswith("Z frozen") for line in lines)
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "gone", ["-v 2>/dev/full", "-v 2>&-", ">/dev/full", "--json >&-", "--log-file /dev/full"]
)
def test_what_nobody_can_hear_was_done_all_the_same(gone: str, tmp_path: Path, program: Program) -> None:
    command = [*LAZYPROC, "checkpoint", str(program.pid), "-D", str(tmp_path / "images")]
    done = subprocess.run(["sh", "-c", f'exec "$@" {gone}', "sh", *command], capture_output=True, timeout=60)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr
    assert program.process.wait(10) == -signal.SIGKILL
    lazyproc("show", tmp_path / "images")


def test_a_name_that_no_terminal_can_show(tmp_path: Path, program: Program) -> None:
    """Standard output is strict wherever the locale is UTF-8, but for C.UTF-8: the tree had ended, with exit 1."""
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/im\xff")
    for command in (["checkpoint", str(program.pid), "-D", folder], ["show", folder]):
        done = subprocess.run([*LAZYPROC, *command], env=strict, capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"1 task" in done.stdout


def test_a_reader_that_leaves_during_a_move_changes_no_exit_code(program: Program) -> None:
    """Exit 1 would say that the process runs here."""
    with listening("receive", "--once", "--json") as (_, target):
        command = [*LAZYPROC, "migrate", str(program.pid), target, "-v", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as moving:
            assert moving.stderr is not None
            assert moving.stdout is not None
            while "prepared" not in moving.stderr.readline():
                pass
            moving.stderr.close()
            there = json.loads(moving.stdout.read())["root_pid"]
        assert moving.returncode == 0
        stop_and_verify(there, program.watch)


def test_what_only_tells_has_failed_when_nobody_can_hear_it(tmp_path: Path) -> None:
    for command in (["check"], ["sessions", "--json"], ["explain", str(os.getpid()), "--json"]):
        done = subprocess.run(
            ["sh", "-c", 'exec "$@" >/dev/full', "sh", *LAZYPROC, *command], stderr=subprocess.PIPE, text=True
        )
        assert done.returncode in (1, 3)
        assert "standard output: the result cannot be written: No space left on device" in done.stderr


@pytest.mark.slow
def test_the_demo_moves_and_verifies() -> None:
    done = lazyproc("demo")
    assert done.stdout.splitlines()[-1] == "verified"
    assert "it moved from host source to host destination" in done.stdout
