"""`criu lazy-pages --page-server` asks `lazyproc serve` for pages, on the port of our own protocol."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lazyproc.hosts import Pair
from lazyproc.keys import make_keys
from tests.faults.hostile import Listener, listening
from tests.interop.criu_hosts import Criu, criu, restored_by_criu, run_criu, running_there
from tests.live.moving import INSECURE
from tests.live.programs import Watch

MIB = 16


@dataclass(frozen=True)
class Dumped:
    """Images of a process that has ended, and its status block."""

    images: Path
    watch: Watch


@pytest.fixture
def dumped(pair: Pair) -> Iterator[Dumped]:
    images = pair.shared / "images"
    with running_there(pair.source, "mixed", MIB, 3, 500, directory=pair.shared) as it:
        it.watch.wait_beats()
        images.mkdir()
        run_criu(pair.source, images, "dump", "--tree", pair.source.vpid(it.pid))
        it.process.wait()
        yield Dumped(images, it.watch)


@contextmanager
def restoring_lazily(
    pair: Pair, images: Path, server: Listener, *options: object
) -> Iterator[tuple[int, Criu]]:
    """CRIU's daemon asks the server for the pages of the tree that CRIU restores."""
    work = pair.shared / "work"
    work.mkdir(exist_ok=True)
    address, _, port = server.address.rpartition(":")
    with (
        criu(
            pair.destination, images, "lazy-pages", "--page-server", "--address", address, "--port", port,
            *options, work=work,
        ) as daemon,
        restored_by_criu(pair.destination, images, "--lazy-pages", work=work) as pid,
    ):  # fmt: skip
        yield pid, daemon


def test_pages_of_images(pair: Pair, dumped: Dumped) -> None:
    with (
        listening(pair.source, "serve", "-D", dumped.images, *INSECURE) as server,
        restoring_lazily(pair, dumped.images, server) as (pid, daemon),
    ):
        dumped.watch.wait_beats()
        daemon.finish()
        os.kill(pid, signal.SIGTERM)
        dumped.watch.wait_ended()


def test_over_tls(pair: Pair, dumped: Dumped) -> None:
    """From the first byte, each end with its certificate; a client without one gets nothing."""
    hosts = str(pair.source.address), str(pair.destination.address)
    ours, theirs = make_keys(pair.shared / "keys", hosts, days=9)
    options = ("--tls-cert", ours.cert, "--tls-key", ours.key, "--tls-ca", ours.ca)
    with listening(pair.source, "serve", "-D", dumped.images, *options) as server:
        with server.dial_from(pair.destination)() as stranger:
            stranger.sendall(bytes.fromhex("07000000") + bytes(60))
            assert stranger.recv(100) == b""
        tls = ("--tls", "--tls-cert", theirs.cert, "--tls-key", theirs.key, "--tls-cacert", theirs.ca)
        with restoring_lazily(pair, dumped.images, server, *tls) as (pid, daemon):
            dumped.watch.wait_beats()
            daemon.finish()
            os.kill(pid, signal.SIGTERM)
            dumped.watch.wait_ended()
