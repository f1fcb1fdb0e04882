"""Sockets, their options and queues (CRIU 4.2: images/sk-*.proto, images/tcp-stream.proto)."""

from __future__ import annotations

import errno
import functools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from google.protobuf.message import Message

from lazyproc.errors import ImageError
from lazyproc.facts import replace
from lazyproc.images.extras import Extras
from lazyproc.images.files import (
    EXTRAS,
    FILES,
    INVENTORY,
    ImageReader,
    ImageWriter,
    garbled,
    open_image,
    record,
    records,
    to_bytes,
    to_text,
)
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.images.pb import process_pb2 as process
from lazyproc.model import (
    NETLINK_PROTOCOLS,
    TIES,
    InetSocket,
    Membership,
    NetlinkSocket,
    OpenFile,
    Packet,
    SocketOptions,
    TcpState,
    Tie,
    UnixSocket,
)

QUEUES = "sk-queues.img"
_SCM_RIGHTS = 1
EXTERNAL = 1  # unix_sk_entry.uflags: USK_EXTERN of CRIU's sk-unix.c
_ESTABLISHED, _LISTEN = 1, 10
_SOCK_DGRAM, _SOCK_RAW = 2, 3
_NETLINK_CONNECTED = 1  # NETLINK_* of net/netlink/af_netlink.c; 0 when it is not
_CLOSE, _CONNECTED = 7, (1, 4, 5, 8, 9, 11)  # TCP_* of include/net/tcp_states.h
_BOTH = 3  # directions shut down
_TCP, _UDP = 6, 17
_PROTOCOLS = ((1, _TCP), (2, _UDP))  # by SOCK_STREAM, SOCK_DGRAM
_WORDS = {2: 1, 10: 4}  # AF_INET, AF_INET6: 32-bit words of an address

# --- options ------------------------------------------------------------------------------------------------


class _Option(NamedTuple):
    """Where CRIU keeps a 32-bit option: which of the messages opts, ip_opts, tcp_opts, and which field."""

    message: int
    field: str


_SOL_IP, _SOL_SOCKET, _SOL_TCP = 0, 1, 6
_PLAIN = {
    (_SOL_SOCKET, 2): _Option(0, "reuseaddr"),
    (_SOL_SOCKET, 5): _Option(0, "so_dontroute"),
    (_SOL_SOCKET, 6): _Option(0, "so_broadcast"),
    (_SOL_SOCKET, 7): _Option(0, "so_sndbuf"),
    (_SOL_SOCKET, 8): _Option(0, "so_rcvbuf"),
    (_SOL_SOCKET, 9): _Option(0, "so_keepalive"),
    (_SOL_SOCKET, 10): _Option(0, "so_oobinline"),
    (_SOL_SOCKET, 11): _Option(0, "so_no_check"),
    (_SOL_SOCKET, 12): _Option(0, "so_priority"),
    (_SOL_SOCKET, 15): _Option(0, "so_reuseport"),
    (_SOL_SOCKET, 16): _Option(0, "so_passcred"),
    (_SOL_SOCKET, 18): _Option(0, "so_rcvlowat"),
    (_SOL_SOCKET, 34): _Option(0, "so_passsec"),
    (_SOL_SOCKET, 36): _Option(0, "so_mark"),
    (_SOL_SOCKET, 72): _Option(0, "so_buf_lock"),
    (_SOL_IP, 1): _Option(1, "tos"),
    (_SOL_IP, 2): _Option(1, "ttl"),
    (_SOL_IP, 8): _Option(1, "pktinfo"),
    (_SOL_IP, 15): _Option(1, "freebind"),
    (_SOL_TCP, 1): _Option(2, "nodelay"),
    (_SOL_TCP, 3): _Option(2, "cork"),
    (_SOL_TCP, 4): _Option(2, "keepidle"),
    (_SOL_TCP, 5): _Option(2, "keepintvl"),
    (_SOL_TCP, 6): _Option(2, "keepcnt"),
}
_LINGER, _RCVTIMEO, _SNDTIMEO, _FILTER = ((_SOL_SOCKET, number) for number in (13, 20, 21, 26))
_TCP_NODELAY, _TCP_CORK = (_SOL_TCP, 1), (_SOL_TCP, 3)
_BEFORE_4 = {(_SOL_TCP, 4): "tcp_keepidle", (_SOL_TCP, 5): "tcp_keepintvl", (_SOL_TCP, 6): "tcp_keepcnt"}
_TIMES = {_RCVTIMEO: "so_rcv_tmo", _SNDTIMEO: "so_snd_tmo"}
_BPF = struct.Struct("<HBBI")  # struct sock_filter: code, jt, jf, k
_DEFAULT_BUFFER = 212992  # net.core.wmem_default; CRIU requires a size


