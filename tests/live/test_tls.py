"""TLS between two hosts: with both certificates in order everything goes as without, otherwise nobody gets in."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.keys import make_keys
from tests.faults.helpers import DESTINATION, SOURCE, journals, kill
from tests.live.moving import CLI, Moved, Receiver, migrate, move, receiving, run_cli
from tests.live.programs import Program, running, wait_until
from tests.live.real import ending, migrating, processes_of, runs

MIB = "16"
SLOW = (
    "--max-rate",
    "5000000",
    "--retry-for",
    "8",
)  # 3 seconds for 16 MiB; not without end when a test fails


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", MIB, "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


def keys(
    pair: Pair, name: str = "keys", *, days: int = 9, hosts: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The options of the source and of the destination, with keys of a CA of their own."""
    hosts = hosts or (str(pair.source.address), str(pair.destination.address))
    made = make_keys(pair.shared / name, tuple(hosts), days=days)
    one, other = (
        ["--tls-cert", str(each.cert), "--tls-key", str(each.key), "--tls-ca", str(each.ca)] for each in made
    )
    return one, other


def relays(host: Host) -> list[int]:
    return [pid for pid, comm in processes_of(host).items() if comm == "lazyproc-relay" and runs(pid)]


@contextmanager
def secured(pair: Pair, *options: str) -> Iterator[Receiver]:
    ours, theirs = keys(pair)
    with receiving(pair.destination, *options, trust=theirs, clients=ours) as receiver:
        yield receiver


# --- everything in order ----------------------------------------------------------------------------------------


def test_a_program_moves_and_no_relay_is_left(pair: Pair, program: Program) -> None:
    with secured(pair) as receiver:
        moved = move(pair.source, receiver, program.pid)
        assert moved.report["rtt_us"] > 0
        moved.end(program.watch)
    for host in (pair.source, pair.destination):
        wait_until(lambda host=host: not relays(host), "the relays have ended")  # type: ignore[misc]


def test_what_crosses_the_network_cannot_be_read(pair: Pair, program: Program) -> None:
    """In plain the frames' names of JSON are there for everybody to see; the same in TLS shows none."""
    assert b'"session"' in captured(pair, program, secure=False)
    seen = captured(pair, program, secure=True)
    assert len(seen) > 1000
    assert b'"session"' not in seen


