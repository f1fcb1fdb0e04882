"""The client's end of CRIU's page server protocol, without CRIU."""

from __future__ import annotations

import socket
from typing import Self

from lazyproc.model import PAGE
from lazyproc.wire.criu import Command, Connection, Dialect, Event, Message, PageBytes, Role

PATIENCE_S = 20


class CriuClient:
    """Asks one thing after the other. A context manager."""

    def __init__(self, sock: socket.socket, dialect: Dialect = Dialect.V4_2) -> None:
        self.sock = sock
        self.connection = Connection(Role.CLIENT, dialect)
        sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, vpid: int, addr: int, count: int) -> None:
        self.sock.sendall(self.connection.send(Message(Command.GET, count, addr, vpid)))

    def get(self, vpid: int, addr: int, count: int) -> bytes:
        """The pages that come; none when the server has said that it has none."""
        self.ask(vpid, addr, count)
        (message,) = self.receive()
        assert isinstance(message, Message)
        data = b""
        while len(data) < message.nr_pages * PAGE:
            data += b"".join(bytes(event.data) for event in self.receive() if isinstance(event, PageBytes))
        return data

    def close_in_order(self) -> Event:
        """The answer to CLOSE."""
        self.sock.sendall(self.connection.send(Message(Command.CLOSE)))
        (answer,) = self.receive()
        return answer

    def receive(self) -> list[Event]:
        """What completes next."""
        events: list[Event] = []
        while not events:
            data = self.sock.recv(self.connection.wanted)
            assert data, "the server has hung up"
            events = self.connection.receive_data(data)
        return events

    def hung_up(self) -> bool:
        """Whether the server ends the connection, and says nothing more."""
        try:
            return not self.sock.recv(1)
        except ConnectionError:
            return True