def _encode_options(values: Mapping[tuple[int, int], bytes], messages: Sequence[Message]) -> None:
    """Fills opts (and ip_opts, tcp_opts, for those that have them) with what has a field there."""
    opts = messages[0]
    assert isinstance(opts, pb.sk_opts_entry)
    opts.so_sndbuf = opts.so_rcvbuf = _DEFAULT_BUFFER
    opts.so_snd_tmo_sec = opts.so_snd_tmo_usec = opts.so_rcv_tmo_sec = opts.so_rcv_tmo_usec = 0
    for key, value in values.items():
        if (place := _PLAIN.get(key)) and place.message < len(messages) and len(value) == 4:
            number = int.from_bytes(value, "little")
            field = messages[place.message].DESCRIPTOR.fields_by_name[place.field]
            setattr(
                messages[place.message],
                place.field,
                bool(number) if field.type == field.TYPE_BOOL else number,
            )
        elif key in _TIMES and len(value) == 16:
            seconds, micros = struct.unpack("<QQ", value)
            setattr(opts, f"{_TIMES[key]}_sec", seconds)
            setattr(opts, f"{_TIMES[key]}_usec", micros)
        elif key == _LINGER and len(value) == 8 and value[:4] == b"\1\0\0\0":
            opts.so_linger = int.from_bytes(value[4:], "little")
        elif key == _FILTER and len(value) % 8 == 0:
            opts.so_filter.extend(
                code << 48 | jt << 40 | jf << 32 | k for code, jt, jf, k in _BPF.iter_unpack(value)
            )


def _decode_options(messages: Sequence[Message]) -> dict[tuple[int, int], bytes]:
    """What the messages say."""
    opts = messages[0]
    assert isinstance(opts, pb.sk_opts_entry)
    values = {
        key: int(getattr(messages[place.message], place.field)).to_bytes(4, "little")
        for key, place in _PLAIN.items()
        if place.message < len(messages) and messages[place.message].HasField(place.field)
    }
    for key, field in _TIMES.items():
        values[key] = struct.pack("<QQ", getattr(opts, f"{field}_sec"), getattr(opts, f"{field}_usec"))
    if opts.HasField("so_linger"):
        values[_LINGER] = struct.pack("<II", 1, opts.so_linger)
    if opts.so_filter:
        values[_FILTER] = b"".join(
            _BPF.pack(word >> 48, word >> 40 & 0xFF, word >> 32 & 0xFF, word & 0xFFFFFFFF)
            for word in opts.so_filter
        )
    return values


def write_options(options: SocketOptions, messages: Sequence[Message], extra: own.FileExtra) -> None:
    """The options in CRIU's fields, and all of them in `extra` when those do not give back the same."""
    fields, everything = _encoded(tuple(options.values.items()), tuple(map(type, messages)))
    for message, data in zip(messages, fields, strict=True):
        if data:
            message.MergeFromString(data)
    if everything is not None:
        extra.options.SetInParent()
        extra.options.MergeFromString(everything)


@functools.lru_cache(maxsize=256)  # a server has thousands of sockets with the same options
def _encoded(
    options: tuple[tuple[tuple[int, int], bytes], ...], kinds: tuple[type[Message], ...]
) -> tuple[tuple[bytes, ...], bytes | None]:
    """The options in messages of these kinds, and all of them as OptionsExtra, None where that is not needed."""
    values, messages = dict(options), [kind() for kind in kinds]
    _encode_options(values, messages)
    fields = tuple(message.SerializePartialToString() for message in messages)
    if _decode_options(messages) == values:
        return fields, None
    extra = own.OptionsExtra()
    for (level, name), value in options:
        extra.values.add(level=level, name=name, value=value)
    return fields, extra.SerializeToString()


def read_options(messages: Sequence[Message], extra: own.FileExtra) -> SocketOptions:
    if extra.HasField("options"):
        return _decoded(extra.options.SerializeToString())
    return SocketOptions(_decode_options(messages))


