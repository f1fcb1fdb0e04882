"""Everything that may come to a listener and is no migration. What each stranger does follows from the seed."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from lazyproc.pages.session import Session
from lazyproc.wire import native
from lazyproc.wire.frame import HEADER, Type
from lazyproc.wire.native import Connection, Event, Party, Role

ROLES = (Role.CONTROL, Role.URGENT, Role.BULK)
GREETING_S = 10.0
HALF_OPEN = 3000  # strangers who say nothing, at once; the oldest are closed
SLOW = 20  # at once, each with a byte at every step of the others
LIMITS = (0x7FFFFFFF, 0xFFFFFFFF, 64 << 10 | 1, 64 << 20 | 1)  # payloads that no frame may have, or just so
_GONE = struct.pack("ii", 1, 0)  # struct linger: close(2) sends RST

Dial = Callable[[], socket.socket]
Behaviour = Callable[["Crowd"], None]


@dataclass(frozen=True, slots=True)
class Script:
    """What a peer of that side may say on its control connection once it has been welcomed."""

    side: Party
    control: Sequence[Event]
    pages: Sequence[Event] = ()  # on its urgent and bulk connections

    def streams(self, session: Session) -> dict[Role, list[bytes]]:
        """The frames of each connection, HELLO first."""
        return {role: list(self.frames(session, role)) for role in ROLES}

    def frames(self, session: Session, role: Role) -> Iterator[bytes]:
        other = Party.DESTINATION if self.side is Party.SOURCE else Party.SOURCE
        ours, theirs = Connection(self.side, dialled=True), Connection(other, dialled=False)
        greeting = ours.send(session.hello(role))
        theirs.receive_data(greeting)
        ours.receive_data(theirs.send(native.Welcome(session.id)))
        yield greeting
        for event in self.control if role is Role.CONTROL else self.pages:
            yield ours.send(event)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bits flipped, or a piece cut out, doubled or replaced by noise; never the same."""
    piece = bytearray(data)
    while bytes(piece) == data:
        at = rng.randrange(len(piece) + 1)
        end = min(len(piece), at + rng.choice((1, 4, 32, 1024)))
        match rng.randrange(4):
            case 0:
                for _ in range(rng.choice((1, 1, 2, 8))):
                    piece[rng.randrange(len(piece))] ^= 1 << rng.randrange(8)
            case 1:
                del piece[at:end]
            case 2:
                piece[at:at] = piece[at:end]
            case _:
                piece[at:end] = rng.randbytes(end - at)
        if not piece:
            piece += rng.randbytes(1)
    return bytes(piece)


@dataclass
class Crowd:
    """Strangers who come one after another, and some who stay. `counts` says who came so far; a whole session is
    three connections.
    """

    dial: Dial
    script: Script
    rng: random.Random
    sessions: Sequence[Session] = ()  # such as are known to the listener, their tokens are not
    counts: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    _half_open: deque[socket.socket] = field(default_factory=deque)
    _slow: list[tuple[socket.socket, Iterator[bytes]]] = field(default_factory=list)

    def come(self, count: int, behaviours: Sequence[Behaviour], limit_s: float) -> None:
        """At least `count` connections, each behaviour as often as any other. AssertionError after `limit_s` s."""
        until, goal = time.monotonic() + limit_s, self.connections + count
        while self.connections < goal:
            assert time.monotonic() < until, f"{self.connections} of {goal} connections in {limit_s:.0f} s"
            behaviour = self.rng.choice(behaviours)
            self.counts[behaviour.__name__] += 1
            with suppress(OSError):  # hung up on
                behaviour(self)
            self._one_byte_more()

    def leave(self) -> None:
        """Nobody is left."""
        for sock in [*self._half_open, *(sock for sock, _ in self._slow)]:
            sock.close()
        self._half_open.clear()
        self._slow.clear()

    def connect(self) -> socket.socket:
        self.connections += 1
        return self.dial()

    def say(self, data: bytes) -> None:
        """To somebody who may hang up at any byte of it."""
        with self.connect() as sock:
            sock.sendall(data)

    def stay(self, sock: socket.socket) -> None:
        self._half_open.append(sock)
        while len(self._half_open) > HALF_OPEN:
            self._half_open.popleft().close()

    def stay_slow(self, sock: socket.socket, data: bytes) -> None:
        self._slow.append((sock, iter(struct.unpack(f"{len(data)}c", data))))
        while len(self._slow) > SLOW:
            self._slow.pop(0)[0].close()

    def _one_byte_more(self) -> None:
        for each in list(self._slow):
            sock, data = each
            try:
                sock.send(next(data), socket.MSG_DONTWAIT)
            except (OSError, StopIteration):
                sock.close()
                self._slow.remove(each)

    def greeting(self, role: Role = Role.CONTROL) -> bytes:
        return next(self.script.frames(Session.new(), role))


# --- one connection ---------------------------------------------------------------------------------------------


def noise(crowd: Crowd) -> None:
    crowd.say(crowd.rng.randbytes(crowd.rng.choice((1, 31, 32, 33, 4096))))


def closes_at_once(crowd: Crowd) -> None:
    crowd.connect().close()


def says_nothing(crowd: Crowd) -> None:
    crowd.stay(crowd.connect())


