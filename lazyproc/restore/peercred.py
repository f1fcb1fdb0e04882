"""SO_PEERCRED shows who called socketpair(2), listen(2) or connect(2) (init_peercred, net/unix/af_unix.c): pid,
effective uid and gid. So the task that called it calls it again, if it is in the tree; for one that has ended somebody
does under its number, if that is free; for all others we do, and the pid is ours.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from lazyproc.errors import PidTaken
from lazyproc.facts import dataclass
from lazyproc.kernel.remote import Call
from lazyproc.kernel.sys import pidfd_getfd
from lazyproc.restore.creation import Maker
from lazyproc.restore.names import acting_as, address_of, descriptor_of
from lazyproc.restore.site import Site

Credentials = tuple[int, int, int]  # pid as the task itself sees it, uid, gid
Pair = tuple[socket.socket, socket.socket]
_KEEP = -1
_AT_ONCE = 64  # pairs, whose descriptors a task has for a moment
_PAIR = struct.Struct("<2i")


@dataclass(frozen=True, slots=True)
class Callers:
    """The tasks of the tree, as `maker` has made them; they have our own credentials still."""

    maker: Maker | None = None

    def socketpairs(self, kind: int, who: Credentials | None, count: int) -> list[Pair]:
        """So many alike. Each stop of a task costs as much as making many."""
        with self._caller(who) as site:
            if site is None:
                with acting_as(who):
                    return [socket.socketpair(socket.AF_UNIX, kind) for _ in range(count)]
            made: list[Pair] = []
            while missing := count - len(made):
                made += self._some_pairs(site, kind, who, min(missing, _AT_ONCE))
            return made

    def _some_pairs(self, site: Site, kind: int, who: Credentials | None, count: int) -> list[Pair]:
        at = site.bench.room(_PAIR.size * count)
        where = range(at, at + _PAIR.size * count, _PAIR.size)
        self._run(site, who, *(Call("socketpair", (socket.AF_UNIX, kind, 0, each)) for each in where))
        numbers = list(_PAIR.iter_unpack(site.bench.read(at, _PAIR.size * count)))
        pairs = [(_taken(site, here), _taken(site, there)) for here, there in numbers]
        site.run(*(Call("close", (number,)) for pair in numbers for number in pair))
        return pairs

    def listen(self, sock: socket.socket, backlog: int, who: Credentials | None) -> None:
        with self._caller(who) as site:
            if site is None:
                with acting_as(who):
                    sock.listen(backlog)
                return
            with _lent(site, sock.fileno()) as number:
                self._run(site, who, Call("listen", (number, backlog)))

    def connect(
        self, sock: socket.socket, target: socket.socket, name: bytes, who: Credentials | None
    ) -> None:
        """To the listening socket `target` of ours, whatever became of its file `name`."""
        with self._caller(who) as site:
            if site is None:
                with address_of(target, name) as path, acting_as(who):
                    sock.connect(path)
                return
            with _lent(site, sock.fileno()) as number, _address(site, target, name) as raw:
                address = site.bench.place(raw)
                self._run(site, who, Call("connect", (number, address, len(raw))))

    @contextmanager
    def _caller(self, who: Credentials | None) -> Iterator[Site | None]:
        """Whoever is to call; None: we."""
        with ExitStack() as stack:
            site = None
            if who is not None and who[0] and self.maker is not None:
                site = self.maker.sites.get(who[0])
                if site is None:
                    with suppress(PidTaken):
                        site = stack.enter_context(self.maker.standing_in(who[0]))
            yield site

    @staticmethod
    def _run(site: Site, who: Credentials | None, *calls: Call) -> None:
        """With the effective ids of `who`, and root's access to files."""
        uid, gid = os.geteuid(), os.getegid()
        if who is None or who[1:] == (uid, gid):
            site.run(*calls)
            return
        site.run(
            Call("setresgid", (_KEEP, who[2], _KEEP)),
            Call("setresuid", (_KEEP, who[1], _KEEP)),
            Call("setfsuid", (uid,)),
            *calls,
            Call("setresuid", (_KEEP, uid, _KEEP)),
            Call("setresgid", (_KEEP, gid, _KEEP)),
        )


def _taken(site: Site, number: int) -> socket.socket:
    return socket.socket(fileno=pidfd_getfd(site.pidfd, number))


@contextmanager
def _lent(site: Site, fd: int) -> Iterator[int]:
    """The number that a descriptor of ours has in the task, for the block."""
    (number,) = site.receive([fd])
    yield number
    site.run(Call("close", (number,)))


@contextmanager
def _address(site: Site, target: socket.socket, name: bytes) -> Iterator[bytes]:
    """struct sockaddr_un of a listening socket of ours, for the task."""
    family = struct.pack("<H", socket.AF_UNIX)
    if name.startswith(b"\0"):
        yield family + name
        return
    with descriptor_of(target) as file, _lent(site, file) as number:
        yield family + b"/proc/self/fd/%d\0" % number
