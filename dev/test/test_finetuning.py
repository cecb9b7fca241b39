"""Tests of fine-tuning."""
import functools
import json
import shutil

import pytest

import train_gpt2
from conftest import curves, driver, LIB, metrics, reports_error, TEXT, tokens_of
from train_gpt2 import GPT2, GPT2Config, Loader


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a text and a byte-level model."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    GPT2(GPT2Config(32, 256, 1, 1, 48), seed=1).save(folder / "model.bin")
    return folder


def tune(base, out, flags):
    """Fine-tunes a model on a text; returns the output, the settings and the run directory."""
    shown = driver("--init", "model.bin", "--data", "text.txt", "--out", out, *flags.split(), cwd=base).stdout
    return shown, json.loads((base / out / "run.json").read_text()), base / out


def test_fine_tuning_settings_follow_from_model_and_text(base):
    shown, s, folder = tune(base, "fits", "--sample-tokens 5")
    tokens = len(tokens_of(folder / "tokens" / "train_000000.bin"))
    assert (s["seq_len"], s["batch_size"], s["total_batch_size"]) == (32, 32, 1024)
    assert s["steps"] == max(50, 2 * tokens // 1024) and s["val_every"] == s["steps"] // 10
    assert s["lr"] == pytest.approx(3e-5 * 768 / 48, rel=0.05) and 0 < s["warmup"] < s["steps"] / 5
    assert s["patience"] > 0 and "tuning: " in shown and "best validation loss" in shown
    losses = [row["val_loss"] for row in metrics(folder) if "val_loss" in row]
    assert len(losses) == 11 and losses[-1] < losses[0] - 0.1


def test_fine_tuning_keeps_given_settings(base):
    flags = "--lr 0.5 --steps 2 --seq-len 8 --total-batch-size 64 --batch-size 4 --patience 0 --val-batches 1"
    _, s, _ = tune(base, "given", flags)
    assert f"--lr {s['lr']} --steps {s['steps']} --seq-len {s['seq_len']}" in flags
    assert (s["total_batch_size"], s["batch_size"], s["patience"], s["val_batches"]) == (64, 4, 0, 1)


def test_fine_tuning_accepts_a_few_lines(base):
    (base / "poem.txt").write_text(TEXT[:300], encoding="utf-8")
    driver(*"--init model.bin --data poem.txt --out poem --steps 2 --sample-tokens 0".split(), cwd=base)


def test_fine_tuning_rejects_another_tokenizer(base, tmp_path):
    pieces = [bytes([value]) for value in range(256)]
    train_gpt2.Tokenizer(pieces[::-1], 0).save(str(tmp_path / "tokenizer.bin"))
    shutil.copy(base / "model.bin", tmp_path)
    GPT2(GPT2Config(32, 97, 1, 1, 48)).save(tmp_path / "other.bin")
    for name, flags, expected in (("model.bin", (), "tokenizer.bin can only decode its 256 tokens"),
                                  ("model.bin", ("--tokenizer", "bytes"), "model.bin differ, expected"),
                                  ("other.bin", (), "256 tokens, expected at most")):
        words = ("--init", name, "--data", base / "text.txt", "--out", "run", *flags)
        reports_error(driver(*words, status=1, cwd=tmp_path), "tokenizer", expected)


def test_patience_stops_a_run_early(base):
    shown, _, folder = tune(base, "patient", "--lr 0 --steps 100 --val-every 2 --patience 3")
    assert "stopped early" in shown and LIB.gpt2_newest(str(folder)) == 6
    assert [row["step"] for row in metrics(folder) if "val_loss" in row] == [0, 2, 4, 6]
    assert (folder / "best.bin").read_bytes() == (base / "model.bin").read_bytes()
    resume = functools.partial(driver, "--resume", "--out", folder)
    assert "stopped early" in resume().stdout and LIB.gpt2_newest(str(folder)) == 6
    shown = resume("--patience", 0, "--steps", 9, "--sample-tokens", 0).stdout
    assert "at step 0 " in shown and LIB.gpt2_newest(str(folder)) == 9


def test_the_best_model_survives_resuming(base):
    flags = ("--lr 50 --schedule constant --warmup 1000 --steps 12 --val-every 2 --patience 0"
             " --sample-tokens 0 --checkpoint-every 4 --keep ")
    _, s, whole = tune(base, "whole", flags + "1")
    _, _, parts = tune(base, "parts", flags + "0")
    rows = {row["step"]: row["val_loss"] for row in metrics(whole) if "val_loss" in row}
    step = min(rows, key=rows.get)
    assert step == 2 and LIB.gpt2_newest(str(whole)) == 12     # first improves, then gets worse
    for later in (8, 12):
        (parts / f"DONE_{later:08}").unlink()
    assert "resumed at step 4" in driver("--resume", "--out", parts, "--patience", 2).stdout
    assert LIB.gpt2_newest(str(parts)) == 6     # earlier validations beyond step 4 do not count
    shown = driver("--resume", "--out", parts, "--patience", 0).stdout
    assert f"{rows[2]:.4f} at step 2 ({parts}/best.bin)" in shown
    uninterrupted, resumed = (curves.read_curves(str(folder)) for folder in (whole, parts))
    assert all(resumed[name] == uninterrupted[name] for name in ("loss", "val_loss", "lr", "norm"))
    assert len(metrics(parts)) > len(metrics(whole))
    for folder in (whole, parts):
        model = GPT2.load(folder / "best.bin")
        loader = Loader(str(folder / "tokens" / "val_*.bin"), s["batch_size"], s["seq_len"], 256)
        assert model.evaluate(loader, s["val_batches"]) == rows[2]
    assert driver("sample", parts / "best.bin", "--tokens", 5).stdout.strip()
