"""Where a command reads and writes: the folder of images, the work folder, and what lies in them."""

from __future__ import annotations

import os
from pathlib import Path

import lazyproc
from lazyproc.criu.parse import Given
from lazyproc.errors import UsageError

# criu/tls.c, as distributions build it.
CERT, KEY = "/etc/pki/criu/cert.pem", "/etc/pki/criu/private/key.pem"
CA, CRL = "/etc/pki/CA/cacert.pem", "/etc/pki/CA/cacrl.pem"


def images(given: Given) -> Path:
    """Raises UsageError unless it is a folder: CRIU makes none."""
    return _folder(given.last("images-dir", "."), "--images-dir")


def work(given: Given) -> Path:
    return _folder(given.last("work-dir"), "--work-dir") if "work-dir" in given else images(given)


def root(given: Given) -> str | None:
    """The root directory of the tree, where that is to be another one than ours. Raises UsageError."""
    return str(_folder(given.last("root"), "--root").absolute()) if "root" in given else None


def log(given: Given) -> Path | None:
    return work(given) / given.last("log-file") if "log-file" in given else None


def _folder(name: str, option: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise UsageError("is no folder", where=f"{option} {name}", remedy="make it first")
    return path


def private(path: str, flags: int) -> int:
    """An opener (see open()) of files that are nobody else's, whatever the umask is; as CRIU's are."""
    return os.open(path, flags, 0o600)


def write_pidfile(given: Given, pid: int) -> None:
    """No new line, as of CRIU. Raises UsageError when it is there already."""
    if "pidfile" not in given:
        return
    path = work(given) / given.last("pidfile")
    try:
        with open(path, "x", opener=private) as file:
            file.write(str(pid))
    except OSError as error:
        raise UsageError(
            f"cannot be written ({os.strerror(error.errno or 0).lower()})",
            where=f"--pidfile {path}",
            remedy="remove it first",
        ) from None


def say_ready(given: Given) -> None:
    """A zero byte to --status-fd, which is closed then. Raises UsageError."""
    fd = given.number("status-fd", -1)
    if fd < 0:
        return
    try:
        os.write(fd, b"\0")
        close_status(given)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise UsageError(
            f"cannot be written ({reason})", where=f"--status-fd {fd}", remedy="give an open one"
        ) from None


def tls(given: Given) -> lazyproc.Tls | None:
    """With --tls: the files that are given, otherwise those of CRIU's own folders."""
    if "tls" not in given:
        return None
    crl = CRL if os.access(CRL, os.R_OK) else ""
    return lazyproc.Tls(
        given.last("tls-cert", CERT),
        given.last("tls-key", KEY),
        given.last("tls-cacert", CA),
        given.last("tls-cacrl", crl),
        names="tls-no-cn-verify" not in given,
    )


def close_status(given: Given) -> None:
    """In every process that has --status-fd: who reads it waits for its end. Raises OSError unless it is open."""
    if (fd := given.number("status-fd", -1)) >= 0:
        os.close(fd)


def peer(given: Given) -> str:
    """HOST:PORT of a page server. Raises UsageError."""
    host, port = given.last("address", "127.0.0.1"), given.number("port", 0)
    if not port:
        raise UsageError("is not given", where="--port", remedy="name the port of the page server")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def insecure(given: Given) -> bool:
    """Whether the other end of a page server's connection may be anybody."""
    return "insecure" in given


def page_server(given: Given) -> lazyproc.PageServerOfCriu:
    """CRIU's, or ours that speaks its language. Raises UsageError."""
    return lazyproc.PageServerOfCriu(peer(given), insecure=insecure(given), tls=tls(given))
