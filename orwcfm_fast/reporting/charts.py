"""Line and bar charts as inline SVG, coloured by the page's style sheet, so that they follow light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40


@dataclass(frozen=True)
class Series:
    """Points joined by a line, or bars, each with its interval where one is known.

    Attributes:
        style: class in the style sheet: a to e for measured series, forecast (dashed) for expected ones.
        y_low, y_high, x_low, x_high: ends of the intervals, one for each point, or empty.
        labels: a text beside each point, or empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "a"
    y_low: Sequence[float] = field(default=())
    y_high: Sequence[float] = field(default=())
    x_low: Sequence[float] = field(default=())
    x_high: Sequence[float] = field(default=())
    labels: Sequence[str] = field(default=())


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, series: Sequence[Series], x_label: str, *, whole_x: bool = False, x_names: Sequence[str] = ()
) -> Markup:
    """A figure with title, legend and lines on two axes.

    Values that are not finite are left out; a chart without any point says so.

    Args:
        whole_x: put the ticks of x at whole numbers only.
        x_names: texts for the ticks at x = 0, 1, 2 and so on, in place of numbers.
    """
    xs = _finite([v for s in series for part in (s.x, s.x_low, s.x_high) for v in part])
    ys = _finite([v for s in series for part in (s.y, s.y_low, s.y_high) for v in part])
    if not xs or not ys:
        head = Markup("<h3>{}</h3>").format(title) + _legend(series)
        return Markup('<figure class="chart">{}<p class="empty">nothing recorded</p></figure>').format(head)
    frame = _Frame(*_range(xs, whole_x), *_range(ys, False))
    across = [(v, _number(v)) for v in ticks(frame.x0, frame.x1, 6) if not whole_x or v == round(v)]
    body = [_grid(frame, x_label, [*enumerate(x_names)] or across)] + [_draw(s, frame) for s in series]
    return _framed(title, series, body)


def bar_chart(title: str, groups: Sequence[Series], names: Sequence[str]) -> Markup:
    """A figure of grouped bars from 0, with intervals: for each of `names`, the values y of every group."""
    highest = max(_finite([v for s in groups for part in (s.y, s.y_high) for v in part]))
    frame = _Frame(-0.5, len(names) - 0.5, 0.0, 1.06 * highest)
    width = 0.8 / len(groups)
    body = [_grid(frame, "", [*enumerate(names)])]
    for k, s in enumerate(groups):
        parts = []
        for i, (name, y) in enumerate(zip(names, s.y, strict=True)):
            (left, top), (right, bottom) = (
                frame.at(i - 0.4 + k * width, y),
                frame.at(i - 0.4 + (k + 1) * width, 0.0),
            )
            tip = f"{s.name}, {name}: {_number(y)}"
            parts.append(
                f'<rect x="{left}" y="{top}" width="{right - left:.1f}" height="{bottom - top:.1f}">'
                f"<title>{escape(tip)}</title></rect>"
            )
            (x, low), (_, high) = (
                frame.at(i - 0.4 + (k + 0.5) * width, v) for v in (s.y_low[i], s.y_high[i])
            )
            parts.append(f'<line class="error" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
        body.append(Markup(f'<g class="{escape(s.style)}">{"".join(parts)}</g>'))
    return _framed(title, groups, body)


def _framed(title: str, series: Sequence[Series], body: Sequence[Markup]) -> Markup:
    """A figure with its title and legend above an SVG of these parts."""
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(body)
    )
    head = Markup("<h3>{}</h3>").format(title) + _legend(series)
    return Markup('<figure class="chart">{}{}</figure>').format(head, svg)


@dataclass(frozen=True)
class _Frame:
    """The range of the data, and its map to SVG coordinates."""

    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        right = LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)
        down = TOP + (self.y1 - y) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)
        return round(right, 1), round(down, 1)


def _finite(values: Sequence[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def _range(values: Sequence[float], whole: bool) -> tuple[float, float]:
    """The range of the values with a margin; a single value gets a margin on both sides."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        room = 0.5 if whole else 0.05 * max(abs(high), 0.1)
        return low - room, high + room
    margin = 0.0 if whole else 0.06 * (high - low)
    return low - margin, high + margin


def _legend(series: Sequence[Series]) -> Markup:
    named = [s for s in series if s.name and len(s.x)]
    if len(named) < 2:
        return Markup("")
    items = Markup("").join(Markup('<li class="{}"><i></i>{}</li>').format(s.style, s.name) for s in named)
    return Markup('<ul class="legend">{}</ul>').format(items)


def _number(value: float) -> str:
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}").replace("-", "−")


def _grid(frame: _Frame, x_label: str, across: Sequence[tuple[float, str]]) -> Markup:
    """Grid lines, tick labels and the label of x."""
    parts = []
    for value in ticks(frame.y0, frame.y1):
        (left, y), (right, _) = frame.at(frame.x0, value), frame.at(frame.x1, value)
        parts.append(f'<line class="grid" x1="{left}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + 3.5}" text-anchor="end">{_number(value)}</text>'
        )
    for value, name in across:
        x, bottom = frame.at(value, frame.y0)
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">{escape(name)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return Markup("".join(parts))


def _draw(s: Series, frame: _Frame) -> Markup:
    """The line of a series, its intervals, its points with tooltips, and its labels."""
    known = [
        i for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if math.isfinite(x) and math.isfinite(y)
    ]
    at = {i: frame.at(s.x[i], s.y[i]) for i in known}
    parts = ['<polyline points="' + " ".join(f"{x},{y}" for x, y in at.values()) + '"/>']
    for i in known:
        if len(s.y_low) and math.isfinite(s.y_low[i] + s.y_high[i]):
            (x, low), (_, high) = frame.at(s.x[i], s.y_low[i]), frame.at(s.x[i], s.y_high[i])
            parts.append(f'<line class="bar" x1="{x}" y1="{low}" x2="{x}" y2="{high}"/>')
        if len(s.x_low) and math.isfinite(s.x_low[i] + s.x_high[i]):
            (low, y), (high, _) = frame.at(s.x_low[i], s.y[i]), frame.at(s.x_high[i], s.y[i])
            parts.append(f'<line class="bar" x1="{low}" y1="{y}" x2="{high}" y2="{y}"/>')
    for i, (x, y) in at.items():
        label = s.labels[i] if len(s.labels) else ""
        tip = f"{s.name} {label} ({_number(s.x[i])}, {_number(s.y[i])})"
        parts.append(f'<circle cx="{x}" cy="{y}" r="2.6"><title>{escape(tip)}</title></circle>')
        if label:
            end = x > WIDTH * 0.8
            parts.append(
                f'<text class="label" x="{x + (-6 if end else 6)}" y="{y - 5}"'
                f"{' text-anchor=' + chr(34) + 'end' + chr(34) if end else ''}>{escape(label)}</text>"
            )
    return Markup(f'<g class="{escape(s.style)}">{"".join(parts)}</g>')
