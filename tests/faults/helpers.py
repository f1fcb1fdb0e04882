"""The helpers of a migration under way, found by the journals, and what may be done to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lazyproc.hosts import Host
from tests.live.moving import run_cli
from tests.live.programs import wait_until

DESTINATION, SOURCE = "destination", "source"


def journals(host: Host, role: str) -> list[dict[str, Any]]:
    """The records of a host's sessions."""
    found = []
    for path in sorted((host.outside / "state").rglob(f"*-{role}.json")):
        with suppress(FileNotFoundError, ValueError):
            found.append(json.loads(path.read_text()))
    return found


def journal(host: Host, role: str) -> dict[str, Any]:
    """The only one, as soon as it is there."""
    wait_until(lambda: bool(journals(host, role)), f"a journal of the {role}")
    (only,) = journals(host, role)
    return only


def helper(host: Host, role: str, name: str) -> int:
    """The pid, as the test sees it, of `keeper`, `pager` or `guard`, as the journal says by now."""
    wait_until(lambda: f"{name}_pid" in (journals(host, role) or [{}])[0], f"the {role} has a {name}")
    return host.pid(journal(host, role)[f"{name}_pid"])


def kill(host: Host, role: str, *names: str) -> list[int]:
    """SIGKILL to all of them before anybody can notice the first."""
    pids = [helper(host, role, name) for name in names]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: gone(pid), f"pid {pid} has ended")  # type: ignore[misc]
    return pids


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in b"ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def other_than(host: Host, role: str, name: str, old: int) -> Iterator[bool]:
    """Whether another helper of that name has come."""
    yield helper(host, role, name) != old


def sessions(host: Host) -> list[dict[str, Any]]:
    """What `lazyproc sessions --json` says there."""
    found: list[dict[str, Any]] = json.loads(run_cli(host, "sessions", "--json").stdout)
    return found
