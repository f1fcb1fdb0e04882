"""Line charts as SVG: what the plots need, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 72, 28, 44, 48
COLOURS = ("#0b63ce", "#d1495b", "#7a7a7a", "#2a9d5c", "#b7791f", "#6b4fbb")
TEXT = 'font-family="sans-serif" font-size="12" fill="#222"'


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`; `place` puts a value on a straight scale, `ticks` are values and what is written there."""

    label: str
    low: float
    high: float
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]

    def part(self, value: float) -> float:
        """Where a value lies: 0 at the beginning of the axis, 1 at its end, and never outside."""
        low, high, at = self.place(self.low), self.place(self.high), self.place(max(value, self.low))
        return min(max((at - low) / (high - low), 0.0), 1.0)


def _number(value: float) -> str:
    return f"{round(value):,}" if abs(value) >= 1000 else f"{round(value, 10):g}"


def linear(label: str, low: float, high: float) -> Axis:
    high = high if high > low else low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(label, low, high, float, [(tick, _number(tick)) for tick in ticks])


def logarithmic(label: str, low: float, high: float) -> Axis:
    """Whole decades."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    ticks = [(10.0**i, _number(10.0**i)) for i in range(first, last + 1)]
    return Axis(label, 10.0**first, 10.0**last, math.log10, ticks)


def nines(label: str, last: float = 0.9999) -> Axis:
    """Shares up to `last`, each nine as wide as the one before."""
    ticks = [(share, f"{share * 100:g} %") for share in (0, 0.5, 0.9, 0.99, 0.999, 0.9999) if share <= last]
    return Axis(label, 0, last, lambda share: -math.log10(1 - min(share, last)), ticks)


@dataclass(frozen=True, slots=True)
class Line:
    """`band` is an area around it: x, its lower end, its upper end."""

    name: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float, float]] = ()


def chart(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> str:
    """A whole SVG file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _words(LEFT, 16, title, 'font-weight="bold"'),
        *_grid(x, y),
    ]
    for number, line in enumerate(lines):
        parts += _drawn(line, COLOURS[number % len(COLOURS)], x, y)
    parts += _legend(lines)
    return "\n".join([*parts, "</svg>", ""])


def _across(x: Axis, value: float) -> float:
    return round(LEFT + x.part(value) * (WIDTH - LEFT - RIGHT), 1)


def _up(y: Axis, value: float) -> float:
    return round(HEIGHT - BOTTOM - y.part(value) * (HEIGHT - TOP - BOTTOM), 1)


def _words(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {TEXT} {more}>{escape(words)}</text>'


def _grid(x: Axis, y: Axis) -> list[str]:
    bottom, right, line = HEIGHT - BOTTOM, WIDTH - RIGHT, 'stroke="#ddd"'
    parts = []
    for value, words in x.ticks:
        at = _across(x, value)
        parts.append(f'<path d="M{at:g} {TOP}V{bottom}" {line}/>')
        parts.append(_words(at, bottom + 16, words, 'text-anchor="middle"'))
    for value, words in y.ticks:
        at = _up(y, value)
        parts.append(f'<path d="M{LEFT} {at:g}H{right}" {line}/>')
        parts.append(_words(LEFT - 6, at + 4, words, 'text-anchor="end"'))
    parts.append(_words((LEFT + right) / 2, HEIGHT - 10, x.label, 'text-anchor="middle"'))
    middle = (TOP + bottom) / 2
    parts.append(_words(14, middle, y.label, f'text-anchor="middle" transform="rotate(-90 14 {middle:g})"'))
    return parts


def _drawn(line: Line, colour: str, x: Axis, y: Axis) -> list[str]:
    parts = []
    if line.band:
        there = [(_across(x, at), _up(y, high)) for at, _, high in line.band]
        back = [(_across(x, at), _up(y, low)) for at, low, _ in reversed(line.band)]
        parts.append(f'<path d="{_path([*there, *back])}Z" fill="{colour}" fill-opacity="0.15"/>')
    points = [(_across(x, at), _up(y, value)) for at, value in line.points]
    parts.append(f'<path d="{_path(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    return parts


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _legend(lines: Sequence[Line]) -> list[str]:
    parts = []
    for number, line in enumerate(lines):
        at = LEFT + number * 110
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<path d="M{at} 31h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(_words(at + 24, 35, line.name))
    return parts
