"""As whom trees may run here, where `receive --allow-uid` says so: users of this host, with nothing that makes them
more. Decided by what the source says of the tree before the freeze, and again by the images, which say what will be.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from lazyproc.errors import Obstacle, PermissionDenied
from lazyproc.facts import dataclass
from lazyproc.kernel import proc
from lazyproc.model import Checkpoint
from lazyproc.needs import GroupNeed, PrivilegeNeed, UserNeed, Wanted
from lazyproc.restore.users import User, users_wanted

ROOT = 0
NO_GROUP = 65534
_FIRST_PORT = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
_PRIVILEGES: Mapping[str, tuple[str, str]] = {
    "capabilities": ("has capabilities ({bits:#x})", "start it without: setpriv --inh-caps=-all"),
    "securebits": ("has securebits ({bits:#x})", "start it without: setpriv --securebits"),
    "seccomp": ("has seccomp filters without no_new_privs", "start it with setpriv --no-new-privs"),
    "chroot": ("has another root directory without no_new_privs", "start it with setpriv --no-new-privs"),
    "bounding": (
        "lacks capabilities of this host in its bounding set ({bits:#x}) without no_new_privs",
        "start it with setpriv --no-new-privs",
    ),
    "signals": (
        "sends signals to process {bits}, which is not in the tree (F_SETOWN)",
        "let its processes send signals to each other only",
    ),
    "port": ("has port {bits}, which only root may take", "let it use a port that anybody may take"),
}


@dataclass(frozen=True, slots=True)
class Whom:
    """Who may run here, and what anybody of this host may: the groups of these users, the capabilities that a set-uid
    program has, the first port that takes no privilege. `users` whose files a tree may have, none: anybody's.
    """

    uids: frozenset[int]
    gids: frozenset[int]
    bounding: int
    first_port: int
    users: tuple[User, ...] = ()

    @classmethod
    def here(cls, uids: Collection[int]) -> Whom:
        """By the databases of this host."""
        status = proc.status(proc.read(os.getpid(), "status"))
        first = int(Path(_FIRST_PORT).read_text())
        groups = {uid: _groups_of(uid) for uid in sorted(uids)}
        users = (User(uid, gids[0] if gids else NO_GROUP, gids) for uid, gids in groups.items())
        return cls(
            frozenset(uids),
            frozenset(gid for gids in groups.values() for gid in gids),
            status.cap_bounding,
            first,
            () if ROOT in uids else tuple(users),
        )

    def obstacles(self, wanted: Iterable[Wanted]) -> Iterator[Obstacle]:
        """What of a tree is more than these users. Pure."""
        for each in wanted:
            against = self._against(each)
            if against is not None:
                who = " or ".join(map(str, sorted(self.uids)))
                why = f"{against[0]}, and only uid {who} is taken in here (receive --allow-uid)"
                yield Obstacle(each.pid, each.where, why, against[1])

    def _against(self, wanted: Wanted) -> tuple[str, str] | None:
        """Who may be root may be anybody's group, and have any privilege."""
        need = wanted.need
        if isinstance(need, UserNeed) and need.uid not in self.uids:
            return (
                f"is of uid {need.uid}",
                f"start it as another user, or the receiver with --allow-uid {need.uid}",
            )
        if ROOT in self.uids:
            return None
        if isinstance(need, GroupNeed) and need.gid not in self.gids:
            return f"is of group {need.gid}, which is none of theirs", "start it with setpriv --init-groups"
        if isinstance(need, PrivilegeNeed) and self._refuses(need):
            why, remedy = _PRIVILEGES.get(
                need.name, (f"has {need.name}", "use the same lazyproc on both hosts")
            )
            return why.format(bits=self._shown(need)), remedy
        return None

    def _refuses(self, need: PrivilegeNeed) -> bool:
        if need.name == "port":
            return need.bits < self.first_port
        return need.name != "bounding" or bool(self._shown(need))

    def _shown(self, need: PrivilegeNeed) -> int:
        return self.bounding & ~need.bits if need.name == "bounding" else need.bits

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises PermissionDenied unless the tree of these images is of these users."""
        for first in self.obstacles(users_wanted(checkpoint)):
            raise PermissionDenied(first.why, where=first.place, remedy=first.remedy)


def _groups_of(uid: int) -> tuple[int, ...]:
    """All groups of a user. Who is in no database has the group of his number, unless that is somebody's."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return () if _known(grp.getgrgid, uid) else (uid,)
    return tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))


def _known(look: Callable[[int], object], number: int) -> bool:
    try:
        look(number)
    except KeyError:
        return False
    return True
