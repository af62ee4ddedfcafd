"""Charts as inline SVG: plain text without scripts, coloured by the classes of ``page.css``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

WIDTH = 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 26, 28
_PLOT_HEIGHT = 190
_ROW = 25
_BAR_TEXT = 130
_END_LABEL = 52
_SMALLEST, _LARGEST = 1e-30, 1e30

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        label: for the legend and the tooltips.
        values: one per epoch; None leaves a gap.
        colour: number of a colour class, from 1.
    """

    label: str
    values: Sequence[float | None]
    colour: int


@dataclass(frozen=True)
class Curve:
    """One line of a chart on two logarithmic axes: label, points of positive numbers, colour."""

    label: str
    points: Sequence[Point]
    colour: int


@dataclass(frozen=True)
class Mark:
    """One point of a scatter chart, with the standard deviation of both its coordinates.

    Attributes:
        label: what is written beside it; short.
        name: for its tooltip.
        x: a positive number.
        y: any number.
        spread: of x and of y.
        colour: number of a colour class, from 1.
    """

    label: str
    name: str
    x: float
    y: float
    spread: Point
    colour: int


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: parts, laid end to end, and what is written behind them."""

    label: str
    parts: Sequence[float]
    text: str


def line_chart(
    title: str,
    series: Sequence[Series],
    sections: Sequence[tuple[int, str]],
    write: Callable[[float], str],
    logarithmic: bool = False,
) -> str:
    """Draw series over epochs.

    Args:
        title: what the chart shows.
        series: lines of equal length; values that are not finite, beyond 1e30 or within 1e-30 of
            zero, or not positive on a logarithmic axis, are gaps. Zero itself is a value.
        sections: (first epoch, name) of each stretch of training, marked by a vertical line.
        write: how a value is written.
        logarithmic: whether the vertical axis is.
    """

    def usable(value: float | None) -> bool:
        if value is None or (value <= 0 and logarithmic):
            return False
        return value == 0 or _SMALLEST < abs(value) < _LARGEST

    shown = [v for one in series for v in one.values if v is not None and usable(v)]
    if not shown:
        return ""
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    low, high, ticks = (_decades if logarithmic else _linear)(min(shown), max(shown))
    epochs = max(len(one.values) for one in series)
    bottom, radius = _TOP + _PLOT_HEIGHT, 3 if epochs <= 60 else 1.5

    def place(epoch: float, value: float) -> Point:
        across = epoch / max(epochs - 1, 1)
        up = (scale(value) - scale(low)) / (scale(high) - scale(low))
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), bottom - up * _PLOT_HEIGHT

    parts = []
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" {_both("y", y)}/>')
        parts.append(_text(_LEFT - 8, y + 4, write(tick), "end"))
    parts += _sections(sections, epochs, place(0, low)[0], place(epochs - 1, low)[0], bottom)
    for epoch in _epoch_ticks(epochs):
        parts.append(_text(place(epoch, low)[0], bottom + 20, str(epoch + 1), "middle"))
    for one in series:
        path, dots, before = "", "", None
        for epoch, value in enumerate(one.values):
            if value is None or not usable(value):
                continue
            x, y = place(epoch, value)
            path += f"{'L' if before == epoch - 1 else 'M'}{x:.1f} {y:.1f}"
            hint = escape(f"{one.label}, epoch {epoch + 1}: {write(value)}")
            dots += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{hint}</title></circle>'
            before = epoch
        parts.append(f'<path class="line c{one.colour}" d="{path}"/>')
        parts.append(f'<g class="dot c{one.colour}">{dots}</g>')
    summary = "; ".join(f"{one.label} {_from_to(one.values, usable, write)}" for one in series)
    return _svg(title, f"{epochs} epochs: {summary}.", bottom + _BOTTOM, parts)


def curve_chart(
    title: str, across: str, curves: Sequence[Curve], write: Callable[[float], str]
) -> str:
    """Draw curves on logarithmic axes, each with its label at its right end.

    Args:
        title: what the vertical axis shows.
        across: what the horizontal axis shows.
        curves: lines, the lowest first, so that labels can be kept apart.
        write: how a value of either axis is written.
    """
    points = [point for curve in curves for point in curve.points]
    axes = [_decades(min(values), max(values)) for values in zip(*points, strict=True)]
    right, bottom = WIDTH - _END_LABEL, _TOP + _PLOT_HEIGHT

    def place(point: Point) -> Point:
        x, y = (
            math.log10(value / low) / math.log10(high / low)
            for value, (low, high, _) in zip(point, axes, strict=True)
        )
        return _LEFT + x * (right - _LEFT), bottom - y * _PLOT_HEIGHT

    (left, _, columns), (low, _, rows) = axes
    parts = [_text(_LEFT, _TOP - 12, title, "start")]
    for tick in rows:
        y = place((left, tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" {_both("y", y)}/>')
        parts.append(_text(_LEFT - 8, y + 4, write(tick), "end"))
    for tick in columns:
        parts.append(_text(place((tick, low))[0], bottom + 20, write(tick), "middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 38, across, "middle"))
    free = math.inf  # above the label before
    for curve in curves:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, curve.points))
        parts.append(f'<path class="line c{curve.colour}" d="M{path}"/>')
        x, y = place(curve.points[-1])
        free = min(y + 4, free - 13)
        parts.append(_text(x + 6, free, curve.label, "start"))
    summary = "; ".join(
        f"{curve.label}: {write(curve.points[-1][1])} at {write(curve.points[-1][0])}"
        for curve in curves
    )
    return _svg(title, summary, bottom + 46, parts)


def scatter_chart(
    title: str,
    marks: Sequence[Mark],
    front: Sequence[int],
    write_x: Callable[[float], str],
    write_y: Callable[[float], str],
) -> str:
    """Draw points with error bars over a logarithmic axis of costs, and the front of the best.

    Args:
        title: what the horizontal axis shows.
        marks: points.
        front: positions in ``marks`` of those that nothing is better than, by rising x. A line of
            steps joins them: the highest y to be had for each x.
        write_x: how a value of the horizontal axis is written.
        write_y: how a value of the vertical axis is written.
    """
    across = [
        x for mark in marks for x in (mark.x, mark.x + mark.spread[0], mark.x - mark.spread[0])
    ]
    left, right, columns = _rounded([x for x in across if x > 0])
    ends = [mark.y + sign * mark.spread[1] for mark in marks for sign in (-1, 1)]
    low, high, rows = _linear(min(ends), max(ends))
    edge, bottom = WIDTH - _RIGHT, _TOP + _PLOT_HEIGHT

    def place(x: float, y: float) -> Point:
        share = math.log(max(x, left) / left) / math.log(right / left)
        return _LEFT + share * (edge - _LEFT), bottom - (y - low) / (high - low) * _PLOT_HEIGHT

    parts = []
    for tick in rows:
        y = place(left, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{edge}" {_both("y", y)}/>')
        parts.append(_text(_LEFT - 8, y + 4, write_y(tick), "end"))
    for tick in columns:
        x = place(tick, low)[0]
        parts.append(f'<line class="grid" y1="{_TOP}" y2="{bottom}" {_both("x", x)}/>')
        parts.append(_text(x, bottom + 20, write_x(tick), "middle"))
    corners = [place(marks[at].x, marks[at].y) for at in front]
    steps = "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
    x, y = corners[0]
    parts.append(f'<path class="front" d="M{x:.1f} {bottom}V{y:.1f}{steps}H{edge}"/>')
    taken: list[Point] = []
    for mark in marks:
        (x, y), (dx, dy) = place(mark.x, mark.y), mark.spread
        (x1, y1), (x2, y2) = place(mark.x - dx, mark.y - dy), place(mark.x + dx, mark.y + dy)
        bars = f"M{x1:.1f} {y:.1f}H{x2:.1f}M{x:.1f} {y1:.1f}V{y2:.1f}"
        hint = f"{mark.name}: {write_y(mark.y)} at {write_x(mark.x)}"
        parts.append(
            f'<g class="c{mark.colour}"><title>{escape(hint)}</title><path class="spread" '
            f'd="{bars}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
        crowded = any(abs(x - a) < 18 and abs(y - b) < 14 for a, b in taken)
        taken.append((x, y))
        side, anchor = (-7, "end") if crowded else (7, "start")
        parts.append(_text(x + side, y - 7, mark.label, anchor))
    summary = "; ".join(f"{m.name} {write_y(m.y)} at {write_x(m.x)}" for m in marks)
    best = ", ".join(marks[at].name for at in front)
    return _svg(title, f"{summary}. Pareto front: {best}.", bottom + _BOTTOM, parts)


def standalone(svg: str) -> str:
    """Return a chart as the text of an SVG file, with the colours of the page in it."""
    style = files("secateur.report").joinpath("page.css").read_text(encoding="utf-8")
    root, rest = svg.removeprefix("<svg").split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{root}><style>{style}</style>{rest}'


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Draw one horizontal bar of one or more parts per row, on a common scale from zero."""
    longest = max((sum(bar.parts) for bar in bars), default=0) or 1
    label_width = min(150, 12 + 7 * max((len(bar.label) for bar in bars), default=0))
    room = WIDTH - label_width - _BAR_TEXT
    parts = []
    for row, bar in enumerate(bars):
        y = row * _ROW + 4
        parts.append(_text(label_width - 8, y + 13, _shortened(bar.label, label_width), "end"))
        x = float(label_width)
        for colour, part in enumerate(bar.parts, start=1):
            width = room * part / longest
            if width > 0:
                shape = f'x="{x:.1f}" y="{y}" width="{max(width - 1, 0.5):.1f}" height="18" rx="2"'
                parts.append(f'<rect class="bar c{colour}" {shape}/>')
            x += width
        hint = f"<title>{escape(f'{bar.label}: {bar.text}')}</title>"
        parts.append(
            f'<text class="value" x="{x + 8:.1f}" y="{y + 13}">{hint}{escape(bar.text)}</text>'
        )
    summary = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    return _svg(title, summary, len(bars) * _ROW + 4, parts)


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {height:.0f}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _both(axis: str, value: float) -> str:
    return f'{axis}1="{value:.1f}" {axis}2="{value:.1f}"'


