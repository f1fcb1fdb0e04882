"""`--tls` of lazyproc-criu's page-server and lazy-pages: pages come from who proves whose they are."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.keys import Pair, make_keys
from tests.interop.test_criu_command import DEADLINE_S, Place, dumped, lazy_pages, place
from tests.live.programs import running
from tests.needs import require_root

__all__ = ["place"]  # the fixture
HERE, ELSEWHERE = "127.0.0.1", "elsewhere.example"


@pytest.fixture(autouse=True)
def _root() -> None:
    require_root()


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Pair, Pair]:
    here, elsewhere = make_keys(tmp_path / "keys", (HERE, ELSEWHERE), days=9)
    return here, elsewhere


def tls(pair: Pair) -> list[object]:
    return ["--tls", "--tls-cert", pair.cert, "--tls-key", pair.key, "--tls-cacert", pair.ca]


@contextmanager
def serving(place: Place, *options: object) -> Iterator[int]:
    """`page-server --lazy-pages` on a port of its own, until somebody has all."""
    with socket.create_server((HERE, 0)) as sock:
        port = int(sock.getsockname()[1])
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    words = ("--lazy-pages", "--address", HERE, "--port", port, "--status-fd", writing)
    server = place.start("page-server", *words, *options, close_fds=False)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"\0"
        yield port
        assert server.wait(DEADLINE_S) == 0
    finally:
        os.close(reading)
        server.kill()
        server.wait()


def test_whole_over_tls(place: Place, keys: tuple[Pair, Pair], tmp_path: Path) -> None:
    """Not from a server of another name, unless that does not matter; not by a client whom the CA has revoked."""
    here, elsewhere = keys
    with running("memory_random", 16, 2, 100, directory=tmp_path) as program:
        program.watch.wait_beats()
        dumped(place, program)
        with serving(place, *tls(elsewhere), "--tls-cacrl", revoked(here)) as port:
            place.images = Path(shutil.copytree(place.images, tmp_path / "there"))
            asking = ["--page-server", "--address", HERE, "--port", port]
            assert place.run("lazy-pages", *asking, *tls(elsewhere)) == 1
            assert "not for that name" in place.errors("lazy-pages")[0]
            asking.append("--tls-no-cn-verify")
            with as_client(here, port) as revoked_one, pytest.raises(ssl.SSLError, match="revoked"):
                revoked_one.recv(1)
            with lazy_pages("ours", place, *asking, *tls(elsewhere)) as daemon:
                place.restore("--lazy-pages")
                assert daemon.wait(DEADLINE_S) == 0, place.log("lazy-pages")
        place.verify(program)


def as_client(pair: Pair, port: int) -> ssl.SSLSocket:
    """In TLS 1.3 it hears with the first answer that it is not let in, and a daemon asks when CRIU restores."""
    context = ssl.create_default_context(cafile=pair.ca)
    context.check_hostname = False
    context.load_cert_chain(pair.cert, pair.key)
    return context.wrap_socket(socket.create_connection((HERE, port), DEADLINE_S))


def revoked(pair: Pair) -> Path:
    """A list of the CA with the certificate of `pair`."""
    folder = pair.ca.parent
    (folder / "index").touch()
    (folder / "ca.conf").write_text(
        f"[ca]\ndefault_ca = it\n[it]\ndatabase = {folder}/index\ncertificate = {pair.ca}\n"
        f"private_key = {folder}/ca.key\ndefault_md = sha256\ndefault_crl_days = 9\n"
    )
    for words in (("-revoke", pair.cert), ("-gencrl", "-out", folder / "crl.pem")):
        subprocess.run(
            ["openssl", "ca", "-config", folder / "ca.conf", *words], check=True, capture_output=True
        )
    return folder / "crl.pem"
