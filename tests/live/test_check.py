"""`check` tries what this host can do: here it can, and who may not is told what is missing."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from lazyproc.host_check import State, check_host
from lazyproc.kernel import host
from tests.forked import become_nobody, in_child
from tests.needs import require_root

T = TypeVar("T")
EDGE = {"CAP_SYS_RESOURCE", "nftables", "MADV_COLLAPSE", "memory"}  # what this machine may lack


def test_root_finds_everything_that_the_main_job_needs() -> None:
    require_root()
    findings = check_host()
    assert [f for f in findings if f.state is not State.OK and f.name not in EDGE] == []
    assert len({f.name for f in findings}) == len(findings)
    assert all(f.detail for f in findings)


def test_whatever_is_not_ok_has_a_remedy() -> None:
    require_root()
    findings = _as_nobody(check_host)
    states = {f.name: f.state for f in findings}
    for name in ("userfaultfd", "CAP_SYS_PTRACE", "choose pids", "pid namespaces", "map_files"):
        assert states[name] is State.MISSING, name
    for name in ("TCP_REPAIR", "nftables", "CAP_NET_ADMIN"):
        assert states[name] is State.DEGRADED, name
    for name in ("ptrace", "kcmp", "pidfd_getfd", "PAGEMAP_SCAN"):
        assert states[name] is State.OK, name
    assert all(f.remedy for f in findings if f.state is not State.OK)


def test_json_and_exit_code_agree() -> None:
    require_root()
    done = subprocess.run(
        [sys.executable, "-m", "lazyproc.cli.main", "check", "--json"], capture_output=True, text=True
    )
    fields = json.loads(done.stdout)
    assert done.returncode == (0 if fields["ok"] else 3) == 0
    assert {tuple(finding) for finding in fields["findings"]} == {("name", "state", "detail", "remedy")}
    assert {finding["state"] for finding in fields["findings"]} <= {"ok", "degraded", "missing"}


def test_the_table_has_the_same_rows_and_remedies_below() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lazyproc.cli.main", "check"], capture_output=True, text=True
    )
    table = done.stdout.split("\n\n")[0].splitlines()
    assert [line.split("  ")[0] for line in table] == [finding.name for finding in check_host()]


def test_probes_leave_nothing_behind() -> None:
    require_root()
    check_host()
    before = _belongings()
    check_host()
    assert _belongings() == before


def test_a_refused_namespace_has_the_kernels_errno() -> None:
    require_root()

    with pytest.raises(PermissionError, match=r"^\[Errno 1\] Operation not permitted$"):
        _as_nobody(lambda: host.new_namespace(host.CLONE_NEWPID))


def _belongings() -> tuple[list[str], str]:
    """Our descriptors and children."""
    return sorted(os.listdir("/proc/self/fd")), Path("/proc/thread-self/children").read_text()


def _as_nobody(work: Callable[[], T]) -> T:
    def unprivileged() -> T:
        become_nobody()
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self is nobody's own again
        return work()

    return in_child(unprivileged)
