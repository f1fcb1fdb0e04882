"""What the relays of TLS cost: faults and bulk between two hosts, in plain and in TLS by turns."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.blackout import PACE_US, PORT, THREADS, _lazyproc
from benchmarks.measure import Result, Samples
from lazyproc.hosts import Pair, pair_of_hosts
from lazyproc.keys import make_keys
from tests.live.programs import running

PLAIN, TLS = "plain", "TLS"
QUIET_MIB, BULK_MIB = 64, 1024
SLOWLY = ("--max-rate", str(20 << 20))  # faults have the links to themselves


def move(
    pair: Pair, mib: int, directory: Path, trust: Sequence[Sequence[str]], *options: str
) -> dict[str, float]:
    """One move of a fresh program. Microseconds, and for all its memory MB a second after the blackout."""
    address = f"{pair.destination.address}:{PORT}"
    with running("memory_random", mib, THREADS, PACE_US, directory=directory, host=pair.source) as program:
        receiver = pair.destination.popen(
            _lazyproc("receive", "--listen", address, "--once", *trust[1], "--json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert receiver.stderr is not None
        for line in receiver.stderr:
            if "listening" in line:
                break
        argv = _lazyproc("migrate", pair.source.vpid(program.pid), address, *trust[0], *options, "--json")
        migrate = pair.source.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        report = json.loads(migrate.communicate(timeout=120)[0])
        receiver.communicate(timeout=30)
        program.watch.wait_beats()
        pair.destination.run(["kill", f"-{signal.SIGKILL.value}", str(report["root_pid"])], check=True)
    after = report["total_ms"] - report["blackout_ms"]
    return {
        "p50": report["fault_us"]["p50"],
        "p99": report["fault_us"]["p99"],
        "rate": report["pages_total"] * 4.096 / after,
        "blackout": report["blackout_ms"],
    }


def run(rounds: int) -> Result:
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    units = {"p50": "us", "p99": "us", "rate": "MB/s", "blackout": "ms"}
    for _ in range(rounds):
        for name in (PLAIN, TLS):
            for load, mib, options in (("quiet", QUIET_MIB, SLOWLY), ("with bulk", BULK_MIB, ())):
                with pair_of_hosts() as pair, tempfile.TemporaryDirectory(dir=pair.shared) as directory:
                    found = move(pair, mib, Path(directory), _trust(pair, name), *options)
                for key, value in found.items():
                    if not (load == "quiet" and key == "rate"):
                        values[f"{load}: {key}", name].append(value)
    samples = {
        f"{what}, {name}": Samples(units[what.rpartition(" ")[2]], tuple(values[what, name]))
        for what, name in sorted(values)
    }
    return Result("TLS against plain", samples, [])


def _trust(pair: Pair, name: str) -> Sequence[Sequence[str]]:
    """The options of the source and of the destination."""
    if name == PLAIN:
        return ("--insecure",), ("--insecure",)
    hosts = (str(pair.source.address), str(pair.destination.address))
    return [
        ("--tls-cert", str(each.cert), "--tls-key", str(each.key), "--tls-ca", str(each.ca))
        for each in make_keys(pair.shared / "keys", hosts)
    ]
