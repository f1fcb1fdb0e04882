"""What went wrong or would go wrong, for people and for scripts."""

from __future__ import annotations

from collections.abc import Iterable

from lazyproc.errors import CannotBeDone, LazyprocError, Obstacle
from lazyproc.facts import asdict

FAILED = 1


def obstacles_text(obstacles: Iterable[Obstacle]) -> str:
    """Each obstacle on a line, the way out below it."""
    return "\n".join(f"{o.place}: {o.why}\n    {o.remedy}" for o in obstacles)


def obstacle_fields(obstacle: Obstacle) -> dict[str, object]:
    return asdict(obstacle)


def exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, LazyprocError) else FAILED


def failure_text(error: Exception) -> str:
    """One sentence; for CannotBeDone the obstacles below it."""
    if isinstance(error, CannotBeDone):
        return f"cannot be done, nothing has been stopped\n{obstacles_text(error.obstacles)}"
    if isinstance(error, LazyprocError | OSError):
        return str(error)
    return f"{type(error).__name__}: {error}; this is a fault of lazyproc's, -v shows where"


def failure_fields(error: Exception) -> dict[str, object]:
    """What `--json` prints instead of a result."""
    fields: dict[str, object] = {"error": failure_text(error), "exit_code": exit_code(error)}
    if isinstance(error, LazyprocError):
        fields |= {"error": error.what, "where": error.where, "remedy": error.remedy}
    if isinstance(error, CannotBeDone):
        fields |= {"error": "cannot be done", "obstacles": [obstacle_fields(o) for o in error.obstacles]}
    return fields