def captured(pair: Pair, program: Program, *, secure: bool) -> bytes:
    """What `explain --peer` sends and gets, by the interface of the receiver."""
    ours, theirs = keys(pair, f"keys-{secure}") if secure else (["--insecure"], ["--insecure"])
    sniffer = pair.destination.popen([CLI[0], "-c", SNIFF], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert sniffer.stdout is not None
        assert sniffer.stdout.readline() == b"ready\n"
        with receiving(pair.destination, trust=theirs, clients=ours) as receiver:
            words = ("explain", pair.source.vpid(program.pid), "--peer", receiver.address, *receiver.trust)
            run_cli(pair.source, *words)
        seen: bytes = sniffer.communicate(b"end", timeout=10)[0]
        return seen
    finally:
        sniffer.kill()
        sniffer.wait()


SNIFF = """
import select, socket, sys
sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
print("ready", flush=True)
while sock in select.select([sock, 0], [], [])[0]:
    sys.stdout.buffer.write(sock.recv(1 << 16))
"""


def test_a_tree_is_fetched_from_serve(pair: Pair, program: Program) -> None:
    fetches, serves = keys(pair, hosts=(str(pair.destination.address), str(pair.source.address)))
    words = [
        "serve",
        str(pair.source.vpid(program.pid)),
        "--listen",
        f"{pair.source.address}:0",
        *serves,
        "-v",
    ]
    log = pair.source.outside / "serve.log"
    with log.open("w") as file:
        server = pair.source.popen([*CLI, *words], stdin=subprocess.DEVNULL, stderr=file)
    try:
        wait_until(lambda: "listening on port" in log.read_text(), "serve listens")
        port = re.search(r"listening on port (\d+)", log.read_text())
        assert port
        address = f"{pair.source.address}:{port[1]}"
        done = run_cli(pair.destination, "restore", "--from", address, *fetches, "--detach", "--json")
        assert server.wait(10) == 0, log.read_text()
    finally:
        server.kill()
        server.wait()
    report = json.loads(done.stdout)
    Moved(pair.destination.pid(report["root_pid"]), report, "").end(program.watch)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_a_killed_relay_is_a_lost_link(pair: Pair, program: Program, end: str) -> None:
    """And a lost link is opened again, in TLS again, by whoever keeps the session."""
    with secured(pair) as receiver, migrating(pair.source, receiver, program.pid, *SLOW) as journey:
        journey.wait_running()
        host: Host = getattr(pair, end)
        wait_until(lambda: len(relays(host)) == 3, "one relay for each connection")
        for pid in relays(host):
            os.kill(pid, signal.SIGKILL)
        program.watch.wait_beats()
        new, report = journey.arrive()
        assert report["reconnects"] >= 1
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()


def test_the_source_is_resumed_with_the_files_that_its_journal_names(pair: Pair, program: Program) -> None:
    with secured(pair) as receiver, migrating(pair.source, receiver, program.pid, *SLOW) as journey:
        journey.wait_running()
        kill(pair.source, SOURCE, "keeper", "server")
        assert journey.finish(expected=4)["exit_code"] == 4
        (facts,) = journals(pair.source, SOURCE)
        assert "PRIVATE" not in json.dumps(facts)
        answer = json.loads(run_cli(pair.source, "resume", facts["id"], "--json").stdout)
        assert answer["reconnects"] == 1
        new = pair.destination.pid(answer["root_pid"])
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()


@pytest.mark.parametrize("resumed", [False, True], ids=["keeper", "resumed"])
def test_without_receive_the_keeper_lets_in_who_has_a_certificate(
    pair: Pair, program: Program, resumed: bool
) -> None:
    """The keeper that was there from the start, or the one that `resume` makes out of the journal."""
    with secured(pair) as receiver, migrating(pair.source, receiver, program.pid, *SLOW) as journey:
        journey.wait_running()
        receiver.process.send_signal(signal.SIGINT)
        assert receiver.process.wait(10) == 0
        if resumed:
            (facts,) = journals(pair.destination, DESTINATION)
            kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
            run_cli(pair.destination, "resume", facts["id"])
        else:
            for pid in relays(pair.source):
                os.kill(pid, signal.SIGKILL)
        new, report = journey.arrive()
        assert report["reconnects"] == 1
        with ending(new):
            program.watch.wait_beats()
            os.kill(new, signal.SIGTERM)
            program.watch.wait_ended()


# --- nobody gets in ---------------------------------------------------------------------------------------------


def refused(pair: Pair, receiver: Receiver, program: Program, code: int = 1) -> str:
    """What is said when it does not move; it runs on, and the receiver takes the next one."""
    done = migrate(pair.source, receiver, program.pid, expected=code)
    program.watch.wait_beats()
    assert receiver.process.poll() is None
    assert journals(pair.source, SOURCE) == []
    assert journals(pair.destination, DESTINATION) == []
    error: str = json.loads(done.stdout)["error"]
    return f"{json.loads(done.stdout)['where']}: {error}; {json.loads(done.stdout)['remedy']}"


@pytest.mark.parametrize("whose", ["source", "destination"])
def test_of_another_ca(pair: Pair, program: Program, whose: str) -> None:
    """Either end has keys of a CA that the other one does not know, and takes the other end's."""
    ours, theirs = keys(pair)
    others, others_there = keys(pair, "others")
    if whose == "source":
        ours = [*others[:4], *ours[4:]]
    else:
        theirs = [*others_there[:4], *theirs[4:]]
    with receiving(pair.destination, trust=theirs, clients=ours) as receiver:
        said = refused(pair, receiver, program)
        assert receiver.address in said
        if whose == "source":
            assert f"does not take our certificate {ours[1]}: it is not of the CA" in said
            assert "refused a connection: 10.77.0.1:" in receiver.notes()
            assert f"is not of the CA in {theirs[5]}" in receiver.notes()
        else:
            assert f"its certificate is not of the CA in {ours[5]}" in said
            assert f"does not take our certificate {theirs[1]}" in receiver.notes()


@pytest.mark.parametrize("whose", ["source", "destination"])
def test_expired(pair: Pair, program: Program, whose: str) -> None:
    """Made on a host whose clock is behind: here it ended yesterday."""
    ours, theirs = keys(pair)
    directory = pair.shared / "keys"
    number, host = (0, pair.source) if whose == "source" else (1, pair.destination)
    options = (ours, theirs)[number]
    expire(directory, Path(options[1]), str(host.address))
    with receiving(pair.destination, trust=theirs, clients=ours) as receiver:
        said = refused(pair, receiver, program)
        assert ("our certificate" in said) == (whose == "source")
        assert "expired" in said
        assert "lazyproc keys" in said


def expire(directory: Path, cert: Path, host: str) -> None:
    """Sign it again, for a time that is over (x509(1) has only days from now in OpenSSL 3.0, ca(1) has dates)."""
    config = directory / "ca.cnf"
    (directory / "index").write_text("")
    (directory / "serial").write_text("77")
    config.write_text(
        f"[ca]\ndefault_ca = c\n[c]\ndatabase = {directory}/index\nserial = {directory}/serial\n"
        f"new_certs_dir = {directory}\ndefault_md = sha256\npolicy = p\nx509_extensions = e\n[p]\n"
        f"commonName = supplied\n[e]\nsubjectAltName = IP:{host}\n[req]\ndistinguished_name = n\nprompt = no\n"
        f"[n]\nCN = {host}\n"
    )
    key, request = cert.with_suffix(".key"), cert.with_suffix(".csr")
    for argv in (
        ["req", "-new", "-config", config, "-key", key, "-out", request],
        [
            *("ca", "-batch", "-notext", "-config", config, "-cert", directory / "ca.pem", "-keyfile"),
            *(directory / "ca.key", "-in", request, "-out", cert),
            *("-startdate", "20200101000000Z", "-enddate", "20200201000000Z"),
        ],
    ):
        subprocess.run(["openssl", *map(str, argv)], check=True, capture_output=True)


def test_a_receiver_by_another_name(pair: Pair, program: Program) -> None:
    ours, theirs = keys(pair, hosts=("10.77.0.1", "elsewhere.example"))
    with receiving(pair.destination, trust=theirs, clients=ours) as receiver:
        said = refused(pair, receiver, program)
        assert "its certificate is not for that name or address" in said


def test_without_tls_to_a_port_that_has_it(pair: Pair, program: Program) -> None:
    _, theirs = keys(pair)
    with receiving(pair.destination, trust=theirs) as receiver:
        said = refused(pair, receiver, program)
        assert "TLS is spoken here; use --tls-cert, --tls-key and --tls-ca" in said
        assert "came without TLS" in receiver.notes()


@pytest.mark.parametrize("trust", [["--insecure"], ["--allow-uid", "65534"]])
def test_with_tls_to_a_port_without(pair: Pair, program: Program, trust: list[str]) -> None:
    """The port lets everybody in, or nobody from there: both hang up on the first bytes."""
    ours, _ = keys(pair)
    with receiving(pair.destination, trust=trust, clients=ours) as receiver:
        said = refused(pair, receiver, program)
        assert "the TLS handshake was broken off; does lazyproc there have --tls-cert" in said
        assert "it speaks TLS" in receiver.notes() or "use TLS" in receiver.notes()


def test_without_a_certificate(pair: Pair, program: Program) -> None:
    """A client of TLS that lazyproc itself cannot be made to be."""
    _, theirs = keys(pair)
    with receiving(pair.destination, trust=theirs) as receiver:
        argv = ["openssl", "s_client", "-connect", receiver.address, "-CAfile", theirs[5], "-quiet"]
        done = pair.source.run(argv, input=b"\x10", capture_output=True, timeout=10)
        assert b"certificate required" in done.stderr
        wait_until(lambda: "gave no certificate" in receiver.notes(), "it says so")
        assert relays(pair.destination) == []
        assert "has no certificate" not in refused(pair, receiver, program)


def test_a_silent_stranger_delays_nobody(pair: Pair, program: Program) -> None:
    with secured(pair) as receiver:
        host, _, port = receiver.address.rpartition(":")
        silent = pair.source.popen(
            [
                CLI[0],
                "-c",
                f"import socket; s = socket.create_connection(({host!r}, {port})); print(1, flush=True); s.recv(1)",
            ],
            stdout=subprocess.PIPE,
        )
        try:
            assert silent.stdout is not None
            assert silent.stdout.readline()
            assert relays(pair.destination) == [], "nobody is made a relay before he has shown a certificate"
            move(pair.source, receiver, program.pid).end(program.watch)
        finally:
            silent.kill()
            silent.wait()


SILENT = """
import socket, sys
sock = socket.create_connection(sys.argv[1:])
print("connected", flush=True)
sock.recv(1)
"""


def test_files_that_are_not_what_they_should_be(pair: Pair, program: Program) -> None:
    ours, theirs = keys(pair)
    with receiving(pair.destination, trust=theirs, clients=[*ours[:3], theirs[3], *ours[4:]]) as receiver:
        said = refused(pair, receiver, program, code=2)
        assert f"{theirs[3]} with {ours[1]}: is not the key of that certificate" in said
