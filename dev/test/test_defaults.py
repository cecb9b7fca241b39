"""Tests of the settings that follow from the size of model and text, and of settings in both front ends."""
import argparse
import ctypes
import json
import re
import signal

import pytest

import train_gpt2
from conftest import (BINARY, command, driver, LIB, outputs, reject_wrong_adamw, reports_error, run, SMALL,
                      TEXT, tokens_of)
from train_gpt2 import GPT2Config

# The flag of train_gpt2.py for each flag of the binary.
SAME = {"-i": "data", "-j": "val-data", "-e": "model", "-o": "out", "-n": "checkpoint-every", "-nk": "keep",
        "-nm": "keep-every", "-y": "resume", "-b": "batch-size", "-t": "seq-len", "-d": "total-batch-size",
        "-x": "steps", "-k": "schedule", "-l": "lr", "-u": "warmup", "-q": "final-lr-frac", "-b1": "beta1",
        "-b2": "beta2", "-ep": "eps", "-c": "weight-decay", "-gc": "grad-clip", "-sl": "skip-loss-z",
        "-sg": "skip-grad-z", "-sn": "skip-nonfinite", "-v": "val-every", "-m": "val-batches",
        "-s": "sample-every", "-g": "sample-tokens", "-a": "overfit", "-w": "master-weights",
        "-r": "recompute"}
BINARY_ONLY = {"--check": "the driver's command check", "--tolerance": "of --check",
               "--version": "the driver's --version, before the command",
               "-h": "the driver's eval --hellaswag", "-f": "llm.c's, ignored", "-ge": "llm.c's, ignored",
               "-z": "llm.c's, ignored", "-lg": "llm.c's, ignored"}
DRIVER_ONLY = {"tokenizer": "the binary reads no texts", "encoding": "texts", "text-field": "texts",
               "document-separator": "texts", "jsonl": "texts", "layers": "shape", "heads": "shape",
               "channels": "shape", "context": "shape", "init": "-e with a file", "patience": "best.bin is"
               " the driver's", "seed": "llm.c has none", "minutes": "the binary does not time steps first",
               "resume-step": "-y resumes the newest", "checkpoint": "of --init", "device": "a binary each",
               "help": "the binary's --help"}


def test_both_front_ends_have_the_same_settings():
    binary = set(re.findall(r"^  (-\S+)", run(BINARY, "--help").stdout, re.M))
    assert binary == {*SAME, *BINARY_ONLY}
    flags = set(re.findall(r"^ +(?:-h, )?--([a-z0-9-]+)", driver("train", "--help").stdout, re.M))
    assert flags == {*SAME.values(), *DRIVER_ONLY}
    assert all({**BINARY_ONLY, **DRIVER_ONLY}.values())     # each has a reason


# Those of train_gpt2.cu of llm.c.
LLMC = "i j e o lg n nk nm y b t d x k l u q c sl sg v m s g h a f w ge z r pi pf ps pn pr pg pm pp".split()
OURS = ["-b1", "-b2", "-ep", "-gc", "-sn"]


def test_flags_of_our_own_are_none_of_llmcs():
    binary = set(re.findall(r"^  -(\w+)", run(BINARY, "--help").stdout, re.M))
    assert sorted(f"-{flag}" for flag in binary - {*LLMC}) == OURS
    assert {*LLMC} - binary == set("pi pf ps pn pr pg pm pp".split())     # of several processes


@pytest.mark.parametrize("flags", [
    ("-b1 0.8 -b2 0.9 -ep 1e-4 -gc 0.3", "--beta1 0.8 --beta2 0.9 --eps 1e-4 --grad-clip 0.3"),
    ("-a 1", "--overfit"), ("-n 2 -nk 1 -nm 6", "--checkpoint-every 2 --keep 1 --keep-every 6")])
def test_both_front_ends_train_alike_with_every_setting(data, whole_runs, tmp_path, flags):
    for front, words in zip(("binary", "driver"), flags):
        run(*command(front, data, words, tmp_path / front))
    ours, theirs = (outputs(tmp_path / front) for front in ("binary", "driver"))
    assert sorted(ours) == sorted(theirs) and [name for name in ours if ours[name] != theirs[name]] == []
    assert ours != outputs(whole_runs["binary"][1])


def test_both_front_ends_skip_the_same_outliers(data, tmp_path):
    base = {"binary": "-x 150 -v 0 -g 0 -n 150 -d 57 -sl 1.2 -sg 1.5",
            "driver": "--steps 150 --val-every 150 --sample-tokens 0 --checkpoint-every 150"
                      " --total-batch-size 57 --skip-loss-z 1.2 --skip-grad-z 1.5"}
    shown = {}
    for front, flags in base.items():
        shown[front] = run(*command(front, data, flags, tmp_path / front)).stdout
    assert "outlier, skipped" in shown["binary"]
    name = "model_00000150.bin"
    assert (tmp_path / "binary" / name).read_bytes() == (tmp_path / "driver" / name).read_bytes()


