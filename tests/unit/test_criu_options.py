"""The table of options: what the parser makes of words, and what is refused."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest

from lazyproc.criu import options
from lazyproc.criu.inherited import descriptors, external
from lazyproc.criu.main import main
from lazyproc.criu.options import COMMANDS, OPTIONS, Kind
from lazyproc.criu.parse import Given, configured, idle, parse, refusals
from lazyproc.errors import UsageError

DOCS = Path(__file__).parents[2] / "docs/criu.md"
NO_FILES = {"HOME": "/nonexistent"}


def given(*words: str) -> Given:
    return parse([*words, "--no-default-config"], NO_FILES)


def test_rows_of_one_name_are_parsed_alike_and_are_for_different_commands() -> None:
    rows = defaultdict(list)
    for option in OPTIONS:
        rows[option.name].append(option)
    for name, same in rows.items():
        assert len({(row.argument, row.negatable) for row in same}) == 1, name
        commands = [command for row in same for command in row.commands]
        assert len(commands) == len(set(commands)), name
        assert set(commands) <= set(COMMANDS)
    letters = [option.short for option in OPTIONS if option.short]
    assert len(letters) == len(set(letters))


def test_every_row_has_words_for_people() -> None:
    for option in OPTIONS:
        assert option.words
        assert not option.words.endswith(".")


def test_the_document_has_the_table() -> None:
    text = DOCS.read_text()
    for names, commands, kind, words in options.rows():
        assert f"| `{names}` | {commands} | {kind} | {words} |" in text


@pytest.mark.parametrize(
    ("words", "name", "values"),
    [
        (["--tree", "7"], "tree", ("7",)),
        (["--tree=7"], "tree", ("7",)),
        (["-t", "7"], "tree", ("7",)),
        (["-t7"], "tree", ("7",)),
        (["--tre", "7"], "tree", ("7",)),
        (["-Rt7"], "leave-running", ("",)),
        (["--external", "a", "--external", "b"], "external", ("a", "b")),
        (["--cgroup-root", "a:/b"], "cgroup-root", ("a:/b",)),
        (["-x"], "ext-unix-sk", ("",)),
        (["-x12,13"], "ext-unix-sk", ("12,13",)),
        (["-verbosity=0"], "verbosity", ("0",)),
        (["-v4"], "verbosity", ("4",)),
        (["-v"], "verbosity", ("1",)),
        (["-vvv"], "verbosity", ("3",)),
        (["-v", "-v"], "verbosity", ("2",)),
        (["--verbosity=4"], "verbosity", ("4",)),
        (["--verbosity"], "verbosity", ("1",)),
    ],
)
def test_words_are_taken_as_getopt_does(words: list[str], name: str, values: tuple[str, ...]) -> None:
    assert given("dump", *words).every(name) == values
    assert given(*words, "dump").every(name) == values  # operands may stand anywhere


def test_what_is_taken_back_was_not_given() -> None:
    assert "file-locks" not in given("dump", "--file-locks", "--no-file-locks")
    assert "file-locks" in given("dump", "--no-file-locks", "-l")


@pytest.mark.parametrize(
    "words",
    [[], ["--tree"], ["dump", "--nonsense"], ["dump", "-Z"], ["dump", "7"], ["fly"], ["pre-dump"],
     ["dump", "--leave-running=1"], ["dump", "--no-tree"], ["restore", "--no"]],
)  # fmt: skip
def test_wrong_words_are_errors(words: list[str]) -> None:
    with pytest.raises(UsageError) as failure:
        given(*words)
    assert failure.value.remedy


def test_a_command_that_is_not_done_is_refused_by_name() -> None:
    for command, reason in options.REFUSED_COMMANDS.items():
        with pytest.raises(UsageError, match=command) as failure:
            given(command)
        assert failure.value.remedy == reason


def test_every_refused_option_is_refused_by_name_and_nothing_else_is() -> None:
    for option in OPTIONS:
        value = "no-such-value" if option.values else "1" if option.takes else ""
        for command in option.commands:
            found = list(refusals(Given(command, {option.name: (value,)})))
            if option.kind is Kind.REFUSED or option.values:
                assert len(found) == 1
                assert f"--{option.name}" in found[0]
                assert option.words in found[0]
            else:
                assert found == []
        for good in option.values:
            assert list(refusals(Given(option.commands[0], {option.name: (good,)}))) == []


def test_options_of_other_commands_are_noted() -> None:
    assert list(idle(given("restore", "--tree", "7", "-d"))) == ["tree", "no-default-config"][:1]


def test_configuration_files_come_first(tmp_path: Path) -> None:
    (tmp_path / ".criu").mkdir()
    (tmp_path / ".criu/default.conf").write_text("# mine\n\ntcp-established # always\nwork-dir /home\n")
    named = tmp_path / "named.conf"
    named.write_text('log-file "two words"\n--images-dir  /named\n')
    words = ["dump", "--config", str(named), "--work-dir", "/line"]
    environment = {"HOME": str(tmp_path)}
    found = parse(words, environment)
    assert "tcp-established" in found
    assert (found.last("work-dir"), found.last("log-file")) == ("/line", "two words")
    assert found.last("images-dir") == "/named"
    assert "tcp-established" not in parse([*words, "--no-default-config"], environment)
    other = tmp_path / "other.conf"
    other.write_text("shell-job\n")
    assert "shell-job" in parse(["dump"], {**NO_FILES, "CRIU_CONFIG_FILE": str(other)})


@pytest.mark.parametrize("line", ["nonsense", "tree 1 2", "leave-running yes"])
def test_a_wrong_line_is_named(line: str) -> None:
    with pytest.raises(UsageError, match="line 2"):
        list(configured(["shell-job", line], "file"))


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert all(f"--{option.name}" in capsys.readouterr().out for option in OPTIONS[:1])
    assert main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("Version: 4.2\n")
    assert main(["restore", "--nonsense"]) == 2
    assert "--nonsense" in capsys.readouterr().err


def test_a_folder_that_is_none_is_a_failure_and_no_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    """As with CRIU; with a log and without one."""
    assert main(["restore", "--no-default-config", "-D", "/none", "-o", "log", "--close", str(1 << 40)]) == 1
    assert "/none: is no folder" in capsys.readouterr().err


def test_a_configuration_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".criu/default.conf").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["check", "--feature", "list"]) == 2
    assert f"{tmp_path}/.criu/default.conf: is a directory" in capsys.readouterr().err


def test_descriptors_that_are_given_and_words_that_are_written() -> None:
    """The first of a name counts, as in CRIU; debug[N] is for the one who reads N."""
    reading, writing = os.pipe()
    try:
        words = [
            f"fd[{reading}]:pipe:[7]",
            f"fd[{writing}]:pipe:[7]",
            f"fd[{writing}]:a/b:c",
            f"debug[{writing}]:now",
        ]
        asked = given("restore", *(word for each in words for word in ("--inherit-fd", each)))
        assert descriptors(asked) == {"pipe:[7]": reading, "a/b:c": writing}
        assert os.read(reading, 9) == b"now"
    finally:
        os.close(reading)
        os.close(writing)


def test_what_stays_outside_by_name() -> None:
    asked = given(
        "dump", "--external", "file[1a:2b]:x", "--external", "mnt[/dev]:y", "-x3,4", "--external", "unix[5]"
    )
    assert sorted(external(asked)) == ["file[1a:2b]", "unix[3]", "unix[4]", "unix[5]"]
