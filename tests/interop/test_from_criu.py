"""`lazyproc restore --lazy -D DIR --from` takes pages from CRIU's page servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Pair
from lazyproc.keys import make_keys
from tests.faults.helpers import DESTINATION, journal, sessions
from tests.interop.criu_hosts import END_S, FREE_NUMBER, Criu, criu, large_pipes, run_criu, running_there
from tests.live.moving import CLI, INSECURE, Moved, run_cli
from tests.live.programs import Program, wait_until
from tests.live.real import check_clean

PORT = 7000
MIB = 16


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with large_pipes(), running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as it:
        it.watch.wait_beats()
        yield it


@contextmanager
def dumping_lazily(pair: Pair, program: Program, *options: object) -> Iterator[tuple[Path, Criu]]:
    """`criu dump --lazy-pages`: the images, and the command that serves the rest."""
    images = pair.shared / "images"
    images.mkdir()
    vpid, address = pair.source.vpid(program.pid), pair.source.address
    words = ("--tree", vpid, "--lazy-pages", "--address", address, "--port", PORT, *options)
    with criu(pair.source, images, "dump", *words) as dump:
        yield images, dump


def words(pair: Pair, images: Path) -> list[object]:
    return [
        "restore",
        "--lazy",
        "-D",
        images,
        "--from",
        f"{pair.source.address}:{PORT}",
        "--detach",
        "--json",
        "-v",
    ]


def restore(pair: Pair, images: Path, *options: object) -> Moved:
    done = run_cli(pair.destination, *words(pair, images), *(options or INSECURE))
    report = json.loads(done.stdout)
    return Moved(pair.destination.pid(report["root_pid"]), report, done.stderr)


@contextmanager
def restoring(pair: Pair, images: Path) -> Iterator[subprocess.Popen[Any]]:
    """The same under way: the tree runs, most of its memory still to come."""
    log = pair.destination.outside / "restore.log"
    argv = [*CLI, *map(str, words(pair, images)), *INSECURE]
    with log.open("w") as out:
        process = pair.destination.popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        wait_until(lambda: process.poll() is not None or "running" in log.read_text().splitlines(), "it runs")
        assert process.poll() is None, log.read_text()
        journal(pair.destination, DESTINATION)
        yield process
    finally:
        process.kill()
        process.wait()


def ends_well(program: Program, pid: int) -> None:
    program.watch.wait_beats()
    os.kill(pid, signal.SIGTERM)
    program.watch.wait_ended()


def test_pages_of_a_frozen_process(pair: Pair, program: Program) -> None:
    """CRIU's dump ends its source when all pages are here."""
    with dumping_lazily(pair, program) as (images, dump):
        moved = restore(pair, images)
        dump.finish()
        program.process.wait()
        check_clean(moved.pid)
        assert moved.report["pages_urgent"] + moved.report["pages_bulk"] > 256 * MIB * 0.9
        ends_well(program, moved.pid)


@pytest.mark.long
def test_256_mib(pair: Pair) -> None:
    with (
        large_pipes(),
        running_there(pair.source, "mixed", 256, 3, 20_000, directory=pair.shared) as program,
        dumping_lazily(pair, program) as (images, dump),
    ):
        with restoring(pair, images) as restorer:
            assert restorer.wait(END_S) == 0
        dump.finish()
        program.process.wait()
        moved = pair.destination.pid(FREE_NUMBER)
        check_clean(moved)
        ends_well(program, moved)


def test_pages_of_images(pair: Pair, program: Program) -> None:
    """`criu page-server --lazy-pages`, over TLS."""
    images = pair.shared / "images"
    images.mkdir()
    run_criu(pair.source, images, "dump", "--tree", pair.source.vpid(program.pid))
    program.process.wait()
    ours, theirs = make_keys(
        pair.shared / "keys", (str(pair.source.address), str(pair.destination.address)), days=9
    )
    tls = (
        "--tls",
        "--tls-no-cn-verify",
        "--tls-cert",
        ours.cert,
        "--tls-key",
        ours.key,
        "--tls-cacert",
        ours.ca,
    )
    address = ("--address", pair.source.address, "--port", PORT)
    with criu(pair.source, images, "page-server", "--lazy-pages", *address, *tls) as server:
        options = ("--tls-cert", theirs.cert, "--tls-key", theirs.key, "--tls-ca", theirs.ca)
        moved = restore(pair, images, *options)
        server.finish()
        ends_well(program, moved.pid)


def test_a_restore_that_fails_lets_the_source_run_on(pair: Pair, program: Program) -> None:
    """CRIU would end it for a connection that ends in order."""
    with dumping_lazily(pair, program) as (images, dump):
        (images / f"core-{FREE_NUMBER}.img").rename(images / "elsewhere")
        run_cli(pair.destination, *words(pair, images), *INSECURE, expected=1)
        assert dump.process.poll() is None, "it is not even dialled for images that are not whole"
        (images / "elsewhere").rename(images / f"core-{FREE_NUMBER}.img")
        with running_there(pair.destination, "steady", directory=pair.shared):  # has the number
            run_cli(pair.destination, *words(pair, images), *INSECURE, "--pidns", "host", expected=1)
        assert dump.process.wait(END_S) != 0
    program.watch.wait_beats()
    program.stop_and_verify()


def test_a_restore_that_is_killed_is_completed(slow_pair: Pair) -> None:
    """The source stands still meanwhile: its connection outlives the restore."""
    pair = slow_pair
    with (
        large_pipes(),
        running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as program,
        dumping_lazily(pair, program) as (images, dump),
    ):
        with restoring(pair, images) as restorer:
            restorer.kill()
            restorer.wait()
        (session,) = sessions(pair.destination)
        assert session["state"] == "orphaned"
        assert dump.process.poll() is None
        report = json.loads(run_cli(pair.destination, "resume", session["id"], "--json").stdout)
        assert report["pages_urgent"] + report["pages_bulk"] > 0
        dump.finish()
        program.process.wait()
        program.watch.wait_beats()
        os.kill(pair.destination.pid(session["root_pid"]), signal.SIGTERM)
        program.watch.wait_ended()


def test_a_server_that_is_lost_parks_the_tree(slow_pair: Pair) -> None:
    """Who touches a missing page waits, and nothing is read as zeros."""
    pair = slow_pair
    with (
        large_pipes(),
        running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as program,
        dumping_lazily(pair, program) as (images, dump),
        restoring(pair, images) as restorer,
    ):
        dump.process.kill()
        assert restorer.wait(END_S) == 4, (pair.destination.outside / "restore.log").read_text()
        (session,) = sessions(pair.destination)
        assert session["state"] == "orphaned"
        run_cli(pair.destination, "resume", session["id"], expected=2)
        run_cli(pair.destination, "abort", session["id"], expected=5)
        assert program.watch.read().errors == 0 or "another copy" in program.watch.read().what
