"""redis with 1 GiB, moved while a client on a third host asks it without ever waiting (redis_load.c): what its requests
take meanwhile, and how long nobody is answered. The service's address moves along, and the client's connections do."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from benchmarks.answers import WINDOW_S, Answers, Reading
from benchmarks.engines import Engine, Report, by_lazy_criu, by_lazyproc
from benchmarks.measure import Goal, Result, Samples
from benchmarks.programs import program
from benchmarks.toucher import LAZY, OURS
from benchmarks.touching import HIGH_PID, pid_in, resident_kib
from lazyproc.hosts import Host, Pair, Trio, trio_of_hosts
from lazyproc.migrate.address import announce
from tests.live.programs import wait_until
from tests.live.real import network_of
from tests.live.real_redis import PORT, Reply, asking
from tests.live.test_move_real import SERVICE, give
from tests.needs import require

KEYS, VALUE_BYTES = 250_000, 4000  # with redis's own data a gibibyte
CONNECTIONS, OWN_KEYS = 8, 256  # OWN_KEYS for each connection: redis_load.c
REQUESTS_A_SECOND = 2000
BEFORE_S, AFTER_S = 1.0, 0.5
UNTIL_FREEZE_S = 0.8  # what an engine may take to come to it
COMM = "redis-server"


@contextmanager
def _redis(host: Host) -> Iterator[subprocess.Popen[bytes]]:
    """In memory only. The host's own /dev/null: CRIU does not find what was opened in another mount namespace."""
    host.run(["sh", "-c", f"echo {HIGH_PID} > /proc/sys/kernel/ns_last_pid"], check=True)
    argv = [str(require(COMM)), "--port", str(PORT), "--save", "", "--protected-mode", "no"]
    argv += ["--enable-debug-command", "yes", "--dir", str(host.scratch)]
    shell = ["sh", "-c", 'exec "$@" < /dev/null > /dev/null 2>&1', "sh", *argv]
    process = host.popen(shell, start_new_session=True)
    try:
        with asking(host) as redis:
            assert redis.call("DEBUG", "POPULATE", KEYS, "k", VALUE_BYTES) == "OK"
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def _loaded(trio: Trio, file: Path) -> Iterator[None]:
    """The client works in this block. Whatever it finds wrong is an error in the end."""
    words = (SERVICE, PORT, CONNECTIONS, REQUESTS_A_SECOND, KEYS, file)
    client = trio.client.popen(
        [program("redis_load"), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert client.stdout is not None
        client.stdout.readline()
        yield
        client.terminate()
        _, wrong = client.communicate(timeout=90)
        if client.returncode:
            raise AssertionError(f"the client of redis: exit {client.returncode}: {wrong.strip()}")
    finally:
        client.kill()
        client.wait()


def _check(host: Host, digest: Reply) -> None:
    """All that DEBUG POPULATE made is as it was, and nothing else is there but the client's own keys."""
    own = [f"c:{number}" for number in range(CONNECTIONS * OWN_KEYS)]
    with asking(host) as redis:
        redis.call("DEL", *own)
        assert redis.call("DBSIZE") == KEYS
        assert redis.call("DEBUG", "DIGEST") == digest, "redis has other data than before its move"


def _digest() -> Reply:
    """What the data should be: of a redis that is never moved."""
    with trio_of_hosts() as trio, _redis(trio.source), asking(trio.source) as redis:
        return redis.call("DEBUG", "DIGEST")


def _move(engine: Engine, arrived: Callable[[Trio], None], digest: Reply) -> Reading:
    with (
        trio_of_hosts() as trio,
        tempfile.TemporaryDirectory(dir=trio.source.ground.shared) as name,
        _redis(trio.source) as redis,
    ):
        file, images = Path(name) / "answers", Path(name) / "images"
        images.mkdir()
        give(trio.source, "add")
        with _loaded(trio, file):
            time.sleep(BEFORE_S)
            give(trio.destination, "add")
            whole_kib, begun = int(resident_kib(redis.pid) * 0.99), time.time_ns()
            pair = Pair(trio.source, trio.destination)
            with engine(pair, trio.source.vpid(redis.pid), images) as report:
                arrived(trio)
                _wait_resident(trio.destination, whole_kib)
                resident = time.time_ns()
            since_begun_s = (time.time_ns() - begun) / 1e9
            time.sleep(max(AFTER_S, WINDOW_S + UNTIL_FREEZE_S - since_begun_s))
        answers = Answers.read(file, begun, report["frozen_at"])
        _check(trio.destination, digest)
    return Reading(answers, (resident - answers.silence()[0]) / 1e6)


def _wait_resident(host: Host, whole_kib: int) -> None:
    wait_until(lambda: pid_in(host, COMM) != 0, "redis runs at the destination", 60)
    pid = pid_in(host, COMM)
    wait_until(lambda: resident_kib(pid) >= whole_kib, "all of redis is there", 120)


def _announce(trio: Trio) -> None:
    """What lazyproc does by itself: the neighbours hear where the address is now."""
    with network_of(trio.destination):
        announce("eth0", socket.inet_aton(SERVICE))


def _nobody_has_to(_trio: Trio) -> None:
    pass


@contextmanager
def _by_lazyproc(pair: Pair, vpid: int, images: Path) -> Iterator[Report]:
    """Its log says when the freeze was done, in milliseconds, rounded down."""
    log = images / "migrate.log"
    with by_lazyproc(pair, vpid, images, ("--log-file", str(log))) as report:
        yield report
    stamp = next(line.split()[0] for line in log.read_text().splitlines() if line.endswith(" frozen"))
    report["frozen_at"] = round(datetime.fromisoformat(stamp).timestamp() * 1e3 + 1) * 10**6


TCP = ("--tcp-established", "--network-lock", "nftables")
ENGINES: dict[str, tuple[Engine, Callable[[Trio], None]]] = {
    OURS: (_by_lazyproc, _nobody_has_to),
    LAZY: (partial(by_lazy_criu, options=TCP), _announce),
}


def run(rounds: int) -> Result:
    digest = _digest()
    readings: dict[str, list[Reading]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        for name, (engine, arrived) in ENGINES.items():
            readings[name].append(_move(engine, arrived, digest))
    samples = {}
    for name, found in readings.items():
        rows = [reading.numbers() for reading in found]
        for what, (unit, _) in rows[0].items():
            samples[f"{what}, {name}"] = Samples(unit, tuple(row[what][1] for row in rows))
    first = (samples[f"freeze to first answer, {name}"] for name in (OURS, LAZY))
    return Result(
        "redis with 1 GiB under an open loop",
        samples,
        [Goal.of("freeze to first answer, lazyproc / CRIU lazy", 1 / 8, *first)],
        {
            f"worst latency, {name}": [reading.worst() for reading in found]
            for name, found in readings.items()
        },
        {f"latency, {name}": [reading.spectrum() for reading in found] for name, found in readings.items()},
    )
