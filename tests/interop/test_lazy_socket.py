"""A real `criu restore --lazy-pages` hands its userfaultfds to lazyproc's pager."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lazyproc.uffd.device import Userfaultfd
from tests import peer
from tests.faults.helpers import gone
from tests.interop.both_ways import end
from tests.interop.criu_hosts import large_pipes
from tests.interop.lazily import (
    NAME,
    Dumped,
    LazyPages,
    connected,
    dumped,
    dumped_and_running,
    environment,
    lazy_pages,
    serving,
)
from tests.interop.test_criu_chains import chained
from tests.live.programs import wait_until
from tests.needs import require_root

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("root")]
SLOW = ("--max-rate", "3000000")
CARGO = ("memory_random", 16, 2, 1000)
SLOW_CARGO = ("memory_random", 16, 2, 20000)  # after a second it has not touched everything
ANCHORED = ("anon_inode:[userfaultfd]", "/memfd:lazyproc-ledger (deleted)")


@pytest.fixture
def root() -> None:
    require_root()


def crew(state: Path) -> dict[str, int]:
    """Who works for a command, by its environment, as soon as each has its name."""
    found: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (folder / "comm").read_text().strip()
            variables = (folder / "environ").read_bytes().split(b"\0")
            if name.startswith("lazyproc-") and f"XDG_STATE_HOME={state}".encode() in variables:
                found[name] = int(folder.name)
    return found if {"lazyproc-keeper", "lazyproc-pager", "lazyproc-guard"} == found.keys() else {}


def kill(pager: LazyPages, names: Sequence[str]) -> None:
    """All of them before anybody can notice the first."""
    helpers = [pager.helper(name) for name in names]
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for pid in helpers:
            os.kill(pid, number)


def resumed(session: str, state: Path) -> dict[str, Any]:
    """The report."""
    words = [sys.executable, "-m", "lazyproc.cli.main", "resume", session, "--json"]
    done = subprocess.run(words, env=environment(state), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def descriptors(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    return [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]


def when_restored(tmp_path: Path, deed: str) -> tuple[str, str]:
    """Options with which CRIU does this when every process is there and none runs yet."""
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || {deed}\n')
    script.chmod(0o755)
    return "--action-script", str(script)


def test_threads_whose_memory_comes_later(tmp_path: Path) -> None:
    with dumped("memory_random", 64, 4, 100, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            cargo.restored()
            cargo.watch.wait_beats()
            report = pager.finish()
        assert report["pages_total"] > 14000
        assert report["pages_bulk"] > 0
        assert not set(descriptors(cargo.pid)) & set(ANCHORED)
        assert not (cargo.images / NAME).exists()
        cargo.stop_and_verify()


def test_mappings_that_change_before_their_pages_are_there(tmp_path: Path) -> None:
    with dumped("fork_lazy", 4, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, "--max-rate", "1000000", directory=tmp_path) as pager:
            cargo.restored()
            cargo.watch.wait_beats(4)
            report = pager.finish()
        assert report["pages_urgent"] > 0
        cargo.stop_and_verify()


def test_what_is_done_before_anything_is_there(tmp_path: Path) -> None:
    with (
        dumped("trap_lazy", directory=tmp_path) as cargo,
        lazy_pages(cargo.images, "--no-bulk", directory=tmp_path) as pager,
    ):
        cargo.restored()
        pager.wait_state("running")
        cargo.watch.wait_beats()
        cargo.stop_and_verify()
        assert pager.finish()["ended"]


@pytest.mark.parametrize("name", ["pager", "keeper", "guard"])
def test_one_who_works_on_it_is_killed(tmp_path: Path, name: str) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, *SLOW, directory=tmp_path) as pager:
            cargo.restored()
            pager.wait_state("running")
            old = pager.helper(name)
            os.kill(old, signal.SIGKILL)
            wait_until(lambda: pager.helper(name) != old, f"the {name} is replaced")
            cargo.watch.wait_beats()
            report = pager.finish()
        assert report["pages_total"] == sum(
            report[f"pages_{way}"] for way in ("zero", "eager", "urgent", "bulk", "dropped")
        )
        cargo.stop_and_verify()


@pytest.mark.parametrize("names", [("pager",), ("keeper",), ("guard",), ("keeper", "pager")])
def test_they_are_killed_while_it_is_restored(tmp_path: Path, names: tuple[str, ...]) -> None:
    reached, go_on = tmp_path / "reached", tmp_path / "go-on"
    os.mkfifo(reached)
    os.mkfifo(go_on)
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, *SLOW, directory=tmp_path) as pager:
            restore = cargo.restore(
                *when_restored(tmp_path, f"{{ echo > {reached}; read answer < {go_on}; }}")
            )
            reached.read_text()
            pager.wait_state("arriving")
            old = {name: pager.helper(name) for name in names}
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for pid in old.values():
                    os.kill(pid, number)
            wait_until(
                lambda: all(pager.helper(name) != pid for name, pid in old.items()), "they are replaced"
            )
            go_on.write_text("go on\n")
            assert restore.wait() == 0, cargo.log("restore")
            pager.wait_state("running")
            cargo.watch.wait_beats()
            pager.finish()
        cargo.stop_and_verify()


@pytest.mark.parametrize("finishes", [True, False])
def test_the_pager_is_left_alone_while_it_is_restored(tmp_path: Path, finishes: bool) -> None:
    """Who was killed can no longer say whether the tree runs."""
    reached, go_on = tmp_path / "reached", tmp_path / "go-on"
    os.mkfifo(reached)
    os.mkfifo(go_on)
    with dumped(*CARGO, directory=tmp_path) as cargo:
        before = cargo.watch.read()
        with lazy_pages(cargo.images, *SLOW, directory=tmp_path) as pager:
            restore = cargo.restore(
                *when_restored(tmp_path, f"{{ echo > {reached}; read answer < {go_on}; }}")
            )
            reached.read_text()
            pager.wait_state("arriving")
            helpers = {name: pager.helper(name) for name in ("guard", "keeper", "pager")}
            for pid in helpers.values():
                os.kill(pid, signal.SIGSTOP)
            if finishes:
                go_on.write_text("go on\n")
                assert restore.wait() == 0
            for name in ("guard", "keeper"):
                os.kill(helpers[name], signal.SIGKILL)
                wait_until(lambda name=name: gone(helpers[name]), f"the {name} is dead")  # type: ignore[misc]
            os.kill(helpers["pager"], signal.SIGCONT)
            if finishes:
                cargo.watch.wait_beats()
                pager.finish()
                cargo.stop_and_verify()
                return
            assert pager.finish(expected=1)
            go_on.write_text("go on\n")
            assert restore.wait() != 0
        wait_until(lambda: gone(cargo.pid), "nothing of it is left")
        assert cargo.watch.read() == before


def test_the_keeper_is_killed_before_a_restore(tmp_path: Path) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            wait_until(lambda: bool(crew(pager.state)), "all are there")
            os.kill(crew(pager.state)["lazyproc-keeper"], signal.SIGKILL)
            assert "was killed" in pager.finish(expected=1)["error"]
        assert cargo.restore().wait() != 0


def test_images_of_lazyproc_and_a_process_without_privileges(tmp_path: Path) -> None:
    with (
        dumped("trap_lazy", "fork", 65534, directory=tmp_path, by_criu=False) as cargo,
        lazy_pages(cargo.images, "--no-bulk", directory=tmp_path) as pager,
    ):
        cargo.restored()
        pager.wait_anchored()
        cargo.watch.wait_beats()
        cargo.stop_and_verify()
        assert pager.finish()["ended"]


@pytest.mark.parametrize("served", [False, True])
def test_all_who_work_on_it_are_killed(tmp_path: Path, served: bool) -> None:
    with dumped(*SLOW_CARGO, directory=tmp_path) as cargo, ExitStack() as stack:
        options: tuple[str, ...] = SLOW
        if served:
            _, port = stack.enter_context(serving(cargo.images, directory=tmp_path))
            options, cargo.images = (*SLOW, "--from", f"127.0.0.1:{port}"), tmp_path / "fetched"
            cargo.images.mkdir()
        with lazy_pages(cargo.images, *options, directory=tmp_path) as pager:
            cargo.restored()
            record = pager.wait_state("running")
            pager.wait_anchored()
            kill(pager, ("guard", "keeper", "pager"))
            assert "lazyproc resume" in pager.finish(expected=4)["remedy"]
            assert resumed(record["id"], pager.state)["pages_total"] > 3000
        assert not set(descriptors(cargo.pid)) & set(ANCHORED)
        cargo.stop_and_verify()


def test_the_command_is_interrupted_while_pages_are_missing(tmp_path: Path) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, *SLOW, directory=tmp_path) as pager:
            cargo.restored()
            pager.wait_state("running")
            pager.process.send_signal(signal.SIGINT)
            assert pager.finish(expected=4)
            cargo.watch.wait_beats()
            wait_until(lambda: not pager.record(), "all pages have come")
        cargo.stop_and_verify()


def test_the_command_is_interrupted_before_a_restore(tmp_path: Path) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            pager.process.send_signal(signal.SIGINT)
            assert "nothing has been restored" in str(pager.finish(expected=1))
            wait_until(lambda: not (cargo.images / NAME).exists(), "the socket is gone")
        assert cargo.restore().wait() != 0


def test_a_restore_that_fails_at_once(tmp_path: Path) -> None:
    """The number of the process is taken, by itself."""
    with (
        dumped_and_running(*CARGO, directory=tmp_path) as cargo,
        lazy_pages(cargo.images, directory=tmp_path) as pager,
    ):
        assert cargo.restore().wait() != 0
        assert "the restore failed" in pager.finish(expected=1)["error"]
        cargo.watch.wait_beats()


@pytest.mark.parametrize("deed", ["exit 1", "kill -9 $PPID"])
def test_a_restore_that_fails_late(tmp_path: Path, deed: str) -> None:
    """When every process is there: CRIU ends them, or is killed and leaves them behind."""
    with dumped(*CARGO, directory=tmp_path) as cargo:
        before = cargo.watch.read()
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            assert cargo.restore(*when_restored(tmp_path, deed)).wait() != 0
            assert "the restore failed" in pager.finish(expected=1)["error"]
        wait_until(lambda: gone(cargo.pid), "nothing of it is left")
        assert cargo.watch.read() == before
        assert not pager.record()


# --- what connects and is no restorer -----------------------------------------------------------------------------


def send(caller: socket.socket, number: int, *fds: int) -> None:
    """One process's record, as CRIU sends it."""
    caller.send(struct.pack("<i", number))
    if fds:
        caller.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_strangers_are_refused_and_the_restorer_is_not(tmp_path: Path) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, directory=tmp_path) as pager:
            with connected(cargo.images) as silent:
                with connected(cargo.images) as caller:  # a process that is not in the images
                    send(caller, cargo.pid + 1)
                    assert caller.recv(1) == b""
                with connected(cargo.images) as caller:  # who lives is said to be dead
                    send(caller, -cargo.pid)
                    assert caller.recv(1) == b""
                with connected(cargo.images) as caller, open("/dev/null") as null:  # no userfaultfd
                    send(caller, cargo.pid, null.fileno())
                    assert caller.recv(1) == b""
                with connected(cargo.images) as caller, Userfaultfd.open() as one:  # two of them
                    send(caller, cargo.pid, one.fileno(), one.fileno())
                    assert caller.recv(1) == b""
                cargo.restored()
                cargo.watch.wait_beats()
                assert silent.recv(1) == b""
            pager.finish()
        assert pager.log.read_text().count("no restorer of these images") == 4
        cargo.stop_and_verify()


