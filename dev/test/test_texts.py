"""Tests of what data arguments mean, of reading texts, and of small texts."""
import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

import train_gpt2
from conftest import (driver, header, HERE, json_lines, one_sentence, prepare, rejects, reports_error, run,
                      shards, SMALL, TEXT, tokens_of)
from train_gpt2 import find_data, Loader

NO_SAMPLE = ("--sample-tokens", 0)


def text_of(folder):
    """The bytes in the shards of a folder, training and then validation."""
    return b"".join(bytes(tokens_of(path)) for split in ("train", "val")
                    for path in sorted(folder.glob(f"{split}_*.bin")))


def write(folder, files):
    for name, contents in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, str):
            contents = contents.encode()
        (folder / name).write_bytes(contents)


def reads(folder, *words, expected):
    """prepare reads this text."""
    done = prepare(*words, cwd=folder)
    assert text_of(folder / "out") == expected
    return done


# --- What data arguments mean -------------------------------------------------------------------------------
def test_all_commands_take_several_data_arguments(tmp_path, byte_model):
    """Files, folders, globs that the shell or the driver expands, repeated flags."""
    write(tmp_path, {"a.txt": "a" * 80, "b.txt": "b" * 80, "more/c.md": "c" * 80, "d.log": "d" * 80})
    both = b"\0" + b"a" * 80 + b"\0" + b"b" * 80
    for words in (["a.txt", "b.txt"], ["*.txt"], ["[ab].txt", "a.txt"]):
        reads(tmp_path, *words, expected=both)
    reads(tmp_path, "more", "d.*", expected=b"\0" + b"c" * 80 + b"\0" + b"d" * 80)
    for n, words in enumerate((["--data", "a.txt", "b.txt"], ["--data", "a.txt", "--data", "b.txt"],
                               ["--data", "?.txt"])):
        driver(*words, "--out", f"run{n}", *SMALL, *NO_SAMPLE, cwd=tmp_path)
        assert text_of(tmp_path / f"run{n}" / "tokens") == both
        shown = driver("eval", byte_model[1], *words, cwd=tmp_path).stdout
        assert "over 159 bytes" in shown     # 10 sequences of 16 tokens, one of which is end-of-text
    saved = json.loads((tmp_path / "run0" / "run.json").read_text())
    assert saved["data"] == [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    resume = ("--resume", "--out", "run0", "--steps", 4, *NO_SAMPLE)
    reports_error(driver(*resume, "--data", "a.txt", status=1, cwd=tmp_path), "a.txt", "b.txt", "other data")
    driver(*resume, "--data", "a.txt", "--data", "b.txt", cwd=tmp_path)


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    """Its run.json has one path, not a list. A resumed run does not read its text again."""
    write(tmp_path, {"a.txt": TEXT})
    driver("--data", "a.txt", "--out", "run", *SMALL, *NO_SAMPLE, cwd=tmp_path)
    path = tmp_path / "run" / "run.json"
    saved = json.loads(path.read_text())
    for name in ("encoding", "text_field", "document_separator", "jsonl"):
        del saved[name]
    path.write_text(json.dumps({**saved, "data": saved["data"][0]}))
    os.remove(tmp_path / "a.txt")
    (tmp_path / "a.txt").symlink_to("run/tokens/train_000000.bin")     # a shard now
    driver("--resume", "--out", "run", "--steps", 4, cwd=tmp_path)
    assert json.loads(path.read_text())["data"] == saved["data"]


def test_pipes_are_texts_for_all_commands(tmp_path, byte_model):
    write(tmp_path, {"a.txt": TEXT, "b.txt": TEXT[::-1]})
    command = f"{sys.executable} {HERE}/train_gpt2.py"
    both = b"\0" + TEXT.encode() + b"\0" + TEXT[::-1].encode()
    for words, expected in (("<(cat a.txt) <(gzip -c b.txt)", both), ("- < a.txt", TEXT.encode()),
                            ("- b.txt < a.txt", both), ("/dev/stdin < a.txt", TEXT.encode())):
        run("bash", "-c", f"{command} prepare --out out {words}", cwd=tmp_path)
        assert text_of(tmp_path / "out") == expected
    run("bash", "-c", f"{command} --out run --sample-tokens 0 {' '.join(SMALL)} --data <(cat a.txt) b.txt",
        cwd=tmp_path)
    assert text_of(tmp_path / "run" / "tokens") == both
    driver("--resume", "--out", "run", "--steps", 4, cwd=tmp_path)     # the pipe is gone
    shown = run("bash", "-c", f"{command} eval {byte_model[1]} --data - < a.txt", cwd=tmp_path).stdout
    assert shown == driver("eval", byte_model[1], "--data", "a.txt", cwd=tmp_path).stdout
    os.mkfifo(tmp_path / "fifo")
    threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(b"abcdef",), daemon=True).start()
    reads(tmp_path, "fifo", expected=b"abcdef")


