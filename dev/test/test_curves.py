"""Tests of the metrics, the curves and the summary of a run."""
import math
import os
import re
import shutil
import sys
import xml.etree.ElementTree

import pytest

from conftest import curves, driver, HERE, metrics, run, TEXT
from train_gpt2 import GPT2


def drawing(path):
    """The words of an SVG, and the points of each line in the order of drawing."""
    root = xml.etree.ElementTree.parse(path).getroot()
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names <= set("svg style rect path text polyline circle".split())     # no script
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
             for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert all(math.isfinite(value) for line in lines for point in line for value in point)
    return [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")], lines


def test_metrics_agree_with_the_log(trained):
    _, folder = trained
    rows = metrics(folder)
    lines = ["s:{step} tel:{val_loss:.4f}" if "val_loss" in row else
             "s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}" for row in rows]
    assert [line.format(**row) for line, row in zip(lines, rows)] == (
        folder / "main.log").read_text().splitlines()
    assert all(row["seconds"] > 0 for row in rows if "loss" in row)


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
    assert start < 0 and 100 < end < 300
    driver("plot", "a<&\x01>.log", cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 9


@pytest.mark.parametrize("points", [[(0, 0)], [(5, 3), (6, 3)], [(0, 1e-9), (9, 10**15 - 1)],
                                    [(3, 0), (4, 7)], [(10**15 - 1, 2.5)], [(0, 1e-30), (1, 2e-30)]])
def test_degenerate_curves_are_drawn(tmp_path, points):
    (tmp_path / "log").write_text("".join(f"s:{step} trl:{value} lr:{value} norm:{value}\n"
                                          for step, value in points))
    driver("plot", "log", cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 8


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
