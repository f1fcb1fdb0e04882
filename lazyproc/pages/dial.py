"""Connections that are ours to open."""

from __future__ import annotations

import socket
import time

from lazyproc.errors import ConnectionLost, LazyprocError, ProtocolError
from lazyproc.pages.address import SCHEME, parse_address
from lazyproc.pages.channel import Behind, Channel, tune
from lazyproc.pages.peer import Trust
from lazyproc.pages.tls import Tls, secured
from lazyproc.wire.native import VERSION, Abort, Event, Hello, Party, Welcome


class Declined(ProtocolError):
    """The HELLO was understood, and answered with no."""


def dial(address: str, hello: Hello, side: Party, *, trust: Trust, timeout: float = 10) -> Channel:
    """A channel to whoever listens at HOST:PORT or ssh://HOST/PORT, greeted and welcomed.

    With TLS the peer proves who he is before anything is said. Without, he is checked once he has answered: until he
    has accepted, the kernel cannot name his socket's owner. Raises UsageError for the address or the files of `trust`,
    ConnectionLost, PermissionDenied for an untrusted peer, ProtocolError.
    """
    channel = _dialled(address, side, trust, timeout)
    asked = time.monotonic()
    try:
        channel.send(hello)
        _check_answer(channel.receive(timeout), hello, address)
        if channel.behind is None:
            trust.check(channel.socket)
        elif channel.behind.rtt_us is None:
            channel.behind = Behind(address, (time.monotonic() - asked) * 1e6)
    except LazyprocError:
        channel.close()
        raise
    return channel


def _dialled(address: str, side: Party, trust: Trust, timeout: float) -> Channel:
    """A connection over which nothing has been said. Whoever is behind a relay or ssh has proved who he is."""
    if address.startswith(SCHEME):
        from lazyproc.pages.ssh import connected

        return Channel(connected(address), side, dialled=address, behind=Behind(address, None))
    sock = connect(address, timeout)
    if trust.tls is None:
        return Channel(sock, side, dialled=address)
    return _behind_tls(sock, address, side, trust.tls)


def _behind_tls(sock: socket.socket, address: str, side: Party, tls: Tls) -> Channel:
    from lazyproc.pages.relay import relayed  # it imports ssl

    tune(sock)
    far = secured(sock, tls, parse_address(address)[0], address)
    behind = Behind.look(far)
    return Channel(relayed(far), side, dialled=address, behind=behind)


def _check_answer(answer: Event | None, hello: Hello, address: str) -> None:
    if answer is None:
        raise ConnectionLost("connected, but there is no answer", where=address, remedy="is it lazyproc?")
    if isinstance(answer, Abort):
        refusal = f"refused: {answer.fields.get('reason')!s:.200}"
        if answer.fields.get("again") is True:
            raise ConnectionLost(refusal, where=address)
        raise Declined(refusal, where=address)
    if not isinstance(answer, Welcome) or (answer.session, answer.version) != (hello.session, VERSION):
        raise ProtocolError(f"{answer} is no answer to {hello}", where=address)


class Unreachable(ConnectionLost):
    """There was no connection in the first place."""


def connect(
    address: str, timeout: float, otherwise: str = "start lazyproc receive or serve there first"
) -> socket.socket:
    """A TCP connection to HOST:PORT. `otherwise`: what to do when nobody listens. Raises UsageError for the address,
    Unreachable.
    """
    try:
        return socket.create_connection(parse_address(address), timeout)
    except socket.gaierror as error:
        what, remedy = f"the name is not known ({error.strerror})", "check the name, or give an address"
    except ConnectionRefusedError:
        what, remedy = "nobody listens there", otherwise
    except OSError as error:
        what, remedy = f"cannot be reached ({error.strerror or error})", "check the network and firewalls"
    raise Unreachable(what, where=address, remedy=remedy)
