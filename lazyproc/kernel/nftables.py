"""nf_tables over netlink: tables of the family inet in the calling thread's network namespace.

nft(8) says the same and takes 15 to 25 ms to start; here a batch is one send(2), and all of it or nothing holds when
that returns. Layouts: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h. A batch begins and ends with a message of
its own, and errors come back one by one for the messages that had them.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple, Self

from lazyproc.errors import HostLacks, LazyprocError, PermissionDenied

_NETLINK_NETFILTER = 12
_SO_SNDBUFFORCE = 32
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 16, 17
_NEW_TABLE, _GET_TABLE, _NEW_CHAIN, _NEW_RULE, _NEW_SET, _NEW_ELEMENTS, _DESTROY_TABLE = (
    _SUBSYSTEM << 8 | n for n in (0, 1, 3, 6, 9, 12, 26)
)
_REQUEST, _ACK, _DUMP, _CREATE, _APPEND = 0x1, 0x4, 0x300, 0x400, 0x800  # NLM_F_*
_ERROR, _DONE = 2, 3  # NLMSG_*
_INET, _IPV4, _IPV6 = 1, 2, 10  # NFPROTO_*
_OWNER = 2  # NFT_TABLE_F_OWNER
_NESTED = 0x8000  # NLA_F_NESTED
_MESSAGE = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, pid
_GENERIC = struct.Struct("!BBH")  # nfgenmsg: family, version, resource
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_U32 = struct.Struct("!I")
_S32 = struct.Struct("=i")
_REGISTER = 1  # NFT_REG_1
_FIRST_WORD = 8  # NFT_REG32_00: the same room in words, for what is looked up as one
_IPV4_ADDRESS, _IPV6_ADDRESS, _PORT = 7, 8, 13  # as nft(8) numbers its types, six bits each
_AT_ONCE = 1000  # elements, whose list has 16 bits for its length
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2  # NFT_PAYLOAD_*
_MARK, _NFPROTO, _L4PROTO = 3, 15, 16  # NFT_META_*
_LARGEST = 1 << 30

PREROUTING, OUTPUT = 0, 3  # NF_INET_PRE_ROUTING, NF_INET_LOCAL_OUT


class Change(NamedTuple):
    """A message of a batch: its type, NLM_F_* flags and attributes."""

    kind: int
    flags: int
    attributes: bytes


def destroy(table: str) -> Change:
    """A table that is not there is no error (Linux 6.3)."""
    return Change(_DESTROY_TABLE, 0, _text(1, table))


def new_table(table: str, *, owned: bool) -> Change:
    """`owned`: only the Netfilter that made it can change it, and it goes when that one is closed, by whomever."""
    return Change(_NEW_TABLE, _CREATE, _text(1, table) + _number(2, _OWNER if owned else 0))


def new_chain(table: str, chain: str, hook: int, priority: int) -> Change:
    """A filter whose packets pass unless a rule drops them."""
    at = _number(1, hook) + _number(2, priority & 0xFFFFFFFF)
    return Change(
        _NEW_CHAIN, _CREATE, _text(1, table) + _text(3, chain) + _nested(4, at) + _text(7, "filter")
    )


def new_rule(table: str, chain: str, expressions: Iterable[bytes]) -> Change:
    """The verdict holds for packets of which all the conditions before it do."""
    where = _text(1, table) + _text(2, chain)
    return Change(_NEW_RULE, _CREATE | _APPEND, where + _nested(4, b"".join(expressions)))


def new_ends(table: str, name: str, ends: Sequence[bytes]) -> Iterator[Change]:
    """A set of what `ends_of` gives, all of one length. To look one up takes as long however many there are."""
    kind = _IPV4_ADDRESS if len(ends[0]) == 16 else _IPV6_ADDRESS
    concatenated = ((kind << 6 | _PORT) << 6 | kind) << 6 | _PORT
    where, called = _text(1, table) + _text(2, name), _number(10, 1)
    size = _nested(9, _number(1, len(ends)))
    yield Change(
        _NEW_SET, _CREATE, where + _number(4, concatenated) + _number(5, len(ends[0])) + size + called
    )
    for first in range(0, len(ends), _AT_ONCE):
        some = (_nested(1, _nested(1, _attribute(1, each))) for each in ends[first : first + _AT_ONCE])
        yield Change(_NEW_ELEMENTS, _CREATE, where + _nested(3, b"".join(some)))


def ends_of(here: tuple[bytes, int], there: tuple[bytes, int]) -> bytes:
    """Two ends (address, port) as an element of a set: each part in whole words."""
    return b"".join(address + struct.pack("!HH", port, 0) for address, port in (there, here))


def ends_are_in(name: str, *, four: bool, inbound: bool) -> bytes:
    """The packet leads from what is there to what is here, or the other way."""
    length, words = (4, 1) if four else (16, 4)
    addresses = (12, 16) if four else (8, 24)  # source, destination
    loads, register = [], _FIRST_WORD
    for end in (0, 1) if inbound else (1, 0):
        loads.append(_payload(_NETWORK_HEADER, addresses[end], length, register))
        loads.append(_payload(_TRANSPORT_HEADER, 2 * end, 2, register + words))
        register += words + 1
    family = _meta_is(_NFPROTO, bytes([_IPV4 if four else _IPV6]))
    return family + b"".join(loads) + _expression("lookup", _text(1, name) + _number(2, _FIRST_WORD))


# Expressions. The same few stand in many rules: a server's connections have one address and port here.


@cache
def mark_is(mark: int) -> bytes:
    return _meta_is(_MARK, struct.pack("=I", mark))


@cache
def protocol_is(protocol: int) -> bytes:
    return _meta_is(_L4PROTO, bytes([protocol]))


@cache
def address_is(address: bytes, *, source: bool) -> bytes:
    """Of 4 or of 16 bytes; packets of the other family have no such address."""
    four = len(address) == 4
    offset = (12 if four else 8) + (0 if source else len(address))
    return _meta_is(_NFPROTO, bytes([_IPV4 if four else _IPV6])) + _header_is(
        _NETWORK_HEADER, offset, address
    )


@cache
def port_is(port: int, *, source: bool) -> bytes:
    """TCP's and UDP's lie at the same place."""
    return _header_is(_TRANSPORT_HEADER, 0 if source else 2, struct.pack("!H", port))


@cache
def verdict(*, accept: bool) -> bytes:
    """Counted, as `nft list` shows."""
    code = _nested(2, _number(1, int(accept)))  # NF_DROP, NF_ACCEPT
    return _expression("counter", b"") + _expression("immediate", _number(1, 0) + _nested(2, code))


def _meta_is(key: int, value: bytes) -> bytes:
    return _expression("meta", _number(1, _REGISTER) + _number(2, key)) + _equals(value)


def _header_is(header: int, offset: int, value: bytes) -> bytes:
    return _payload(header, offset, len(value), _REGISTER) + _equals(value)


def _payload(header: int, offset: int, length: int, register: int) -> bytes:
    where = _number(2, header) + _number(3, offset) + _number(4, length)
    return _expression("payload", _number(1, register) + where)


def _equals(value: bytes) -> bytes:
    data = _nested(3, _attribute(1, value))
    return _expression("cmp", _number(1, _REGISTER) + _number(2, 0) + data)


def _expression(name: str, data: bytes) -> bytes:
    return _nested(1, _text(1, name) + _nested(2, data))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, _U32.pack(value))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _nested(kind: int, value: bytes) -> bytes:
    return _attribute(kind | _NESTED, value)


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


class Netfilter:
    """A socket to nf_tables of the network namespace in which it was opened. To be closed."""

    def __init__(self) -> None:
        """Raises HostLacks when the kernel has no netfilter."""
        try:
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as error:
            raise _refused(error.errno or 0) from None
        self._sock.bind((0, 0))

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def change(self, batch: Iterable[Change]) -> None:
        """All of it at once, or nothing. PermissionDenied without CAP_NET_ADMIN, HostLacks without nf_tables,
        LazyprocError for what the kernel does not take.
        """
        data = _batch(list(batch))
        with suppress(PermissionError):  # the kernel says that of the batch too, in an answer
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, min(2 * len(data) + 4096, _LARGEST))
        self._sock.send(data)
        self._demand_done()

    def tables(self) -> list[str]:
        """The names of all tables of the family. Raises as `change`."""
        self._sock.send(_message(_GET_TABLE, _REQUEST | _DUMP, _GENERIC.pack(_INET, 0, 0)))
        names: list[str] = []
        while True:
            for kind, body in _messages(self._sock.recv(1 << 17)):
                if kind == _DONE:
                    return names
                if kind == _ERROR:
                    raise _refused(-_S32.unpack_from(body)[0])
                names.append(_first_text(body[_GENERIC.size :]))

    def _demand_done(self) -> None:
        """The kernel works before send(2) returns, so its answers are there: one for each error, one for the last."""
        while True:
            for kind, body in _messages(self._sock.recv(1 << 16)):
                code = -_S32.unpack_from(body)[0] if kind == _ERROR else errno.EPROTO
                if code:
                    self._forget_answers()
                    raise _refused(code)
                return

    def _forget_answers(self) -> None:
        try:
            while True:
                self._sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except OSError:  # EAGAIN, or ENOBUFS for those there was no room for
            pass


def _batch(changes: list[Change]) -> bytes:
    """Only the last has itself answered when all is well."""
    generic, edge = _GENERIC.pack(_INET, 0, 0), _GENERIC.pack(0, 0, _SUBSYSTEM)
    last = len(changes) - 1
    messages = [
        _message(kind, flags | _REQUEST | (_ACK if number == last else 0), generic + attributes)
        for number, (kind, flags, attributes) in enumerate(changes)
    ]
    return b"".join((_message(_BATCH_BEGIN, _REQUEST, edge), *messages, _message(_BATCH_END, _REQUEST, edge)))


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return _MESSAGE.pack(_MESSAGE.size + len(body), kind, flags, 0, 0) + body + bytes(-len(body) % 4)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        length, kind, _, _, _ = _MESSAGE.unpack_from(data, at)
        yield kind, data[at + _MESSAGE.size : at + length]
        at += length + -length % 4


def _first_text(attributes: bytes) -> str:
    """The name of a table is its first attribute."""
    length, _ = _ATTRIBUTE.unpack_from(attributes)
    return attributes[_ATTRIBUTE.size : length].rstrip(b"\0").decode()


def _refused(code: int) -> LazyprocError:
    if code in (errno.EPERM, errno.EACCES):
        return PermissionDenied(
            "the kernel refuses to hold packets back", where="nftables", remedy="run as root (CAP_NET_ADMIN)"
        )
    if code in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL):
        return HostLacks(
            f"packets cannot be held back: {os.strerror(code)}",
            where="nftables",
            remedy="load the kernel module nf_tables",
        )
    return LazyprocError(
        f"packets cannot be held back: {os.strerror(code)}", where="nftables", remedy="try again in a moment"
    )
