"""What a test misses is a skip for a developer, a failure in CI; what it leaves behind fails everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import require

_LEAKING = """
import subprocess

def test_leaks():
    subprocess.Popen(["sleep", "1000"])
    subprocess.run(["sh", "-c", "sleep 1001 & true"], check=True)

def test_cleans_up():
    subprocess.run(["sleep", "0"], check=True)
"""


def test_a_missing_tool_is_a_skip_that_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-tool is missing; apt install no-such-tool"):
        require("no-such-tool")


def test_a_missing_tool_is_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-tool"):
        require("no-such-tool")


def test_a_tool_that_is_there_is_found() -> None:
    assert require("sh").name == "sh"


def test_a_process_left_running_fails_its_test_and_is_killed(tmp_path: Path) -> None:
    (tmp_path / "test_leaking.py").write_text(_LEAKING)
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", f"--rootdir={tmp_path}", tmp_path],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert re.search(r"left running: sleep 1000 \(pid \d+\), sleep 1001 \(pid \d+\)", told.stdout)
    assert "2 passed, 1 error" in told.stdout
