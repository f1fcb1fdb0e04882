"""What the relays of TLS and ssh cost: faults and bulk between two hosts, in plain, TLS and ssh by turns."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.blackout import PACE_US, THREADS
from benchmarks.engines import timed_migrate
from benchmarks.measure import Goal, Result, Samples
from benchmarks.receiver import receiving
from lazyproc.hosts import Pair, pair_of_hosts
from lazyproc.keys import make_keys
from tests.live.programs import running
from tests.live.sshd import serving

PLAIN, TLS, SSH = "plain", "TLS", "ssh"
QUIET_MIB, BULK_MIB = 16, 128
SLOWLY = ("--max-rate", str(20 << 20))  # faults have the links to themselves


def move(
    pair: Pair, mib: int, directory: Path, to: Sequence[str], env: Mapping[str, str], *options: str
) -> dict[str, float]:
    """One move of a fresh program. Microseconds, and for all its memory MB a second after the blackout."""
    with running("memory_random", mib, THREADS, PACE_US, directory=directory, host=pair.source) as program:
        pid = pair.source.vpid(program.pid)
        report, at = timed_migrate(pair.source, pid, *to, *options, env=env)
        program.watch.wait_beats()
        pair.destination.run(["kill", f"-{signal.SIGKILL.value}", str(report["root_pid"])], check=True)
    return {
        "p50": report["fault_us"]["p50"],
        "p99": report["fault_us"]["p99"],
        "rate": report["pages_total"] * 4.096e-3 / (at["released"] - at["running"]),
        "blackout": report["blackout_ms"],
    }


@contextmanager
def way(pair: Pair, name: str) -> Iterator[tuple[Sequence[str], Mapping[str, str]]]:
    """What `migrate` is given, and its environment."""
    if name == SSH:
        with serving(pair) as sshd:
            yield [sshd.target], sshd.environment()
    else:
        source, destination = _trust(pair, name)
        with receiving(pair, *destination) as address:
            yield [address, *source], os.environ


def run(rounds: int) -> Result:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    units = {"p50": "us", "p99": "us", "rate": "MB/s", "blackout": "ms"}
    for _ in range(rounds):
        for name in (PLAIN, TLS, SSH):
            for load, mib, options in (("quiet", QUIET_MIB, SLOWLY), ("with bulk", BULK_MIB, ())):
                with (
                    pair_of_hosts() as pair,
                    tempfile.TemporaryDirectory(dir=pair.shared) as directory,
                    way(pair, name) as (to, env),
                ):
                    found = move(pair, mib, Path(directory), to, env, *options)
                for key, value in found.items():
                    if not (load == "quiet" and key == "rate"):
                        values[f"{load}: {key}", name].append(value)
    samples = {
        f"{what}, {name}": Samples(units[what.rpartition(" ")[2]], tuple(values[what, name]))
        for what, name in sorted(values)
    }
    rates = (samples[f"with bulk: rate, {name}"] for name in (PLAIN, TLS))
    return Result("TLS and ssh against plain", samples, [Goal.of("bulk rate, plain / TLS", 2, *rates)])


def _trust(pair: Pair, name: str) -> Sequence[Sequence[str]]:
    """The options of the source and of the destination."""
    if name == PLAIN:
        return ("--insecure",), ("--insecure",)
    hosts = (str(pair.source.address), str(pair.destination.address))
    return [
        ("--tls-cert", str(each.cert), "--tls-key", str(each.key), "--tls-ca", str(each.ca))
        for each in make_keys(pair.shared / "keys", hosts)
    ]
