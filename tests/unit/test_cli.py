"""The command line without a process to work on: options, usage errors, help, and what a start imports."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lazyproc.cli.main import NAMES, main, parser

HEAVY = (
    "google.protobuf",
    "ptrace",
    "asyncio",
    "cffi",
    "_cffi_backend",
    "dataclasses",
    "typing",
)


def lazyproc(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lazyproc.cli.main", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_start_imports_argparse_and_nothing_heavy() -> None:
    """On a bare interpreter: -S, because an editable install may import what it likes."""
    probe = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
        "from lazyproc.cli.main import parser\n"
        "parser().parse_args(['migrate', '1', 'host:1', '--json'])\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", probe], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_importing_the_package_imports_nothing_else() -> None:
    probe = "import sys, lazyproc; print(*[name for name in sys.modules if name.startswith('lazyproc.')])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.split() == []


def test_every_public_name_is_there_and_callable() -> None:
    probe = (
        "import lazyproc\n"
        "import lazyproc.restore.plan, lazyproc.migrate.report  # bind the sub-packages, over any function\n"
        "print(*[n for n in lazyproc.__all__ if n != 'errors' and not callable(getattr(lazyproc, n))])\n"
        "print(set(lazyproc.__all__) - set(dir(lazyproc)))\n"
        "try: lazyproc.nothing_of_the_kind\n"
        "except AttributeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "",
        "set()",
        "module 'lazyproc' has no attribute 'nothing_of_the_kind'",
    ]


def test_a_sub_package_that_is_called_calls_its_function() -> None:
    """Without arguments the real function complains about its own parameters."""
    import lazyproc

    with pytest.raises(TypeError, match=r"restore.. missing .* 'directory'"):
        lazyproc.restore()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"migrate.. missing .* 'pid'"):
        lazyproc.migrate()  # type: ignore[call-arg]
    assert next(iter(inspect.signature(lazyproc.migrate).parameters)) == "pid"


def test_only_what_has_no_usual_value_has_to_be_given() -> None:
    import lazyproc

    functions = {name: getattr(lazyproc, name) for name in lazyproc.__all__ if name[0].islower()}
    given = {
        f"{name}({parameter.name})"
        for name, function in functions.items()
        if callable(function)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
    }
    assert given == set()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-command"],
        ["explain"],
        ["explain", "0"],
        ["explain", "-1"],
        ["explain", "1x"],
        ["explain", "99999999999"],
        ["checkpoint", "1"],
        ["checkpoint", "-D", "x"],
        ["restore"],
        ["restore", "-D", "x", "--criu-4.1"],
        ["restore", "-D", "x", "--pidns", "other"],
        ["serve", "--listen", "host:1"],
        ["serve", "1", "-D", "x", "--listen", "host:1"],
        ["receive"],
        ["receive", "--listen", "7070"],
        ["receive", "--listen", "host:65536"],
        ["receive", "--listen", ":1"],
        ["receive", "--listen", "host:1", "--allow-uid", "root"],
        ["migrate", "1"],
        ["migrate", "1", "host"],
        ["stdio", "0"],
        ["migrate", "1", "host:1", "--mode", "other"],
        ["migrate", "1", "host:1", "--max-rate", "0"],
        ["migrate", "1", "host:1", "--max"],
        ["show"],
        ["show", ""],
        ["checkpoint", "1", "-D", ""],
        ["resume", "abc", "--from", ""],
    ],
)
def test_wrong_usage_is_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: lazyproc")


@pytest.mark.parametrize("argv", [["explain", "x"], ["restore"], ["abort"], ["nothing"]])
def test_wrong_usage_is_one_object_with_json(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exit([*argv, "--json"]) == 2
    said = capsys.readouterr()
    fields = json.loads(said.out)
    assert fields["exit_code"] == 2
    assert fields["error"] in said.err


@pytest.mark.parametrize("command", [("check",), ("explain", "1"), ("migrate", "1", "host:1")])
def test_a_part_of_what_tls_needs_is_wrong_usage(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--tls-cert", "x"]) == 2
    assert "--tls-cert, --tls-key and --tls-ca belong together" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ("migrate", "1", "host:1"),
        ("migrate", "--qemu", "/qmp", "host:1"),
        ("serve", "1", "--listen", "[::1]:0"),
    ],
)
@pytest.mark.parametrize("policy", ["nope", "recorded:/nowhere"])
def test_a_policy_that_does_not_exist_is_wrong_usage(
    command: tuple[str, ...], policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--policy", policy]) == 2
    assert f"--policy {policy}: no such policy; there are sequential, " in capsys.readouterr().err


def test_arguments_arrive_as_they_are_meant() -> None:
    args = parser().parse_args(
        [
            "receive",
            "--listen",
            "[fd77::1]:0",
            "--allow-uid",
            "5",
            "--allow-uid",
            "0",
            "-v",
            "--log-file",
            "log",
        ]
    )
    assert (args.listen, args.allow_uid, args.verbose, args.log_file) == ("[fd77::1]:0", [5, 0], True, "log")
    args = parser().parse_args(["migrate", "7", "host:9", "--no-bulk", "--max-rate", "1000"])
    assert (args.pid, args.target, args.mode, args.no_bulk, args.max_rate) == (
        7,
        "host:9",
        "postcopy",
        True,
        1000,
    )
    assert not args.json
    assert not args.insecure


def test_help_names_every_command_and_each_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    names = set(NAMES)
    assert main_exit(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text or f"  {name}\n" in text for name in names)
    assert "exit codes" in text
    for name in names:
        assert main_exit([name, "--help"]) == 0
        assert "--log-file FILE" in capsys.readouterr().out


def test_every_option_is_documented() -> None:
    manual = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for command, commands in _commands(parser()).items():
        for action in commands._actions:
            for option in action.option_strings:
                assert f"`{option}" in manual, f"{command}: {option} is not in docs/cli.md"


def test_an_error_is_one_line_and_with_json_one_object(tmp_path: Path) -> None:
    done = lazyproc("show", str(tmp_path), "--json")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [done.stderr.strip()]
    assert done.stderr.startswith("lazyproc: ")
    fields = json.loads(done.stdout)
    assert fields["exit_code"] == 1
    assert fields["error"] == "missing"
    assert fields["remedy"]
    assert "Traceback" in lazyproc("show", str(tmp_path), "-v").stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m lazyproc.cli.main check | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def main_exit(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return ended.value.code


def _commands(whole: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)