@pytest.mark.parametrize("command", ["--out run --data", "prepare --out out", "eval {model} --data"])
@pytest.mark.parametrize("words, expected", [
    ([""], ["''", "file"]), (["https://example.com/a.txt"], ["URL", "download it first"]),
    (["s3://b/*.txt"], ["URL"]), (["none*.txt"], ["none*.txt", "matches no file"]),
    (["none.txt"], ["none.txt"]),
    (["a.txt", "shards"], ["train_000.bin", "a.txt", "only shards or only texts"]),
    (["nanogpt"], ["train.bin", "--raw-uint16"]), (["nanogpt/train.bin"], ["train.bin", "--raw-uint16"]),
    (["run"], ["run", "run directory"]), (["model.bin"], ["model.bin", "GPT-2 model"])])
def test_wrong_data_arguments_are_reported(tmp_path, byte_model, command, words, expected):
    write(tmp_path, {"a.txt": TEXT, "nanogpt/train.bin": b"\1\0" * 50, "run/run.json": "{}"})
    shards(tmp_path / "shards", range(99))
    flags = command.format(model=byte_model[1]).split()
    before = sorted(os.listdir(tmp_path))
    reports_error(driver(*flags, *words, status=1, cwd=tmp_path), *expected)
    assert sorted(os.listdir(tmp_path)) == before


def test_folders_are_read_recursively_without_what_is_no_text(tmp_path):
    """Names in any case, links but no loops; not hidden files, runs, token folders or other types."""
    texts = {"top/a.TXT": "a", "top/b.md": "b", "top/c/d/e.Markdown.gz": gzip.compress(b"e"),
             "top/f.rst": "f", "top/g.text": "g", "top/h.JSONL": json_lines("h"), "elsewhere/i.txt": "i"}
    others = {"top/.ipynb_checkpoints/a.txt": "x", "top/.git/b.txt": "x", "top/.hidden.txt": "x",
              "top/runs/1/metrics.jsonl": "x", "top/runs/1/tokens/c.txt": "x", "top/old/main.log": "x",
              "top/old/d.txt": "x", "top/saved/DONE_00000003": "", "top/saved/e.txt": "x",
              "top/p.pdf": "%PDF-", "top/q.PDF": "%PDF-", "top/r.bin": b"\x80\4", "top/noname": "x"}
    write(tmp_path, {**texts, **others, "top/encoded/note.txt": "x"})
    shards(tmp_path / "top" / "encoded", range(9))
    (tmp_path / "top" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "top" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "c" / "loop").symlink_to("..")
    (tmp_path / "top" / "again.txt").symlink_to("a.TXT")     # the same text
    done = reads(tmp_path, "top", "elsewhere/i.txt", expected=b"\0a\0b\0e\0f\0g\0h\0i")
    [line] = [line for line in done.stdout.splitlines() if "skipped" in line]
    for words in ("2 .pdf", "1 .bin", "3 hidden", "3 run directories", "1 shard folder",
                  "1 without extension"):
        assert words in line
    sources = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert len(sources) == 7 and "top/link/i.txt" in sources
    assert find_data([str(tmp_path / "top")]).shards == []     # for all its .bin file
    reports_error(prepare("top/old/..", "top/.git", "top/saved", status=1, cwd=tmp_path), "run directory")
    write(tmp_path, {"other/a.pdf": "%PDF-", "other/b.docx": "PK"})
    reports_error(prepare("other", status=1, cwd=tmp_path), "other", "no text", "1 .pdf", "1 .docx")


