"""Tests of run directories: locking, failed starts, resuming, choosing a checkpoint."""
import itertools
import os
import shutil
import subprocess
import sys
import time

import pytest

import train_gpt2
from conftest import (command, driver, FLAGS, HERE, LIB, one_sentence,
                      outputs, reports_error, run, TEXT)


# --- Locking ------------------------------------------------------------------------------------------------
def started(words, out, cwd=None):
    """A process that runs a command, once its run has logged a step."""
    process = subprocess.Popen([str(word) for word in words], cwd=cwd, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    log = out / "main.log"
    until = time.monotonic() + 60
    while not log.exists() or "trl" not in log.read_text():
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.01)
    return process


LONG = {"binary": "-x 1000000 -n 0 -v 0 -g 0", "driver": "--steps 1000000 --val-every 0 --sample-tokens 0"}


@pytest.mark.parametrize("first, second", list(itertools.product(FLAGS, FLAGS)))
def test_a_second_start_is_rejected_and_the_first_finishes(data, tmp_path, first, second):
    out = tmp_path / "run"
    process = started(command(first, data, LONG[first], out), out)
    for resume in (False, True):
        done = run(*command(second, data, LONG[second], out, resume=resume), status=1)
        reports_error(done, out, "in use by another run")
    process.terminate()
    assert process.wait(60) == 130 and process.stderr.read().count("\n") < 3
    assert LIB.gpt2_newest(str(out)) > 0


def test_a_second_start_on_a_text_leaves_its_tokens(tmp_path):
    """The tokens of a text are in the run directory: they must not be written before it is locked."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [sys.executable, HERE / "train_gpt2.py", "--data", "text.txt", *"--layers 1 --heads 1 --channels 16"
             " --context 16 --batch-size 2 --steps 1000000 --val-every 0 --out run".split()]
    process = started(words, tmp_path / "run", tmp_path)
    files = sorted((tmp_path / "run" / "tokens").iterdir())
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    reports_error(run(*words, status=1, cwd=tmp_path), "run is in use")
    assert [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
    at = (tmp_path / "run" / "main.log").read_text().count("\n")
    while (tmp_path / "run" / "main.log").read_text().count("\n") < at + 3:
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 130


def test_simultaneous_starts_have_different_directories(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [sys.executable, str(HERE / "train_gpt2.py"), "--data", "text.txt", *"--layers 1 --heads 1"
             " --channels 16 --context 16 --batch-size 2 --steps 2 --val-every 0 --sample-tokens 0".split()]
    processes = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [LIB.gpt2_newest(str(tmp_path / "runs" / n)) for n in "12"] == [2, 2]


@pytest.mark.parametrize("words", [
    "--data none.txt", "--data empty.txt", "--data text.txt --batch-size 999", "--init none.bin",
    "--data text.txt --heads 5", "--data none.txt --out deep/er/run", "--resume --out new/run"])
def test_a_failed_start_of_the_driver_leaves_nothing(tmp_path, monkeypatch, words):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("deep/er/run", "mine"):
        assert train_gpt2.main(words.replace("deep/er/run", out).split()) == 1
    assert sorted(os.listdir(tmp_path)) == ["empty.txt", "mine", "text.txt"]


def test_a_failed_start_of_the_binary_leaves_nothing(data, tmp_path):
    (tmp_path / "mine").mkdir()
    for name, flags in (("run", "-e none.bin"), ("run", "-t 99 -d 0"), ("mine", "-e none.bin")):
        run(*command("binary", data, flags, tmp_path / name), status=1)
    assert os.listdir(tmp_path) == ["mine"]
