"""A live line chart: new points are appended in the browser, and never more than 2,000 a line are drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nicegui import ui

from tunewright.web.kit import Text, box, tag
from tunewright.web.series import MAX_POINTS, Point, delta, last, number, thin

GREY = "#8a94a3"
# Puts each piece at its place, so that a piece which arrives twice, or after a drawing that has it already, changes
# nothing. (ECharts' own appendData would draw it twice.) The pieces are numbers only.
APPEND = """(() => {
  const series = getElement(%(id)d).options.series;
  for (const [index, start, points] of %(pieces)s) series[index].data.splice(start, Infinity, ...points);
  return {series: series.map((s) => ({data: s.data, showSymbol: s.dots || s.data.length < 2}))};
})()"""


@dataclass(frozen=True)
class Line:
    """One line of a chart. dots: few points that deserve a mark (one an epoch)."""

    label: str
    colour: str
    dots: bool = False
    dashed: bool = False


class LineChart:
    """A chart with a legend in words above it, which also says the newest values (and so serves screen readers)."""

    def __init__(self, title: str, lines: Mapping[str, Line], name: str, digits: int = 3, scale: float = 1.0) -> None:
        self.title = title
        self.lines = dict(lines)
        self.digits = digits
        self.scale = scale
        self._drawn: dict[str, list[Point]] = {key: [] for key in lines}
        self._sent = dict.fromkeys(lines, 0)
        self._total: float | None = None
        self._readout: dict[str, Text] = {}
        with tag(box("tw-chart"), name) as self.root:
            self.root.props["role"] = "img"
            with box("tw-legend"):
                for key, line in self.lines.items():
                    self._legend(key, line)
            self.plot = ui.echart(self._options()).classes("tw-plot")
            self.plot.props["aria-hidden"] = "true"
            self.plot.set_visibility(False)
            self.empty = Text("The curve begins with the first step.", "tw-plot tw-muted tw-plot-empty")
        self._describe()

    def show(self, data: Mapping[str, Sequence[Point]], total: float | None = None) -> None:
        """Draw these points: only what is new travels to the browser as long as the lines merely grow.

        total: the last step of the job, where the axis ends.
        """
        grown = {key: delta(self._drawn[key], data[key]) for key in self.lines}
        if not any(grown[key] is None or grown[key] for key in self.lines):
            return
        self._drawn = {key: list(data[key]) for key in self.lines}
        room = all(g is not None and self._sent[key] + len(g) <= MAX_POINTS for key, g in grown.items())
        if room and any(self._sent.values()) and total == self._total:
            self._append({key: list(g or ()) for key, g in grown.items()})
        else:
            self._total = total
            self._redraw()
        self._describe()

    def _append(self, grown: dict[str, list[Point]]) -> None:
        pieces = []
        for index, (key, points) in enumerate(grown.items()):
            start, scaled = self._sent[key], self._scaled(points)
            # the options keep the whole truth, for a browser that connects again and builds the chart anew; NiceGUI
            # watches them and would send all of them at every change
            with self.plot.props.suspend_updates():
                self.plot.options["series"][index]["data"][start:] = scaled
            self._sent[key] += len(points)
            pieces.append([index, start, scaled])
        self.plot.run_chart_method(":setOption", APPEND % {"id": self.plot.id, "pieces": json.dumps(pieces)})

    def _redraw(self) -> None:
        for index, key in enumerate(self.lines):
            shown = thin(self._drawn[key], MAX_POINTS // 2) if len(self._drawn[key]) > MAX_POINTS else self._drawn[key]
            series = self.plot.options["series"][index]
            series["data"] = self._scaled(shown)
            series["showSymbol"] = series["dots"] or len(shown) < 2
            self._sent[key] = len(shown)
        self.plot.options["xAxis"]["max"] = self._total or "dataMax"
        self.plot.set_visibility(any(self._sent.values()))
        self.empty.set_visibility(not any(self._sent.values()))
        self.plot.update()

    def _scaled(self, points: Sequence[Point]) -> list[list[float]]:
        return [[x, round(y * self.scale, 5)] for x, y in points]

    def _legend(self, key: str, line: Line) -> None:
        with box("tw-legend-item"):
            box("tw-legend-dot" if line.dots else "tw-legend-line").style(f"--mark: {line.colour}")
            Text(line.label, "tw-legend-label")
            self._readout[key] = Text("–", "tw-legend-value")

    def _describe(self) -> None:
        words = []
        for key, line in self.lines.items():
            newest = last(self._drawn[key])
            text = number(None if newest is None else newest * self.scale, self.digits)
            self._readout[key].set_text(text)
            words.append(f"{line.label} {text}")
        first = next(iter(self.lines))
        n = len(self._drawn[first])
        self.root.props["data-points"] = str(n)
        self.root.props["aria-label"] = f"{self.title} over {n} steps. Newest values: {', '.join(words)}."

    def _options(self) -> dict[str, Any]:
        axis = {
            "axisLine": {"lineStyle": {"color": GREY, "opacity": 0.4}},
            "axisTick": {"show": False},
            "axisLabel": {"color": GREY, "fontSize": 11},
            "splitLine": {"lineStyle": {"color": GREY, "opacity": 0.16}},
        }
        return {
            "animation": False,
            "aria": {"enabled": True},
            "grid": {"left": 8, "right": 14, "top": 12, "bottom": 4, "containLabel": True},
            "tooltip": {"trigger": "axis", "confine": True, "axisPointer": {"lineStyle": {"color": GREY}}},
            "dataZoom": [{"type": "inside", "filterMode": "none"}],
            "xAxis": {"type": "value", "min": 0, "max": "dataMax", "minInterval": 1, **axis},
            "yAxis": {"type": "value", "scale": True, **axis, "axisLine": {"show": False}},
            "series": [self._series(line) for line in self.lines.values()],
        }

    def _series(self, line: Line) -> dict[str, Any]:
        return {
            "type": "line",
            "name": line.label,
            "data": [],
            "dots": line.dots,
            "showSymbol": line.dots,
            "symbol": "circle",
            "symbolSize": 9,
            "itemStyle": {"color": line.colour, "borderColor": "#fff", "borderWidth": 1.5 if line.dots else 0},
            # no more vertices than the plot has pixels: thick lines of thousands are slow to draw without a GPU
            "sampling": "minmax",
            "lineStyle": {"width": 2, "color": line.colour, "type": "dashed" if line.dashed else "solid"},
            "emphasis": {"disabled": True},
        }
