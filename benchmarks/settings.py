"""Settings of the whole machine that a scene needs; each is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PIPE_SIZE = Path("/proc/sys/fs/pipe-max-size")
_CRIU_PIPES = 4 << 20  # what its page server asks for; without CAP_SYS_RESOURCE this is the limit
_ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control")


@contextmanager
def large_pipes() -> Iterator[None]:
    wanted = max(int(_PIPE_SIZE.read_text()), _CRIU_PIPES)
    with _set(_PIPE_SIZE, str(wanted)):
        yield


@contextmanager
def allowed(control: str) -> Iterator[None]:
    """A network namespace may have as its default what the machine allows to everybody, and nothing else
    (net/ipv4/tcp_cong.c: tcp_set_default_congestion_control)."""
    now = _ALLOWED.read_text().split()
    with _set(_ALLOWED, " ".join(sorted({*now, control}))):
        yield


@contextmanager
def _set(file: Path, value: str) -> Iterator[None]:
    before = file.read_text().strip()
    if before == value:
        yield
        return
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)
