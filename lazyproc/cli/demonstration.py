"""What `lazyproc demo` does, with the same commands that a user gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lazyproc.cli.cargo import Cargo, Phase
from lazyproc.errors import LazyprocError
from lazyproc.hosts import Pair
from lazyproc.show.reports import measures
from lazyproc.show.text import table

MIB, THREADS = 256, 2
PORT = 7070
LISTEN_S = 20.0
MORE_VISITS = 10_000  # after the move, before the last check
LAZYPROC = (sys.executable, "-m", "lazyproc.cli.main")
QUIET: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
_LISTENING = "0A"  # include/net/tcp_states.h


def move(pair: Pair) -> None:
    """A cargo from one host to the other. Raises HostLacks, or LazyprocError when anything is not as it was."""
    target = f"{pair.destination.address}:{PORT}"
    receiver = pair.destination.popen(
        [*LAZYPROC, "receive", "--listen", target, "--once", "--insecure"],
        stderr=subprocess.PIPE,
        text=True,
        **QUIET,
    )
    _wait_listening(receiver)
    cargo = Cargo.compiled(pair.shared, mib=MIB, threads=THREADS)
    process = pair.source.popen(cargo.argv, stderr=subprocess.DEVNULL, **QUIET)
    _introduce(cargo)
    report = _result(pair.source.run, "migrate", str(pair.source.vpid(process.pid)), target, "--insecure")
    process.wait()
    print(f"it moved from host source to host destination:\n{measures(report)}")
    _verify(cargo, pair.destination.pid(report["root_pid"]))


def in_place() -> None:
    """A checkpoint of the cargo and a lazy restore, on this host."""
    with tempfile.TemporaryDirectory(prefix="lazyproc-demo-") as directory:
        cargo = Cargo.compiled(Path(directory), mib=MIB, threads=THREADS)
        process = subprocess.Popen(cargo.argv, stderr=subprocess.DEVNULL, start_new_session=True, **QUIET)
        try:
            _introduce(cargo)
            images = str(Path(directory, "images"))
            frozen = _result(subprocess.run, "checkpoint", str(process.pid), "-D", images)
            process.wait()
            restored = _result(subprocess.run, "restore", "-D", images, "--lazy", "--detach")
        finally:
            process.kill()
            process.wait()
        print(
            table(
                [
                    ("  checkpoint, frozen", f"{frozen['frozen_ms']:.0f} ms"),
                    ("  restore, to the last page", f"{restored['total_ms']:.0f} ms"),
                ]
            )
        )
        _verify(cargo, restored["root_pid"])


def _introduce(cargo: Cargo) -> None:
    cargo.wait(lambda status: status.phase == Phase.RUNNING, "set up its memory")
    print(
        f"a process with {cargo.mib} MiB runs; its {cargo.threads} threads check and rewrite its pages without pause"
    )
    cargo.forget_slowest()


def _result(run: Callable[..., subprocess.CompletedProcess[Any]], *argv: str) -> dict[str, Any]:
    """What a command prints with --json. Raises LazyprocError when it fails."""
    done = run([*LAZYPROC, *argv, "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise LazyprocError(
            f"exit code {done.returncode}", where=f"lazyproc {argv[0]}", remedy="see what it said above"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _verify(cargo: Cargo, pid: int) -> None:
    """It runs on, and every word of every page is what the cargo itself wrote. Ends it."""
    try:
        moved = cargo.status().visits
        cargo.wait(lambda status: status.visits >= moved + MORE_VISITS, "go on")
        os.kill(pid, signal.SIGTERM)
        status = cargo.wait(lambda status: status.phase == Phase.VERIFIED, "check all its pages")
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    rows = [
        ("  visits to pages", f"{status.visits}, {status.visits - moved} of them after the last page came"),
        ("  longest visit", f"{status.slowest_ns / 1e6:.1f} ms"),
        ("  pages checked at the end", f"{status.pages}, wrong words {status.bad_words}"),
    ]
    print(f"what the process itself saw:\n{table(rows)}")
    if status.bad_words:
        raise LazyprocError(
            f"the cargo found {status.bad_words} wrong words", where=f"pid {pid}", remedy="report it"
        )


def _wait_listening(receiver: subprocess.Popen[str]) -> None:
    """Until the receiver has its socket, as its network namespace says (proc_pid_net(5))."""
    sockets = Path(f"/proc/{receiver.pid}/net/tcp")
    until = time.monotonic() + LISTEN_S
    while not any(
        row[1].endswith(f":{PORT:04X}") and row[3] == _LISTENING
        for row in map(str.split, sockets.read_text().splitlines()[1:])
    ):
        if receiver.poll() is not None or time.monotonic() > until:
            receiver.kill()
            raise LazyprocError(receiver.communicate()[1].strip(), where="the receiver did not come up")
        time.sleep(0.01)