def test_training_twice_on_the_working_directory(tmp_path):
    write(tmp_path, {"a.txt": TEXT})
    for n in "12":
        driver("--data", ".", *SMALL, *NO_SAMPLE, cwd=tmp_path)
        assert text_of(tmp_path / "runs" / n / "tokens") == TEXT.encode()


def test_shards_are_found_by_their_contents(tmp_path, byte_model):
    """Any number of folders and files of shards, with names that no glob separates; a table is no shard."""
    draw = [n % 256 for n in range(400)]
    pieces = b"".join(bytes([1, n]) for n in range(256))
    write(tmp_path, {"tokenizer.bin": header(20240328, 2, 256, 0) + pieces})
    for name in ("a[1]/x", "a[1]/back\\slash", "b/interval", "b/y"):
        shards((tmp_path / name).parent, draw, name=(tmp_path / name).name)
    os.rename(tmp_path / "b" / "y_000.bin", tmp_path / "b" / "new\nline.shard")
    driver("--data", "a[1]", "b/new\nline.shard", "b/interval_000.bin", "tokenizer.bin", "--out", "run",
           "--init", byte_model[1], *SMALL[8:], *NO_SAMPLE, cwd=tmp_path)
    log = (tmp_path / "run" / "main.log").read_text()
    assert "trl" in log and "tel" in log     # "interval" has val in its name
    found = find_data([str(tmp_path / "a[1]"), str(tmp_path / "b" / "*")]).shards
    train, val = train_gpt2.split_shards(found)
    names = [os.path.basename(path) for path in train]
    assert names == ["back\\slash_000.bin", "x_000.bin", "new\nline.shard"]
    assert Loader(train_gpt2.exact_globs(train), 1, 8, 256).tokens == 1200
    shown = driver("eval", byte_model[1], "--data", "b", "a[1]", cwd=tmp_path).stdout
    assert "over 384 tokens" in shown        # of folders the validation shards


def test_a_loader_takes_several_globs(tmp_path):
    """In order of names, each file once."""
    for folder, first in (("b", 50), ("a", 10)):
        shards(tmp_path / folder, range(first, first + 5), range(first + 20, first + 25))
    globs = [str(tmp_path / name) for name in ("b/*", "a/*1.bin", "?/train_001.bin")]
    loader = Loader("\n".join(globs), 1, 4, 99)
    assert (loader.shards, loader.tokens) == (3, 15)
    assert [loader.next()[0][0][0] for _ in range(4)] == [30, 50, 70, 30]
    with rejects("none*"):
        Loader("\n".join([*globs, str(tmp_path / "none*")]), 1, 4, 99)
    with rejects("no token shards"):
        Loader("\n\n", 1, 4, 99)


