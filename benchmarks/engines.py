"""Who moves a process from one host to the other: lazyproc, CRIU with lazy pages, CRIU without. All alike: each is a
context manager that starts its commands; at the end they must have succeeded."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.receiver import DEADLINE_S, PORT, lazyproc, receiving
from benchmarks.settings import large_pipes
from lazyproc.hosts import Host, Pair
from tests.peer import criu

Report = dict[str, Any]
# Yields what the engine itself reports, filled at the end; CRIU does not.
Engine = Callable[[Pair, int, Path], AbstractContextManager[Report]]


@contextmanager
def by_lazyproc(pair: Pair, vpid: int, _images: Path, options: Sequence[str] = ()) -> Iterator[Report]:
    with receiving(pair, "--insecure") as address, migrating(pair, [vpid], address, options) as report:
        yield report


@contextmanager
def migrating(
    pair: Pair, what: Sequence[object], address: str, options: Sequence[str] = ()
) -> Iterator[Report]:
    """`what` the command calls it, to a receiver that is there."""
    migrate = pair.source.popen(
        lazyproc("migrate", *what, address, "--insecure", "--json", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    report: Report = {}
    try:
        yield report
    except Exception as error:
        migrate.kill()
        error.add_note(f"lazyproc migrate: {migrate.communicate()[1].strip()}")
        raise
    out, words = migrate.communicate(timeout=DEADLINE_S)
    if migrate.returncode:
        raise RuntimeError(f"lazyproc migrate: exit {migrate.returncode}: {words.strip()}")
    report |= json.loads(out)


def timed_migrate(
    host: Host, *words: object, env: Mapping[str, str] | None = None
) -> tuple[Report, Mapping[str, float]]:
    """`lazyproc migrate` to its end: its report, and when it entered which state, by time.monotonic()."""
    argv = lazyproc("migrate", *words, "--json", "-v")
    migrate = host.popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert migrate.stderr is not None
    at = {line.strip(): time.monotonic() for line in migrate.stderr}
    out = migrate.communicate(timeout=DEADLINE_S)[0]
    if migrate.returncode:
        raise RuntimeError(f"lazyproc migrate: exit {migrate.returncode}: {'; '.join(at)}")
    return json.loads(out), at


@contextmanager
def by_lazy_criu(pair: Pair, vpid: int, images: Path, options: Sequence[str] = ()) -> Iterator[Report]:
    """The images lie where both see them: nothing is copied, which is more than CRIU's users have. Yields when it
    runs there."""
    server = ("--address", str(pair.source.address), "--port", str(PORT))
    with large_pipes():
        dump = _until_ready(pair.source, images, "dump", "--lazy-pages", *server, "-t", str(vpid), *options)
        report: Report = {"frozen_at": time.time_ns()}  # it is, and stays so
        daemon = _until_ready(pair.destination, images, "lazy-pages", "--page-server", *server)
        restore = _criu("restore", images, "--lazy-pages", "--restore-detached", *options)
        # Not run()'s own timeout: it looks every 50 ms only.
        if status := pair.destination.run(["timeout", str(DEADLINE_S), *restore]).returncode:
            raise _failed("restore", status, images)
        yield report
        for name, process in (("lazy-pages", daemon), ("dump", dump)):
            if process.wait(DEADLINE_S):
                raise _failed(name, process.returncode, images)


@contextmanager
def by_plain_criu(pair: Pair, vpid: int, images: Path) -> Iterator[Report]:
    """All of the memory through files that both see; no link is between."""
    pair.source.run(_criu("dump", images, "-t", str(vpid)), check=True, timeout=DEADLINE_S)
    pair.destination.run(_criu("restore", images, "--restore-detached"), check=True, timeout=DEADLINE_S)
    yield {}


ENGINES: Mapping[str, Engine] = {
    "lazyproc": by_lazyproc,
    "CRIU lazy": by_lazy_criu,
    "CRIU plain": by_plain_criu,
}


def _criu(command: str, images: Path, *options: str) -> list[str]:
    return [*criu(), command, "-D", str(images), "-o", f"{command}.log", *options]


def _failed(command: str, status: int, images: Path) -> RuntimeError:
    words = [line for line in (images / f"{command}.log").read_text().splitlines() if "Error" in line]
    return RuntimeError(f"criu {command}: exit {status}: {'; '.join(words[-4:])}")


def _until_ready(host: Host, images: Path, command: str, *options: str) -> subprocess.Popen[Any]:
    """A command of CRIU that serves; it says on its status descriptor that it does."""
    read, write = os.pipe()
    argv = _criu(command, images, *options, "--status-fd", str(write))
    process = host.popen(argv, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    ready = os.read(read, 1)
    os.close(read)
    if not ready:
        process.wait(DEADLINE_S)
        raise _failed(command, process.returncode, images)
    return process