@functools.lru_cache(maxsize=256)
def _decoded(data: bytes) -> SocketOptions:
    """From OptionsExtra."""
    values = own.OptionsExtra.FromString(data).values
    return SocketOptions({(option.level, option.name): option.value for option in values})


def _options_before_4(opts: Message, stream: pb.tcp_stream_entry) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Those of TCP, which CRIU has in fields of their own since 4.0."""
    for key, field in _BEFORE_4.items():
        if opts.HasField(field):
            yield key, getattr(opts, field).to_bytes(4, "little")
    for key, value in ((_TCP_NODELAY, stream.nodelay), (_TCP_CORK, stream.cork)):
        if value:
            yield key, (1).to_bytes(4, "little")


# --- queues -------------------------------------------------------------------------------------------------


def write_queue(file_id: int, queue: Iterable[Packet], writer: ImageWriter, extras: own.Extras) -> None:
    for index, packet in enumerate(queue):
        entry = pb.sk_packet_entry(id_for=file_id, length=len(packet.data))
        if packet.file_ids:
            entry.scm.add(type=_SCM_RIGHTS, rights=packet.file_ids)
        writer.add(QUEUES, entry, packet.data)
        if packet.sender or packet.credentials:
            extra = extras.packets.add(file_id=file_id, index=index, sender=packet.sender)
            if packet.credentials:
                extra.credentials.pid, extra.credentials.uid, extra.credentials.gid = packet.credentials


def read_queues(images: Mapping[str, bytes], extras: Extras) -> dict[int, tuple[Packet, ...]]:
    """The queue of each socket by file id."""
    queues: dict[int, list[Packet]] = {}
    for entry, reader in records(images, QUEUES, pb.sk_packet_entry):
        if any(scm.type != _SCM_RIGHTS for scm in entry.scm):
            raise reader.error("ancillary data other than descriptors")
        queue = queues.setdefault(entry.id_for, [])
        extra = extras.packets.get((entry.id_for, len(queue)))
        credentials = None
        if extra and extra.HasField("credentials"):
            credentials = (extra.credentials.pid, extra.credentials.uid, extra.credentials.gid)
        rights = tuple(file_id for scm in entry.scm for file_id in scm.rights)
        queue.append(Packet(reader.raw(entry.length), rights, extra.sender if extra else b"", credentials))
    return {file_id: tuple(queue) for file_id, queue in queues.items()}


# --- unix(7) ------------------------------------------------------------------------------------------------


def accept_listeners(sockets: Iterable[UnixSocket]) -> dict[int, int]:
    """For each connection not yet accepted, the listening socket's inode: what CRIU writes as its peer."""
    return {inode: socket.inode for socket in sockets for inode in socket.pending}


def write_unix(
    file: OpenFile,
    socket: UnixSocket,
    listeners: Mapping[int, int],
    entry: pb.unix_sk_entry,
    extra: own.FileExtra,
) -> None:
    entry.ino, entry.type, entry.state, entry.backlog = (
        socket.inode,
        socket.type,
        socket.state,
        socket.backlog,
    )
    entry.flags, entry.uflags = file.flags, 0
    entry.peer = listeners.get(socket.inode, socket.peer)
    if entry.peer != socket.peer:
        extra.unix.peer = socket.peer
    # The kernel counts the NUL behind a path into the name (unix_mkname_bsd), and so does CRIU.
    entry.name = socket.name + b"\0" if socket.name and socket.name[0] else socket.name
    if socket.shutdown:
        entry.shutdown = pb.sk_shutdown.ValueType(socket.shutdown)
    if socket.mode or socket.uid or socket.gid:
        perms = entry.file_perms
        perms.mode, perms.uid, perms.gid = socket.mode, socket.uid, socket.gid
    _write_path(socket, entry)
    if socket.path != _implied_path(entry, socket.name):
        extra.unix.path = to_bytes(socket.path)
    if socket.peer_credentials:
        credentials = extra.unix.peer_credentials
        credentials.pid, credentials.uid, credentials.gid = socket.peer_credentials
    if socket.reset:
        extra.unix.reset = True
    extra.unix.bound_here = socket.bound_here
    extra.unix.pending.extend(socket.pending)
    write_options(socket.options, (entry.opts,), extra)


