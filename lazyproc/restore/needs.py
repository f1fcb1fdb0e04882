"""Whether this host has what a tree needs: tried with the functions that a restore uses, and nothing is changed.

What cannot be known before the tree is frozen stays with the restore: the content of files that travel, data in a
FIFO, a number that somebody takes meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from typing import Any

from lazyproc.errors import RestoreError
from lazyproc.kernel import proc, sysvipc
from lazyproc.needs import (
    AddressNeed,
    FifoNeed,
    FileNeed,
    InterfaceNeed,
    LimitNeed,
    NameNeed,
    Need,
    NetlinkNeed,
    PathNeed,
    PidNeed,
    PlaceNeed,
    SegmentNeed,
    SocketFileNeed,
    TerminalNeed,
    Wanted,
)
from lazyproc.restore.contents import check_kind, parent_of
from lazyproc.restore.creation import pid_taken
from lazyproc.restore.files import check_access, check_file
from lazyproc.restore.limits import check_limit
from lazyproc.restore.names import check_place
from lazyproc.restore.objects import check_segment
from lazyproc.restore.pipes import check_fifo
from lazyproc.restore.tree import Pidns, is_taken
from lazyproc.restore.users import User, acting_as
from lazyproc.restore.workshop import probe


def unmet(
    wanted: Iterable[Wanted], *, pidns: Pidns, users: Sequence[User] = ()
) -> Iterator[tuple[Wanted, RestoreError]]:
    """The needs that this host does not meet, and why. Features of the kernel are left out (host_check). Files are
    tried with the rights of these `users`, of which one is enough, otherwise with ours.
    """
    every = tuple(wanted)
    here = _Here(pidns, frozenset(w.need.path for w in every if isinstance(w.need, PlaceNeed)))
    for each in every:
        attempt = _TRIES.get(type(each.need))
        try:
            if attempt is not None:
                _try_as_one_of(users, partial(attempt, here, each.need))
        except RestoreError as error:
            yield each, error
        except (OSError, ValueError, OverflowError) as error:  # also of numbers and paths that cannot be
            yield each, RestoreError(f"cannot be tried ({error})", remedy="see `lazyproc check`")


def _try_as_one_of(users: Sequence[User], attempt: Callable[[], None]) -> None:
    """Raises what stood in the way of the last one."""
    for user in users[:-1]:
        with suppress(RestoreError, OSError), acting_as(user):
            attempt()
            return
    with acting_as(users[-1]) if users else nullcontext():
        attempt()


class _Here:
    """This host; `coming` are the paths that travel with the tree."""

    def __init__(self, pidns: Pidns, coming: frozenset[str]) -> None:
        self.pidns = pidns
        self.coming = coming

    @cached_property
    def segments(self) -> tuple[sysvipc.Segment, ...]:
        return tuple(sysvipc.segments().values())

    def comes(self, path: str) -> bool:
        """Whether what is missing here will be there by the time it is needed."""
        return path in self.coming and not os.path.lexists(path)


def _open_path(path: str, flags: int, mode: int) -> int:
    return os.open(path, flags, mode)


def _try_file(_here: _Here, need: FileNeed) -> None:
    with probe(_open_path, need.path) as found:
        check_file(need, found)
        check_access(need, found)


def _try_path(here: _Here, need: PathNeed) -> None:
    if not here.comes(need.path):
        with probe(_open_path, need.path):
            pass


def _try_fifo(here: _Here, need: FifoNeed) -> None:
    if not here.comes(need.path):
        with probe(_open_path, need.path) as found:
            check_fifo(need.path, found)


def _try_place(here: _Here, need: PlaceNeed) -> None:
    if here.comes(os.path.dirname(need.path)):
        return
    with parent_of(_open_path, need.path) as (parent, name):
        try:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RestoreError(
                f"cannot be looked at ({error.strerror})", where=f"file {need.path}", remedy="rename it"
            ) from error
    check_kind(need.path, need.mode, found)


def _try_socket_file(here: _Here, need: SocketFileNeed) -> None:
    if not here.comes(os.path.dirname(need.path)):
        check_place(need.path, need.path)


def _try_name(_here: _Here, need: NameNeed) -> None:
    from lazyproc.restore.unix import check_name

    check_name(need)


def _try_address(_here: _Here, need: AddressNeed) -> None:
    from lazyproc.restore.inet import check_address

    check_address(need)


def _try_interface(_here: _Here, need: InterfaceNeed) -> None:
    from lazyproc.restore.interfaces import check_interface

    check_interface(need)


def _try_netlink(_here: _Here, need: NetlinkNeed) -> None:
    from lazyproc.restore.netlink import check_port

    check_port(need)


def _try_terminal(_here: _Here, need: TerminalNeed) -> None:
    from lazyproc.restore.terminals import check_number

    check_number(need)


def _try_segment(here: _Here, need: SegmentNeed) -> None:
    check_segment(need, here.segments)


def _try_pid(here: _Here, need: PidNeed) -> None:
    if here.pidns == "host" and (is_taken(need.number) or need.number >= proc.pid_max()):
        raise pid_taken(need.number)


def _try_limit(_here: _Here, need: LimitNeed) -> None:
    check_limit(need)


_TRIES: Mapping[type[Need], Callable[[_Here, Any], None]] = {
    FileNeed: _try_file,
    PathNeed: _try_path,
    FifoNeed: _try_fifo,
    PlaceNeed: _try_place,
    SocketFileNeed: _try_socket_file,
    NameNeed: _try_name,
    AddressNeed: _try_address,
    InterfaceNeed: _try_interface,
    NetlinkNeed: _try_netlink,
    TerminalNeed: _try_terminal,
    SegmentNeed: _try_segment,
    PidNeed: _try_pid,
    LimitNeed: _try_limit,
}
