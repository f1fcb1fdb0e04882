"""Build ids: of real files, and garbage does no harm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyproc.kernel.elf import build_id

SOURCE = "int main(void) { return 0; }"


def _linked(directory: Path, option: str) -> bytes:
    (directory / "p.c").write_text(SOURCE)
    subprocess.run(["gcc", "-o", directory / "p", option, directory / "p.c"], check=True)
    return (directory / "p").read_bytes()


def test_the_id_given_to_the_linker(tmp_path: Path) -> None:
    assert build_id(_linked(tmp_path, "-Wl,--build-id=0x0123456789abcdef")) == bytes.fromhex(
        "0123456789abcdef"
    )


def test_no_id(tmp_path: Path) -> None:
    assert build_id(_linked(tmp_path, "-Wl,--build-id=none")) == b""


def test_the_c_library_as_file_sees_it() -> None:
    path = next(
        line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line
    )
    text = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True).stdout
    (expected,) = re.findall(r"Build ID: ([0-9a-f]+)", text)
    assert build_id(Path(os.path.realpath(path)).read_bytes()).hex() == expected


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF\x01\x01" + bytes(100)])
def test_what_is_no_elf_file(data: bytes) -> None:
    assert build_id(data) == b""


_HEAD = Path(os.path.realpath(sys.executable)).read_bytes()[:4096]


@given(st.integers(0, len(_HEAD) - 1), st.integers(0, 255), st.integers(0, len(_HEAD)))
def test_garbled_files_have_none_or_another(at: int, byte: int, length: int) -> None:
    garbled = _HEAD[:at] + bytes([byte]) + _HEAD[at + 1 :]
    assert len(build_id(garbled[:length])) <= length