def write_external(socket: UnixSocket, number: int, entry: pb.unix_sk_entry) -> None:
    """The peer of `socket` outside of the tree, as the file `number`: only inode and name mean anything."""
    entry.id, entry.ino, entry.type, entry.state = number, socket.peer, _SOCK_DGRAM, _LISTEN
    entry.flags, entry.uflags, entry.backlog, entry.peer = 0, EXTERNAL, 0, 0
    entry.name = socket.peer_name + b"\0" * socket.peer_name.startswith(b"/")
    opts = entry.opts
    opts.so_sndbuf = opts.so_rcvbuf = 0
    opts.so_snd_tmo_sec = opts.so_snd_tmo_usec = opts.so_rcv_tmo_sec = opts.so_rcv_tmo_usec = 0


def _write_path(socket: UnixSocket, entry: pb.unix_sk_entry) -> None:
    """Where the socket file lies: CRIU has the folder of a relative name, and whether the file is gone."""
    if not socket.name or socket.name[0] == 0 or not socket.bound_here:
        return
    path, tail = to_bytes(socket.path), b"/" + socket.name
    if not path:
        entry.deleted = True
    elif socket.name[0:1] != b"/" and path.endswith(tail):
        entry.name_dir = path.removesuffix(tail)


def _implied_path(entry: pb.unix_sk_entry, name: bytes) -> str:
    if not name or name[0] == 0 or entry.deleted:
        return ""
    path = name if name[0:1] == b"/" else entry.name_dir + b"/" + name
    return to_text(path, FILES)


def read_unix(
    entry: pb.unix_sk_entry, extra: own.FileExtra, queue: tuple[Packet, ...], outside: Mapping[int, bytes]
) -> UnixSocket:
    """`outside` are the names of sockets that are not in the tree, by inode."""
    if entry.uflags:
        raise ImageError(
            "the unix socket leads out of the tree",
            where=f"{FILES}, file {entry.id}",
            remedy="restore it with criu",
        )
    name = entry.name if entry.name[:1] == b"\0" else entry.name.rstrip(b"\0")
    accepted = entry.type != _SOCK_DGRAM and entry.state == _ESTABLISHED
    unix = extra.unix
    credentials = unix.peer_credentials
    return UnixSocket(
        inode=entry.ino,
        type=entry.type,
        state=entry.state,
        peer=unix.peer if unix.HasField("peer") else entry.peer,
        name=name,
        bound_here=unix.bound_here if unix.HasField("bound_here") else bool(name) and not accepted,
        backlog=entry.backlog,
        shutdown=entry.shutdown,
        options=read_options((entry.opts,), extra),
        queue=queue,
        mode=entry.file_perms.mode,
        uid=entry.file_perms.uid,
        gid=entry.file_perms.gid,
        pending=tuple(unix.pending),
        path=to_text(unix.path, FILES) if unix.HasField("path") else _implied_path(entry, name),
        peer_credentials=(
            (credentials.pid, credentials.uid, credentials.gid) if unix.HasField("peer_credentials") else None
        ),
        peer_name=outside.get(entry.peer, b"") if entry.type == _SOCK_DGRAM else b"",
        reset=unix.reset,
    )


def has_to_be_given(entry: pb.unix_sk_entry, outside: Mapping[int, bytes]) -> bool:
    """Whether it leads to one of those `outside` that cannot be connected to again by their names."""
    return entry.peer in outside and not (entry.type == _SOCK_DGRAM and outside[entry.peer])


# --- TCP and UDP --------------------------------------------------------------------------------------------


def write_inet(
    file: OpenFile, socket: InetSocket, entry: pb.inet_sk_entry, extra: own.FileExtra, writer: ImageWriter
) -> None:
    entry.ino, entry.family, entry.type, entry.proto = (
        socket.inode,
        socket.family,
        socket.type,
        socket.protocol,
    )
    entry.state, entry.backlog, entry.flags = socket.state, socket.backlog, file.flags
    entry.src_addr.extend(_words(socket.local[0]))
    entry.src_port = socket.local[1]
    remote = socket.remote or (bytes(len(socket.local[0])), 0)
    entry.dst_addr.extend(_words(remote[0]))
    entry.dst_port = remote[1]
    if socket.shutdown:
        entry.shutdown = pb.sk_shutdown.ValueType(socket.shutdown)
    if socket.v6only:
        entry.v6only = True
    entry.ip_opts.SetInParent()
    entry.tcp_opts.SetInParent()
    write_options(socket.options, (entry.opts, entry.ip_opts, entry.tcp_opts), extra)
    if socket.absent:
        extra.absent = True
    if socket.error:
        extra.tcp_error = socket.error
    for membership in socket.memberships:
        extra.memberships.add(
            family=membership.family,
            address=membership.address,
            interface=to_bytes(membership.interface),
            only=membership.only,
            sources=membership.sources,
        )
    for tie in socket.ties:
        extra.ties.add(level=tie.level, option=tie.option, interface=to_bytes(tie.interface))
    if socket.interface:
        entry.opts.so_bound_dev = to_bytes(socket.interface)
    if socket.tcp is not None:
        _write_tcp(f"tcp-stream-{socket.inode:x}.img", socket.tcp, writer)
        if socket.tcp.unsent:
            extra.tcp_unsent = socket.tcp.unsent