# --- What is not a text -------------------------------------------------------------------------------------
def archive(kind):
    """A zip or tar archive in memory."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("mimetype", "application/epub+zip")
    else:
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


BINARY_FILES = {
    "zip": archive("zip"), "tar": archive("tar"), "xz": lzma.compress(b"text"),
    "bzip2": bz2.compress(b"text"), "pickle": pickle.dumps(["text"]), "SQLite": b"SQLite format 3\0\4",
    "zstd": b"\x28\xb5\x2f\xfd\4text", "7z": b"7z\xbc\xaf\x27\x1c\0\4", "rar": b"Rar!\x1a\7\1text",
    "Parquet": b"PAR1\x15\4\x15\x10", "Arrow": b"ARROW1\0\0", "PDF": b"%PDF-1.7\nx",
    "image": b"\x89PNG\r\n\x1a\nx", "NumPy": b"\x93NUMPY\1text", "ELF": b"\x7fELF\2\1\1",
    "an image": b"\xff\xd8\xff\xe0JFIF", "audio": b"ID3\3text", "a video": b"\0\0\0\x18ftypmp42",
    "safetensors": struct.pack("<Q", 20) + b'{"__metadata__": {}}', "GGUF": b"GGUF\3\0\0\0",
    "GPT-2 model": header(20240326, 3), "reference": header(20240327), "table": header(20240328),
    "token shard": header(20240520, 1, 0), "multiple-choice": header(20240522), "state": header(20260601),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n",
    "web page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "HTML": b"<HTML lang=en>",
    "NUL at offset 3": b"abc\0def", "gzip data in gzip data": gzip.compress(gzip.compress(b"text")),
}


@pytest.mark.parametrize("kind", BINARY_FILES)
def test_what_is_not_a_text_is_rejected_by_its_type(tmp_path, kind):
    """Under a text's name, named or in a folder, compressed, from stdin, in JSON lines."""
    write(tmp_path, {"in/a.txt": TEXT, "in/b.txt": BINARY_FILES[kind],
                     "b.md.gz": gzip.compress(BINARY_FILES[kind]), "b.jsonl": BINARY_FILES[kind]})
    for words in ("in", "in/b.txt", "b.md.gz", "b.jsonl"):
        reports_error(prepare(words, status=1, cwd=tmp_path), "b.", kind)
    assert text_of(tmp_path / "out") == b""
    done = subprocess.run([sys.executable, HERE / "train_gpt2.py", "prepare", "-", "--out", "out"],
                          cwd=tmp_path, input=BINARY_FILES[kind], capture_output=True)
    assert done.returncode == 1
    one_sentence(done.stderr.decode(), "train_gpt2.py: -", kind)


def test_texts_that_resemble_other_types_are_read(tmp_path):
    """HTML under its own name, gzip under a text's, words that begin as a binary file does."""
    texts = {"a.html": b"<!doctype html>x", "b.txt": b"BM, the PNG and PK of GGUF", "f.txt": b"MThd, RIFF",
             "c.txt": b"GGUF is a format", "d.txt": b"[Verse 1]\nBZh9", "e.dat": b"ID3, Rar! <html>",
             "g": b"{x: 1}"}
    for name, contents in texts.items():
        write(tmp_path, {name: contents, "z.txt": gzip.compress(contents)})
        reads(tmp_path, name, "--val-fraction", 0, expected=contents)
    reads(tmp_path, "z.txt", expected=contents)


# --- Encodings ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mark, encoding", [
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")])
def test_a_byte_order_mark_decides(tmp_path, mark, encoding):
    """In plain texts, JSON lines and their texts, compressed or not."""
    text = "Wörter – 語\n" * 9000            # longer than a block of the reader
    lines = json_lines("\ufeffWörter", text)
    write(tmp_path, {"a.txt": mark + text.encode(encoding), "b.jsonl": mark + lines.encode(encoding)})
    write(tmp_path, {"c.txt": gzip.compress((tmp_path / "a.txt").read_bytes())})
    for name in ("a.txt", "c.txt"):
        reads(tmp_path, name, expected=text.encode())
        reads(tmp_path, name, "--encoding", "latin-1", expected=text.encode())
    reads(tmp_path, "b.jsonl", expected=b"\0" + "Wörter".encode() + b"\0" + text.encode())


