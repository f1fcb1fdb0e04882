"""Tables, sizes and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def print_json(fields: Mapping[str, object] | Sequence[Mapping[str, object]]) -> None:
    """One object, or a list of them, on one line of standard output."""
    import json

    print(json.dumps(fields), flush=True)


def printable(text: str, *, keep: str = "") -> str:
    """With all that is no text of one line written as escapes, but for `keep`: a file may be called anything, so that
    its name is bytes that no encoding has, or commands for a terminal.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # of os.fsdecode(): a byte
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of the same length as columns, two blanks apart; nothing behind the last column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def size(count: float) -> str:
    """A number of bytes with three or four digits: "1536 bytes", "98.3 KiB"."""
    unit = 0
    while abs(count) >= 9999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {UNITS[unit]}" if unit == 0 or count >= 999.5 else f"{count:.1f} {UNITS[unit]}"


def plural(count: int, noun: str) -> str:
    """ "1 task", "3 tasks"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def numbers(values: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "0-2, 7, 9-11"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    return ", ".join("-".join(map(str, run)) for run in runs)
