"""A service on TCP port 5000 that answers each line of its first client in capitals and counts the later ones.

tcp_service.py STATUS [--inner]: STATUS gets a JSON list: the seconds of its clock at the last look, whether the first
client is still there ("open" or "ended"), what it said that was not a whole line, how many later ones came. With
--inner it also has both ends of a connection to itself, which it tries at each look.
"""

import json
import os
import socket
import sys
import time

PORT = 5000


def inner_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        one = socket.create_connection(door.getsockname())
        return one, door.accept()[0]


def main() -> None:
    ballast = os.urandom(8 << 20)
    pair = inner_pair() if "--inner" in sys.argv else None
    door = socket.create_server(("", PORT))
    first, rest, later = door.accept()[0], b"", 0
    door.setblocking(False)
    first.setblocking(False)
    state = "open"
    while True:
        try:
            data = first.recv(4096) if state == "open" else b"?"
            if data == b"":
                state = "ended"
            elif state == "open":
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    first.sendall(line.upper() + b"\n")
        except BlockingIOError:
            pass
        except OSError as error:
            state = f"ended by {type(error).__name__}"
        try:
            door.accept()[0].close()
            later += 1
        except BlockingIOError:
            pass
        if pair:
            pair[0].sendall(b"x")
            assert pair[1].recv(1) == b"x"
        assert len(ballast) == 8 << 20
        with open(sys.argv[1] + ".new", "w") as status:
            json.dump([time.monotonic(), state, rest.decode(), later], status)
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(0.01)


main()
