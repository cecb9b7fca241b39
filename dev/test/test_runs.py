"""Tests of run directories: locking, failed starts, resuming, choosing a checkpoint."""
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

import train_gpt2
from conftest import (binary, command, driver, FLAGS, HERE, LIB, make_data, metrics, one_sentence, outputs,
                      reports_error, run, shards, SMALL, TEXT, V)
from train_gpt2 import GPT2Config

both_front_ends = pytest.mark.parametrize("front", list(FLAGS))


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


def steps_flag(front, steps):
    return {"binary": f"-x {steps}", "driver": f"--steps {steps}"}[front]


LONG = {"binary": "-x 1000000 -n 0 -v 0 -g 0", "driver": "--steps 1000000 --val-every 0 --sample-tokens 0"}


@pytest.mark.parametrize("first, second", list(itertools.product(FLAGS, FLAGS)))
def test_a_second_start_is_rejected_and_the_first_finishes(data, tmp_path, first, second):
    out = tmp_path / "run"
    process = started(command(first, data, LONG[first], out), out)
    for resume in (False, True):
        flags = f"{LONG[second]} {steps_flag(second, 9)}"     # soon done, if it is not rejected
        done = run(*command(second, data, flags, out, resume=resume), status=1)
        reports_error(done, out, "in use by another run")
    process.terminate()
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    assert LIB.gpt2_newest(str(out)) > 0


def test_a_second_start_on_a_text_leaves_its_tokens(tmp_path):
    """The tokens of a text are in the run directory: they must not be written before it is locked."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [sys.executable, HERE / "train_gpt2.py", "--data", "text.txt", "--out", "run", *SMALL,
             *LONG["driver"].split()]
    process = started(words, tmp_path / "run", tmp_path)
    files = sorted((tmp_path / "run" / "tokens").iterdir())
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files]
    reports_error(run(*words, "--steps", 9, status=1, cwd=tmp_path), "run is in use")
    assert [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in files] == before
    at = (tmp_path / "run" / "main.log").read_text().count("\n")
    while (tmp_path / "run" / "main.log").read_text().count("\n") < at + 3:
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 130


def test_simultaneous_starts_have_different_directories(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = [sys.executable, str(HERE / "train_gpt2.py"), "--data", "text.txt", *SMALL, "--val-every", "0"]
    processes = [subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert [LIB.gpt2_newest(str(tmp_path / "runs" / n)) for n in "12"] == [3, 3]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "numbered_runs", list)     # both looked before either created one
    assert train_gpt2.make_numbered_run() == [os.path.join("runs", "3")]


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


# --- Resuming -----------------------------------------------------------------------------------------------
QUIET = {"binary": "-v 0 -g 0", "driver": "--val-every 0 --sample-tokens 0"}


def damage(path):
    """Flips a bit."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def copy_of(whole_runs, front, folder):
    """A copy of a whole run, with checkpoints of steps 4 and 8."""
    shutil.copytree(whole_runs[front][1], folder)
    return folder


@pytest.mark.parametrize("name", ["model_00000008.bin", "state_00000008_00000.bin"])
@both_front_ends
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(data, whole_runs, tmp_path, front, name):
    whole = outputs(whole_runs[front][1])
    folder = copy_of(whole_runs, front, tmp_path / "run")
    damage(folder / name)
    done = run(*command(front, data, "", folder, resume=True))
    one_sentence(done.stderr, "step 4 is resumed instead of 8", name, "damaged")
    assert {n: c for n, c in outputs(folder).items() if n != "main.log"} == {
        n: c for n, c in whole.items() if n != "main.log"}
    for path in folder.glob("state_*"):
        path.unlink()
    done = run(*command(front, data, "", folder, resume=True), status=1)
    reports_error(done, "state_00000008_00000.bin", "No such file")     # of the newest


