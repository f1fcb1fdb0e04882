"""What may be put on a keeper's desk that is no request (lazyproc/migrate/desk.py)."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack

from lazyproc.pages.session import Session
from tests.faults.strangers import Behaviour, Crowd

NESTED = b"[" * 60_000
VALUES: tuple[object, ...] = (
    None,
    5,
    "x",
    [],
    {},
    {"do": None},
    {"do": []},
    {"do": "end"},
    {"role": "urgent"},
)


def packets(session: Session) -> Sequence[Behaviour]:
    def noise(crowd: Crowd) -> None:
        crowd.say(crowd.rng.randbytes(crowd.rng.choice((1, 100, 60_000))))

    def closes_at_once(crowd: Crowd) -> None:
        crowd.connect().close()

    def too_deep(crowd: Crowd) -> None:
        crowd.say(NESTED)

    def no_request(crowd: Crowd) -> None:
        crowd.say(json.dumps(crowd.rng.choice(VALUES)).encode())

    def strange_descriptors(crowd: Crowd) -> None:
        """With none, one or several, of all kinds, with noise or with the words of who goes on with the session."""
        fields = {"do": "connect", "role": "control", "session": session.id, "token": session.token}
        match crowd.rng.randrange(4):
            case 0:
                fields.pop(crowd.rng.choice(tuple(fields)))
            case 1:
                fields[crowd.rng.choice(tuple(fields))] = crowd.rng.choice(("", "x", "0" * 500))
        data = json.dumps(fields).encode() if crowd.rng.random() < 0.8 else crowd.rng.randbytes(50)
        with ExitStack() as stack, crowd.connect() as sock:
            fds = array.array("i")
            for _ in range(crowd.rng.choice((0, 1, 1, 1, 3, 20))):
                fds.append(_descriptor(crowd, stack))
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else [])
            sock.recv(1 << 16)

    return (noise, closes_at_once, too_deep, no_request, strange_descriptors)


def _descriptor(crowd: Crowd, stack: ExitStack) -> int:
    match crowd.rng.randrange(5):
        case 0:
            return stack.enter_context(open(os.devnull)).fileno()
        case 1:
            return stack.enter_context(socket.socket()).fileno()
        case 2:
            listening = stack.enter_context(socket.socket())
            listening.listen()
            return listening.fileno()
        case 3:
            reading, writing = os.pipe()
            stack.callback(os.close, reading)
            stack.callback(os.close, writing)
            return writing
    one, other = socket.socketpair()
    stack.enter_context(one)
    return stack.enter_context(other).fileno()
