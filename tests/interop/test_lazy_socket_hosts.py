"""CRIU dumps lazily on one host and restores lazily on another, with lazyproc between the two."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Pair
from tests.interop.criu_hosts import restored_by_criu
from tests.interop.lazily import NAME
from tests.interop.test_from_criu import PORT, dumping_lazily, ends_well, program
from tests.live.moving import CLI, INSECURE
from tests.live.programs import Program, wait_until

pytestmark = pytest.mark.long

__all__ = ["program"]


@contextmanager
def lazy_pages(pair: Pair, images: Path, work: Path) -> Iterator[subprocess.Popen[Any]]:
    """`lazyproc lazy-pages` at the destination, ready for a restorer; its pages come from CRIU's dump."""
    work.mkdir()
    words = ["-D", images, "--work-dir", work, "--page-server", f"{pair.source.address}:{PORT}", *INSECURE]
    with (work / "lazy-pages.out").open("w") as out:
        argv = [*CLI, "lazy-pages", *map(str, words), "--json"]
        process = pair.destination.popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: process.poll() is not None or (work / NAME).is_socket(), "it listens")
        assert process.poll() is None, (work / "lazy-pages.out").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_frozen_process_moves(pair: Pair, program: Program) -> None:
    """It ends at its source when every page is here."""
    work = pair.shared / "work"
    with (
        dumping_lazily(pair, program) as (images, dump),
        lazy_pages(pair, images, work) as pages,
        restored_by_criu(pair.destination, images, "--lazy-pages", work=work) as pid,
    ):
        assert pages.wait(60) == 0, (work / "lazy-pages.out").read_text()
        report = json.loads((work / "lazy-pages.out").read_text().splitlines()[-1])
        assert report["pages_urgent"] + report["pages_bulk"] > 256 * 16 * 0.9
        dump.finish()
        program.process.wait()
        ends_well(program, pid)


@pytest.mark.parametrize("deed", ["exit 1", "kill -9 $PPID"])
def test_a_restore_that_fails_lets_the_source_run_on(pair: Pair, program: Program, deed: str) -> None:
    work = pair.shared / "work"
    script = pair.shared / "script"
    script.write_text(f'#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || {deed}\n')
    script.chmod(0o755)
    with dumping_lazily(pair, program) as (images, dump), lazy_pages(pair, images, work) as pages:
        options = ("--lazy-pages", "--action-script", script)
        with suppress(AssertionError), restored_by_criu(pair.destination, images, *options, work=work):
            pytest.fail("it was to fail")
        assert pages.wait(60) == 1, (work / "lazy-pages.out").read_text()
        assert dump.process.wait(60) != 0
        program.watch.wait_beats()
        program.stop_and_verify()
