"""Who waits for a guest, and is trusted."""

from __future__ import annotations

import socket
import threading
import time

from lazyproc.migrate.guest_dial import demand_fit, dialled
from lazyproc.pages.peer import Trust


def test_who_accepts_late_is_known_then() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[socket.socket] = []

        def accept() -> None:
            time.sleep(0.3)
            accepted.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        demand_fit(target, Trust())
        with dialled(target, Trust()) as sock:
            assert sock.getpeername() == listener.getsockname()
        thread.join()
        accepted[0].close()
