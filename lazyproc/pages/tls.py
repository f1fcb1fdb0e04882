"""TLS for lazyproc's own traffic: 1.3 only, and each end demands a certificate of the same CA from the other.

OpenSSL 3 is under Apache-2.0, which GPL-2.0-only code may not be linked with; so this is Python's own `ssl`, and the
threads in C see a relay's plain end (pages/relay.py, docs/adr/0011-tls.md).
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager

from lazyproc.errors import ConnectionLost, LazyprocError, PermissionDenied, UsageError
from lazyproc.facts import dataclass

TYPE_CHECKING = False  # ssl costs 10 ms of the start of everybody who does not use it
if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping

# In TLS 1.3 the dialler's handshake is over before its certificate has been looked at. This byte says that it was
# taken; so a refusal comes here, with its reason, and not in the middle of the first frame.
LET_IN = b"\n"
# Who dials says in the handshake that it is lazyproc (ALPN, RFC 7301). CRIU says nothing, and fails for a byte that it
# has not asked for.
PROTOCOL = "lazyproc"
HANDSHAKE_RECORD = 0x16  # RFC 8446, 5.1: ContentType of a ClientHello

OPTIONS = "--tls-cert, --tls-key and --tls-ca"


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: our certificate (with what is between it and the CA), its private key, and the CA's certificate.

    They are read when a connection is opened, so renewed ones are used from the next connection on. `lazyproc keys`
    makes a set. `crl` is a list of certificates that the CA has revoked, "" without one. Without `names` who dials
    takes every certificate of the CA, whatever the other end is called.
    """

    cert: str
    key: str
    ca: str
    crl: str = ""
    names: bool = True

    def __post_init__(self) -> None:
        """Whoever goes on from a journal has another working directory."""
        for name in ("cert", "key", "ca", "crl"):
            if path := getattr(self, name):
                object.__setattr__(self, name, os.path.abspath(path))

    def facts(self) -> dict[str, str]:
        """For a journal: the names of the files, and "yes" for `names`."""
        names = "yes" if self.names else ""
        return {"cert": self.cert, "key": self.key, "ca": self.ca, "crl": self.crl, "names": names}

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> Tls:
        names = bool(facts.get("names", "yes"))
        return cls(facts["cert"], facts["key"], facts["ca"], facts.get("crl", ""), names)


def dialling(tls: Tls, *, criu: bool = False) -> ssl.SSLContext:
    """For who connects: the other end's certificate must be for the name it was called by. `criu`: its protocol is
    spoken, whoever listens. Raises UsageError.
    """
    import ssl

    context = _context(tls, ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = tls.names
    if not criu:
        context.set_alpn_protocols([PROTOCOL])
    return context


def accepting(tls: Tls) -> ssl.SSLContext:
    """For who listens: whoever has a certificate of the CA is let in. Raises UsageError."""
    import ssl

    context = _context(tls, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nothing is resumed: each connection proves anew who it is
    context.set_alpn_protocols([PROTOCOL])
    return context


def _context(tls: Tls, protocol: ssl._SSLMethod) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for path in (tls.cert, tls.key, tls.ca, *([tls.crl] if tls.crl else ())):
        _demand_readable(path)
    try:
        context.load_verify_locations(tls.ca)
    except ssl.SSLError:
        raise UsageError("is no certificate in PEM", where=tls.ca, remedy=f"check {OPTIONS}") from None
    if tls.crl:
        _load_revoked(context, tls.crl)
    try:
        context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    except ssl.SSLError as error:
        what = "is not the key of that certificate"
        if error.reason != "KEY_VALUES_MISMATCH":
            what = "is no pair of a certificate and a key in PEM"
        raise UsageError(what, where=f"{tls.key} with {tls.cert}", remedy=f"check {OPTIONS}") from None
    except _Encrypted:
        raise UsageError(
            "the key is encrypted, and nobody can be asked for its password",
            where=tls.key,
            remedy="store it without (openssl pkey -in KEY -out NEW), readable by its owner alone",
        ) from None
    return context


def _load_revoked(context: ssl.SSLContext, path: str) -> None:
    """A certificate is refused when it is in the list, or when the list is not of its CA, or is too old."""
    import ssl

    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise UsageError("is no revocation list in PEM", where=path, remedy="see openssl-ca(1)") from None
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF


class _Encrypted(Exception):
    """OpenSSL wants a password, and would ask the terminal."""


def _no_password() -> str:
    raise _Encrypted


def _demand_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}",
            where=path,
            remedy=f"check {OPTIONS}; lazyproc keys makes such files",
        ) from None


# --- who dials --------------------------------------------------------------------------------------------------


def secured(sock: socket.socket, tls: Tls, host: str, where: str) -> ssl.SSLSocket:
    """A connection to lazyproc when both ends have taken the other's certificate; see `handshaken`."""
    import ssl

    far = handshaken(sock, tls, host, where)
    try:
        with _blamed(tls, where):
            said = far.recv(len(LET_IN))
            if said != LET_IN:
                raise ssl.SSLEOFError
    except LazyprocError:
        far.close()
        raise
    return far


def handshaken(sock: socket.socket, tls: Tls, host: str, where: str, *, criu: bool = False) -> ssl.SSLSocket:
    """The connected socket after the handshake; `sock` is used up. The other end may still say that it does not take
    our certificate.

    Its timeout is the limit of every step. `host` is the name or address the other end must prove to have. Raises
    PermissionDenied, ConnectionLost, UsageError for the files.
    """
    try:
        sock = far = dialling(tls, criu=criu).wrap_socket(
            sock,
            server_hostname=host.partition("%")[0],
            suppress_ragged_eofs=False,
            do_handshake_on_connect=False,
        )
        with _blamed(tls, where):
            far.do_handshake()
    except LazyprocError:
        sock.close()
        raise
    return far


