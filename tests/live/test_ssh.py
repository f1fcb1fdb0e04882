"""ssh://: a receiver is started on the other host by ssh alone, and three connections go through it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lazyproc.hosts import Host, Pair
from lazyproc.pages.ssh import OPTIONS, Ssh, greeting
from tests.faults.helpers import DESTINATION, SOURCE, helper, journals, kill, sessions
from tests.faults.test_links_cut import cut
from tests.live.moving import CLI, END_S, PAGE_KINDS, Moved, look_at_tree
from tests.live.programs import Program, running, wait_until
from tests.live.real import check_clean, ending, processes_of, runs
from tests.live.sshd import PATH, PORT, Sshd, serving
from tests.needs import require_root

SLOW = ("--max-rate", "10000000")  # 6 seconds for 64 MiB
BARE = "/usr/bin:/bin"


@pytest.fixture
def program(pair: Pair) -> Iterator[Program]:
    with running("memory_random", "64", "2", directory=pair.shared, host=pair.source, exclusive=True) as it:
        it.watch.wait_beats()
        yield it


def start(sshd: Sshd, program: Program, *options: str, target: str = "") -> subprocess.Popen[str]:
    pid = sshd.pair.source.vpid(program.pid)
    return sshd.popen([*CLI, "migrate", pid, target or sshd.target, "--json", "-v", *options])


def fails(sshd: Sshd, program: Program, *, target: str = "") -> dict[str, Any]:
    """What `migrate` says; the program runs as before, and neither side keeps anything."""
    done = start(sshd, program, target=target)
    out, notes = done.communicate(timeout=END_S)
    assert done.returncode == 1, notes
    program.watch.wait_beats()
    assert journals(sshd.pair.source, SOURCE) == journals(sshd.pair.destination, DESTINATION) == []
    assert ours(sshd.pair.source) == []
    answer: dict[str, Any] = json.loads(out)
    return answer


def ours(host: Host) -> list[str]:
    """The command lines of what runs for lazyproc on a host."""
    lines = []
    for pid in filter(runs, processes_of(host)):
        words = ""
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        if "lazyproc.cli.main" in words or "bin/lazyproc" in words or words.startswith("ssh "):
            lines.append(words)
    return lines


def clients(host: Host) -> list[int]:
    return [pid for pid, name in processes_of(host).items() if name == "ssh" and runs(pid)]


def wait_running(pair: Pair) -> None:
    wait_until(
        lambda: str((journals(pair.source, SOURCE) or [{}])[0].get("state")) == "running", "it runs there"
    )


def completes(pair: Pair, report: dict[str, Any], program: Program) -> None:
    """All its pages were right, and nothing of ours is left at either end."""
    assert report["pages_total"] == sum(report[f"pages_{kind}"] for kind in PAGE_KINDS), report
    assert not runs(program.pid)
    new = pair.destination.pid(report["root_pid"])
    with ending(new):
        check_clean(new)
        program.watch.wait_beats()
        os.kill(new, signal.SIGTERM)
        program.watch.wait_ended()
    wait_until(lambda: ours(pair.source) == ours(pair.destination) == [], "all helpers have ended")
    assert journals(pair.source, SOURCE) == journals(pair.destination, DESTINATION) == []


def test_a_program_moves_and_nothing_is_left(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        before = look_at_tree(program.pid)
        done = start(sshd, program)
        out, notes = done.communicate(timeout=END_S)
        assert done.returncode == 0, notes
        report = json.loads(out)
        assert 0 < report["rtt_us"] < 10e6
        Moved(pair.destination.pid(report["root_pid"]), report, notes).check_like(before)
        completes(pair, report, program)


@pytest.mark.long
def test_connections_that_are_killed_are_opened_again(pair: Pair, program: Program) -> None:
    """Each is an ssh of its own, though the user's configuration wants a shared one. Also the one that has the
    receiver is killed: the keeper there goes on without it.
    """
    with serving(pair) as sshd:
        migrate = start(sshd, program, *SLOW)
        wait_running(pair)
        program.watch.wait_beats()
        assert not list(sshd.folder.glob("shared*"))
        found = clients(pair.source)
        assert len(found) == 4  # the receiver's, and one for each connection
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        out, notes = migrate.communicate(timeout=END_S)
        assert migrate.returncode == 0, notes
        report = json.loads(out)
        assert report["reconnects"] >= 1
        completes(pair, report, program)


@pytest.mark.long
def test_the_network_goes_and_comes_back(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        migrate = start(sshd, program, *SLOW)
        assert migrate.stderr is not None
        wait_running(pair)
        program.watch.wait_beats()
        with cut(pair.destination):
            said = [next(line for line in migrate.stderr if "is opened again" in line)]
            said.append(next(line for line in migrate.stderr if "not yet:" in line))
            assert program.watch.read().errors == 0
        out, notes = migrate.communicate(timeout=END_S)
        assert migrate.returncode == 0, (said, notes)
        completes(pair, json.loads(out), program)


@pytest.mark.long
def test_everything_killed_at_the_source_is_completed_by_one_resume(pair: Pair, program: Program) -> None:
    """It finds its way by the journal, and by ssh."""
    with serving(pair) as sshd:
        migrate = start(sshd, program, *SLOW)
        wait_running(pair)
        program.watch.wait_beats()
        kill(pair.source, SOURCE, "keeper", "server")
        assert migrate.wait(END_S) == 4
        (orphan,) = sessions(pair.source)
        assert orphan["state"] == "orphaned"
        assert orphan["peer"].startswith(f"{sshd.target}/")
        resume = sshd.popen([*CLI, "resume", orphan["id"], "--json"])
        out, notes = resume.communicate(timeout=END_S)
        assert resume.returncode == 0, notes
        completes(pair, json.loads(out), program)


@pytest.mark.long
def test_the_server_killed_at_the_source_is_replaced(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        migrate = start(sshd, program, *SLOW)
        wait_running(pair)
        kill(pair.source, SOURCE, "server")
        out, notes = migrate.communicate(timeout=END_S)
        assert migrate.returncode == 0, notes
        report = json.loads(out)
        assert report["reconnects"] == 1
        completes(pair, report, program)


@pytest.mark.long
def test_with_nobody_left_at_the_destination_its_journal_answers(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        migrate = start(sshd, program, *SLOW)
        assert migrate.stderr is not None
        wait_running(pair)
        program.watch.wait_beats()
        server = helper(pair.source, SOURCE, "server")
        os.kill(server, signal.SIGSTOP)  # it asks again when nobody is left
        kill(pair.destination, DESTINATION, "keeper", "pager", "guard")
        for pid in clients(pair.source):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: ours(pair.destination) == [], "the receiver has ended")
        os.kill(server, signal.SIGCONT)
        next(line for line in migrate.stderr if "it is orphaned here: lazyproc resume" in line)
        (orphan,) = sessions(pair.destination)
        argv = [*CLI, "resume", orphan["id"]]
        resumed = pair.destination.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=END_S)
        assert resumed.returncode == 0, resumed.stderr
        out, notes = migrate.communicate(timeout=END_S)
        assert migrate.returncode == 0, notes
        completes(pair, json.loads(out), program)


def test_a_receiver_that_runs_already_is_taken_by_its_port(pair: Pair, program: Program) -> None:
    argv = [*CLI, "receive", "--listen", "127.0.0.1:7070", "--once"]
    receiver = pair.destination.popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert receiver.stderr is not None
        assert "listening on port 7070" in receiver.stderr.readline()
        with serving(pair) as sshd:
            done = start(sshd, program, target=f"{sshd.target}/7070")
            out, notes = done.communicate(timeout=END_S)
            assert done.returncode == 0, notes
            assert receiver.wait(END_S) == 0
            completes(pair, json.loads(out), program)
    finally:
        receiver.kill()
        receiver.wait()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"key": "other"}, "Permission denied"),
        ({"more": "HostKeyAlias somebody-else"}, "Host key verification failed"),
    ],
    ids=["our key is refused", "the host key is not known"],
)
def test_ssh_itself_says_why_it_did_not_come_in(
    pair: Pair, program: Program, settings: dict[str, str], says: str
) -> None:
    with serving(pair) as sshd:
        sshd.configure(**settings)
        answer = fails(sshd, program)
        assert says in answer["error"]
        assert "\n" not in answer["error"]
        assert answer["where"] == sshd.target
        assert f"`ssh -p {PORT} root@{pair.destination.address}` has to work" in answer["remedy"]


@pytest.mark.parametrize(
    ("host", "says"),
    [("no-such-host.invalid", "Could not resolve hostname"), ("10.77.0.99:22", "No route to host")],
    ids=["no such name", "no such host"],
)
def test_no_such_host(pair: Pair, program: Program, host: str, says: str) -> None:
    with serving(pair) as sshd:
        answer = fails(sshd, program, target=f"ssh://{host}")
        assert says in answer["error"]
        assert answer["where"] == f"ssh://{host}"


def test_lazyproc_is_not_there(pair: Pair, program: Program) -> None:
    with serving(pair, path=BARE) as sshd:
        answer = fails(sshd, program)
        assert "lazyproc is not found there" in answer["error"]
        assert answer["where"] == sshd.target
        assert "install it on that host, in the PATH" in answer["remedy"]


@pytest.mark.parametrize(
    ("script", "says", "remedy"),
    [
        ("echo lazyproc 99 7", "speaks version 99 of the protocol", "install the same version"),
        (
            f"{PATH.split(':')[0]}/lazyproc unknown-command",
            "too old for ssh://",
            "install the same version",
        ),
        ("echo Welcome", "something else answers before lazyproc does (b'Welcome", "must print nothing"),
        ("echo 'lazyproc: it broke' >&2; exit 1", "it broke", "lazyproc check"),
    ],
    ids=["another protocol", "older than ssh://", "a shell that greets", "it fails there"],
)
def test_another_lazyproc_is_there(pair: Pair, program: Program, script: str, says: str, remedy: str) -> None:
    folder = pair.shared / "bin"
    folder.mkdir()
    (folder / "lazyproc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "lazyproc").chmod(0o755)
    with serving(pair, path=f"{folder}:{BARE}") as sshd:
        answer = fails(sshd, program)
        assert says in answer["error"]
        assert answer["where"] == sshd.target
        assert remedy in answer["remedy"]


def test_interrupted_before_the_hand_over_it_runs_on_here(pair: Pair, program: Program) -> None:
    """The lazyproc there says nothing until this test lets it: the connection is being made for so long."""
    folder, gate = pair.shared / "bin", pair.shared / "gate"
    folder.mkdir()
    os.mkfifo(gate)
    (folder / "lazyproc").write_text(f"#!/bin/sh\nexec cat {gate}\n")
    (folder / "lazyproc").chmod(0o755)
    with serving(pair, path=f"{folder}:{BARE}") as sshd:
        migrate = start(sshd, program)
        with gate.open("w"):  # as soon as it is read: ssh has come in
            migrate.send_signal(signal.SIGINT)
            out, notes = migrate.communicate(timeout=END_S)
        assert migrate.returncode == 1, notes
        assert "runs here as before" in out
        program.watch.wait_beats()
        assert journals(pair.source, SOURCE) == []
        wait_until(lambda: ours(pair.source) == [], "ssh has ended")


def test_ssh_with_tls_or_insecure_is_wrong_usage(pair: Pair, program: Program) -> None:
    with serving(pair) as sshd:
        done = start(sshd, program, "--insecure")
        out, _ = done.communicate(timeout=END_S)
        assert done.returncode == 2
        assert "leave out --insecure and TLS" in json.loads(out)["remedy"]


@pytest.mark.parametrize(
    "target",
    [
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://u@-h",
        "ssh://h/x",
        "ssh://h:22:1",
        "ssh://h/1/2",
        "ssh://h ",
    ],
)
def test_what_is_no_address_reaches_no_ssh(target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazyproc.cli.main", "migrate", str(os.getpid()), target],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr


def test_the_far_end_passes_nothing_on_from_another_users_port() -> None:
    """Whoever took the port of a receiver that has gone."""
    require_root()
    script = (
        "import os, socket; os.setuid(65534)\n"
        "door = socket.create_server(('127.0.0.1', 0)); print(door.getsockname()[1], flush=True)\n"
        "peer = door.accept()[0]; peer.sendall(b'not yours'); peer.recv(1)"
    )
    other = subprocess.Popen([sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        argv = [sys.executable, "-m", "lazyproc.cli.main", "stdio", other.stdout.readline().strip()]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as far:
            assert far.wait(END_S) == 1
            assert far.stdout is not None
            assert far.stderr is not None
            assert far.stdout.read() == greeting()
            assert b"the peer is uid 65534" in far.stderr.read()
    finally:
        other.kill()
        other.wait()


def test_no_option_of_ours_changes_whom_ssh_trusts() -> None:
    words = Ssh.parse("ssh://me@[fd00::1]:2022/7").argv()
    assert words[-6:] == ["2022", "--", "me@fd00::1", "lazyproc", "stdio", "7"]
    assert words[1 : 1 + len(OPTIONS)] == list(OPTIONS)
    assert not any(name in word for word in OPTIONS for name in ("HostKey", "KnownHosts", "Identity", "User"))


def test_a_far_end_that_nobody_speaks_to_ends_without_a_word() -> None:
    """Where no receiver listens it answers itself, from the journal."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    done = subprocess.run(
        [*CLI, "stdio", str(port)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
