"""One run of one of CRIU's tests, and what its output says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
# How the run went wrong. WRONG is what must not be: it was restored, and is not what it was.
REFUSED, UNRESTORED, WRONG, UNSTARTED, BROKEN = "refused", "not restored", "wrong", "not started", "broken"
MODES = {"plain": (), "lazy": ("--lazy-pages",), "remote-lazy": ("--remote-lazy-pages",)}
TIMEOUT_S = 150
_STEP = re.compile(r"Test \S+ FAIL at (.*?)[\s#]*$", re.MULTILINE)
_SKIPPED = re.compile(r"Skipping \S+ \((.*)\)")
_ERROR = re.compile(r"Error \([^)]*\): (.*?)'?$", re.MULTILINE)
_COMPLAINT = re.compile(r"(?:ERR|FAIL|SKIP): .*")
_STEPS = {"CRIU dump": REFUSED, "CRIU restore": UNRESTORED}
# What differs from run to run: the same reason is to be the same text.
_VARYING = (
    (re.compile(r"\bpid \d+: "), ""),
    (re.compile(r"0x[0-9a-f]{5,}(-0x[0-9a-f]+)?"), "0x…"),
    (re.compile(r"/proc/\d+"), "/proc/N"),
    (re.compile(r"/\S*?/test/zdtm/"), "zdtm/"),
)


@dataclass(frozen=True)
class Result:
    """`kind` says how it failed, `reason` why, in the words of the command or of the test."""

    result: str
    kind: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Bench:
    """A tree of CRIU's that is built, and the command to test. `python` runs zdtm.py and has yaml and protobuf."""

    tree: Path
    criu: Path
    python: str = "/usr/bin/python3"

    @property
    def folder(self) -> Path:
        return self.tree / "test"

    def tests(self) -> list[str]:
        out = subprocess.run(
            [self.python, "zdtm.py", "list"], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return sorted(line.strip() for line in out.stdout.splitlines() if line.startswith("zdtm/"))

    def run(self, test: str, mode: str) -> Result:
        """In a container of its own (zdtm_ct): what is left of it is killed with it."""
        command = [
            self.python,
            "zdtm.py",
            "run",
            "-t",
            test,
            "-f",
            "h",
            "--keep-img",
            "never",
            "--ignore-taint",
        ]
        command += [
            "--criu-bin",
            str(self.criu),
            "--pycriu-search-path",
            str(self.tree / "lib"),
            *MODES[mode],
        ]
        # zdtm.py starts itself again by its first line
        environment = os.environ | {"PATH": f"{Path(self.python).parent}:{os.environ['PATH']}"}
        child = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
            return Result(FAIL, BROKEN, f"did not end within {TIMEOUT_S} s")
        return judged(output, child.returncode)


def judged(output: str, status: int) -> Result:
    """Pure."""
    if skipped := _SKIPPED.search(output):
        return Result(SKIP, reason=skipped[1])
    if status == 0 and " PASS ===" in output:
        return Result(PASS)
    step = _STEP.search(output)
    if step is None:
        lines = [line for line in output.splitlines() if line.strip() and not set(line.strip()) <= set("#= ")]
        return Result(
            FAIL, BROKEN, plain(next((line for line in reversed(lines) if "Error" in line), "no word of it"))
        )
    kind = UNSTARTED if ".pid'" in step[1] else _STEPS.get(step[1], WRONG)
    return Result(
        FAIL, kind, f"{step[1]}: {reason}" if (reason := next(_reasons(output, kind), "")) else step[1]
    )


def _reasons(output: str, kind: str) -> Iterator[str]:
    pattern = _COMPLAINT if kind in (WRONG, UNSTARTED) else _ERROR
    # check --feature speaks before the test begins
    for match in pattern.finditer(output, max(0, output.find("Start test"))):
        yield plain(match[match.re.groups])


def plain(text: str) -> str:
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return text.strip()
