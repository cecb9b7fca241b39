"""Tests of the metrics, the curves and the summary of a run."""
import collections
import http.server
import math
import os
import re
import shutil
import signal
import struct
import sys
import threading
import xml.etree.ElementTree
import zlib

import pytest

import train_gpt2
from conftest import curves, driver, HERE, metrics, reports_error, run, SMALL, TEXT
from train_gpt2 import GPT2


SVG = "{http://www.w3.org/2000/svg}"


def drawing(path):
    """The words of an SVG, and the points of each line in the order of drawing."""
    root = xml.etree.ElementTree.fromstring(re.search("<svg.*</svg>", path.read_text(), re.DOTALL)[0])
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names <= set("svg style rect path text polyline circle".split())     # no script
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
             for line in root.iter(f"{SVG}polyline")]
    assert all(math.isfinite(value) for line in lines for point in line for value in point)
    return [text.text for text in root.iter(f"{SVG}text")], lines


def test_metrics_agree_with_the_log(trained):
    _, folder = trained
    rows = metrics(folder)
    lines = ["s:{step} tel:{val_loss:.4f}" if "val_loss" in row else
             "s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}" for row in rows]
    assert [line.format(**row) for line, row in zip(lines, rows)] == (
        folder / "main.log").read_text().splitlines()
    assert all(row["seconds"] > 0 and row["tokens"] == 32 for row in rows if "loss" in row)


def test_a_run_is_drawn(trained):
    words, lines = drawing(trained[1] / "loss.svg")
    best = min(row["val_loss"] for row in metrics(trained[1]) if "val_loss" in row)
    assert words[0] == f"runs/1: best validation loss {best:.4f} at step 3"
    expected = {"training", "training, smoothed", "validation", "loss, nats per token", "learning rate",
                "gradient norm", "step", "0", "1", "2", "3"}
    assert expected <= set(words)
    assert [len(line) for line in lines[3:]] == [3] * 6     # loss and norm, raw and smoothed; val; lr
    assert "(prefers-color-scheme: dark)" in (trained[1] / "loss.svg").read_text()