def test_settings_of_a_gpu_are_reported_on_a_cpu(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    done = driver("--data", "a.txt", *SMALL, "--recompute", 1, "--master-weights", 0, cwd=tmp_path)
    assert re.findall(r"--(\S+) is ignored", done.stderr) == ["recompute", "master-weights"]


def settings(model, tokens, **given):
    """The settings of a run of a size on as many tokens, before steps are timed."""
    s = argparse.Namespace(**{**train_gpt2.DEFAULTS, "model": model, **given})
    config = train_gpt2.new_config(s, given, LIB)
    config.V = 256
    train_gpt2.settle_batch(s, config.max_T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2, "tokens_in", lambda path: tokens)
        train_gpt2.settle_training(s, config, LIB, ["shard"])
    train_gpt2.settle_intervals(s, config, LIB, False)
    return s


@pytest.mark.parametrize("tokens", [1003854, 4551589, 419576])     # the three default texts
def test_the_default_run_is_unchanged(tokens):
    s = settings(None, tokens)
    assert (s.batch_size, s.seq_len, s.total_batch_size, s.steps) == (8, 64, 512, 5400)
    assert (s.lr, s.warmup, s.val_every, s.val_batches) == (4e-3, 100, 1000, 250)
    assert (s.checkpoint_every, s.keep) == (1000, 0)


@pytest.mark.parametrize("model, tokens, steps, lr, batch, keep", [
    ("d2", 270000, 890, 3e-3, (8, 256), 0), ("d6", 270000, 1300, 1e-3, (8, 256), 0),
    ("d12", 270000, 1300, 5e-4, (2, 1024), 2), ("d4", 50 * 10**6, 24000, 1.5e-3, (8, 256), 0),
    (None, 1000, 100, 4e-3, (8, 64), 0), (None, 4551589, 8900, 4e-3, (8, 64), 0)])
def test_settings_follow_from_model_and_text(model, tokens, steps, lr, batch, keep):
    s = settings(model, tokens, data=["text.txt"])
    assert (s.steps, s.lr, (s.batch_size, s.seq_len), s.keep) == (steps, lr, batch, keep)
    assert 10 <= s.warmup <= max(100, steps / 100)
    assert s.val_every == s.checkpoint_every and (4 <= steps / s.val_every <= 6 or s.val_every == 100)


def test_given_settings_are_kept():
    s = settings("d6", 270000, steps=7, lr=0.5, batch_size=3, context=32, keep=9, warmup=4)
    assert (s.steps, s.lr, s.batch_size, s.seq_len, s.keep, s.warmup) == (7, 0.5, 3, 32, 9, 4)


def timed(tmp_path, monkeypatch, capsys, seconds, *flags):
    """Output and settings of a run whose steps would take as long; it ends before the first."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "seconds_of_batch", lambda *_: seconds)
    monkeypatch.setattr(train_gpt2, "train", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["--data", "text.txt", *(word for word in SMALL if word not in ("--steps", "3")), *flags]
    assert train_gpt2.main(["--out", "run", *map(str, words)]) == 0
    shown = capsys.readouterr()
    return shown, json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.parametrize("flags, steps", [
    ("--val-every 0", 1000), ("--val-every 0 --minutes 20", 2100), ("--val-every 0 --minutes 0.1", 10),
    ("--val-every 0 --total-batch-size 64", 530), ("--val-every 100", None), ("--val-batches 99", None),
    ("--minutes 1e6", None)])
def test_minutes_choose_the_number_of_steps(tmp_path, monkeypatch, capsys, flags, steps):
    """Half a second per batch, a third of it in validation; a tenth is a reserve. 10 minutes are 1,080
    batches, of which two digits remain."""
    _, s = timed(tmp_path, monkeypatch, capsys, 0.5, "--minutes", 10, *flags.split())
    assert steps in (None, s["steps"])
    assert s["checkpoint_every"] == max(100, train_gpt2.rounded(s["steps"] / 5, 1))
    batches = s["steps"] * s["total_batch_size"] / 32
    if s["val_every"]:
        largest = len(tokens_of(tmp_path / "run" / "tokens" / "val_000000.bin")) // 32
        batches += (2 + (s["steps"] - 1) // s["val_every"]) * min(s["val_batches"], largest) / 3
    assert 0.87 < 0.5 * batches / (0.9 * 60 * s["minutes"]) <= 1


def test_a_long_run_is_limited_to_an_hour(tmp_path, monkeypatch, capsys):
    shown, s = timed(tmp_path, monkeypatch, capsys, 100.0, "--val-every", 0)
    assert s["steps"] == 32 and re.search("^steps: +32 instead of .*--minutes", shown.out, re.M)
    assert not {"steps", "minutes", "lr", "keep"} & {*s["given"]}     # they are derived
    _, s = timed(tmp_path / "given", monkeypatch, capsys, 100.0, "--steps", 70)
    assert s["steps"] == 70 and "steps" in s["given"]


def one_line(text, pattern):
    return text.count("\n") == 1 and re.search(pattern, text)


def test_many_epochs_are_reported_with_the_flag(tmp_path, monkeypatch, capsys):
    shown, _ = timed(tmp_path, monkeypatch, capsys, 0.001, "--minutes", 60, "--batch-size", 64)
    assert one_line(shown.err, r"makes [\d,]+ epochs of a text of [\d,]+ tokens.* --minutes")
    shown, s = timed(tmp_path / "default", monkeypatch, capsys, 0.001)
    assert s["steps"] == 690 and shown.err == ""
    shown, _ = timed(tmp_path / "floor", monkeypatch, capsys, 0.001, "--batch-size", 64)
    assert one_line(shown.err, r"makes \d\d epochs .* --steps")
    shown, _ = timed(tmp_path / "overfit", monkeypatch, capsys, 0.001, "--batch-size", 64, "--overfit")
    assert shown.err == ""


def test_minutes_are_for_new_runs_without_steps(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    done = driver("--data", "a.txt", "--steps", 2, "--minutes", 1, cwd=tmp_path, status=1)
    reports_error(done, "--minutes", "--steps")


def test_what_takes_long_is_reported_before_the_model_is_allocated(tmp_path, monkeypatch, capsys):
    """One sentence each, which names the flag."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "memory_available", lambda: 10**5)

    class Allocated(train_gpt2.GPT2Error):
        pass

    def allocate(*_):
        raise Allocated("allocated")
    monkeypatch.setattr(train_gpt2, "GPT2", allocate)
    words = [word for word in SMALL if word not in ("--steps", "3")]
    assert train_gpt2.main(["--data", "text.txt", *words, "--steps", "2000000000"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[3].endswith("allocated")
    for line, flag in zip(lines, ("--batch-size", "--steps", "--minutes")):
        assert flag in line
    assert "MB" in lines[0] and "epochs" in lines[1] and re.search(r"about \d+(:\d\d)+|about \d+d", lines[2])


def test_memory_needed_is_that_of_the_shape():
    config = GPT2Config(64, 256, 6, 3, 96)
    assert train_gpt2.parameters_of(config, LIB) == LIB.gpt2_parameters(ctypes.byref(config)) == 701952
    assert train_gpt2.memory_needed(config, LIB, 8, 64) == 4 * (
        4 * 701952 + 512 * 96 * 72 + min(512 * 256, 2**24))


def test_the_memory_available_is_that_of_a_container(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "CONTROL_GROUP", str(tmp_path / "memory."))
    free = train_gpt2.memory_available()
    for limit, expected in ((b"5000000\n", 4300000), (b"1000\n", 0), (b"max\n", free), (b"", free)):
        files = {"max": limit, "current": b"1000000\n", "stat": b"anon 5\ninactive_file 300000\n"}
        for name, contents in files.items():
            (tmp_path / f"memory.{name}").write_bytes(contents)
        assert train_gpt2.memory_available() == pytest.approx(expected, rel=0.01 if expected < free else 0.2)


@pytest.mark.parametrize("flags", ["-b1 1", "-b2 1.5", "-ep 0"])
def test_the_binary_rejects_what_would_give_nan(flags):
    reports_error(run(BINARY, *flags.split(), status=2), flags.split()[0])


@pytest.mark.parametrize("flags", ["--beta1 1", "--beta2 1.5", "--eps 0", "--minutes 0", "--minutes inf"])
def test_the_driver_rejects_what_would_give_nan(flags):
    reports_error(driver(*flags.split(), status=2), flags.split()[0])


def test_an_update_rejects_what_would_give_nan():
    reject_wrong_adamw()


def test_only_the_remaining_steps_of_a_resumed_run_count_as_long(monkeypatch, capsys):
    s, config = settings("d2", 10**9, steps=100_000), GPT2Config(256, 256, 2, 2, 128)
    monkeypatch.setattr(train_gpt2, "tokens_in", lambda path: 10**9)
    monkeypatch.setattr(LIB, "gpt2_ceiling", lambda: 1e11)
    for done, given, long in ((None, ["steps"], True), (10_000, ["steps"], True), (80_000, ["steps"], False),
                              (10_000, [], False)):
        train_gpt2.warn_before(s, given, config, LIB, ["shard"], 10**12, done)
        assert ("--steps 100000 takes" in capsys.readouterr().err) == long
