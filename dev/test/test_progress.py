"""Tests of what is shown while something takes long, of numbers in messages, and of terms."""
import collections
import contextlib
import ctypes
import io
import math
import os
import pty
import re
import subprocess
import sys
import time

import pytest

import train_gpt2
from conftest import BINARY, binary, driver, fileio, HERE, run, SMALL, TEXT
from train_gpt2 import clock, counted, fitted, Progress


# --- Messages -----------------------------------------------------------------------------------------------
def test_nouns_follow_their_number():
    for noun, plural in (("file", "files"), ("batch", "batches"), ("run directory", "run directories"),
                         ("validation", "validations"), ("MB", "MB"), ("shard folder", "shard folders")):
        assert counted(1, noun) == f"1 {noun}" and counted(0, noun) == f"0 {plural}"
        assert counted(1234, noun) == f"1,234 {plural}"
    assert counted(0.5, "MB", 1) == "0.5 MB" and counted(1.25, "batch", 1) == "1.2 batches"
    assert (fileio.counted(1, "byte"), fileio.counted(2000, "byte")) == ("1 byte", "2,000 bytes")


def test_durations_are_short():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3600, 86399, 86400, 1000 * 86400 + 7200)] == [
        "00:00", "01:00", "59:59", "1:00:00", "23:59:59", "1d 00h", "1,000d 02h"]