def test_curves_come_from_either_log(tmp_path):
    log = tmp_path / "main.log"
    log.write_text("s:0 tel:5.5000\nnot a line\ns:0 trl:5.4000 lr:0.000040 norm:5.99\ns:250 eval:0.2950\n"
                   "s:1 trl:nan lr:0.000080 norm:1.00\ns:1 trl:5.2000 lr:0.000080 norm:2.00\n\0\xff\n"
                   "s:2 trl:5.")
    expected = {"val_loss": [(0, 5.5)], "loss": [(0, 5.4), (1, 5.2)], "lr": [(0, 4e-5), (1, 8e-5)],
                "norm": [(0, 5.99), (1, 2)], "eval": [(250, 0.295)]}
    assert curves.read_curves(str(log)) == curves.read_curves(str(tmp_path)) == expected
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1, "loss": 5.20004, "lr": 8.00001e-05}\n{"step')
    expected.update(loss=[(0, 5.4), (1, 5.20004)], lr=[(0, 4e-5), (1, 8.00001e-5)])
    assert curves.read_curves(str(tmp_path)) == expected


def test_plot_overlays_runs_and_logs_of_llmc(tmp_path, trained):
    with open(tmp_path / "a<&\x01>.log", "w") as log:
        for s in range(20000):
            loss, norm = 3 + 800 / (s + 100), 99 if s == 7000 else 0.5
            log.write(f"s:{s} trl:{loss:.4f} lr:0.000600 norm:{norm:.2f}\n")
            if s % 250 == 0:
                log.write(f"s:{s} tel:{loss:.4f}\n")
    driver("plot", "a<&\x01>.log", trained[1], "--out", "both.svg", cwd=tmp_path)
    words, lines = drawing(tmp_path / "both.svg")
    assert words[0] == "2 runs" and "a<&?>.log: best validation loss 3.0403 at step 19,750" in words
    assert any(word.startswith(f"{trained[1]}"[-60:]) for word in words) and "18,000" in words
    assert max(map(len, lines)) < 1000 and (tmp_path / "both.svg").stat().st_size < 100_000
    start, end = lines[5][0][1], lines[5][-1][1]     # the loss: its steep start is above the upper edge
    assert 0 < start < 20 and 250 < end < 300      # with the first validation, which is inside
    driver("plot", "a<&\x01>.log", cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 9


def test_the_first_validation_is_inside_and_dashed(tmp_path):
    """Also where the training loss falls steeply, and for each of several runs in its own colour."""
    for name in "ab":
        rows = [f"s:{s} trl:{9 * 0.9 ** s + 2:.4f} lr:0.1 norm:{9 if s == 0 else 1}.00\n" for s in range(400)]
        (tmp_path / name).write_text("s:0 tel:11.0000\n" + "".join(rows) + "s:400 tel:2.1000\n")
    driver("plot", "a", "b", cwd=tmp_path)
    root = xml.etree.ElementTree.parse(tmp_path / "loss.svg").getroot()
    panel = next(root.iter(f"{SVG}svg[@height='300']"), None) or root.find(f"{SVG}svg")
    height = float(panel.get("height"))
    dashed = [line for line in panel if line.tag == f"{SVG}polyline" and "val" in line.get("class").split()]
    assert [line.get("class") for line in dashed] == ["c1 val", "c2 val"] and ".val {" in (
        tmp_path / "loss.svg").read_text()
    for line in dashed:
        places = [float(point.split(",")[1]) for point in line.get("points").split()]
        assert len(places) == 2 and all(0 < y < height for y in places)
    assert len(panel.findall(f"{SVG}circle")) == 4


def test_plot_over_tokens_and_time_with_logarithmic_axes(tmp_path, trained):
    rows = ['{"step": 0, "val_loss": 9}\n']
    for step in range(100):
        rows.append('{"step": %d, "loss": %f, "tokens": 1000000, "seconds": %d}\n'
                    % (step, 9 * max(step, 1) ** -0.5, 1 if step < 50 else 3))
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 100, "val_loss": 0.9}\n')
    read = curves.read_curves(str(tmp_path))
    assert curves.along("", read, "tokens")["val_loss"] == [(0, 9), (1e8, 0.9)]
    assert curves.along("", read, "time")["val_loss"] == [(0, 9), (200, 0.9)]
    assert curves.along("", read, "time")["loss"][51] == (53, read["loss"][51][1])
    for axis, title, tick in (("tokens", "training tokens, millions", "50"), ("step", "step", "60"),
                              ("time", "training time, minutes", "1.5")):
        driver("plot", ".", "--x", axis, cwd=tmp_path)
        words, linear = drawing(tmp_path / "loss.svg")
        assert title in words and tick in words
        driver("plot", ".", "--x", axis, "--log", cwd=tmp_path)
        words, logs = drawing(tmp_path / "loss.svg")
        assert title in words and {"1", "2", "5"} <= {*words}
        if axis != "time":                   # a power law is a straight line
            x, y = zip(*logs[3][2:])
            slopes = [(y[i] - y[1]) / (x[i] - x[1]) for i in range(9, len(x), 9)]
            assert slopes == [pytest.approx(slopes[-1], rel=0.03)] * len(slopes)
        assert linear[3] != logs[3]
    (tmp_path / "main.log").write_text("s:0 trl:2.0 lr:0.1 norm:1.00\n")
    failed = driver("plot", "main.log", "--x", "tokens", status=1, cwd=tmp_path)
    reports_error(failed, "main.log", "no tokens", "--x step")


@pytest.mark.parametrize("flags", ["", "--log"])
@pytest.mark.parametrize("points", [[(0, 0)], [(5, 3), (6, 3)], [(0, 1e-9), (9, 10**15 - 1)],
                                    [(3, 0), (4, 7)], [(10**15 - 1, 2.5)], [(0, 1e-30), (1, 2e-30)]])
def test_degenerate_curves_are_drawn(tmp_path, points, flags):
    (tmp_path / "log").write_text("".join(f"s:{step} trl:{value} lr:{value} norm:{value}\n"
                                          for step, value in points))
    driver("plot", "log", *flags.split(), cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 8


def test_the_page_of_a_run_refreshes_itself_until_the_end(trained, tmp_path):
    """One file without scripts and addresses, except for the name space of SVG."""
    folder = trained[1]
    ended = (folder / "loss.html").read_text()
    assert drawing(folder / "loss.html") == drawing(folder / "loss.svg")
    assert "Finished: 3 steps." in ended and "refresh" not in ended
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    curves.draw_run(str(tmp_path), "step <3>", running=True)
    shown = (tmp_path / "loss.html").read_text()
    assert '<meta http-equiv="refresh" content="10">' in shown and "step &lt;3&gt;" in shown
    for text in (shown, ended):
        assert not re.search("<script|<img|<link|src=|href=|https?://(?!www.w3.org/2000/svg)", text)
    assert sorted(os.listdir(tmp_path)) == ["loss.html", "loss.svg", "metrics.jsonl"]


def test_the_page_of_a_failed_run_says_so(tmp_path, monkeypatch):
    def fail(run, step, loss):
        if step == 2:
            raise train_gpt2.GPT2Error("this one fails")

    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train_gpt2.Run, "validated", fail)
    assert train_gpt2.main(["--data", "text.txt", "--out", "run", *SMALL]) == 1
    shown = (tmp_path / "run" / "loss.html").read_text()
    assert "Stopped after step 2 of 3." in shown and "refresh" not in shown


# --- In a browser -------------------------------------------------------------------------------------------
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not BROWSER or "LD_PRELOAD" in os.environ, reason="needs chromium")