def half_a_greeting(crowd: Crowd) -> None:
    """Ended in the middle, or never."""
    sock, data = crowd.connect(), crowd.greeting()
    crowd.stay(sock)
    sock.sendall(data[: crowd.rng.randrange(1, len(data))])
    if crowd.rng.random() < 0.5:
        sock.shutdown(socket.SHUT_WR)


def byte_by_byte(crowd: Crowd) -> None:
    crowd.stay_slow(crowd.connect(), crowd.greeting())


def mutated_greeting(crowd: Crowd) -> None:
    crowd.say(mutated(crowd.greeting(crowd.rng.choice(ROLES)), crowd.rng))


def too_long(crowd: Crowd) -> None:
    kind = crowd.rng.choice((*Type, 0, 255))
    crowd.say(HEADER.pack(kind, 0, 0, crowd.rng.choice(LIMITS), 0, 0, 0, 0) + bytes(64))


def out_of_turn(crowd: Crowd) -> None:
    """A whole conversation, sent at once."""
    role = crowd.rng.choice(ROLES)
    frames = list(crowd.script.frames(Session.new(), role))
    crowd.rng.shuffle(frames)
    crowd.say(b"".join(frames))


def wrong_session(crowd: Crowd) -> None:
    """Begins, joins or goes on with a session that is another's or nobody's."""
    known = crowd.rng.choice((*crowd.sessions, Session.new()))
    stranger = Session(known.id, Session.new().token)
    role, resume = crowd.rng.choice(ROLES), crowd.rng.random() < 0.7
    if not resume:
        role = Role.BULK
    _greet(crowd, stranger.hello(role, resume=resume)).close()


def resets(crowd: Crowd) -> None:
    """Gone, with the greeting unread: who answers learns it by an error."""
    sock = crowd.connect()
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _GONE)
        sock.sendall(crowd.greeting())


def never_comes_again(crowd: Crowd) -> None:
    """A session that was begun, and stays without its other connections."""
    session = Session.new()
    crowd.stay(_greet(crowd, session.hello(Role.CONTROL)))
    if crowd.rng.random() < 0.5:
        crowd.stay(_greet(crowd, session.hello(Role.BULK)))


def _greet(crowd: Crowd, hello: native.Hello) -> socket.socket:
    """Said, and whatever the answer is has come; an OSError when there is none."""
    sock = crowd.connect()
    sock.settimeout(GREETING_S)
    sock.sendall(Connection(crowd.script.side, dialled=True).send(hello))
    sock.recv(1 << 16)
    return sock


ALONE: tuple[Behaviour, ...] = (
    noise,
    closes_at_once,
    says_nothing,
    half_a_greeting,
    byte_by_byte,
    mutated_greeting,
    too_long,
    out_of_turn,
    wrong_session,
    resets,
    never_comes_again,
)


# --- a session --------------------------------------------------------------------------------------------------


def mutated_session(crowd: Crowd) -> None:
    """All three connections are let in; what comes then is not what it should be."""
    session = Session.new()
    streams = crowd.script.streams(session)
    socks = {role: _greet(crowd, session.hello(role)) for role in ROLES}
    try:
        control = b"".join(streams[Role.CONTROL][1:])
        cut = crowd.rng.randrange(len(control) + 1)
        socks[Role.CONTROL].sendall(
            crowd.rng.choice((b"", control[:cut], mutated(control, crowd.rng), mutated(control, crowd.rng)))
        )
        for role in ROLES[1:]:
            socks[role].sendall(mutated(b"".join(streams[role][1:]) or bytes(32), crowd.rng))
        if crowd.rng.random() < 0.5:
            socks[Role.CONTROL].recv(1 << 16)
    finally:
        for sock in socks.values():
            sock.close()


def silent_session(crowd: Crowd) -> None:
    """Whoever takes it in waits for a PREPARE."""
    session = Session.new()
    for role in ROLES:
        crowd.stay(_greet(crowd, session.hello(role)))


def prepared_session(crowd: Crowd) -> None:
    """A destination that is ready, gets what it needs to build a tree, asks for pages or talks nonsense, and leaves."""
    session = Session.new()
    streams = crowd.script.streams(session)
    socks = {role: _greet(crowd, session.hello(role)) for role in ROLES}
    try:
        socks[Role.CONTROL].sendall(_PREPARED)
        _wait_for(socks[Role.CONTROL], Type.IMAGES)
        for role in ROLES[1:]:
            gets = b"".join(streams[role][1:])
            socks[role].sendall(crowd.rng.choice((gets, mutated(gets, crowd.rng))))
        socks[Role.CONTROL].sendall(crowd.rng.choice((b"", crowd.rng.randbytes(32), _PREPARED)))
        socks[Role.URGENT].recv(1 << 16)
    finally:
        for sock in socks.values():
            sock.close()


_PREPARED = HEADER.pack(Type.PREPARED, 0, 0, 2, 0, 0, 0, 0) + b"{}"


def _wait_for(sock: socket.socket, kind: Type) -> None:
    """Until the header of such a frame has come; what was said before is passed over."""
    while True:
        header = sock.recv(HEADER.size, socket.MSG_WAITALL)
        if len(header) < HEADER.size or header[0] == kind:
            return
        sock.recv(HEADER.unpack(header)[3], socket.MSG_WAITALL)
