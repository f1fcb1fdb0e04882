"""Our image messages are those of CRIU: every field of every message has the same number, type and label."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from lazyproc.images.pb import files_pb2, process_pb2
from tests import peer

_OTHER_ARCHITECTURES = {
    "ti_arm",
    "ti_aarch64",
    "ti_ppc64",
    "ti_s390",
    "ti_mips",
    "ti_loongarch64",
    "ti_riscv64",
}
# Of CRIU's development branch, which no release has.
_NEWER_FIELDS = {"compress", "compress_region_size", "blocks"}
_NEWER_MESSAGES = {"pagemap_blocks", "pagemap_entry_2895"}
_STRING, _BYTES = FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES

# Runs in pycriu's interpreter: every message as {name: {field: [number, type, repeated, required, type's name]}}.
_LIST_MESSAGES = """
import json, pkgutil, pycriu.images
from importlib import import_module
def fields(message):
    for field in message.fields:
        named = field.message_type or field.enum_type
        yield field.name, [
            field.number, field.type, field.label == field.LABEL_REPEATED, field.label == field.LABEL_REQUIRED,
            named.name if named else ""]
messages = {}
for module in pkgutil.iter_modules(pycriu.images.__path__, "pycriu.images."):
    if module.name.endswith("_pb2"):
        for message in import_module(module.name).DESCRIPTOR.message_types_by_name.values():
            messages[message.name] = dict(fields(message))
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict[str, list[Any]]]:
    command = [*peer.pycriu_python(), "-c", _LIST_MESSAGES]
    listed: dict[str, dict[str, list[Any]]] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout
    )
    return listed


def _ours(message: Descriptor) -> dict[str, list[Any]]:
    described = {}
    for field in message.fields:
        named = field.message_type or field.enum_type
        kind = [field.number, field.type, field.is_repeated, field.is_required, named.name if named else ""]
        described[field.name] = kind
    return described


_MESSAGES = [
    message
    for module in (process_pb2, files_pb2)
    for message in module.DESCRIPTOR.message_types_by_name.values()
    if message.name not in _NEWER_MESSAGES
]


@pytest.mark.parametrize("message", _MESSAGES, ids=lambda message: str(message.name))
def test_every_field_is_the_same(message: Descriptor, theirs: dict[str, dict[str, list[Any]]]) -> None:
    ours, expected = _ours(message), theirs[message.name]
    ours = {name: field for name, field in ours.items() if name not in _NEWER_FIELDS}
    for name, field in ours.items():
        # Paths and names are bytes to the kernel and to us; CRIU's C does not look whether they are UTF-8.
        if field[1] == _BYTES and name in expected and expected[name][1] == _STRING:
            field[1] = _STRING
    assert ours == {name: field for name, field in expected.items() if name not in _OTHER_ARCHITECTURES}