def test_another_user_may_not_connect(tmp_path: Path) -> None:
    with dumped(*CARGO, directory=tmp_path) as cargo, lazy_pages(cargo.images, directory=tmp_path) as pager:
        path = cargo.images / NAME
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        cargo.images.chmod(0o755)
        with connected(cargo.images, uid=65534) as caller:
            assert caller.recv(1) == b""
        cargo.restored()
        pager.finish()
        assert "the peer is uid 65534" in pager.log.read_text()
        cargo.stop_and_verify()


@pytest.mark.parametrize("end", ["closes", "garbage"])
def test_the_word_that_all_is_restored_never_comes(tmp_path: Path, end: str) -> None:
    with (
        dumped(*CARGO, directory=tmp_path) as cargo,
        lazy_pages(cargo.images, directory=tmp_path) as pager,
        connected(cargo.images) as caller,
        Userfaultfd.open() as device,
    ):
        device.api()
        send(caller, cargo.pid, device.fileno())
        pager.wait_state("arriving")
        if end == "garbage":
            caller.send(b"FTSX")
        else:
            caller.close()
        assert "the restore failed" in pager.finish(expected=1)["error"]
        assert not pager.record()


# --- trees ---------------------------------------------------------------------------------------------------------


def test_a_tree_with_a_zombie(tmp_path: Path) -> None:
    with dumped("zombie", 8, directory=tmp_path) as cargo:
        with lazy_pages(cargo.images, *SLOW, directory=tmp_path) as pager:
            cargo.restored()
            pager.wait_anchored()
            cargo.watch.wait_beats()
            pager.finish()
        cargo.stop_and_verify()


