"""Tests of both command lines: mistakes, help, and a run from text to text."""
import contextlib
import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

import train_gpt2
from conftest import (binary, command, damaged, driver, header, hellaswag_file, HERE, make_data,
                      one_sentence, REFERENCES, reports_error, run, shards, SMALL, TEXT, tokens_of, V)
from train_gpt2 import GPT2


# --- Mistakes on the command lines --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder with valid and invalid files."""
    folder = make_data(tmp_path_factory.mktemp("mistakes"))
    good = (folder / "model.bin").read_bytes()
    for name, contents in {"text.txt": b"To be, or not to be. " * 99, "empty.txt": b"",
                           "cut.bin": good[:-1], "version.bin": damaged(good, 1, 1)}.items():
        (folder / name).write_bytes(contents)
    (folder / "nothing").mkdir()
    for name, tokens in {"large": [V] * 200, "few": [1] * 16, "cut": [1] * 99, "table": [1] * 99}.items():
        shards(folder / name, tokens)
    shards(folder / "val", [1] * 99, name="val")
    os.truncate(folder / "cut" / "train_000.bin", 1100)
    (folder / "table" / "tokenizer.bin").write_bytes(header(20240328, 2, V, 0) + b"\x05abc")
    driver(*"--data data --init model.bin --steps 2 --batch-size 2 --seq-len 8 --out run".split(), cwd=folder)
    shutil.copytree(folder / "run", folder / "unreadable")
    (folder / "unreadable" / "run.json").write_text("{not json")
    return folder


def cases(status, table):
    """The mistakes of a table. The message contains the words after =>, else the last word."""
    lines = [line.partition(" => ") for line in re.split(r" *[|\n] *", table.strip())]
    return [pytest.param(words, status, expected or re.split("[ /]", words)[-1], id=words)
            for words, _, expected in lines]


@pytest.mark.parametrize("flags, status, expected", cases(2, """
    -zz 1 => -zz is not a flag | b 2 => b is not a flag | -b => -b needs a value | -b x | -b 2x | -b 2.5
    -b 0 | -b -3 | -b nan | -b inf | -b 1e300 | -l x | -l -1 | -x -2 | -d 17 | -d 8 => multiple | -k foo
    -n 1 => -o | -y 1 => -o""") + cases(1, """
    -e d5 | -e {f}/none.bin | -e {f}/text.txt | -e {f}/cut.bin | -e {f}/version.bin | -e {f} => regular file
    -e {f}/data/val_000.bin | -i {f}/none*.bin | -i {f}/text.txt | -i {f}/large/train_000.bin
    -i {f}/cut/train_000.bin | -i {f}/few/* => 16 tokens | -i {f}/table/train* => tokenizer.bin
    -j {f}/none*.bin | -j {f}/large/train_000.bin | -t 25 | -o {f}/text.txt | -o {f}/text.txt/run
    -l 1e10 -x 9 => diverged | --check {f}/none.bin | --check {f}/text.txt
    --check {r}/tiny_reference.bin"""))
def test_the_binary_reports_a_mistake_in_one_sentence(mistakes, flags, status, expected):
    base = "-e {f}/model.bin -i {f}/data/train*.bin -j {f}/data/val*.bin -b 2 -t 8 -x 2 -g 0 "
    words = [word.format(f=mistakes, r=REFERENCES) for word in (base + flags).split()]
    reports_error(binary(*words, status=status), expected)


NEW_RUN = ("--data {f}/data --init {f}/model.bin --batch-size 2 --seq-len 8 --steps 2 --sample-tokens 0"
           " --out {t}/run ")


@pytest.mark.parametrize("words, status, expected", cases(2, """
    --steps -1 | --steps x | --steps 2.5 | --steps => --steps | --lr nan | --batch-size 0 | --final-lr-frac 2
    --unknown 1 => --unknown | --stepz 9 => --steps | sampel => sample | --model d5 | --schedule foo
    --tokenizer foo
    sample {f}/model.bin --tokens x | sample {f}/model.bin --temperature -1 | prepare {f}/text.txt => --out
    prepare {f}/text.txt --out {t} --val-fraction 2 | check => REFERENCE""") + cases(1, """
    --data {f}/none.txt | --data {f}/nothing | --init scratch --data {f}/empty.txt | --data {f}/val
    --data {f}/few => 16 tokens | --data {f}/cut => train_000.bin | --data {f}/large => train_000.bin
    --data {f}/table => tokenizer.bin | --data {f}/text.txt => vocabulary of 97 | --val-data {f}/none*.bin
    --data {f}/text.txt --val-data {f}/val/* => --val-data | --seq-len 25 | --total-batch-size 17
    --layers 3 => --layers | --model d2 => --model | --init {f}/none.bin | --init {f}/text.txt
    --init {f} => neither | --init {f}/cut.bin | --init scratch --heads 5
    --init scratch --heads 1 --channels 99999
    --init scratch --heads 1 --channels 65536 --layers 4096 => memory
    --out {f}/text.txt | --out {f}/run => --resume | --lr 1e30 --steps 9 => diverged
    --resume => no run | --resume --out {f}/nothing
    --resume --out {f}/run --steps 4 --data {f}/few => other data
    --resume --out {f}/run --seed 1 => seed | --resume --out {f}/run --seq-len 4 => expected 8
    --resume --out {f}/run --steps 1 => --steps 1 | --resume --out {f}/unreadable => run.json
    sample => no run | sample {f}/nothing | sample {f}/none.bin | sample {f}/text.txt
    prepare {f}/none.txt --out {t}/out => none.txt | prepare {f}/nothing --out {t}/out => nothing
    prepare {f}/text.txt --out {f}/text.txt | check {f}/none_reference.bin => none_model.bin
    check {f}/text.txt => --model | check {f}/text.txt --model {r}/odd_model.bin => text.txt
    check {r}/tiny_reference.bin --model {r}/odd_model.bin => tiny_reference.bin
    plot {f}/none | plot {f}/nothing => no losses | plot {f}/empty.txt => no losses | plot {f}/text.txt
    plot {f}/run {f}/model.bin => model.bin | plot {f}/run --out {f}/nothing"""))