def _sections(
    sections: Sequence[tuple[int, str]], epochs: int, left: float, right: float, bottom: int
) -> list[str]:
    """Mark where each stretch begins, and name it where its name has room."""
    step = (right - left) / max(epochs - 1, 1)
    starts = [left + max(first - 0.5, 0) * step for first, _ in sections]
    parts = []
    for x, end, (_, name) in zip(starts, [*starts[1:], right], sections, strict=True):
        if x > left:
            place = f'{_both("x", x)} y1="{_TOP - 16}" y2="{bottom}"'
            parts.append(f'<line class="edge" {place}><title>{escape(name)}</title></line>')
        if 6.5 * len(name) < end - x:
            parts.append(_text(x + 5, _TOP - 8, name, "start"))
    return parts


def _epoch_ticks(epochs: int) -> range:
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    return range(0, epochs, next((step for step in steps if epochs / step <= 10), epochs))


def _linear(low: float, high: float) -> tuple[float, float, list[float]]:
    """Return rounded limits around the values, and four to eight round ticks between them."""
    span = max(high - low, 1e-6 * abs(high)) or 1.0
    rough = span / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return first * step, last * step, [number * step for number in range(first, last + 1)]


def _decades(low: float, high: float) -> tuple[float, float, list[float]]:
    first = math.floor(math.log10(low))
    last = max(math.ceil(math.log10(high)), first + 1)
    every = math.ceil((last - first) / 6)
    return 10.0**first, 10.0**last, [10.0**power for power in range(first, last + 1, every)]


def _rounded(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """Return limits around positive numbers with some air, and round ticks between: 1, 2, 5, 10."""
    low, high = min(values) / 1.3, max(values) * 1.5
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [step * 10.0**power for power in powers for step in (1, 2, 5)]
    decades = [10.0**power for power in powers]
    ticks = [
        [tick for tick in each if low <= tick <= high]
        for each in (fine, decades, decades[::2], decades[::4])
    ]
    return low, high, next((each for each in ticks if len(each) <= 6), ticks[-1])


def _from_to(
    values: Sequence[float | None],
    usable: Callable[[float | None], bool],
    write: Callable[[float], str],
) -> str:
    shown = [value for value in values if value is not None and usable(value)]
    return f"from {write(shown[0])} to {write(shown[-1])}" if shown else "absent"


def _shortened(label: str, width: int) -> str:
    room = (width - 8) // 7
    return label if len(label) <= room else "…" + label[1 - room :]