def test_encodings_are_named_by_a_flag(tmp_path, byte_model):
    text = "Wörter, naïve Väter.\n" * 99
    write(tmp_path, {"a.txt": text.encode("latin-1"), "b.txt": text.encode("utf-16-le"), "c.txt": text,
                     "d.jsonl": json.dumps({"text": text}, ensure_ascii=False).encode("cp1252")})
    for name, encoding in (("a.txt", "latin-1"), ("a.txt", "CP1252"), ("b.txt", "utf-16-le")):
        reads(tmp_path, name, "--encoding", encoding, expected=text.encode())
    reads(tmp_path, "d.jsonl", "--encoding", "cp1252", expected=b"\0" + text.encode())
    driver("--data", "a.txt", "--encoding", "latin-1", "--out", "run", *SMALL, *NO_SAMPLE, cwd=tmp_path)
    assert text_of(tmp_path / "run" / "tokens") == text.encode()
    shown = driver("eval", byte_model[1], "--data", "a.txt", "--encoding", "latin-1", cwd=tmp_path).stdout
    assert shown == driver("eval", byte_model[1], "--data", "c.txt", cwd=tmp_path).stdout
    reports_error(prepare("b.txt", status=1, cwd=tmp_path), "b.txt", "NUL at offset 1, line 1",
                  "--encoding utf-16")
    for encoding in ("nonsense", "rot13", "hex", "undefined", ""):
        done = prepare("a.txt", "--encoding", encoding, status=1, cwd=tmp_path)
        reports_error(done, f"{encoding!r}", "--encoding", "latin-1")
    for encoding, offset in (("ascii", 1), ("utf-8", 1)):
        reports_error(prepare("a.txt", "--encoding", encoding, status=1, cwd=tmp_path), "a.txt",
                      f"offset {offset}", encoding)
    write(tmp_path, {"e.txt": b"a" * 100_001 + b"\xff"})
    reports_error(prepare("e.txt", "--encoding", "ascii", status=1, cwd=tmp_path), "offset 100,001")


def test_bytes_that_are_not_utf8_are_reported(tmp_path, bpe):
    text = b"abc " * 40_000 + b"\xff\xfe" + "–".encode()[:2]
    write(tmp_path, {"a.txt": text, "b.txt": "Wörter " * 9, "c.txt": ("Wörter " * 9).encode("latin-1"),
                     "few.txt": b"abc \xff" + b" abc" * 500})
    done = reads(tmp_path, "a.txt", expected=text)
    one_sentence(done.stderr, "a.txt", "4 of 160,004", "offset 160,000", "--encoding")
    assert prepare("b.txt", cwd=tmp_path).stderr == ""
    write(tmp_path, {"d.txt": b"a" * 1023 + "é".encode() + b"\xff"})     # where the reader's first block ends
    one_sentence(prepare("d.txt", cwd=tmp_path).stderr, "1 of 1,026", "offset 1,025")
    done = reads(tmp_path, "c.txt", expected=("Wörter " * 9).encode("latin-1"))
    one_sentence(done.stderr, "9 of 63", "offset 1")
    reports_error(prepare("c.txt", "--tokenizer", "gpt2", status=1, cwd=tmp_path), "c.txt", "9 of 63",
                  "--encoding latin-1")
    one_sentence(prepare("few.txt", "--tokenizer", "gpt2", cwd=tmp_path).stderr, "few.txt", "1 of 2,005")


def test_a_nul_is_rejected_wherever_it_is(tmp_path, byte_model):
    write(tmp_path, {"a.txt": b"ab\n" * 30_000 + b"c\0", "b.jsonl": '{"text": "a"}\n{"text": "b\\u0000"}\n',
                     "c.jsonl": b'{"text": "a"}\n\n{"text": "\0"}'})
    reports_error(prepare("a.txt", status=1, cwd=tmp_path), "a.txt", "offset 90,001", "line 30,001")
    reports_error(prepare("b.jsonl", status=1, cwd=tmp_path), "b.jsonl, line 2", "NUL")
    reports_error(prepare("c.jsonl", status=1, cwd=tmp_path), "c.jsonl", "line 3", "NUL")
    done = subprocess.run([sys.executable, HERE / "train_gpt2.py", "sample", byte_model[1], "--prompt", "-"],
                          input=b"ROMEO\0", capture_output=True)
    assert done.returncode == 1
    one_sentence(done.stderr.decode(), "prompt", "NUL")


