#!/usr/bin/env python3
"""Draws the curves that runs have logged into one SVG, which follows a light or dark theme.

    python3 dev/curves.py runs/1 runs/2 --out loss.svg

A run is a run directory, a main.log (llm.c's too) or a metrics.jsonl. Standard library only. The
driver's command plot calls plot(), its training loop read_curves() and draw_curves().
"""
import argparse
import collections
import functools
import html
import math
import os
import re
import statistics
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from fileio import Error, naming, printable, regular, write_file  # noqa: E402

METRICS = "metrics.jsonl"                    # in a run directory: a JSON object per step and per validation
LOG_NAMES = {"s": "step", "trl": "loss", "tel": "val_loss"}     # main.log's names: ours
LEFT, WIDTH = 80, 740                        # pixels: left edge and width of the panels
Panel = collections.namedtuple("Panel", "heading height curves low")     # low: axis start; None: the data's
PANELS = [
    Panel("loss, nats per token", 300, ("loss", "val_loss"), None),
    Panel("learning rate", 80, ("lr",), 0),
    Panel("gradient norm", 80, ("norm",), 0),
    Panel("HellaSwag accuracy", 80, ("eval",), None),
]
STYLE = """<style>
rect { fill: #fff } svg { color: #1f2328 } path { stroke: #d8dee4 } .c1 { color: #0969da }
.c2 { color: #bc4c00 } .c3 { color: #1a7f37 } .c4 { color: #8250df } .c5 { color: #cf222e }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117 } svg { color: #d1d7e0 } path { stroke: #2a3038 } .c1 { color: #58a6ff }
.c2 { color: #f0883e } .c3 { color: #3fb950 } .c4 { color: #bc8cff } .c5 { color: #ff7b72 } }
polyline { fill: none; stroke: currentColor; stroke-width: 1.8 } .raw { stroke-width: 1; opacity: .45 }
text { font: 12px system-ui, sans-serif } text, circle { fill: currentColor } .title { font-size: 16px }
.middle { text-anchor: middle } .end { text-anchor: end }
</style>"""


def read_curves(path):
    """The curves of a run by name, such as "val_loss": points (step, value) sorted by step.

    If a step was logged twice, the later line counts. Other lines are skipped."""
    files = [path]
    if os.path.isdir(path):                  # main.log has the binary's steps too, metrics.jsonl more digits
        files = [os.path.join(path, name) for name in ("main.log", METRICS) if name in os.listdir(path)]
    curves = collections.defaultdict(dict)
    for file in files:
        with naming(file), open(file, encoding="utf-8", errors="replace", opener=regular) as text:
            for line in iter(functools.partial(text.readline, 1000), ""):
                pairs = re.findall(r'([a-z_]{1,20})"?: ?(\d{1,15}(?:\.\d+)?(?:e-\d\d)?)(?=[\s,}])', line)
                values = {LOG_NAMES.get(name, name): float(value) for name, value in pairs}
                step = values.pop("step", None)
                if step is not None:
                    for name in values:
                        curves[name][step] = values[name]
    return {name: sorted(points.items()) for name, points in curves.items()}