def browse(tmp_path, *words):
    return run(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path}/profile", *words).stdout


def pixels(path):
    """The colours of a PNG of 8-bit RGB or RGBA, and how many pixels have each."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
            assert depth == 8 and colour in (2, 6)
        packed += body * (kind == b"IDAT")
        at += 12 + size
    n = {2: 3, 6: 4}[colour]
    raw, above, found = zlib.decompress(packed), bytes(n * width), collections.Counter()
    for row in range(height):
        kind, *line = raw[row * (n * width + 1):(row + 1) * (n * width + 1)]
        for i, value in enumerate(line):     # the five filters of PNG
            a, b, c = (line[i - n], above[i], above[i - n]) if i >= n else (0, above[i], 0)
            paeth = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
            line[i] = (value + [0, a, b, (a + b) // 2, paeth][kind]) % 256
        found.update(tuple(line[i:i + 3]) for i in range(0, len(line), n))
        above = line
    return found


@in_a_browser
def test_a_browser_shows_the_page_chromium(trained, tmp_path):
    browse(tmp_path, "--window-size=860,400", f"--screenshot={tmp_path}/page.png",
           f"file://{trained[1]}/loss.html")
    found = pixels(tmp_path / "page.png")
    blue, orange, white = (9, 105, 218), (188, 76, 0), (255, 255, 255)     # training, validation, page
    assert sum(found.values()) == 860 * 400 and 200_000 < found[white] < 340_000
    assert min(found[blue], found[orange]) > 100


@in_a_browser
def test_a_browser_refreshes_the_page_chromium(tmp_path, monkeypatch):
    """Until it says that the run has ended."""
    monkeypatch.setattr(curves, "REFRESH", 1)
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            n = requests.count("/loss.html")
            self.wfile.write(curves.page("<svg/>", "run", f"step {n}", running=n < 3).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        shown = browse(tmp_path, "--virtual-time-budget=9000", "--dump-dom",
                       f"http://127.0.0.1:{server.server_port}/loss.html")
        server.shutdown()
    assert "step 3" in shown and requests.count("/loss.html") == 3


def test_a_run_prints_a_summary_and_next_commands(trained, tmp_path):
    shown, folder = trained
    shutil.copytree(folder.parents[1], tmp_path, dirs_exist_ok=True)
    parameters = GPT2.load(folder / "best.bin").num_parameters
    assert f"3 of 32 tokens, in micro-batches of 2 x 16: {96 / len(TEXT.encode()) / 0.9:.2f} epochs" in shown
    assert f"{parameters:,} parameters" in shown and f"{96 / parameters:.2f} tokens per parameter" in shown
    assert re.search(r"^memory: \d+ MB needed, [\d,]+ MB available$", shown, re.M)
    assert re.search(r"^time:   about \d\d:\d\d for the remaining 1 step,", shown, re.M)
    line = r"^3 steps, \d\d:\d\d, best validation loss \d\.\d{4} at step \d \(runs/1/best.bin\)$"
    assert re.search(line, shown, re.M)
    for title in ("sample", "train on", "compare"):
        words = re.search(rf"^{title}: +python3 \S+ (.*)$", shown, re.M)[1].split()
        driver(*(word.replace("ANOTHER_RUN", "runs/1/main.log") for word in words), cwd=tmp_path)
    assert (tmp_path / "loss.svg").exists() and list((tmp_path / "runs" / "2").glob("DONE_*"))


def test_the_memory_estimate_is_accurate(tmp_path):
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer takes memory of its own")
    (tmp_path / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    flags = ("--data text.txt --layers 4 --heads 4 --channels 256 --context 64 --batch-size 32 --steps 2"
             " --val-batches 1 --sample-tokens 0").split()
    # Through a small process: the peak memory of a process includes that before exec, here of pytest.
    between = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
               " print('used', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    words = [sys.executable, "-c", between, sys.executable, HERE / "train_gpt2.py", *flags]
    shown = run(*words, cwd=tmp_path).stdout
    needed = int(re.search(r"^memory: (\d+) MB needed", shown, re.M)[1])
    used = int(re.search(r"^used (\d+)", shown, re.M)[1])
    assert needed == pytest.approx(used / 1e3 - 30, rel=0.2)
