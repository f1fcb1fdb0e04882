"""Where a peer is, in the user's words."""

from __future__ import annotations

from lazyproc.errors import UsageError

SCHEME = "ssh://"  # of what is reached through ssh(1)


def parse_address(text: str) -> tuple[str, int]:
    """("host", port) from HOST:PORT or [IPV6]:PORT. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError("is not an address", where=repr(text), remedy="write HOST:PORT or [IPV6]:PORT")
    if host.startswith("[") and host.endswith("]"):
        return host[1:-1], int(port)
    if ":" in host or "[" in host or "]" in host:
        raise UsageError("is not an address", where=repr(text), remedy="write an IPv6 address as [IPV6]:PORT")
    try:
        host.encode("idna")  # as `socket` does
    except UnicodeError:
        raise UsageError("is not the name of a host", where=repr(text), remedy="check the name") from None
    return host, int(port)