@contextmanager
def _blamed(tls: Tls, where: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise ConnectionLost(
            "connected, but it does not answer in TLS", where=where, remedy="is it lazyproc, or CRIU?"
        ) from None
    except OSError as error:
        raise refusal(error, tls, where) from None


# --- who accepts ------------------------------------------------------------------------------------------------


class Greeting:
    """The acceptor's handshake with one stranger, a step whenever his socket is ready; slow ones delay nobody."""

    def __init__(self, sock: socket.socket, tls: Tls, where: str, *, criu: bool = False) -> None:
        """`sock` is not blocking; `where` is its peer. With `criu` who does not say that it is lazyproc gets no byte
        unasked. Raises UsageError for the files.
        """
        self.sock = sock
        self._criu = criu
        self.wants_write = False
        self._context = accepting(tls)
        self._tls = tls
        self._where = where
        self._far: ssl.SSLSocket | None = None

    def fileno(self) -> int:
        return (self._far or self.sock).fileno()

    def close(self) -> None:
        (self._far or self.sock).close()

    @property
    def is_ours(self) -> bool:
        """Whether the stranger has said that he is lazyproc."""
        return self._far is not None and self._far.selected_alpn_protocol() == PROTOCOL

    def step(self) -> ssl.SSLSocket | None:
        """The secured socket when the handshake is over. Raises PermissionDenied, Plain, ConnectionLost."""
        import ssl

        try:
            if self._far is None:
                self._demand_tls()
                self._far = self._context.wrap_socket(
                    self.sock, server_side=True, suppress_ragged_eofs=False, do_handshake_on_connect=False
                )
            self._far.do_handshake()
            if self.is_ours or not self._criu:
                self._far.send(LET_IN)  # the first byte finds room
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as error:
            self.wants_write = isinstance(error, ssl.SSLWantWriteError)
            return None
        except OSError as error:
            raise refusal(error, self._tls, self._where) from None
        return self._far

    def _demand_tls(self) -> None:
        """OpenSSL would say of anything else that its version is wrong."""
        first = self.sock.recv(1, socket.MSG_PEEK)
        if first and first[0] != HANDSHAKE_RECORD:
            raise Plain("came without TLS, which is spoken here", where=self._where)


class Plain(PermissionDenied):
    """A connection without TLS where TLS is spoken."""


# --- what went wrong --------------------------------------------------------------------------------------------

RENEW = "make new ones with lazyproc keys"
_ALERTS = {  # as OpenSSL calls what the other end says of our certificate (RFC 8446, 6.2)
    "TLSV1_ALERT_UNKNOWN_CA": "it is not of the CA that is trusted there",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it was revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is not valid, or not for the name it was called by",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it could not be verified",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is not made for this use",
    "TLSV1_ALERT_DECRYPT_ERROR": "its signature is wrong",
    "TLSV1_ALERT_ACCESS_DENIED": "it is not welcome there",
}
_NO_CERTIFICATE = ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "PEER_DID_NOT_RETURN_A_CERTIFICATE")
_VERSIONS = ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE")
_NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")


def refusal(error: OSError, tls: Tls, where: str) -> LazyprocError:
    """What went wrong in a handshake with `where`, and what to do."""
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        return _not_taken(error, tls, where)
    reason = str(getattr(error, "reason", None) or "")
    if reason in _ALERTS:
        return PermissionDenied(
            f"the other end does not take our certificate {tls.cert}: {_ALERTS[reason]}",
            where=where,
            remedy=f"use one of the CA that the other end has; {RENEW}",
        )
    if reason in _NO_CERTIFICATE:
        return PermissionDenied(
            "the other end of the connection wants or gave no certificate",
            where=where,
            remedy=f"give {OPTIONS} there",
        )
    if reason in _VERSIONS:
        return PermissionDenied("the two ends have no version of TLS in common; 1.3 is needed", where=where)
    if reason in _NO_TLS:
        return ConnectionLost(
            "does not speak TLS", where=where, remedy=f"start lazyproc there with {OPTIONS}"
        )
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
        return PermissionDenied(f"the TLS handshake failed ({reason or error})", where=where)
    return ConnectionLost(
        "the TLS handshake was broken off",
        where=where,
        remedy=f"does lazyproc there have {OPTIONS}, too? see its log",
    )


def _not_taken(error: ssl.SSLCertVerificationError, tls: Tls, where: str) -> PermissionDenied:
    """The other end's certificate. Codes are X509_V_ERR_… (x509_vfy.h)."""
    match error.verify_code:
        case 9 | 10:
            what = "has expired" if error.verify_code == 10 else "is not valid yet"
            return PermissionDenied(
                f"its certificate {what}", where=where, remedy=f"{RENEW}, or check the clocks"
            )
        case 23:
            return PermissionDenied("its certificate was revoked", where=where, remedy=RENEW)
        case 3 | 12:
            what = "is too old" if error.verify_code == 12 else "is not of the CA of its certificate"
            return PermissionDenied(f"the revocation list {tls.crl} {what}", where=where, remedy="renew it")
        case 62 | 64:
            return PermissionDenied(
                "its certificate is not for that name or address",
                where=where,
                remedy="call it by a name that its certificate has; lazyproc keys writes the names it is given",
            )
        case 18 | 19 | 20 | 21:
            return PermissionDenied(
                f"its certificate is not of the CA in {tls.ca}",
                where=where,
                remedy="give both ends certificates of one CA; lazyproc keys makes them",
            )
    return PermissionDenied(f"its certificate cannot be verified: {error.verify_message}", where=where)
