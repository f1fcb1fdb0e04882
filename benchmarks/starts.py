"""Cold and warm: a first move for which nothing of the engine's programs is in the page cache, and a second one between
the same hosts. `lazyproc receive` has been started before, as a service is, and stays; CRIU has no such thing.

Cold goes as far as one machine lets it: what another process has mapped stays in the cache, the interpreter that runs
this for one, and both hosts have the same cache, so what the source reads the destination need not.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cffi
import google.protobuf
import ptrace
import zstandard

import lazyproc
from benchmarks.engines import Engine, by_lazy_criu, migrating
from benchmarks.measure import Result, Samples
from benchmarks.toucher import LAZY, OURS, moved_between
from benchmarks.touching import Cargo
from benchmarks.wires import hosts
from lazyproc.hosts import Pair
from tests.live.moving import receiving
from tests.peer import criu

CARGO = Cargo("think", 64, 5)


def evict(*folders: Path) -> None:
    """Out of the page cache, what nobody has mapped or changed."""
    for path in (each for folder in folders for each in folder.rglob("*") if each.is_file()):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _evict_lazyproc() -> None:
    """The package, what it imports, and Python's own library."""
    evict(*(Path(module.__path__[0]) for module in (lazyproc, cffi, google.protobuf, ptrace, zstandard)))
    evict(Path(os.__file__).parent)


def _evict_criu() -> None:
    evict(Path(criu()[-1]).parents[2])


@contextmanager
def _lazyproc(pair: Pair) -> Iterator[Engine]:
    with receiving(pair.destination) as receiver:
        yield lambda source, vpid, _images: migrating(source, [vpid], receiver.address)


@contextmanager
def _criu(_pair: Pair) -> Iterator[Engine]:
    yield by_lazy_criu


ENGINES = {OURS: (_lazyproc, _evict_lazyproc), LAZY: (_criu, _evict_criu)}


def run(rounds: int) -> Result:
    values: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, (engine_between, evict_engine) in ENGINES.items():
            with hosts() as pair, engine_between(pair) as engine:
                for start, prepare in (("cold", evict_engine), ("warm", _nothing)):
                    prepare()
                    reading = moved_between(pair, engine, CARGO)
                    values[f"command to running there, {start}, {name}"].append(reading.until_there_ms)
                    values[f"blackout, {start}, {name}"].append(reading.blackout_ms)
    return Result("cold and warm", {name: Samples("ms", tuple(found)) for name, found in values.items()}, ())


def _nothing() -> None:
    pass
