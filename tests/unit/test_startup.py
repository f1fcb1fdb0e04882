"""What the start of `lazyproc restore` imports: by name and not by time, which depends on the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RESTORE = "import lazyproc.cli.main, lazyproc.cli.restore, lazyproc.show.reports, lazyproc.restore.run"
PURE_PYTHON = "google.protobuf.internal.python_message"
MESSAGES = "from lazyproc.images.pb import files_pb2, lazyproc_pb2, process_pb2"

# Each was on the way once, or would be by one careless import; docs/adr/0006-start-up.md has the prices.
UNWANTED = {
    "asyncio",
    "concurrent.futures",
    "google.protobuf.text_format",
    "hashlib",
    "json",
    "lazyproc.dump",
    "lazyproc.kernel.visit",
    "lazyproc.migrate",
    "lazyproc.restore.inet",
    "lazyproc.restore.unix",
    "lazyproc.wire",
    "logging",
    "ptrace",
    "random",
    "secrets",
    "shutil",
    "ssl",
    "subprocess",
    "tempfile",
}


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; -S: an editable install may import what it likes."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{code}"
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ).stdout


def test_restore_imports_nothing_that_a_tree_without_sockets_does_not_need() -> None:
    imported = set(python(f"{RESTORE}\nprint(*sys.modules)").split())
    assert {"lazyproc.restore.tree", "lazyproc.images.convert"} <= imported
    assert imported & UNWANTED == set()


def test_the_parser_of_one_command_asks_nobody_for_the_terminal() -> None:
    code = "from lazyproc.cli.main import parser\nparser('restore')\nprint('shutil' in sys.modules)"
    assert python(code) == "False\n"


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_messages_work_with_either_implementation_of_protobuf(implementation: str) -> None:
    code = f"{MESSAGES}\nprint(process_pb2.pagemap_head(pages_id=3).SerializeToString().hex())"
    assert python(code, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=implementation) == "0803\n"


def test_protobufs_pure_python_is_loaded_by_the_first_who_looks_into_it() -> None:
    code = (
        f"{MESSAGES}\n"
        "unloaded = 'google.protobuf.text_format' not in sys.modules\n"
        "from google.protobuf.internal import python_message\n"
        "print(unloaded, python_message.GeneratedProtocolMessageType.__module__)"
    )
    assert python(code, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="upb") == f"True {PURE_PYTHON}\n"


def test_protobufs_other_parts_work_after_the_messages() -> None:
    """Printing a message needs text_format, which is what brings the pure Python in by the usual way."""
    code = (
        f"{MESSAGES}\n"
        "from google.protobuf import json_format, text_format\n"
        "print(text_format.MessageToString(process_pb2.pagemap_head(pages_id=3)), end='')"
    )
    assert python(code, PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="upb") == "pages_id: 3\n"


def test_a_module_that_is_imported_already_stays_as_it_is() -> None:
    code = (
        f"import {PURE_PYTHON} as before\n"
        f"{MESSAGES}\n"
        f"print(sys.modules[{PURE_PYTHON!r}] is before, type(before).__name__)"
    )
    assert python(code) == "True module\n"


@pytest.mark.parametrize("name", ["google.protobuf.internal.no_such_module", "no_such_package.module"])
def test_a_module_that_is_not_there_is_no_error_yet(name: str) -> None:
    code = f"from lazyproc.images.pb import import_lazily\nimport_lazily({name!r})\nprint({name!r} in sys.modules)"
    assert python(code) == "False\n"


@pytest.mark.parametrize(("command", "imports"), [("lazyproc", "argparse"), ("lazyproc-criu", "resource")])
@pytest.mark.parametrize(("action", "ended"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", 0)])
def test_ctrl_c_while_a_command_is_imported_ends_it_without_a_word(
    command: str, imports: str, action: str, ended: int, tmp_path: Path
) -> None:
    (tmp_path / f"{imports}.py").write_text(
        "import os, signal, sys\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.path.remove({str(tmp_path)!r})\n"
        f"del sys.modules[{imports!r}]\n"
        f"import {imports}\n"
    )
    code = (
        "import os, signal, sys\n"
        f"signal.signal(signal.SIGINT, signal.{action})\n"
        f"os.execv(sys.argv[1], [sys.argv[1], '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(sys.executable).parent / command)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (ended, "")