def _words(address: bytes) -> tuple[int, ...]:
    """An address in network order as CRIU has it, which reads its bytes as little-endian words."""
    return struct.unpack(f"<{len(address) // 4}I", address)


def _write_tcp(name: str, tcp: TcpState, writer: ImageWriter) -> None:
    entry = pb.tcp_stream_entry(
        inq_len=len(tcp.recv_queue),
        inq_seq=tcp.recv_seq,
        outq_len=len(tcp.send_queue),
        outq_seq=tcp.send_seq,
        unsq_len=0,
        opt_mask=tcp.options,
        mss_clamp=tcp.mss,
        snd_wscale=tcp.send_wscale,
        rcv_wscale=tcp.recv_wscale,
        timestamp=tcp.timestamp,
    )
    if tcp.window:
        entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup = struct.unpack(
            "<5I", tcp.window
        )
    writer.add(name, entry, tcp.recv_queue + tcp.send_queue)


def read_inet(
    entry: pb.inet_sk_entry, extra: own.FileExtra, queue: tuple[Packet, ...], images: Mapping[str, bytes]
) -> InetSocket:
    where = f"{FILES}, file {entry.id}"
    words = _WORDS.get(entry.family)
    if words is None or len(entry.src_addr) != words or len(entry.dst_addr) not in (0, words):
        raise garbled(where, f"addresses of family {entry.family}")
    if EXTRAS not in images and (entry.type, entry.proto) not in _PROTOCOLS:
        raise ImageError(
            f"a socket of type {entry.type} and protocol {entry.proto}, which is neither TCP nor UDP",
            where=where,
            remedy="restore it with criu",
        )
    remote = struct.pack(f"<{len(entry.dst_addr)}I", *entry.dst_addr), entry.dst_port
    name = f"tcp-stream-{entry.ino:x}.img"
    reader = open_image(images, name) if name in images else None
    stream = reader.message(pb.tcp_stream_entry) if reader else pb.tcp_stream_entry()
    options = read_options((entry.opts, entry.ip_opts, entry.tcp_opts), extra).values
    socket = InetSocket(
        inode=entry.ino,
        family=entry.family,
        type=entry.type,
        protocol=entry.proto,
        state=entry.state,
        local=(struct.pack(f"<{words}I", *entry.src_addr), entry.src_port),
        remote=remote if any(remote[0]) or remote[1] else None,
        backlog=entry.backlog,
        shutdown=entry.shutdown,
        options=SocketOptions({**dict(_options_before_4(entry.opts, stream)), **options}),
        v6only=entry.v6only,
        interface=to_text(entry.opts.so_bound_dev.rstrip(b"\0"), where),
        tcp=_read_tcp(reader, stream, extra) if reader else None,
        queue=queue,
        absent=extra.absent,
        error=_read_error(where, extra, ended=reader is not None and entry.state == _CLOSE),
        memberships=tuple(_read_membership(where, each) for each in extra.memberships),
        ties=tuple(_read_tie(where, each) for each in extra.ties),
    )
    if socket.tcp is not None or entry.proto != _TCP or entry.state not in _CONNECTED or EXTRAS in images:
        return socket
    if not record(images, INVENTORY, process.inventory_entry).tcp_close:
        raise garbled(where, f"its connection is missing: {name}")
    return _given_up(socket)


def _read_membership(where: str, extra: own.MembershipExtra) -> Membership:
    length = 4 * _WORDS.get(extra.family, 0)
    if not length or any(len(address) != length for address in (extra.address, *extra.sources)):
        raise garbled(where, f"a multicast group of family {extra.family}")
    interface = to_text(extra.interface, where)
    return Membership(extra.family, extra.address, interface, extra.only, tuple(extra.sources))


