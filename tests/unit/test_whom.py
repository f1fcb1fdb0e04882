"""As whom a tree may run: what it is, against who is allowed. Root may be anybody."""

from __future__ import annotations

import pytest

from lazyproc.migrate.whom import Whom
from lazyproc.needs import GroupNeed, Need, PrivilegeNeed, UserNeed, Wanted

SETUID = 1 << 7
ONE = Whom(frozenset({1000}), frozenset({1000, 27}), bounding=0xFF, first_port=1024)
ROOT = Whom(frozenset({0}), frozenset({0}), bounding=0xFF, first_port=1024)


@pytest.mark.parametrize(
    ("need", "why"),
    [
        (UserNeed(1000), ""),
        (UserNeed(0), "is of uid 0, and only uid 1000"),
        (UserNeed(1001), "is of uid 1001, "),
        (GroupNeed(27), ""),
        (GroupNeed(0), "is of group 0, "),
        (PrivilegeNeed("capabilities", SETUID), "capabilities (0x80)"),
        (PrivilegeNeed("securebits", 1), "securebits (0x1)"),
        (PrivilegeNeed("seccomp"), "seccomp filters"),
        (PrivilegeNeed("chroot"), "root directory"),
        (PrivilegeNeed("bounding", 0xFF), ""),
        (PrivilegeNeed("bounding", 0x1FF), ""),  # of a kernel that knows more
        (PrivilegeNeed("bounding", 0xFF & ~SETUID), "bounding set (0x80)"),
        (PrivilegeNeed("port", 1024), ""),
        (PrivilegeNeed("port", 80), "port 80"),
        (PrivilegeNeed("signals", 7), "signals to process 7"),
        (PrivilegeNeed("something new", 0), "something new"),
    ],
)
def test_what_is_more_than_that_user_is_refused(need: Need, why: str) -> None:
    found = [obstacle.why for obstacle in ONE.obstacles([Wanted(need, 5, "thread 5")])]
    assert len(found) == bool(why)
    assert all(why in each for each in found)


def test_root_may_be_in_any_group_and_have_any_privilege_but_be_nobody_else() -> None:
    every = (GroupNeed(27), PrivilegeNeed("capabilities", SETUID), PrivilegeNeed("port", 80), UserNeed(0))
    assert not list(ROOT.obstacles(Wanted(need, 5, "thread 5") for need in every))
    assert list(ROOT.obstacles([Wanted(UserNeed(1000), 5, "thread 5")]))


def test_the_groups_are_those_of_the_hosts_databases() -> None:
    """Nobody is in no group but his own; who is unknown has the one of his number, unless it is somebody's."""
    assert Whom.here({0}).gids >= {0}
    assert Whom.here({54321}).gids == {54321}
    assert 0 not in Whom.here({54321, 65534}).gids
