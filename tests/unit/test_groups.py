"""Where a tree is put among the cgroups of hosts of several kinds; what a group's limits leave."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.errors import UsageError
from lazyproc.kernel import cgroup, proc
from lazyproc.kernel.cgroup import Hierarchy
from lazyproc.migrate.room import Room, rooms
from lazyproc.restore.groups import demand_path, outside, places

UNIFIED = b"""\
25 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 25 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
"""
HYBRID = b"""\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
38 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
37 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:38 / /mnt/the\\040same rw,relatime - cgroup2 cgroup2 rw
"""
IN_A_CONTAINER = b"35 31 0:28 /docker/0a1b /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw\n"
ABOVE_OUR_NAMESPACE = b"35 31 0:28 /../.. /sys/fs/cgroup rw,relatime - cgroup2 cgroup rw\n"
UNIT = "/system.slice/receive.service"


def found(mountinfo: bytes, own: bytes) -> tuple[Hierarchy, ...]:
    return cgroup._found(proc.mountinfo(mountinfo), proc.cgroup(own))


def of(mountinfo: bytes, own: bytes, named: str | None) -> list[tuple[str, str, bool]]:
    wanted = places(found(mountinfo, own), named, "new")
    return [(place.hierarchy.controllers, place.folder, place.made) for place in wanted]


HYBRID_OWN = f"3:memory:{UNIT}\n2:cpu,cpuacct:{UNIT}\n1:name=systemd:{UNIT}\n0::{UNIT}\n".encode()


def test_each_hierarchy_is_found_once() -> None:
    assert [(each.controllers, each.point, each.own) for each in found(HYBRID, HYBRID_OWN)] == [
        ("", "/sys/fs/cgroup/unified", UNIT),
        ("name=systemd", "/sys/fs/cgroup/systemd", UNIT),
        ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct", UNIT),
        ("memory", "/sys/fs/cgroup/memory", UNIT),
    ]
    assert found(ABOVE_OUR_NAMESPACE, b"0::/\n") == ()
    assert found(UNIFIED.splitlines(keepends=True)[0], b"0::/\n") == ()


@pytest.mark.parametrize(
    ("own", "above"),
    [
        ("/", "/"),
        ("/jobs", "/"),
        ("/jobs/one", "/jobs"),
        ("/system.slice/receive.service", "/system.slice"),
        ("/system.slice/receive.service/payload/deep", "/system.slice"),
        ("/user.slice/user-0.slice/session-3.scope", "/user.slice/user-0.slice"),
        ("/user.slice/user@7.service/app.slice/run.scope", "/user.slice/user@7.service/app.slice"),
        ("/../other.service", "/"),
    ],
)
def test_a_tree_is_outside_the_unit_of_the_command(own: str, above: str) -> None:
    assert outside(Hierarchy("", "/sys/fs/cgroup", "/", own)) == above


def test_a_container_that_sees_its_own_group_only_keeps_the_tree() -> None:
    assert of(IN_A_CONTAINER, b"0::/docker/0a1b/x.service\n", None) == [("", "/sys/fs/cgroup/new", True)]
    assert of(IN_A_CONTAINER, b"0::/docker/0a1b\n", None) == [("", "/sys/fs/cgroup/new", True)]
    assert of(IN_A_CONTAINER, b"0::/docker/0a1b\n", "/elsewhere") == []
    assert of(IN_A_CONTAINER, b"0::/docker/0a1b\n", "/docker/0a1b/x") == [("", "/sys/fs/cgroup/x", True)]


def test_a_new_group_is_where_units_are_kept() -> None:
    """Limits of v1 controllers are not left behind."""
    assert of(UNIFIED, f"0::{UNIT}\n".encode(), None) == [("", "/sys/fs/cgroup/system.slice/new", True)]
    assert of(HYBRID, HYBRID_OWN, None) == [
        ("", "/sys/fs/cgroup/unified/system.slice/new", True),
        ("name=systemd", "/sys/fs/cgroup/systemd/system.slice/new", True),
    ]
    outside_of_units = HYBRID_OWN.replace(f"name=systemd:{UNIT}".encode(), b"name=systemd:/")
    assert of(HYBRID, outside_of_units, None) == [("", "/sys/fs/cgroup/unified/system.slice/new", True)]


def test_a_named_group_is_made_where_units_are_kept_and_joined_elsewhere() -> None:
    assert of(HYBRID, HYBRID_OWN, "/a/b") == [
        ("", "/sys/fs/cgroup/unified/a/b", True),
        ("name=systemd", "/sys/fs/cgroup/systemd/a/b", True),
        ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct/a/b", False),
        ("memory", "/sys/fs/cgroup/memory/a/b", False),
    ]
    assert of(UNIFIED, b"0::/\n", "/") == [("", "/sys/fs/cgroup", True)]


NAMES = st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9))


@given(own=NAMES, named=st.none() | NAMES)
def test_no_place_is_below_the_units_own_group(own: list[str], named: list[str] | None) -> None:
    path = "/" + "/".join([*own, "some.service"])
    hierarchy = Hierarchy("", "/mnt", "/", path)
    (place,) = places([hierarchy], None if named is None else "/" + "/".join(named), "new")
    assert place.path == (f"{outside(hierarchy).rstrip('/')}/new" if named is None else "/" + "/".join(named))
    assert not place.path.startswith(f"{path}/")
    assert place.folder == f"/mnt{place.path}".rstrip("/")


@pytest.mark.parametrize(("text", "path"), [("/a/b", "/a/b"), ("a/b/", "/a/b"), ("/", "/"), ("//a", "/a")])
def test_paths_of_groups(text: str, path: str) -> None:
    assert demand_path(text) == path


@pytest.mark.parametrize("text", ["", "/a/../b", "..", "/a/./b", "/a\nb", "/sys/fs/cgroup/a", "x" * 256])
def test_no_paths_of_groups(text: str) -> None:
    with pytest.raises(UsageError, match="is no path of a cgroup"):
        demand_path(text)


def test_room_is_what_each_limit_above_leaves(tmp_path: Path) -> None:
    """cgroup-v2.rst; memory of the page cache is given back before anybody is killed."""
    group = tmp_path / "slice" / "tree"
    group.mkdir(parents=True)
    for folder, limit, used, cache in ((group, "max", 0, 0), (group.parent, "1000", 700, 50)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    hierarchy = Hierarchy("", str(tmp_path), "/", "/")
    assert list(rooms(hierarchy, "/slice/tree")) == [Room(350, "cgroup /slice", "memory.max")]
    assert list(rooms(hierarchy, "/slice/not-made-yet")) == [Room(350, "cgroup /slice", "memory.max")]
    assert list(rooms(hierarchy, "/")) == []
