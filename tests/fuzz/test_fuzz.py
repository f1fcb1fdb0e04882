"""A fixed number of runs of each fuzzing target. The seed is printed; LAZYPROC_SEED sets it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, examples, packed
from tests.live.arrivals import leave
from tests.needs import lacking

RUNS, LIMIT_S = 20_000, 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a real process with files, pipes and threads."""
    return packed(leave("threads", directory=tmp_path_factory.mktemp("left")).images)


@pytest.mark.parametrize("target", TARGETS)
def test_examples_are_understood(target: str, images: bytes) -> None:
    for data in examples(target, images):
        TARGETS[target](data)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_comes(target: str, images: bytes, tmp_path: Path) -> None:
    if sys.version_info >= (3, 14):
        lacking("there is no atheris for this Python", "take Python 3.11 to 3.13")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, data in enumerate(examples(target, images)):
        (corpus / str(number)).write_bytes(data)
    seed = int(os.environ.get("LAZYPROC_SEED") or time.time()) % (1 << 31)
    print(f"LAZYPROC_SEED={seed}")
    options = (f"-runs={RUNS}", f"-seed={seed}", f"-max_total_time={LIMIT_S}", "-max_len=65536")
    argv = [
        sys.executable,
        "-m",
        "tests.fuzz",
        target,
        str(corpus),
        *options,
        f"-artifact_prefix={tmp_path}/",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