def thin(points):
    """At most some hundred points: the lowest and the highest of each stretch."""
    size = 1 + len(points) // 300
    stretches = [sorted(points[i:i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]
    return [point for stretch in stretches for point in sorted({stretch[0], stretch[-1]})]


def smooth(points):
    """Some hundred moving averages over 1/25 of the points; over fewer at the steep start."""
    half = len(points) // 50
    return [(points[i][0], statistics.fmean(v for _, v in points[max(0, i - half):i + min(i, half) + 1]))
            for i in range(0, len(points), 1 + len(points) // 200)]


def ticks(low, high, most, least=0.0):
    """Round numbers from low to high, at most `most` and at least `least` apart, with their labels."""
    unit = 10 ** math.floor(math.log10((high - low) / most))
    unit = max(least, next(n * unit for n in (1, 2, 5, 10, 20) if n * unit * most >= high - low))
    digits = max(0, -math.floor(math.log10(unit) + 1e-9))
    multiples = range(math.ceil(low / unit), int(high // unit) + 1)
    return [(n * unit, f"{n * unit:,.{digits}f}") for n in multiples]


class Drawing:
    """The elements of an SVG, with the steps from first to last across its panels."""

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.elements = []

    def across(self, step):
        """The x of a step, from the left edge of a panel."""
        return 8 + (step - self.first) / (self.last - self.first) * (WIDTH - 16)

    def text(self, x, y, words, css=""):
        words = html.escape(printable(words))
        self.elements.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{words}</text>')

    def line(self, points, css, dots=False):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(f'<polyline class="{css}" points="{joined}"/>')
        if dots:
            self.elements += [f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]


def axis_range(curves, low):
    """The range of values that a panel shows: a steep start and single outliers may exceed it."""
    settled = sorted(value for points in curves
                     for _, value in points[len(points) // 10 + (len(points) > 2):])
    values = [value for points in curves for _, value in points]
    high, margin_below = settled[-1 - len(settled) // 200], 0
    if low is None:
        low = min(values)
        margin_below = 1
    margin = (high - low) / 20 or 1
    return low - margin * margin_below, min(max(values), high + 5 * margin) + margin


def draw_panel(drawing, panel, shown, y):
    """Draws the curves shown, (name, css class, points) each, below y. Returns the panel's lower edge."""
    low, high = axis_range([points for _, _, points in shown], panel.low)
    y += 46
    drawing.text(LEFT, y - 10, panel.heading)
    for value, label in ticks(low, high, 2 + panel.height / 40):
        at = y + (high - value) / (high - low) * panel.height
        drawing.elements.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}"/>')
        drawing.text(LEFT - 8, at + 4, label, "end")
    for step, _ in ticks(drawing.first, drawing.last, 10, 1):
        drawing.elements.append(f'<path d="M{LEFT + drawing.across(step):.1f} {y}v{panel.height}"/>')

    def place(points):
        scale = panel.height / (high - low)
        return [(drawing.across(step), (high - value) * scale) for step, value in points]

    # An inner svg clips what exceeds the panel.
    drawing.elements.append(f'<svg x="{LEFT}" y="{y}" width="{WIDTH}" height="{panel.height}">')
    for name, css, points in shown:
        if name in ("loss", "norm"):         # noisy
            drawing.line(place(thin(points)), css + " raw")
            drawing.line(place(smooth(points)), css)
        else:
            drawing.line(place(thin(points)), css, dots=name in ("val_loss", "eval"))
    drawing.elements.append("</svg>")
    return y + panel.height


def run_title(name, curves):
    """A run's name and its best validation loss."""
    step, best = min(curves.get("val_loss", [(0, 0)]), key=lambda point: point[1])
    if not best:
        return name[-60:]
    return f"{name[-60:]}: best validation loss {best:.4f} at step {step:,.0f}"


def draw_legend(drawing, runs):
    """Draws the title and the legend: one colour per run, or for a single run one for training and one for
    validation. Returns the legend's lower edge."""
    titles = [run_title(name, curves) for name, curves in runs.items()]
    training, validation = "c1", "c2"
    heading = titles[0]
    if len(runs) > 1:
        training, validation = "c0", "c0"    # no colour: those of the runs follow
        heading = f"{len(runs)} runs"
    drawing.text(LEFT, 30, heading, "title")
    entries = [(f"{training} raw", "training"), (training, "training, smoothed"), (validation, "validation")]
    if len(runs) > 1:
        entries += [(f"c{1 + i % 5}", title) for i, title in enumerate(titles)]
    y = 56
    for i, (css, words) in enumerate(entries):
        x = LEFT
        if i < 3:
            x += WIDTH / 3 * i
        else:
            y += 20
        drawing.line([(x, y - 4), (x + 22, y - 4)], css, dots=words == "validation")
        drawing.text(x + 30, y, words)
    return y


def draw_curves(runs, path):
    """Writes an SVG of the curves of runs: by name, what read_curves returns."""
    steps = [step for curves in runs.values() for points in curves.values() for step, _ in points]
    drawing = Drawing(min(steps), max(*steps, min(steps) + 1))
    y = draw_legend(drawing, runs)
    for panel in PANELS:
        shown = []
        for i, curves in enumerate(runs.values()):
            for name in panel.curves:
                colour = i
                if len(runs) == 1 and name == "val_loss":
                    colour = 1
                if name in curves:
                    shown.append((name, f"c{1 + colour % 5}", curves[name]))
        if shown:
            y = draw_panel(drawing, panel, shown, y)
    for step, label in ticks(drawing.first, drawing.last, 10, 1):
        drawing.text(LEFT + drawing.across(step), y + 18, label, "middle")
    drawing.text(LEFT + WIDTH / 2, y + 38, "step", "middle")
    size = 'width="{0}" height="{1}" viewBox="0 0 {0} {1}"'.format(LEFT + WIDTH + 20, y + 50)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}<rect {size}/>', *drawing.elements]
    write_file(path, "\n".join([*lines, "</svg>\n"]).encode(errors="replace"))


def plot(paths, out):
    """Draws the curves of runs, by path, into the SVG `out`."""
    runs = {path: read_curves(path) for path in paths}
    for path, curves in runs.items():
        if not curves.keys() & {"loss", "val_loss"}:
            raise Error(f"{path} has no losses, expected a run directory, a main.log or a metrics.jsonl")
    draw_curves(runs, out)


def main():
    parser = argparse.ArgumentParser(description="Draws the curves of runs into one SVG.")
    parser.add_argument("runs", nargs="+", help="run directory, main.log or metrics.jsonl")
    parser.add_argument("--out", default="loss.svg", help="the picture (loss.svg)")
    args = parser.parse_args()
    try:
        plot(args.runs, args.out)
    except (Error, OSError) as error:
        sys.exit(f"curves.py: {printable(str(error))}")


if __name__ == "__main__":
    main()
