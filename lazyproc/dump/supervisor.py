"""Who may start a second copy of a tree when it is gone here: its systemd unit, or a parent that starts it anew.

The source's processes end by SIGKILL, which to systemd and to most supervisors is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from lazyproc.errors import NoSuchProcess
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.kernel.cgroup import SYSTEMD, V2

# What is known to start anew what it has started, by comm: process supervisors, and servers whose workers these are.
RESPAWNS = frozenset(
    ("runsv", "s6-supervise", "supervise", "supervisord", "monit", "circusd", "god", "perpd", "systemd", "upstart",
     "containerd-shim", "conmon", "gunicorn", "uwsgi", "nginx", "apache2", "httpd", "php-fpm", "postgres", "haproxy")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Supervisor:
    """`unit` is "" outside of a service; `parent` is None for the child of an init, which starts nothing anew by it."""

    unit: str
    parent: tuple[int, str] | None  # pid and comm


def supervisor_of(pid: int, ppid: int) -> Supervisor:
    """Only reads. What has ended meanwhile supervises nothing."""
    unit, parent = "", None
    with suppress(NoSuchProcess):
        unit = unit_in(proc.cgroup(proc.read(pid, "cgroup")))
    with suppress(NoSuchProcess):
        if ppid > 1:
            parent = (ppid, proc.stat(proc.read(ppid, "stat")).comm)
    return Supervisor(unit, parent)


def unit_in(groups: Mapping[str, str]) -> str:
    """The systemd service of a process by its cgroups (systemd.unit(5)); "" in a scope, as sessions are. Pure."""
    path = groups.get(SYSTEMD) or groups.get(V2, "")
    units = [part for part in path.split("/") if part.endswith((".service", ".scope"))]
    # user@UID.service is the service manager of a user, not what it has started.
    return units[-1] if units and units[-1].endswith(".service") and not units[-1].startswith("user@") else ""


def warnings(pid: int, supervisor: Supervisor) -> Iterator[str]:
    """For the user, who knows what they do. Pure."""
    if supervisor.unit:
        yield (
            f"pid {pid}: is in the systemd unit {supervisor.unit}, which starts a second one here when its Restart= "
            f"says so: see systemctl show -p Restart {supervisor.unit}"
        )
    if supervisor.parent is not None and supervisor.parent[1] in RESPAWNS:
        number, name = supervisor.parent
        yield (
            f"pid {pid}: its parent, pid {number} ({name}), sees it end here and would start a second one: move the "
            "tree under that, or stop it first"
        )