# --- JSON, tables, raw tokens -------------------------------------------------------------------------------
def test_the_field_of_json_lines_is_a_flag(tmp_path):
    lines = [{"text": "no", "content": "a", "data": {"body": {"text": "x"}}, "d.b": "p"},
             {"text": "no", "content": "b", "data": {"body": {"text": "y"}}, "d.b": "q"}]
    write(tmp_path, {"a.jsonl": "\n".join(map(json.dumps, lines))})
    for field, expected in (("content", b"\0a\0b"), ("data.body.text", b"\0x\0y"), ("d.b", b"\0p\0q")):
        reads(tmp_path, "a.jsonl", "--text-field", field, expected=expected)
    for field in ("data.body", "data.none", "content.x"):
        done = prepare("a.jsonl", "--text-field", field, status=1, cwd=tmp_path)
        reports_error(done, "a.jsonl, line 1", field, "--text-field", "text, content, data")
    for words in (["-"], ["/dev/stdin"]):
        with open(tmp_path / "a.jsonl", "rb") as stdin:
            flags = "--jsonl --text-field content --steps 1 --sample-tokens 0 --out".split()
            subprocess.run([sys.executable, HERE / "train_gpt2.py", "--data", *words, *flags,
                            f"run{words[0][-1]}"],
                           cwd=tmp_path, check=True, stdin=stdin, capture_output=True)
        assert text_of(tmp_path / f"run{words[0][-1]}" / "tokens") == b"\0a\0b"


@pytest.mark.parametrize("name, contents", [
    ("a b.json", '[{"text": "x\\u00e9"},\n {"text": "y"}]'), ("a.json", '["xé", "y"]'),
    ("a.jsonl", ' [\n{"text": "xé"}, {"text": "y"}]'), ("a.jsonl", '["xé", "y"]'),
    ("a.txt", '[{"text": "xé"}, {"text": "y"}]'), ("a.JSON", '\ufeff[{"text": "xé"}, {"text": "y"}]'),
    ("a.csv", 'id,text\n1,"xé"\n2,y\n'), ("a.CSV", '\ufefftext,id\nxé,1\ny,2\n'),
    ("it's.tsv", "id\ttext\n1\txé\n2\ty\n"), ("a.csv.gz", "id,text\n1,xé\n2,y\n")])
def test_arrays_and_tables_are_rejected_with_the_command_that_converts_them(tmp_path, name, contents):
    contents = contents.encode()
    write(tmp_path, {name: gzip.compress(contents) if name.endswith(".gz") else contents})
    done = prepare(name, status=1, cwd=tmp_path)
    reports_error(done, name, "convert")
    command = re.search(r": ((cat|gzip -dc) .*)", done.stderr)[1]
    run("bash", "-c", command, cwd=tmp_path)
    [converted] = [path.name for path in tmp_path.glob("*_lines.jsonl")]
    reads(tmp_path, converted, expected="\0xé\0y".encode())


def test_json_that_is_no_array_is_reported(tmp_path):
    write(tmp_path, {"a.json": json_lines("x", "y")})
    reports_error(prepare("a.json", status=1, cwd=tmp_path), "a.json", "--jsonl")
    reads(tmp_path, "a.json", "--jsonl", expected=b"\0x\0y")


