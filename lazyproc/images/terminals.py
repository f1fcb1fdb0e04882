"""Pseudo-terminals in images: the two ends in files.img, what the kernel keeps of the pair in tty-info.img (CRIU 4.2:
images/tty.proto, criu/tty.c). Pure.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from lazyproc.errors import ImageError
from lazyproc.images.files import FILES, ImageWriter, garbled, records
from lazyproc.images.pb import files_pb2 as pb
from lazyproc.images.pb import lazyproc_pb2 as own
from lazyproc.model import TerminalMaster, TerminalSlave

TTY_INFO = "tty-info.img"
_TERMIOS2 = struct.Struct("<4IB19s2I")  # include/uapi/asm-generic/termbits.h
_TERMIOS = struct.Struct("<4IB19s")
_CHARACTERS = struct.Struct("<19I")  # CRIU copies them as they lie: four in each number (termios_copy)
_PTMX, _SLAVES = os.makedev(5, 2), 136


def info_id(number: int, *, master: bool) -> int:
    """Of an end, as CRIU numbers them (tty_gen_id)."""
    return number << 1 | master


def slave_path(path: str, number: int) -> str:
    """Beside or below the ptmx that made it (fs/devpts/inode.c, devpts_mntget)."""
    folder = os.path.dirname(path)
    return f"{folder}/{number}" if os.path.basename(folder) == "pts" else f"{folder}/pts/{number}"


def write_terminal(terminal: TerminalMaster, writer: ImageWriter, extra: own.FileExtra) -> None:
    """Of both ends alike: CRIU takes the slave's where it has one."""
    if terminal.mode is not None:
        extra.terminal.mode = terminal.mode
    if terminal.left:
        extra.terminal.left = True
    for master in (True, False):
        entry = pb.tty_info_entry(
            id=info_id(terminal.number, master=master),
            type=pb.PTY,
            locked=master and terminal.locked,
            exclusive=not master and terminal.exclusive,
            packet_mode=master and terminal.packets,
            sid=terminal.session,
            pgrp=terminal.foreground,
            rdev=_PTMX if master else os.makedev(_SLAVES, terminal.number),
            pty=pb.tty_pty_entry(index=terminal.number),
        )
        _write_modes(_TERMIOS2.unpack(terminal.termios), entry.termios)
        _write_modes((*_TERMIOS.unpack(terminal.locked_termios), 0, 0), entry.termios_locked)
        size = entry.winsize
        size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel = terminal.size
        if not master:  # the owner of a ptmx is nobody's to change
            entry.uid, entry.gid = terminal.uid, terminal.gid
        writer.add(TTY_INFO, entry)


def _write_modes(modes: tuple[int, int, int, int, int, bytes, int, int], entry: pb.termios_entry) -> None:
    entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag, entry.c_line, characters, *speeds = modes
    entry.c_ispeed, entry.c_ospeed = speeds
    entry.c_cc.extend(_CHARACTERS.unpack(characters.ljust(_CHARACTERS.size, b"\0")))


class TerminalReader:
    """tty-info.img, for the files whose records lead there."""

    def __init__(self, images: Mapping[str, bytes]) -> None:
        self._infos = {entry.id: entry for entry, _ in records(images, TTY_INFO, pb.tty_info_entry)}

    def read(
        self, file: pb.tty_file_entry, path: str, extra: own.FileExtra
    ) -> TerminalMaster | TerminalSlave:
        """Raises ImageError, also for the kinds of terminals that are of a host."""
        info = self._infos.get(file.tty_info_id)
        if info is None:
            raise garbled(FILES, f"file {file.id} is a terminal of which {TTY_INFO} has nothing")
        if info.type != pb.PTY:
            raise ImageError(
                f"file {file.id} is a terminal of its host ({pb.TtyType.Name(info.type)})",
                where=TTY_INFO,
                remedy="restore it with criu",
            )
        number = info.pty.index
        if info.id != info_id(number, master=True):
            if info_id(number, master=True) not in self._infos:
                raise ImageError(
                    f"file {file.id} is a terminal whose other end was not dumped (criu dump --shell-job)",
                    where=TTY_INFO,
                    remedy="restore it with criu",
                )
            return TerminalSlave(number)
        return self._master(info, self._infos.get(info_id(number, master=False), info), path, extra.terminal)

    def _master(
        self, info: pb.tty_info_entry, slave: pb.tty_info_entry, path: str, extra: own.TerminalExtra
    ) -> TerminalMaster:
        size = info.winsize
        return TerminalMaster(
            number=info.pty.index,
            path=path,
            termios=_TERMIOS2.pack(*_modes(info.termios), info.termios.c_ispeed, info.termios.c_ospeed),
            locked_termios=_TERMIOS.pack(*_modes(info.termios_locked)),
            size=(size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel),
            mode=extra.mode if extra.HasField("mode") else None,
            uid=slave.uid,
            gid=slave.gid,
            session=info.sid or slave.sid,
            foreground=info.pgrp or slave.pgrp,
            packets=info.packet_mode,
            locked=info.locked,
            exclusive=slave.exclusive,
            left=extra.left,
        )


def _modes(entry: pb.termios_entry) -> tuple[int, int, int, int, int, bytes]:
    modes = entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag, entry.c_line
    return *modes, _CHARACTERS.pack(*entry.c_cc)