# --- pages that are elsewhere ---------------------------------------------------------------------------------------


def refuses(images: Path, port: int) -> str:
    """What the command says."""
    words = ["lazy-pages", "-D", str(images), "--from", f"127.0.0.1:{port}"]
    refused = subprocess.run(
        [sys.executable, "-m", "lazyproc.cli.main", *words],
        env=environment(images.parent / "state"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2, refused.stderr
    return refused.stderr


@pytest.mark.parametrize("killed", [False, True])
def test_pages_come_from_a_server_of_images(tmp_path: Path, killed: bool) -> None:
    """An empty folder becomes one that CRIU restores from; a server that is lost is called again."""
    with dumped(*SLOW_CARGO, directory=tmp_path) as cargo, ExitStack() as stack:
        full, cargo.images = cargo.images, tmp_path / "fetched"
        server, port = stack.enter_context(serving(full, directory=tmp_path))
        cargo.images.mkdir()
        options = ("--from", f"127.0.0.1:{port}", *SLOW)
        with lazy_pages(cargo.images, *options, directory=tmp_path) as pager:
            fetched = sum(path.stat().st_size for path in cargo.images.glob("pages-*"))
            assert fetched < sum(path.stat().st_size for path in full.glob("pages-*")) / 2
            cargo.restored()
            pager.wait_state("running")
            cargo.watch.wait_beats(1)
            if killed:
                server.kill()
                server.wait()
                stack.enter_context(serving(full, directory=tmp_path, port=port))
            cargo.watch.wait_beats()
            report = pager.finish()
        assert report["pages_total"] > 3000
        assert ("reconnecting" in pager.log.read_text()) == killed
        cargo.stop_and_verify()


def test_the_server_has_other_images(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        dumped(*CARGO, directory=tmp_path / "one") as cargo,
        dumped(*CARGO, directory=tmp_path / "two") as other,
    ):
        with serving(other.images, directory=tmp_path) as (_, port):
            refused = refuses(cargo.images, port)
        assert "another checkpoint" in refused


def test_a_process_that_runs_is_no_source(tmp_path: Path) -> None:
    """It runs on, not even frozen."""
    with dumped_and_running(*CARGO, directory=tmp_path) as cargo:
        with serving(cargo.pid, directory=tmp_path) as (_, port):
            refused = refuses(cargo.images, port)
            cargo.watch.wait_beats()
        assert "serve -D" in refused


@pytest.mark.parametrize("from_server", [False, True])
def test_pages_lie_in_parents(tmp_path: Path, from_server: bool) -> None:
    """CRIU itself reads those that it finds there, and fetches others never."""
    with chained(tmp_path, "mixed", "8", "2", "20000") as made, ExitStack() as stack:
        cargo = Dumped(made.newest, made.program.pid, made.program.watch)
        options: tuple[str, ...] = ()
        if from_server:
            _, port = stack.enter_context(serving(made.newest, directory=tmp_path))
            cargo.images, options = tmp_path / "fetched", ("--from", f"127.0.0.1:{port}")
            cargo.images.mkdir()
        with lazy_pages(cargo.images, *options, directory=tmp_path) as pager:
            cargo.restored()
            pager.finish()
        end(cargo.pid, cargo.watch)


@contextmanager
def criu_page_server(images: Path) -> Iterator[int]:
    """`criu page-server --lazy-pages`, which ends when every page was fetched; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    reading, writing = os.pipe()
    words = ["page-server", "--no-default-config", "-D", str(images), "-o", "page-server.log", "-v4"]
    words += ["--lazy-pages", "--address", "127.0.0.1", "--port", str(port), "--status-fd", str(writing)]
    process = subprocess.Popen(
        [*peer.criu(), *words],
        pass_fds=[writing],
        stdin=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"\0"
        yield port
        assert process.wait(30) == 0
    finally:
        os.close(reading)
        process.kill()
        process.wait()


@pytest.mark.parametrize("killed", [(), ("pager",), ("guard", "keeper", "pager")])
def test_pages_come_from_a_page_server_of_criu(tmp_path: Path, killed: tuple[str, ...]) -> None:
    """Who is killed is replaced, or resumed; the connection is the same."""
    with (
        large_pipes(),
        dumped(*SLOW_CARGO, directory=tmp_path) as cargo,
        criu_page_server(cargo.images) as port,
    ):
        options = ("--page-server", f"127.0.0.1:{port}", *SLOW)
        with lazy_pages(cargo.images, *options, directory=tmp_path) as pager:
            cargo.restored()
            record = pager.wait_state("running")
            pager.wait_anchored()
            kill(pager, killed)
            if len(killed) < 3:
                cargo.watch.wait_beats()
                report = pager.finish()
            else:
                assert pager.finish(expected=4)
                report = resumed(record["id"], pager.state)
        assert report["pages_total"] > 3000
        cargo.stop_and_verify()
