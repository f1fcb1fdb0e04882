"""Who waits for a guest, and is trusted."""

from __future__ import annotations

import socket
import threading

import pytest

from lazyproc.migrate import guest_dial
from lazyproc.migrate.guest_dial import demand_fit, dialled
from lazyproc.pages.peer import Trust, peer_uid


def test_who_accepts_late_is_known_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """He does when he has been looked for, and nobody was there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []
        nobody = threading.Event()

        def looked_for(sock: socket.socket) -> int | None:
            uid = peer_uid(sock)
            if uid is None:
                nobody.set()
            return uid

        def accept() -> None:
            if nobody.wait(10):
                accepted.append(listener.accept()[0])

        monkeypatch.setattr(guest_dial, "peer_uid", looked_for)
        thread = threading.Thread(target=accept)
        thread.start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        demand_fit(target, Trust())
        try:
            with dialled(target, Trust()) as sock:
                assert sock.getpeername() == listener.getsockname()
        finally:
            nobody.set()
            thread.join()
        accepted[0].close()