def test_both_front_ends_have_no_wrong_plurals(tmp_path):
    """One step, layer, head, token of something, in runs and messages."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "one.txt").write_text("a")
    flags = ("--layers 1 --heads 1 --channels 16 --context 16 --batch-size 1 --seq-len 1 --steps 1"
             " --sample-tokens 0 --out run").split()
    shown = [driver("--data", "text.txt", *flags, cwd=tmp_path).stdout,
             driver("--resume", "--out", "run", "--steps", 4, cwd=tmp_path).stdout,
             driver("prepare", "one.txt", "--out", "one", "--val-fraction", 0, cwd=tmp_path).stdout,
             driver("--data", "one.txt", "--steps", 1, status=1, cwd=tmp_path).stderr,
             driver("sample", "run", "--tokens", 3, cwd=tmp_path).stderr]
    words = "-e run/best.bin -i run/tokens/train_*.bin -b 1 -t 1 -x 1 -g 0".split()
    shown.append(binary(*words, cwd=tmp_path).stdout)
    for text in shown:
        assert not re.search(r"(?<![\d.,])1 \w+[^s\W]s\b(?<!loss)", text), text
    assert "CPU, 1 thread, " in shown[0] and "1 micro-batch of" in shown[-1] and "1 shard;" in shown[-1]
    assert "1 layer, 1 head, " in shown[0] and "for the remaining 1 step," in shown[1]


def test_utilization_has_one_name(tmp_path):
    """MFU, which both front ends explain in their help."""
    for shown in (binary("--help").stdout, driver("train", "--help").stdout):
        assert "MFU (model FLOPs utilization" in re.sub(r"\s+", " ", shown)
    assert (HERE / "README.md").read_text().count("model FLOPs utilization") == 1
    for name in ("train_gpt2.c", "train_gpt2.py", "README.md"):
        assert not re.search(r"% of (the )?peak", (HERE / name).read_text())


# --- The live line ------------------------------------------------------------------------------------------
def fake_run(step, steps, seconds, total_batch_size, loss, norm):
    """A Run as far as its live line needs it."""
    run = train_gpt2.Run.__new__(train_gpt2.Run)
    run.settings = type("Settings", (), {"steps": steps, "total_batch_size": total_batch_size})
    run.progress = type("Step", (), {"step": step})
    run.last, run.recent, run.peak = (loss, 3.65e-3, norm), collections.deque([seconds]), 2e7
    run.live = Progress(stream=io.StringIO())
    run.live.begun -= step * seconds
    return run


@pytest.mark.parametrize("step, steps, seconds, batch, rate", [
    (1, 2, 1.0, 1, "1 tok/s"), (1117, 5400, 512 / 25164, 512, "25,164 tok/s"),
    (1_000_000, 1_000_000, 524288 / 12_345_678, 524288, "12,345,678 tok/s"),
    (7, 1_000_000, 524288 / 12_345_678, 524288, "12,345,678 tok/s"), (3, 1_000_000, 900, 100, "0 tok/s")])
@pytest.mark.parametrize("loss, norm", [(1.9578, 0.75), (10.9578, 123456.78)])
def test_the_live_line_fits_80_columns(step, steps, seconds, batch, rate, loss, norm):
    line = fake_run(step, steps, seconds, batch, loss, norm)
    shown = line.step_line(79)
    assert len(shown) <= 79 and rate in shown and f"loss {loss:.4f}" in shown
    assert re.match(rf"step +{step}/{steps} \| ", shown) and " left" in shown
    whole = line.step_line(math.inf)
    assert len(whole.split(" | ")) == 8 and whole.endswith("% MFU") and f"norm {norm:.2f}" in whole
    assert line.step_line(40).startswith("step ")


def test_what_does_not_fit_is_left_out():
    fields = [("aaaa", 0), ("bb", 2), ("cc", 1)]
    assert [fitted(fields, width) for width in (14, 13, 11, 8, 2)] == [
        "aaaa | bb | cc", "aaaa | cc", "aaaa | cc", "aaaa", "aaaa"]


def test_a_terminal_shows_lines_of_80_columns(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    ours, theirs = pty.openpty()
    words = [sys.executable, HERE / "train_gpt2.py", "--data", "text.txt", *SMALL]
    process = subprocess.Popen([str(word) for word in words], stdout=theirs, stderr=theirs, cwd=tmp_path,
                               env={**os.environ, "COLUMNS": "80"})
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):       # end of input at a terminal
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    lines = [line for line in re.findall(r"\r(step [^\r\x1b]*)\x1b\[K", shown.decode()) if "loss" in line]
    assert lines and all(len(line) < 80 and "tok/s" in line for line in lines)


# --- What takes long ----------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_is_shown_while_a_call_blocks(stream, monkeypatch):
    """And not before it is due, nor after the end of the `with`."""
    stream, pause = stream(), ctypes.CDLL(None).usleep
    monkeypatch.setattr(Progress, "shown", -math.inf)
    with Progress(label="loading it", stream=stream) as progress:
        until = time.monotonic() + 60
        while "loading it | 00:" not in stream.getvalue() and time.monotonic() < until:
            pause(1000)                      # without the interpreter
    assert "loading it | 00:" in stream.getvalue() and not progress.thread.is_alive()
    assert stream.getvalue().count("\n") == (not progress.terminal)
    assert stream.getvalue().endswith("\r\x1b[K" if progress.terminal else "\n")
    monkeypatch.setattr(Progress, "shown", math.inf)
    quiet = io.StringIO()
    with Progress(label="short", stream=quiet):
        pause(300_000)
    assert quiet.getvalue() == ""


def test_progress_is_due_every_few_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Progress, "shown", 0.0)
    stream, terminal = io.StringIO(), Terminal()
    one, two = Progress(3, "batch", "loss 1 | ", stream=stream), Progress(stream=terminal)
    for n in range(3):
        now[0] += 2
        one.advance(1)
    assert stream.getvalue() == ("loss 1 | 1 of 3 batches | 0.5 batches/s | 00:04 left\n"
                                 "loss 1 | 3 of 3 batches | 0.5 batches/s | 00:00 left\n")
    assert (one.interval, two.due(), one.due()) == (4.0, False, False)     # nothing right after a line
    now[0] += 0.2
    assert two.due() and not two.due()


def test_a_run_says_what_takes_long(monkeypatch):
    line = fake_run(5, 10, 2.0, 100, 3.0, 1.0)
    line.busy = Progress(stream=io.StringIO())
    assert re.fullmatch(r"step 6/10 \| \d\d:\d\d", line.busy_line())
    with line.doing("validation"):
        assert re.fullmatch(r"validation \| \d\d:\d\d", line.busy_line())
        monkeypatch.setattr(line.busy, "terminal", True)
    assert line.busy_line().startswith("step  5/10 | ") and "loss 3.0000" in line.busy_line()
    with line.doing(None):                   # a sample is shown
        assert line.busy_line() is None


def test_the_binary_says_what_takes_long(tmp_path):
    """While it makes a large model."""
    words = [BINARY, "-e", "d12", "-i", tmp_path / "none_*.bin"]
    with subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True) as process:
        shown = process.stderr.readline()
        process.kill()
    assert re.fullmatch(r"creating or loading the model \| 00:0\d\n", shown)


def test_programs_beside_the_driver_say_what_takes_long():
    code = ("import sys; sys.path.insert(0, 'dev'); from fileio import waiting\n"
            "with waiting('downloading it'): sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=HERE)
    assert re.fullmatch(r"downloading it \| 00:0\d\n", process.stderr.readline())
    process.communicate("")
    assert process.returncode == 0


def test_setting_up_the_tests_says_what_takes_long(tmp_path):
    """make test creates the environment with a python that takes a second here."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 1\nmkdir -p {tmp_path}/venv/bin\n"
                      f"cd {tmp_path}/venv/bin\nprintf '#!/bin/sh\\n' >python\nchmod +x python\n")
    python.chmod(0o755)
    shown = run("make", "-s", f"{tmp_path}/venv/bin/pytest", f"PYTHON={python}", f"VENV={tmp_path}/venv",
                "PATIENCE=0.1", cwd=HERE).stdout
    assert shown.splitlines()[0].startswith("creating ") and f"still creating {tmp_path}/venv" in shown
