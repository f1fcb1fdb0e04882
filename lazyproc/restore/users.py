"""As whom a tree runs, and acting as one of its users where others decide as whom it may (`receive --allow-uid`).

Whoever sends a tree says which files its processes have open. Opened with our rights they would be any file of this
host, and root by another name; opened with the rights of the process that has them they are its own.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

from lazyproc.errors import RestoreError
from lazyproc.facts import dataclass, field
from lazyproc.kernel._core import ffi
from lazyproc.kernel.sys import syscall
from lazyproc.model import (
    Checkpoint,
    Credentials,
    FileContent,
    InetSocket,
    SharedKind,
    Task,
    UnixSocket,
)
from lazyproc.needs import GroupNeed, Need, PrivilegeNeed, UserNeed, Wanted, credential_needs
from lazyproc.restore.descriptors import is_our_root

SYS_SETGROUPS, SYS_SETFSUID, SYS_SETFSGID = 116, 122, 123
_NOBODY = -1  # no id: the call changes nothing and says what is


@dataclass(frozen=True, slots=True)
class User:
    """With whose rights a file is opened."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    @classmethod
    def of(cls, credentials: Credentials) -> User:
        return cls(credentials.fsuid, credentials.fsgid, credentials.groups)


@dataclass(frozen=True, slots=True)
class Users:
    """Whose rights it takes to make the files of a tree: ours, unless `limited`; then those of `holders` by file id,
    and what nobody of the tree has open belongs to the `root` process.
    """

    limited: bool = False
    root: User = User(0, 0)
    holders: Mapping[int, User] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Users:
        """To be limited to."""
        holders: dict[int, User] = {}
        for task in checkpoint.tasks:
            for number in _files_of(task):
                holders.setdefault(number, User.of(task.leader.credentials))
        return cls(True, User.of(checkpoint.root.leader.credentials), holders)

    def opening(self, file_id: int) -> AbstractContextManager[None]:
        """The rights with which a file is opened."""
        return acting_as(self.holders.get(file_id, self.root)) if self.limited else nullcontext()

    def creating(self, content: FileContent) -> AbstractContextManager[None]:
        """The rights with which a file is created that travels with the tree. Raises RestoreError for a directory of
        somebody else's: those that are there already may be anybody's, so nobody has looked whose they are.
        """
        if not self.limited:
            return nullcontext()
        owner = User(content.uid, content.gid)
        if stat.S_ISDIR(content.mode) and not self._knows(owner):
            raise RestoreError(
                f"is missing, and would belong to uid {owner.uid} and gid {owner.gid}",
                where=f"directory {content.path}",
                remedy="make it on this host",
            )
        return acting_as(owner)

    def _knows(self, owner: User) -> bool:
        users = {self.root, *self.holders.values()}
        return owner.uid in {each.uid for each in users} and owner.gid in {
            gid for each in users for gid in (each.gid, *each.groups)
        }

    def check_places(self, checkpoint: Checkpoint, root: str) -> None:
        """Raise RestoreError unless the owners of unix sockets may have made their files below `root`."""
        for file in checkpoint.files.values():
            unix = file.resource
            if self.limited and isinstance(unix, UnixSocket) and unix.path:
                with acting_as(User(unix.uid, unix.gid)):
                    may = os.access(root + os.path.dirname(unix.path), os.W_OK | os.X_OK, effective_ids=True)
                if not may:
                    raise RestoreError(
                        f"uid {unix.uid} may not make a socket there",
                        where=f"file {unix.path}",
                        remedy=f"give {os.path.dirname(unix.path)} to that user",
                    )


def _files_of(task: Task) -> Iterator[int]:
    yield from (descriptor.file_id for descriptor in task.descriptors)
    if task.fs:
        yield from (task.fs.cwd_id, task.fs.root_id)
    if task.mm:
        yield task.mm.exe_id
        yield from (vma.file_id for vma in task.mm.vmas if vma.file_id)


@contextmanager
def acting_as(user: User) -> Iterator[None]:
    """The calling thread has this user's access to files, and no more. To be called by root: for others a change of
    the file system uid takes no capability away (capabilities(7)).
    """
    groups = os.getgroups()
    _set_groups(user.groups)
    gid = syscall(SYS_SETFSGID, user.gid)
    uid = syscall(SYS_SETFSUID, user.uid)
    try:
        for call, wanted in (SYS_SETFSUID, user.uid), (SYS_SETFSGID, user.gid):
            if syscall(call, _NOBODY) != wanted:  # these calls report no failure
                raise OSError(errno.EPERM, f"cannot act as uid {user.uid} and gid {user.gid}")
        yield
    finally:
        syscall(SYS_SETFSUID, uid)
        syscall(SYS_SETFSGID, gid)
        _set_groups(groups)


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    """Of this thread alone, unlike os.setgroups."""
    packed = ffi.new("char[]", struct.pack(f"<{len(groups)}I", *groups))
    syscall(SYS_SETGROUPS, len(groups), int(ffi.cast("uintptr_t", packed)))


# --- as whom a tree runs ------------------------------------------------------------------------------------


def users_wanted(checkpoint: Checkpoint) -> Iterator[Wanted]:
    """Everybody that a tree would be, or leave something to, and every privilege; `pid` as the source numbers it."""
    for task in checkpoint.tasks:
        chroot = task.fs is not None and not is_our_root(checkpoint, task.fs.root_id)
        for thread in task.threads:
            needs = credential_needs(thread.credentials, filtered=bool(thread.seccomp_mode), chroot=chroot)
            yield from (Wanted(need, task.vpid, f"thread {thread.tid}") for need in needs)
    root = checkpoint.root.vpid
    for content in checkpoint.contents.values():
        if stat.S_ISDIR(content.mode):  # see Users.creating
            continue
        for need in owner_needs(content.uid, content.gid):
            yield Wanted(need, root, f"file {content.path or content.id}")
    for shared in checkpoint.shared.values():
        if shared.kind is not SharedKind.ANON:
            for need in owner_needs(shared.uid, shared.gid):
                yield Wanted(need, root, f"shared memory {shared.id}")
    numbers = {task.vpid for task in checkpoint.tasks}
    numbers |= {thread.tid for task in checkpoint.tasks for thread in task.threads}
    for file in checkpoint.files.values():
        if file.owner.pid and file.owner.pid not in numbers:
            yield Wanted(PrivilegeNeed("signals", file.owner.pid), root, f"file {file.id}")
        for need in _of_socket(file.resource):
            yield Wanted(need, root, f"file {file.id}")


def owner_needs(uid: int, gid: int) -> tuple[Need, ...]:
    """What an owner of something that travels must be allowed to be."""
    return UserNeed(uid), GroupNeed(gid)


def _of_socket(resource: object) -> Iterator[Need]:
    if isinstance(resource, InetSocket) and resource.local[1]:
        yield PrivilegeNeed("port", resource.local[1])
    if isinstance(resource, UnixSocket):
        if resource.path:
            yield from owner_needs(resource.uid, resource.gid)
        shown = [resource.peer_credentials, *(packet.credentials for packet in resource.queue)]
        for credentials in filter(None, shown):
            yield from owner_needs(*credentials[1:])