def test_the_driver_reports_a_mistake_in_one_sentence(mistakes, tmp_path, words, status, expected):
    if words.startswith("--") and "--resume" not in words:
        base = NEW_RUN
        if words.startswith("--data"):       # which would add to the shards
            base = NEW_RUN.replace("--data {f}/data ", "")
        words = base + words
    words = [word.format(f=mistakes, t=tmp_path, r=REFERENCES) for word in words.split()]
    reports_error(driver(*words, status=status, cwd=tmp_path), expected)


def test_a_missing_or_invalid_library_is_reported(mistakes):
    for name in ("none.so", "text.txt"):
        done = driver("sample", status=1, GPT2_LIBRARY=str(mistakes / name))
        reports_error(done, name, "run `make`")


def test_flags_for_gpus_get_a_notice(data):
    done = run(*command("binary", data, "-x 1 -n 0 -f 1 -w 1 -ge 0 -z 1 -r 0 -lg 7"))
    for flag, notice in zip("-f -w -ge -z -r -lg".split(), done.stderr.splitlines()):
        one_sentence(notice, flag)
    assert "step 1/1" in done.stdout and len(done.stderr.splitlines()) == 6


def test_the_binary_evaluates_hellaswag(data, tmp_path):
    words = command("binary", data, "-x 1 -n 0 -h 1")
    reports_error(run(*words, status=2, cwd=tmp_path), "fetch.py hellaswag")
    folder = tmp_path / "dev" / "data" / "hellaswag"
    folder.mkdir(parents=True)
    model = GPT2.load(data / "model.bin")
    hellaswag_file(folder / "hellaswag_val.bin", model.config.V, 40, longest=9)
    by_sum, by_length, _ = model.hellaswag(folder / "hellaswag_val.bin", 0, 30)
    done = run(*command("binary", data, "-x 1 -n 0 -v 1 -h 30", out=tmp_path / "run"), cwd=tmp_path)
    expected = f"HellaSwag accuracy {by_sum / 30:.4f}, by the mean over tokens {by_length / 30:.4f}\n"
    assert expected in done.stdout
    assert f"s:0 eval:{by_length / 30:.4f}\n" in (tmp_path / "run" / "main.log").read_text()


def test_help_lists_every_flag():
    shown = binary("--help").stdout
    flags = ("-i -j -e -o -n -nk -nm -y -b -t -d -x -k -l -u -q -c -sl -sg -sn -v -m -s -g -h -a --check"
             " --tolerance").split()
    assert [flag for flag in flags if f"\n  {flag} " not in shown] == []
    assert all(name in driver("--help").stdout for name in ("train", "sample", "prepare", "plot", "check"))
    shown = driver("train", "--help").stdout
    assert [name for name in train_gpt2.DEFAULTS if f"--{name.replace('_', '-')} " not in shown] == []


# --- The driver: text in, text out --------------------------------------------------------------------------
def test_a_run_directory_is_complete(trained):
    shown, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "DONE_00000003", "best.bin", "loss.html", "loss.svg", "main.log", "metrics.jsonl",
        "model_00000003.bin", "run.json", "state_00000003_00000.bin", "tokenizer.bin", "tokens"]
    settings = json.loads((folder / "run.json").read_text())
    assert set(settings) == {*train_gpt2.DEFAULTS, "given", "val_shards"}
    assert (settings["channels"], settings["steps"], settings["seed"]) == (16, 3, 42)
    table = header(20240328, 2, 256, 0) + b"".join(bytes([1, value]) for value in range(256))
    assert (folder / "tokenizer.bin").read_bytes() == table
    train, val = (tokens_of(folder / "tokens" / f"{split}_000000.bin") for split in ("train", "val"))
    assert bytes(train + val) == TEXT.encode() and len(val) == pytest.approx(0.1 * len(train + val), abs=3)
    said = ("a sample", "validation loss", "sample runs/1", "train --init runs/1")
    assert [words for words in said if words not in shown] == []