def _read_tie(where: str, extra: own.TieExtra) -> Tie:
    if (extra.level, extra.option) not in TIES:
        raise garbled(where, f"option {extra.option} of level {extra.level} is no interface")
    return Tie(extra.level, extra.option, to_text(extra.interface, where))


def _read_error(where: str, extra: own.FileExtra, *, ended: bool) -> int:
    if extra.tcp_error and not (ended and extra.tcp_error in (errno.ECONNRESET, errno.EPIPE)):
        raise garbled(where, f"a TCP socket of error {extra.tcp_error}")
    return extra.tcp_error


def _given_up(socket: InetSocket) -> InetSocket:
    """A connection that has ended, in which nothing is unread."""
    nothing = TcpState(0, 0, b"", b"", 0, 0, 0, 0, 0, 0, b"")
    return replace(socket, state=_CLOSE, remote=None, shutdown=_BOTH, tcp=nothing)


def _read_tcp(reader: ImageReader, entry: pb.tcp_stream_entry, extra: own.FileExtra) -> TcpState:
    """`reader` stands behind the entry."""
    window = b""
    if entry.HasField("snd_wnd"):
        window = struct.pack(
            "<5I", entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup
        )
    received = reader.raw(entry.inq_len)
    sent = reader.raw(entry.outq_len)
    unsent = extra.tcp_unsent or entry.unsq_len
    if unsent > entry.outq_len:
        raise reader.error(f"{unsent} bytes unsent of {entry.outq_len}")
    return TcpState(
        send_seq=entry.outq_seq,
        recv_seq=entry.inq_seq,
        send_queue=sent,
        recv_queue=received,
        unsent=unsent,
        mss=entry.mss_clamp,
        options=entry.opt_mask,
        send_wscale=entry.snd_wscale,
        recv_wscale=entry.rcv_wscale,
        timestamp=entry.timestamp,
        window=window,
    )


def join_pending(files: Mapping[int, UnixSocket]) -> dict[int, tuple[int, ...]]:
    """For images of CRIU's: the connections that wait at each listening socket, by the listener's inode."""
    listening = {socket.inode for socket in files.values() if socket.state == _LISTEN}
    waiting: dict[int, tuple[int, ...]] = {}
    for socket in files.values():
        if socket.peer in listening and socket.state == _ESTABLISHED and socket.type != _SOCK_DGRAM:
            waiting[socket.peer] = (*waiting.get(socket.peer, ()), socket.inode)
    return waiting


# --- netlink(7) ---------------------------------------------------------------------------------------------


def write_netlink(socket: NetlinkSocket, entry: pb.netlink_sk_entry, extra: own.FileExtra) -> None:
    """CRIU has the groups as words of bits, and a group that it is connected to by its number (criu/sk-netlink.c)."""
    entry.ino, entry.protocol, entry.portid = socket.inode, socket.protocol, socket.port
    entry.state = _NETLINK_CONNECTED if any(socket.remote) else 0
    entry.dst_portid, entry.dst_group = socket.remote[0], socket.remote[1].bit_length()
    for group in socket.groups:
        word, bit = divmod(group - 1, 32)
        entry.groups.extend([0] * (word + 1 - len(entry.groups)))
        entry.groups[word] |= 1 << bit
    if socket.type != _SOCK_RAW:
        extra.netlink_type = socket.type
    write_options(socket.options, (entry.opts,), extra)


def read_netlink(entry: pb.netlink_sk_entry, extra: own.FileExtra) -> NetlinkSocket:
    """Raises ImageError, also for a socket that a program could have no right to."""
    where = f"{FILES}, file {entry.id}"
    if entry.protocol not in NETLINK_PROTOCOLS:
        raise ImageError(
            f"a netlink socket of protocol {entry.protocol}", where=where, remedy="restore it with criu"
        )
    kind = extra.netlink_type or _SOCK_RAW
    if kind not in (_SOCK_DGRAM, _SOCK_RAW) or entry.dst_group > 32:
        raise garbled(where, f"a netlink socket of type {kind}, connected to group {entry.dst_group}")
    groups = (
        32 * word + bit + 1 for word, bits in enumerate(entry.groups) for bit in range(32) if bits >> bit & 1
    )
    return NetlinkSocket(
        inode=entry.ino,
        type=kind,
        protocol=entry.protocol,
        port=entry.portid,
        groups=tuple(groups),
        remote=(entry.dst_portid, 1 << entry.dst_group >> 1),
        options=read_options((entry.opts,), extra),
    )