def test_raw_tokens_become_shards(tmp_path):
    train, val = [50256, 1, 2, 3] * 30, [9, 8, 7]
    pack = lambda tokens: struct.pack(f"<{len(tokens)}H", *tokens)     # noqa: E731
    write(tmp_path, {"n/train.bin": pack(train), "n/val.bin": pack(val), "n/input.txt": "x",
                     "odd.bin": b"abc", "small.bin": pack([1, 2, 255] * 10)})
    table = header(20240328, 2, 50257, 50256) + b"\1a" * 50257     # stands for tiktoken's
    module = ("import sys, train_gpt2 as t; t.GPT2Tokenizer.encode = lambda self, text: None\n"
              "t.GPT2Tokenizer.__init__ = lambda self: t.Tokenizer.__init__(self, [b'a'] * 50257, 50256)\n"
              "sys.exit(t.main(sys.argv[1:]))")
    for words in (["n/val.bin", "n/train.bin"], ["n"], ["n/*.bin"]):
        flags = "--raw-uint16 --tokenizer gpt2 --out out".split()
        run(sys.executable, "-c", module, "prepare", *flags, *words, cwd=tmp_path, PYTHONPATH=str(HERE))
        assert tokens_of(tmp_path / "out" / "train_000000.bin") == train
        assert tokens_of(tmp_path / "out" / "val_000000.bin") == val
        assert (tmp_path / "out" / "tokenizer.bin").read_bytes() == table
    raw = ("prepare", "--raw-uint16", "--out", "raw")
    driver(*raw, "small.bin", "--val-fraction", 0.5, cwd=tmp_path)     # none has val in its name
    assert len(tokens_of(tmp_path / "raw" / "val_000000.bin")) == 15
    for name, words in (("n/train.bin", ["50256", "256", "--tokenizer gpt2"]), ("odd.bin", ["odd size of 3"]),
                        ("raw/val_000000.bin", ["token shard"])):
        reports_error(driver(*raw, name, status=1, cwd=tmp_path), name, *words)


# --- Documents ----------------------------------------------------------------------------------------------
def test_separators_become_end_of_text(tmp_path, byte_model):
    text = "one\n<|endoftext|>\ntwo<|endoftext|><|endoftext|>\ufeffthree<|endoftext|>"
    lines = json_lines("x<|endoftext|>y", "<|endoftext|>z")
    write(tmp_path, {"a.txt": text, "b.txt": "four", "c.jsonl": lines})
    shown = reads(tmp_path, "a.txt", expected=b"one\n\0\ntwo\0three\0").stdout
    assert "4 document separators '<|endoftext|>'" in shown
    reads(tmp_path, "a.txt", "b.txt", expected=b"\0one\n\0\ntwo\0three\0four")
    reads(tmp_path, "c.jsonl", expected=b"\0x\0y\0z")
    off = reads(tmp_path, "a.txt", "--document-separator", "", expected=text.encode()).stdout
    assert "separator" not in off
    words = ("a.txt", "--document-separator", "two<")
    shown = reads(tmp_path, *words, expected=text.replace("two<", "\0").encode()).stdout
    assert "1 document separator " in shown
    assert "0 document separators" in prepare("b.txt", "--document-separator", "xyz", cwd=tmp_path).stdout
    words = ("--data", "a.txt", "--document-separator")
    driver(*words, "\n", "--out", "run", *SMALL[:8], "--steps", 2, *NO_SAMPLE, cwd=tmp_path)
    assert text_of(tmp_path / "run" / "tokens") == text.replace("\n", "\0").encode()
    shown = driver("eval", byte_model[1], *words, "three", cwd=tmp_path).stdout
    assert "1 document separator 'three'" in shown


@pytest.mark.parametrize("separator", ["<|endoftext|>", " \n\n ", "\n", "–", "<sep>\r\n" * 9])
def test_separators_are_found_across_blocks(separator):
    """For blocks of all sizes, the documents are those of the whole text."""
    text = ("Wörter, \n\n<|end" + separator + "Wörter–<|endof\n" + 2 * separator + "x" + separator).encode()
    marked = text.replace(separator.encode(), b"\0")
    while b"\0\0" in marked:
        marked = marked.replace(b"\0\0", b"\0")
    for size in (1, 2, 3, 7, 10, 1000):
        reader = train_gpt2.TextReader(train_gpt2.ByteTokenizer(), train_gpt2.Progress(),
                                       document_separator=separator)
        blocks = (text[i:i + size] for i in range(0, len(text), size))
        parts = [b"\0" if part is None else part for part in reader.document_parts(blocks)]
        assert b"".join(parts) == marked and reader.documents
        assert reader.separators == text.count(separator.encode())