def test_a_new_run_encodes_its_text_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 900)
    driver("prepare", "a.txt", "--out", "run/tokens", cwd=tmp_path)     # left by a failed attempt
    driver("--data", "b.txt", "--out", "run", *SMALL, cwd=tmp_path)
    assert set(tokens_of(tmp_path / "run" / "tokens" / "train_000000.bin")) == {ord("b")}
    made = (tmp_path / "run" / "tokens" / "manifest.json").stat().st_mtime_ns
    driver("--resume", "--out", "run", "--steps", 4, cwd=tmp_path)
    assert (tmp_path / "run" / "tokens" / "manifest.json").stat().st_mtime_ns == made


def test_sample_generates_text(trained):
    _, folder = trained
    first, again, other, coldest = (
        driver("sample", *flags.split(), "--prompt", "ROMEO:", cwd=folder.parents[1]).stdout
        for flags in ("", "runs/1 --seed 42", "--seed 3", "--temperature 0 --tokens 9"))
    assert first == again != other and first.startswith("ROMEO:")
    expected = bytes(GPT2.load(folder / "model_00000003.bin").generate(list(b"ROMEO:"), 9, temperature=0))
    assert coldest == "ROMEO:" + expected.decode(errors="replace") + "\n"


def test_a_terminal_shows_a_live_line(trained, tmp_path):
    ours, expected = pty.openpty()
    words = [sys.executable, HERE / "train_gpt2.py", "--data", trained[1].parents[1] / "text.txt", *SMALL]
    process = subprocess.Popen([str(word) for word in words], stdout=expected, cwd=tmp_path)
    os.close(expected)
    shown = b""
    with contextlib.suppress(OSError):     # end of input at a terminal
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    assert process.wait(timeout=60) == 0 and re.search(rb"\rstep 3/3 \| .*\x1b\[K", shown)


@pytest.mark.parametrize("fraction, size", [(0.1, 100), (0.5, 1000), (0.97, 50)])
def test_prepare_takes_files_and_folders(tmp_path, fraction, size):
    (tmp_path / "texts").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000099.bin").write_bytes(b"of an earlier time")
    texts = {"texts/a.txt": "–" * 50, "texts/b.txt": "second\n" * 20, "c.text": "third"}
    for name, text in {**texts, "texts/other.html": "not this one"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    driver("prepare", "texts", "c.text", "--out", "out", "--val-fraction", fraction, "--shard-tokens", size,
           cwd=tmp_path)
    train, val = ([tokens_of(path) for path in sorted((tmp_path / "out").glob(f"{split}_*.bin"))]
                  for split in ("train", "val"))
    expected = [byte for text in texts.values() for byte in [0, *text.encode()]]     # after end-of-text
    assert sum(train + val, []) == expected
    assert all(len(shard) == size for split in (train, val) for shard in split[:-1])
    assert sum(map(len, val)) == pytest.approx(fraction * len(expected), abs=4)
    assert val[0][0] & 0xC0 != 0x80  # no character is split


def test_gpt2s_tokenizer_needs_tiktoken(tmp_path):
    (tmp_path / "text.txt").write_text("abc" * 20)
    (tmp_path / "tiktoken.py").write_text(
        "class Encoding:\n"
        "    decode_single_token_bytes = staticmethod(lambda i: b'<%d>' % i)\n"
        "    encode_ordinary = staticmethod(lambda text: [50000 + ord(letter) for letter in text])\n"
        "get_encoding = {'gpt2': Encoding()}.get\n")
    prepare = functools.partial(driver, *"prepare text.txt --tokenizer gpt2 --out out".split(), cwd=tmp_path,
                                PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    prepare()
    assert set(tokens_of(tmp_path / "out" / "train_000000.bin")) == {50097, 50098, 50099}
    table = (tmp_path / "out" / "tokenizer.bin").read_bytes()
    assert table[:1028] == header(20240328, 2, 50257, 50256) + b"\x03<0>"
    (tmp_path / "tiktoken.py").write_text("raise ImportError")
    reports_error(prepare(status=1), "pip install tiktoken", "--tokenizer bytes")
    (tmp_path / "tiktoken.py").write_text("def get_encoding(name):\n    raise RuntimeError('no\\nroute')")
    reports_error(prepare(status=1), "network", "dev/data/gpt2_vocab.py", "--tokenizer bytes")


def test_the_binary_prints_text_where_there_is_a_tokenizer(tmp_path):
    make_data(tmp_path)
    pieces = b"".join(bytes([len(piece)]) + piece for piece in (b"<%d>" % i for i in range(V)))
    (tmp_path / "data" / "tokenizer.bin").write_bytes(header(20240328, 2, V, 5) + pieces)
    shown = run(*command("binary", tmp_path, "-x 1 -n 0")).stdout
    assert re.search(r"^---\n(<\d+>){7}\n---$", shown, re.M)