@both_front_ends
def test_a_finished_run_is_reported(data, whole_runs, tmp_path, front):
    folder = copy_of(whole_runs, front, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run(*command(front, data, "", folder, resume=True))
    is_finished = re.compile(r"^finished: .*|^\S+ is finished, .*", re.MULTILINE)
    lines = is_finished.findall(done.stdout)
    assert len(lines) == 1 and "8 steps" in lines[0] and "step 8/8" not in done.stdout
    assert ("train --init" if front == "driver" else "-e ") in lines[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    log = (folder / "main.log").read_text().splitlines()     # the last validation was interrupted
    (folder / "main.log").write_text("\n".join(log[:-1]) + "\n")
    assert not is_finished.search(run(*command(front, data, "", folder, resume=True)).stdout)
    assert outputs(folder)["main.log"] == before["main.log"]
    done = run(*command(front, data, steps_flag(front, 7), folder, resume=True), status=1)
    reports_error(done, "done 8 steps", steps_flag(front, 7).split()[0])


@pytest.mark.parametrize("then", list(FLAGS))
@both_front_ends
def test_a_changed_schedule_is_reported(data, whole_runs, tmp_path, front, then):
    """Both front ends report it in the other's runs too; linear from 1e-3 to 1e-4, two warm-up steps."""
    folder = copy_of(whole_runs, front, tmp_path / "run")
    flags = f"{steps_flag(then, 16)} {QUIET[then]}"
    shown = run(*command(then, data, flags, folder, resume=True)).stdout
    lines = [line for line in shown.splitlines() if re.match("lr: |learning rate:", line)]
    assert len(lines) == 1 and "2.50e-04 in step 8, 6.14e-04 in the next" in lines[0]
    assert "16 steps" in lines[0]
    damage(folder / "model_00000016.bin")    # unchanged from here on: nothing to report
    shown = run(*command(then, data, flags, folder, resume=True)).stdout
    assert not re.search("^(lr|learning rate):", shown, re.MULTILINE)


def test_the_driver_resumes_the_binarys_run_with_its_settings(data, whole_runs, tmp_path):
    settings = json.loads((whole_runs["binary"][1] / "run.json").read_text())
    others = {"model", "tokenizer", "patience", "encoding", "text_field", "document_separator", "jsonl",
              "minutes", "recompute", "master_weights"}
    assert set(settings) == {*train_gpt2.DEFAULTS, "val_shards"} - others
    by_driver = json.loads((whole_runs["driver"][1] / "run.json").read_text())
    others = {"data", "val_data", "init", *train_gpt2.SHAPE}
    assert [settings[name] for name in ("layers", "heads", "channels", "context")] == [2, 3, 39, 24]
    assert {name: settings[name] for name in {*settings} - others} == {
        name: by_driver[name] for name in {*settings} - others}
    for out in ("one", "two"):
        shutil.copytree(whole_runs["binary"][1], tmp_path / out)
    run(*command("binary", data, "-x 12 -l 2e-3", tmp_path / "one", resume=True))
    shown = driver("--resume", "--out", "two", "--steps", 12, "--lr", "2e-3", cwd=tmp_path).stdout
    assert "two, resumed at step 8" in shown
    ours, theirs = outputs(tmp_path / "two"), outputs(tmp_path / "one")
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def test_the_driver_resumes_the_binarys_run_of_unusual_paths(tmp_path):
    """Relative globs, special characters, no -j, and training shards with "val" in their names."""
    folder = tmp_path / 'a [b]*é"\\ \t'
    make_data(folder, GPT2Config(24, 97, 1, 1, 8))
    os.symlink("data", os.fsencode(folder) + b"/\xff")
    flags = "-o run -e model.bin -b 2 -t 8 -n 2 -v 0 -g 0 -l 1.2345e-3 -q 0.5"
    binary("-i", os.fsdecode(b"\xff/*.bin\n./data/val*"), *flags.split(), "-x", 2, cwd=folder)
    saved = train_gpt2.read_settings(str(folder / "run" / "run.json"))
    assert saved["val_data"] == [] and all(map(os.path.isabs, saved["data"]))
    assert saved["init"] == "model.bin" and saved["lr"] == 1.2345e-3
    shown = driver("--resume", "--out", "run", "--steps", 4, "--sample-tokens", 0, cwd=folder).stdout
    assert "data:   1,633 training tokens, no validation" in shown
    binary("-i", "data/*.bin", *flags.split(), "-x", 2, "-o", "new", "-e", "d2", "-d", 32, cwd=folder)
    assert train_gpt2.read_settings(str(folder / "new" / "run.json"))["init"] == "scratch"


@both_front_ends
def test_a_run_resumes_with_its_own_data_only(data, whole_runs, tmp_path, front):
    folder = copy_of(whole_runs, front, tmp_path / "run")
    for name in ("moved", "longer", "changed"):
        shutil.copytree(data / "data", tmp_path / name)
    shards(tmp_path / "longer", [1] * 501, [2] * 333)
    path = tmp_path / "changed" / "train_001.bin"
    tokens = path.read_bytes()
    path.write_bytes(tokens[:-2] + bytes([(tokens[-2] + 1) % V, 0]))
    os.utime(path, (1, 1))

    def resume(name, steps, status=0, **other):
        words = command(front, data, f"{steps_flag(front, steps)} {QUIET[front]}", folder, resume=True)
        for was in (str(data / "data"), str(tmp_path / "moved")):
            words = [word.replace(was, str(tmp_path / name)) for word in words]
        return run(*words, *other.get("extra", ()), status=status)

    for name, expected in (("longer", "834 tokens"), ("changed", "other tokens")):
        reports_error(resume(name, 10, 1), {"binary": "-i ", "driver": "--data "}[front], expected)
    assert "resumed" in resume("moved", 10).stdout
    if front == "driver":
        assert "resumed" in driver("--resume", "--out", folder, "--steps", 11).stdout
    flag, words = {"binary": ("-t", ("-d", 0)), "driver": ("--seq-len", ())}[front]
    reports_error(resume("moved", 12, 1, extra=(flag, 10, *words)), f"{flag} is 10, expected 19")


def test_data_of_a_run_that_keeps_its_tokens_is_not_read(trained, tmp_path):
    """A text that has moved is not needed; other data is rejected."""
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    driver("--resume", "--out", folder, "--steps", 4, "--sample-tokens", 0)
    done = driver("--resume", "--out", folder, "--steps", 5, "--data", "none.txt", status=1)
    reports_error(done, "text.txt", "other data", "--init")
    table = str(tmp_path / "tokenizer.bin")
    train_gpt2.Tokenizer([bytes([255 - value]) for value in range(256)], 0).save(table)
    done = driver("--resume", "--out", folder, "--tokenizer", table, status=1)
    reports_error(done, "another tokenizer than --tokenizer", table)


def test_derived_settings_are_not_treated_as_given(trained, tmp_path):
    """trained has batches of 2 x 16 tokens, 32 in all."""
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    resume = functools.partial(driver, "--resume", "--out", folder, "--sample-tokens", 0)
    saved = json.loads((folder / "run.json").read_text())
    assert "batch_size" in saved["given"] and "total_batch_size" not in saved["given"]
    shown = resume("--steps", 4, "--batch-size", 4).stdout
    assert "64 tokens per optimizer step" in shown and "instead of 32" in shown
    resume("--steps", 5, "--total-batch-size", 128)
    shown = resume("--steps", 6, "--batch-size", 2).stdout
    assert "of 128 tokens, in micro-batches of 2 x 16" in shown
    done = resume("--steps", 7, "--batch-size", 3, status=1)
    reports_error(done, "--total-batch-size is 128", "--batch-size")


def test_an_earlier_checkpoint_is_resumed(data, whole_runs, tmp_path):
    whole = outputs(whole_runs["driver"][1])
    folder = copy_of(whole_runs, "driver", tmp_path / "run")
    done = driver("--resume-step", 5, "--out", folder, status=1)
    reports_error(done, "--resume-step is 5", "checkpoint: 4, 8")
    reports_error(driver("--resume", "--checkpoint", 4, "--out", folder, status=1), "--resume-step")
    reports_error(driver("--checkpoint", 4, "--out", tmp_path / "new", status=1), "--checkpoint", "--init")
    shown = driver("--resume-step", 4, "--out", folder, "--steps", 5).stdout
    assert "resumed at step 4" in shown and "of the steps 8 are discarded" in shown
    assert LIB.gpt2_newest(str(folder)) == 5 and (folder / "model_00000008.bin").exists()
    driver("--resume-step", 4, "--out", folder, "--steps", 8)
    assert {name: outputs(folder)[name] for name in whole if name != "main.log"} == {
        name: whole[name] for name in whole if name != "main.log"}
    assert LIB.gpt2_newest(str(folder)) == 8


# --- Validation shards, the best model ----------------------------------------------------------------------
def test_a_deleted_validation_shard_is_reported(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    (tmp_path / "run" / "tokens" / "val_000000.bin").unlink()
    done = driver("--resume", "--out", "run", "--steps", 4, status=1, cwd=tmp_path)
    reports_error(done, "expected val_000000.bin", "restore")
    shutil.copytree(trained[1] / "tokens", tmp_path / "shards")
    (tmp_path / "shards" / "val_000000.bin").unlink()
    new = functools.partial(driver, *SMALL, "--sample-tokens", 0, "--out", "new", cwd=tmp_path)
    reports_error(new("--data", "shards", status=1), "shards", "val_000000.bin", "manifest.json")
    new("--data", "shards/train_*")


@both_front_ends
def test_a_deleted_validation_shard_of_a_binarys_run_is_reported(tmp_path, front):
    make_data(tmp_path, GPT2Config(24, V, 1, 1, 8))
    shutil.copy(tmp_path / "data" / "val_000.bin", tmp_path / "data" / "val_001.bin")
    words = ["-i", "data/train*", *"-o run -e model.bin -b 2 -t 8 -n 2 -g 0 -x".split()]
    binary(*words, 2, "-j", "data/val*", cwd=tmp_path)
    (tmp_path / "data" / "val_000.bin").unlink()
    if front == "driver":
        done = driver("--resume", "--out", "run", "--steps", 4, status=1, cwd=tmp_path)
        reports_error(done, "run has the validation shards val_001.bin, expected val_000.bin")
        driver("--resume", "--out", "run", "--steps", 4, "--val-data", "data/val*", cwd=tmp_path)
        return
    done = binary(*words, 4, "-j", "data/val*", "-y", 1, status=1, cwd=tmp_path)
    reports_error(done, "-j 'data/val*'", 'expected ["val_000.bin", "val_001.bin"]', "restore")
    binary(*words, 4, "-j", "data/val_001.bin", "-y", 1, cwd=tmp_path)


def test_commands_use_the_best_model_of_a_run(trained, tmp_path):
    """Which has the lowest validation loss; a damaged one falls back."""
    folder = tmp_path / "run"
    shutil.copytree(trained[1], folder)
    resume = functools.partial(driver, "--out", folder, *"--warmup 0 --steps 6 --sample-tokens 0".split())
    resume("--resume", "--lr", 1e-2)
    shutil.copy(folder / "best.bin", tmp_path / "best.bin")
    assert metrics(folder)[-1]["val_loss"] < 5.4
    resume("--resume-step", 3, "--lr", 1e-4)     # better than before, but worse than what is discarded
    assert 5.4 < metrics(folder)[-1]["val_loss"] < metrics(trained[1])[-1]["val_loss"]
    assert (folder / "best.bin").read_bytes() == (tmp_path / "best.bin").read_bytes()
    rows = [(row["step"], row["val_loss"]) for row in metrics(folder) if "val_loss" in row]
    step, loss = min(rows, key=lambda row: row[1])

    def used(command, *flags, status=0):
        return driver(command, folder, *flags, status=status).stderr.splitlines()

    report = f"model:  {folder}/best.bin, step {step}, validation loss {loss:.4f}"
    for command_, *flags in (("sample", "--tokens", 2), ("eval", "--data", folder / "tokens"),
                             ("export", "--format", "llmc", "--out", tmp_path / "out" / "model.bin")):
        assert used(command_, *flags)[0] == report
    assert (tmp_path / "out" / "model.bin").read_bytes() == (folder / "best.bin").read_bytes()
    sample = functools.partial(used, "sample", "--tokens", 2, "--checkpoint")
    assert sample("last")[0] == f"model:  {folder}/model_00000006.bin, step 6"
    assert sample("3")[0] == f"model:  {folder}/model_00000003.bin, step 3"
    one_sentence(sample("4", status=1)[0], "--checkpoint is 4", "3, 6")
    done = driver("sample", folder / "best.bin", "--checkpoint", "best", status=1)
    reports_error(done, "--checkpoint is for run directories")

    new = ("--init", folder, "--data", folder / "tokens", "--steps", 0, "--sample-tokens", 0, "--out")
    assert report in driver(*new, tmp_path / "new").stderr
    driver(*new, tmp_path / "last", "--checkpoint", "last")
    for name, other in (("new", "best.bin"), ("last", "model_00000006.bin")):
        assert (tmp_path / name / "model_00000000.bin").read_bytes() == (folder / other).read_bytes()

    damage(folder / "best.bin")
    damage(folder / "model_00000006.bin")
    lines = used("sample", "--tokens", 2)
    assert f"{folder}/model_00000003.bin is used instead of {folder}/best.bin" in lines[0]
    assert "is used instead of" in sample("last")[0] and "damaged" in sample("best", status=1)[0]
    (folder / "best.bin").unlink()
    one_sentence(sample("best", status=1)[0], "no best.bin", "--checkpoint last")


def test_a_new_run_removes_the_best_model_of_one_without_a_checkpoint(data, trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    (tmp_path / "run" / "DONE_00000003").unlink()
    (tmp_path / "run" / "tokenizer.bin").unlink()
    done = run(*command("binary", data, "", tmp_path / "run"), status=1)
    reports_error(done, "best.bin", "-y 1")
    driver("--data", trained[1] / "tokens", *SMALL, "--val-every", 0, "--sample-tokens", 0, "--out", "run",
           cwd=tmp_path)
    assert not (tmp_path / "run" / "best.bin").exists()


def test_the_command_to_train_on_improves_the_model(tmp_path):
    """Whether the run was of a text or fine-tuned itself."""
    (tmp_path / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    flags = SMALL[:SMALL.index("--batch-size")] + ["--batch-size", "8", "--steps", "100", "--val-every", "50"]
    shown, losses = driver("--data", "text.txt", *flags, cwd=tmp_path).stdout, []
    for n in "23":
        words = shlex.split(re.search("^train on: +python3 (.*)", shown, re.MULTILINE)[1])
        shown = run(sys.executable, *words, "--sample-tokens", 0, cwd=tmp_path).stdout
        losses += [[row["val_loss"] for row in metrics(tmp_path / "runs" / n) if "val_loss" in row]]
    assert losses[0][-1] < losses[0][0] - 0.1 and losses[1][-1] < losses[1][0]
    assert losses[1][0] == min(losses[0])    # it began with the best model, and validates as before
    first = [row["val_loss"] for row in metrics(tmp_path / "runs" / "1") if "val_loss" in row]
    assert losses[0][0] == min(first)