def test_the_split_moves_to_a_separator(tmp_path):
    write(tmp_path, {"a.txt": "<|endoftext|>".join(["x" * 60, "y" * 60])})
    prepare("a.txt", "--val-fraction", 0.2, cwd=tmp_path)
    assert bytes(tokens_of(tmp_path / "out" / "val_000000.bin")) == b"\0" + b"y" * 60


def test_gpt2s_end_of_text_and_a_table_without_one(tmp_path, bpe):
    write(tmp_path, {"a.txt": "one <|endoftext|> two"})
    prepare("a.txt", "--tokenizer", "gpt2", "--val-fraction", 0, cwd=tmp_path)
    expected = [*bpe.encode("one "), 50256, *bpe.encode(" two")]
    assert tokens_of(tmp_path / "out" / "train_000000.bin") == expected
    tokenizer = train_gpt2.Tokenizer([bytes([i]) for i in range(256)], -1)
    tokenizer.encode, tokenizer.name = train_gpt2.ByteTokenizer.encode, "own"
    train_gpt2.prepare([str(tmp_path / "a.txt")] * 2, str(tmp_path / "own"), tokenizer, val_fraction=0)
    assert text_of(tmp_path / "own") == b"one  two"     # separators are removed


# --- Small texts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size, batch, validates", [
    (3, (1, 1), False), (9, (1, 7), False), (20, (1, 17), True), (300, (4, 64), True), (600, (8, 64), True)])
def test_small_texts_reduce_the_batch(tmp_path, size, batch, validates):
    write(tmp_path, {"a.txt": (TEXT * 2).replace("–", "-")[:size]})
    shown = driver("--data", "a.txt", "--steps", 2, *NO_SAMPLE, cwd=tmp_path).stdout
    saved = json.loads((tmp_path / "runs" / "1" / "run.json").read_text())
    assert (saved["batch_size"], saved["seq_len"]) == batch
    assert saved["total_batch_size"] == batch[0] * batch[1] and ("validation loss" in shown) == validates
    assert ("instead of 8 x 64" in shown) == (size < 600)
    assert len(re.findall("^batch:.*validation", shown, re.M)) == 1
    driver("--resume", "--steps", 3, *NO_SAMPLE, cwd=tmp_path)


def test_small_texts_fine_tune(tmp_path, byte_model):
    for size in (3, 12, 30):
        write(tmp_path, {"a.txt": TEXT[:size]})
        driver("--data", "a.txt", "--init", byte_model[1], "--out", f"run{size}", "--steps", 2, *NO_SAMPLE,
               cwd=tmp_path)


def test_ordinary_texts_keep_the_batch(tmp_path):
    write(tmp_path, {"a.txt": (TEXT * 3)[:5200]})
    shown = driver("--data", "a.txt", "--steps", 1, *NO_SAMPLE, cwd=tmp_path).stdout
    assert "micro-batches of 8 x 64" in shown and "instead" not in shown


@pytest.mark.parametrize("size, flags, words", [
    (1, "", "no training tokens"), (2, "", "1 token for training"),
    (300, "--batch-size 8 --seq-len 64", "270 tokens | 513 | --batch-size 8 | --seq-len 64"),
    (300, "--batch-size 500", "270 tokens | --batch-size 500"),
    (50, "--seq-len 64", "45 tokens | --seq-len 64"),
    (300, "--init {model} --seq-len 16 --batch-size 20", "270 tokens | 321 | --batch-size 20")])
def test_what_is_too_small_for_given_sizes_is_reported(tmp_path, byte_model, size, flags, words):
    write(tmp_path, {"a.txt": "x" * size})
    flags = flags.format(model=byte_model[1]).split()
    done = driver("--data", "a.txt", "--steps", 1, *flags, *NO_SAMPLE, status=1, cwd=tmp_path)
    reports_error(done, "a.txt", *words.split(" | "))
    assert "shard" not in done.stderr or size == 1
    write(tmp_path, {"b.txt": "x"})
    done = driver("eval", byte_model[1], "--data", "b.txt", status=1, cwd=tmp_path)
    reports_error(done, "b.txt", "1 token,")
