"""The committed message modules are what protoc makes of the .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "lazyproc/images/pb"


def test_the_generated_modules_are_up_to_date(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    environment = {"PATH": str(Path(sys.executable).parent)}  # protoc finds its mypy plugin there
    subprocess.run(
        [sys.executable, ROOT / "proto/generate.py", tmp_path],
        check=True,
        env=environment,
        capture_output=True,
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / PACKAGE).glob("*_pb2.py*")}
    committed = {path.name: path.read_text() for path in (ROOT / PACKAGE).glob("*_pb2.py*")}
    assert fresh.keys() == committed.keys()
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert not stale, f"stale: {stale}; run: python proto/generate.py"
