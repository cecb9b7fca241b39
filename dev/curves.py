#!/usr/bin/env python3
"""Draws the curves that runs have logged into one SVG, which follows a light or dark theme.

    python3 dev/curves.py runs/1 runs/2 --out loss.svg
    python3 dev/curves.py runs/1 runs/2 --x tokens --log

A run is a run directory, a main.log (llm.c's too) or a metrics.jsonl. Standard library only. The
driver's command plot calls plot(), its training loop draw_run().
"""
import argparse
import bisect
import collections
import functools
import html
import itertools
import math
import os
import re
import statistics
import sys
import time

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from fileio import Error, naming, printable, regular, write_file  # noqa: E402

METRICS = "metrics.jsonl"                    # in a run directory: a JSON object per step and per validation
LOG_NAMES = {"s": "step", "trl": "loss", "tel": "val_loss"}     # main.log's names: ours
REFRESH = 10                                 # seconds between refreshes of loss.html
LEFT, WIDTH = 80, 740                        # pixels: left edge and width of the panels
X_AXES = {                                   # of --x: units with their size, the largest that suits is used
    "step": [(1, "step")],
    "tokens": [(1e9, "training tokens, billions"), (1e6, "training tokens, millions"),
               (1, "training tokens")],
    "time": [(3600, "training time, hours"), (60, "training time, minutes"), (1, "training time, seconds")],
}
Panel = collections.namedtuple("Panel", "heading height curves low")     # low: axis start; None: the data's
PANELS = [
    Panel("loss, nats per token", 300, ("loss", "val_loss"), None),
    Panel("learning rate", 80, ("lr",), 0),
    Panel("gradient norm", 80, ("norm",), 0),
    Panel("HellaSwag accuracy", 80, ("eval",), None),
]
DOTTED = ("val_loss", "eval")
STYLE = """<style>
rect { fill: #fff } svg { color: #1f2328 } path { stroke: #d8dee4 } .c1 { color: #0969da }
.c2 { color: #bc4c00 } .c3 { color: #1a7f37 } .c4 { color: #8250df } .c5 { color: #cf222e }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117 } svg { color: #d1d7e0 } path { stroke: #2a3038 } .c1 { color: #58a6ff }
.c2 { color: #f0883e } .c3 { color: #3fb950 } .c4 { color: #bc8cff } .c5 { color: #ff7b72 } }
polyline { fill: none; stroke: currentColor; stroke-width: 1.8 } .raw { stroke-width: 1; opacity: .45 }
.val { stroke-dasharray: 5 3 }
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


class Scale(collections.namedtuple("Scale", "low high log")):
    """An axis from low to high, perhaps logarithmic."""

    def place(self, value):
        """Where a value is: 0 at low, 1 at high. A logarithmic axis has what is below low at low."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log(max(number, low)) for number in (low, high, value))
        return (value - low) / (high - low)

    def ticks(self, most, least=0.0):
        """As ticks(); over more than a power of ten of a logarithmic axis 1, 2, 5, 10, 20 and so on."""
        if not self.log or self.high < 10 * self.low:
            return ticks(self.low, self.high, most, least)
        powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1,)):
            values = [digit * 10.0 ** power for power in powers for digit in digits]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) <= most:
                break
        return [(value, f"{value:,.15g}") for value in values[::1 + int(len(values) // most)]]


class Drawing:
    """The elements of an SVG, with the horizontal axis of its panels."""

    def __init__(self, axis):
        self.axis = axis
        self.elements = []

    def across(self, x):
        """The horizontal place of x, from the left edge of a panel."""
        return 8 + self.axis.place(x) * (WIDTH - 16)

    def text(self, x, y, words, css=""):
        words = html.escape(printable(words))
        self.elements.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{words}</text>')

    def line(self, points, css, dots=False):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(f'<polyline class="{css}" points="{joined}"/>')
        if dots:
            self.elements += [f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]


def logarithmic(values):
    """A logarithmic axis for values; those that are not positive are at its low end."""
    values = [value for value in values if value > 0] or [1]
    return Scale(min(values) / 1.02, max(values) * 1.02, True)


def axis_range(curves, low, whole):
    """The axis of the values that a panel shows: a steep start and single outliers may exceed it, except for
    those of the curves `whole`."""
    settled = sorted(value for points in curves
                     for _, value in points[len(points) // 10 + (len(points) > 2):])
    values = [value for points in curves for _, value in points]
    high, margin_below = settled[-1 - len(settled) // 200], 0
    if low is None:
        low = min(values)
        margin_below = 1
    margin = (high - low) / 20 or 1
    high = max([min(max(values), high + 5 * margin), *(value for points in whole for _, value in points)])
    return Scale(low - margin * margin_below, high + margin, False)


def draw_panel(drawing, panel, shown, y, least):
    """Draws the curves shown, (name, css class, points) each, below y, with x at least `least` between
    ticks. Returns the panel's lower edge."""
    curves = [points for _, _, points in shown]
    scale = axis_range(curves, panel.low, [points for name, _, points in shown if name in DOTTED])
    if drawing.axis.log and "loss" in panel.curves:
        scale = logarithmic([value for points in curves for _, value in points])
    y += 46
    drawing.text(LEFT, y - 10, panel.heading)
    for value, label in scale.ticks(2 + panel.height / 40):
        at = y + (1 - scale.place(value)) * panel.height
        drawing.elements.append(f'<path d="M{LEFT} {at:.1f}h{WIDTH}"/>')
        drawing.text(LEFT - 8, at + 4, label, "end")
    for x, _ in drawing.axis.ticks(10, least):
        drawing.elements.append(f'<path d="M{LEFT + drawing.across(x):.1f} {y}v{panel.height}"/>')

    def place(points):
        return [(drawing.across(x), (1 - scale.place(value)) * panel.height) for x, value in points]

    # An inner svg clips what exceeds the panel.
    drawing.elements.append(f'<svg x="{LEFT}" y="{y}" width="{WIDTH}" height="{panel.height}">')
    for name, css, points in shown:
        if name in ("loss", "norm"):         # noisy
            drawing.line(place(thin(points)), css + " raw")
            drawing.line(place(smooth(points)), css)
        else:
            if name in DOTTED:
                css += " val"
            drawing.line(place(thin(points)), css, dots=name in DOTTED)
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
    entries = [(f"{training} raw", "training"), (training, "training, smoothed"),
               (f"{validation} val", "validation")]
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


def along(path, curves, axis):
    """The curves of a run over an axis of X_AXES: the tokens or seconds of the training steps before a
    point."""
    if axis == "step":
        return curves
    amounts = dict(curves.get({"tokens": "tokens", "time": "seconds"}[axis], []))
    if not amounts:
        raise Error(f"{path} has no {axis} of steps, expected a metrics.jsonl with them; draw it with --x"
                    " step")
    usual = statistics.median(amounts.values())     # of the binary's steps, which main.log has without
    steps = [step for step, _ in curves.get("loss", [])]
    totals = [0, *itertools.accumulate(amounts.get(step, usual) for step in steps)]
    return {name: [(totals[bisect.bisect_left(steps, step)], value) for step, value in points]
            for name, points in curves.items()}


def horizontal_axis(runs, axis, log):
    """The Scale of an axis of X_AXES, the size of its unit, and its title."""
    places = [x for curves in runs.values() for points in curves.values() for x, _ in points]
    unit, title = next((size, title) for size, title in X_AXES[axis] if max(places) >= 2 * size or size == 1)
    places = [x / unit for x in places]
    low, high = min(places), max(places)
    if log:
        low = min((x for x in places if x > 0), default=1)
        high = max(high, 1.01 * low)
    return Scale(low, max(high, low + 1 / unit), log), unit, title


def picture(runs, axis="step", log=False):
    """An SVG of the curves of runs: by name, what read_curves returns."""
    placed = {name: along(name, curves, axis) for name, curves in runs.items()}
    scale, unit, title = horizontal_axis(placed, axis, log)
    drawing, least = Drawing(scale), float(axis == "step")
    y = draw_legend(drawing, runs)
    for panel in PANELS:
        shown = []
        for i, curves in enumerate(placed.values()):
            for name in panel.curves:
                colour = i
                if len(runs) == 1 and name == "val_loss":
                    colour = 1
                if name in curves:
                    points = [(x / unit, value) for x, value in curves[name]]
                    shown.append((name, f"c{1 + colour % 5}", points))
        if shown:
            y = draw_panel(drawing, panel, shown, y, least)
    for x, label in drawing.axis.ticks(10, least):
        drawing.text(LEFT + drawing.across(x), y + 18, label, "middle")
    drawing.text(LEFT + WIDTH / 2, y + 38, title, "middle")
    size = 'width="{0}" height="{1}" viewBox="0 0 {0} {1}"'.format(LEFT + WIDTH + 20, y + 50)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}<rect {size}/>', *drawing.elements]
    return "\n".join([*lines, "</svg>\n"])


def page(svg, title, status, running):
    """An HTML page with the picture, which refreshes itself while the run is running."""
    refresh, note = "", f"Drawn at {time.strftime('%Y-%m-%d %H:%M:%S')}."
    if running:
        refresh = f'<meta http-equiv="refresh" content="{REFRESH}">\n'
        note += f" This page refreshes itself every {REFRESH} seconds."
    title, status = html.escape(printable(title)), html.escape(printable(status))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
{refresh}<title>{title}: {status}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ margin: 1em auto; max-width: 840px; font: 14px system-ui, sans-serif }}
body {{ color: #1f2328; background: #fff }}
p {{ margin: 0 20px .2em 80px; font-variant-numeric: tabular-nums }} .note {{ color: #656d76 }}
body > svg {{ width: 100%; height: auto }}
@media (prefers-color-scheme: dark) {{
body {{ color: #d1d7e0; background: #0d1117 }} .note {{ color: #9198a1 }} }}
</style>
<p>{status}</p>
<p class="note">{note}</p>
{svg}</html>
"""


def draw_run(folder, status, running):
    """Draws a run's loss.svg, and loss.html, which also shows its status and refreshes itself while it is
    running."""
    curves = read_curves(folder)
    if curves:
        svg = picture({folder: curves})
        write_file(os.path.join(folder, "loss.svg"), svg.encode(errors="replace"))
        text = page(svg, folder, status, running)
        write_file(os.path.join(folder, "loss.html"), text.encode(errors="replace"))


def plot(paths, out, axis="step", log=False):
    """Draws the curves of runs, by path, into the SVG `out`, over an axis of X_AXES."""
    runs = {path: read_curves(path) for path in paths}
    for path, curves in runs.items():
        if not curves.keys() & {"loss", "val_loss"}:
            raise Error(f"{path} has no losses, expected a run directory, a main.log or a metrics.jsonl")
    write_file(out, picture(runs, axis, log).encode(errors="replace"))


def main():
    parser = argparse.ArgumentParser(description="Draws the curves of runs into one SVG.")
    parser.add_argument("runs", nargs="+", help="run directory, main.log or metrics.jsonl")
    parser.add_argument("--x", choices=tuple(X_AXES), default="step", help="horizontal axis (step)")
    parser.add_argument("--log", action="store_true",
                        help="logarithmic axes: the horizontal one and the loss")
    parser.add_argument("--out", default="loss.svg", help="the picture (loss.svg)")
    args = parser.parse_args()
    try:
        plot(args.runs, args.out, args.x, args.log)
    except (Error, OSError) as error:
        sys.exit(f"curves.py: {printable(str(error))}")


if __name__ == "__main__":
    main()
