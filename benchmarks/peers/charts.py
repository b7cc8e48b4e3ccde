"""Line and bar charts as pictures, drawn twice as large and scaled down, which smooths their lines."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f6fb4", "#d6562b", "#3a9144", "#8a56a8", "#7a5c3e", "#d268a5", "#5f6a72", "#b3a01c")
_SCALE, _WIDTH, _HEIGHT = 2, 560, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 26, 44
_GRID, _INK = "#dddddd", "#222222"
Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name of a line -> its points (x, y)."""


def lines(title: str, x_label: str, series: Series, *, logarithmic: bool = False) -> Image.Image:
    """A line for each series over a common x axis, with the x of all points as its ticks; y is above 0."""
    chart = _Chart(title, list(series))
    xs = sorted({x for points in series.values() for x, _ in points})
    chart.scale([y for points in series.values() for _, y in points], logarithmic)
    places = {x: chart.across(k / max(1, len(xs) - 1)) for k, x in enumerate(xs)}
    for x in xs:
        chart.text(places[x], _HEIGHT - _BOTTOM + 5, f"{x:g}", "ma")
    chart.text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 16, x_label, "ma")
    for number, points in enumerate(series.values()):
        chart.line([(places[x], chart.up(y)) for x, y in points], COLOURS[number % len(COLOURS)])
    return chart.finished()


def bars(title: str, groups: Mapping[str, Mapping[str, float]], *, logarithmic: bool = False) -> Image.Image:
    """A group of bars for each key of ``groups``, with one bar for each name; values are above 0."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    chart = _Chart(title, names)
    chart.scale([value for group in groups.values() for value in group.values()], logarithmic)
    room = (_WIDTH - _LEFT - _RIGHT) / len(groups)
    for k, (label, group) in enumerate(groups.items()):
        first = _LEFT + room * (k + 0.1)
        for number, name in enumerate(names):
            if name in group:
                left = first + 0.8 * room * number / len(names)
                chart.bar(left, left + 0.8 * room / len(names) - 1, group[name], COLOURS[number % len(COLOURS)])
        chart.text(_LEFT + room * (k + 0.5), _HEIGHT - _BOTTOM + 5, label, "ma")
    return chart.finished()


def sheet(charts: Sequence[Image.Image], abreast: int = 2) -> Image.Image:
    """Charts side by side."""
    width, height = charts[0].size
    paper = Image.new("RGB", (width * min(abreast, len(charts)), height * ceil(len(charts) / abreast)), "white")
    for number, chart in enumerate(charts):
        line, column = divmod(number, abreast)
        paper.paste(chart, (column * width, line * height))
    return paper


class _Chart:
    """One chart being drawn; coordinates are those of the finished picture."""

    def __init__(self, title: str, names: Sequence[str]) -> None:
        self._image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), "white")
        self._draw = ImageDraw.Draw(self._image)
        self.text(_LEFT, 8, title, "la", size=13)
        self._top = self._legend(names) + 12

    def scale(self, values: Sequence[float], logarithmic: bool) -> None:
        """Choose the y axis for these values and draw its lines."""
        self._logarithmic = logarithmic
        if logarithmic:
            low, high = floor(log10(min(values))), ceil(log10(max(values)) + 1e-9)
            ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
            lowest = max(tick for tick in ticks if tick <= min(values))
            highest = min((tick for tick in ticks if tick >= max(values)), default=10.0**high)
            self._low, self._high = log10(lowest), log10(highest)
            ticks = [tick for tick in ticks if lowest <= tick <= highest]
            if self._low == self._high:
                self._high += 1
        else:
            step = 10.0 ** floor(log10(max(values) or 1.0))
            step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if max(values) / (step * part) <= 6)
            self._low, self._high = 0.0, step * max(1, ceil(max(values) / step - 1e-9))
            ticks = [step * k for k in range(round(self._high / step) + 1)]
        for tick in ticks:
            y = self.up(tick)
            self._draw.line([self._at(_LEFT, y), self._at(_WIDTH - _RIGHT, y)], _GRID, _SCALE)
            self.text(_LEFT - 6, y, f"{tick:g}", "rm")

    def across(self, share: float) -> float:
        """The x of a share of the width; the outermost places keep a distance from the axes."""
        return _LEFT + 16 + share * (_WIDTH - _LEFT - _RIGHT - 32)

    def up(self, value: float) -> float:
        """The y of a value."""
        position = log10(value) if self._logarithmic else value
        share = (position - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - self._top - _BOTTOM)

    def line(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """A line with a dot at each point."""
        self._draw.line([self._at(*point) for point in points], colour, 2 * _SCALE)
        for x, y in points:
            self._draw.ellipse([self._at(x - 3, y - 3), self._at(x + 3, y + 3)], colour)

    def bar(self, left: float, right: float, value: float, colour: str) -> None:
        """A bar from the bottom."""
        self._draw.rectangle([self._at(left, self.up(value)), self._at(right, _HEIGHT - _BOTTOM)], colour)

    def _legend(self, names: Sequence[str]) -> float:
        """Write the names with their colours under the title; returns where they end."""
        font = ImageFont.load_default(10 * _SCALE)
        left, y = float(_LEFT), _TOP + 8.0
        for number, name in enumerate(names):
            width = self._draw.textlength(name, font=font) / _SCALE + 26
            if left > _LEFT and left + width > _WIDTH:
                left, y = float(_LEFT), y + 15
            colour = COLOURS[number % len(COLOURS)]
            self._draw.rectangle([self._at(left, y - 4), self._at(left + 9, y + 4)], colour)
            self.text(left + 14, y, name, "lm")
            left += width
        return y

    def text(self, x: float, y: float, text: str, anchor: str, size: int = 10) -> None:
        """Text whose anchor (see Pillow) is at (x, y)."""
        self._draw.text(self._at(x, y), text, _INK, ImageFont.load_default(size * _SCALE), anchor)

    def finished(self) -> Image.Image:
        """The picture in its final size."""
        return self._image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return x * _SCALE, y * _SCALE
