#!/usr/bin/env python3
"""Fuzzes every reader of train_gpt2.py with malformed files, by hypothesis.

    make && python3 dev/fuzz/driver.py                  500 examples per reader: two minutes
    python3 dev/fuzz/driver.py -n 20000 jsonl gz        more examples, of these readers
    python3 dev/fuzz/driver.py --seed 7                 other examples, reproducible by the seed

An example is a valid file, written by the driver itself, with malformed values (in JSON: any type and size,
names such as ../x, duplicate keys, deep nesting, invalid UTF-8; in numbers: sizes and offsets beyond the
file, negative, overlapping) or with bytes changed, removed or inserted. A command of the driver reads it in
this process. It must end with status 0 and a valid result, or with status 1 and one printable sentence that
names the file (for run.json, what is wrong with the run). It must not

- raise anything, or take more than a second of processor time (an alarm ends it);
- use more Python memory than 16 MB and 48 times the size of the files, by tracemalloc;
- open a file for writing, or create, rename or delete one outside of its output folder, start a program, or
  connect to anything, by Python's audit events.

Files that fail stay in build/fuzz/driver-READER (with --shrink, after minutes, the smallest ones), and the
status is 1. The C readers are fuzzed by readers.c. Needs `pip install hypothesis`.
"""
import argparse
import collections
import contextlib
import gzip
import io
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import xml.etree.ElementTree

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
try:
    import hypothesis
    from hypothesis import strategies as st
except ImportError:
    sys.exit("dev/fuzz/driver.py needs hypothesis; pip install hypothesis")
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, GPT2Config  # noqa: E402

# --- Malformed values ---------------------------------------------------------------------------------------
RAW = [b"[" * 100_000, b'{"a":' * 60_000, b"[" * 900 + b"]" * 900, b"1" * 5000, b"-" + b"9" * 400, b"NaN",
       b"-Infinity", b"1e999", b"1e-999", b'"\xff\xfe"', b'"\\ud800"', b"", b"}", b'"a\0b"',
       b"[" + b"[]," * 9000 + b"1]", b'"' + b"x" * 70_000 + b'"', b"tru", b"-",
       b"\xef\xbb\xbf1", b"0x10", b"01"]
TEXTS = ["", "../x", "../../../../etc/passwd", "/etc/passwd", "a\0b", "\n", "a\nb: c", "\x1b[31mred",
         "\udc80", "x" * 300, "‮", "F64", "BF16", "wte.weight", "transformer.wte.weight", "h.0.ln_1.weight",
         "null"]
INTS = [-1, 0, 1, 2, 3, 7, 8, 255, 256, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
        -2**31, -2**63, 10**308]
FLOATS = [0.0, -0.0, 1.0, 1.5, 1e-5, 1e300, -1e300, 5e-324, math.nan, math.inf, -math.inf]
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(INTS), st.integers(-9, 99),
                    st.sampled_from(FLOATS), st.floats(), st.sampled_from(TEXTS), st.text(max_size=9),
                    st.sampled_from(range(len(RAW))).map(lambda i: f"@raw{i}@"))
values = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(TEXTS), inner, max_size=3)), max_leaves=6)
places = st.integers(0, 10**6)               # taken modulo the number of values


def spell(document, twice=None):
    """JSON with the raw bytes inserted; the entry `twice` of the outermost object occurs twice."""
    text = json.dumps(document).encode()
    if twice is not None and isinstance(document, dict) and document and text[:1] == b"{":
        name = list(document)[twice % len(document)]
        text = b"{" + json.dumps({name: document[name]}).encode()[1:-1] + b", " + text[1:]
    for i, raw in enumerate(RAW):
        text = text.replace(b'"@raw%d@"' % i, raw)
    return text


def branches(document, path=()):
    """The paths of all values in a JSON document."""
    yield path
    inner = ()
    if isinstance(document, dict):
        inner = document.items()
    elif isinstance(document, list):
        inner = enumerate(document)
    for key, value in inner:
        yield from branches(value, (*path, key))


@st.composite
def malformed(draw, document, most=3):
    """A JSON document with malformed values, as bytes."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, most))):
        paths = list(branches(document))
        path = paths[draw(places) % len(paths)]
        if not path:
            if draw(st.integers(0, 20)) == 0:
                document = draw(values)
            continue
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "near", "delete", "rename"]))
        if what == "delete":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([*TEXTS, *list(parent)[:4]]))] = parent.pop(path[-1])
        elif what == "near" and type(parent[path[-1]]) is int:
            parent[path[-1]] += draw(st.sampled_from([-1, 1, 4, -4, 2**32, -2**32, 2**62]))
        else:
            parent[path[-1]] = draw(values)
    return spell(document, draw(st.one_of(st.none(), st.none(), st.none(), places)))


@st.composite
def damage(draw, contents, reach=None, most=4):
    """Bytes with a few changed, inserted or removed, mostly among the first `reach`."""
    contents = bytearray(contents)
    for _ in range(draw(st.integers(0, most))):
        at = draw(places) % (min(reach or len(contents), len(contents)) + 1)
        new = draw(st.one_of(st.binary(max_size=4), st.sampled_from(RAW[3:14])))
        contents[at:at + draw(st.integers(0, 4))] = new
    if draw(st.integers(0, 9)) == 0:
        del contents[draw(places) % (len(contents) + 1):]
    return bytes(contents)


# --- Valid files --------------------------------------------------------------------------------------------
class Good:
    """The valid files that examples start from: models, texts, a run."""

    def __init__(self, folder):
        self.folder = folder
        model = GPT2(GPT2Config(8, 256, 2, 2, 8), seed=3)
        tokenizer = train_gpt2.ByteTokenizer()
        (folder / "ours").mkdir()
        model.save(str(folder / "ours" / "model.bin"))
        tokenizer.save(str(folder / "ours" / "tokenizer.bin"))
        self.table = (folder / "ours" / "tokenizer.bin").read_bytes()
        self.hf = {}
        for dtype in ("F32", "F16", "BF16"):
            train_gpt2.export_model(model, tokenizer, "hf", str(folder / dtype), dtype)
            contents = (folder / dtype / "model.safetensors").read_bytes()
            start = 8 + struct.unpack("<Q", contents[:8])[0]
            self.hf[dtype] = json.loads(contents[8:start]), contents[start:]
        self.config = {**json.loads((folder / "F32" / "config.json").read_bytes()),
                       "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
        silently("prepare", folder / "text.txt", "--out", folder / "shards")
        silently("--data", folder / "shards", "--out", folder / "run", *"--layers 1 --heads 1 --channels 8"
                 " --context 8 --batch-size 2 --steps 4 --val-every 2 --val-batches 1"
                 " --sample-tokens 0".split())
        self.lines = [(folder / "run" / name).read_bytes() for name in ("main.log", "metrics.jsonl")]
        self.run = json.loads((folder / "run" / "run.json").read_bytes())


def silently(*words):
    with contextlib.redirect_stdout(io.StringIO()):
        if train_gpt2.main([str(word) for word in words]):
            sys.exit(f"{words} failed")


# --- The readers: each writes an example, and returns a command and a check of its result --------------
READERS = {}


def reader(function):
    READERS[function.__name__] = function
    return function


def safetensors(header, data, length=None):
    if length is None:
        length = len(header)
    return struct.pack("<Q", length % 2**64) + header + data


def imported(out):
    """The imported model is readable."""
    with GPT2.load(str(out / "model.bin"), "cpu") as model:
        assert model.num_parameters > 0


@reader
def weights(draw, good, folder):
    """model.safetensors"""
    header, data = good.hf[draw(st.sampled_from(list(good.hf)))]
    header = json.loads(json.dumps(header))
    kind = draw(st.integers(0, 3))
    names = list(header)[1:]
    if kind == 0:                            # places that overlap, have gaps, are swapped
        one, other = (header[names[draw(places) % len(names)]] for _ in range(2))
        if draw(st.booleans()):
            one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
        else:
            ends = st.sampled_from([*INTS, len(data), len(data) + 1])
            one["data_offsets"][draw(st.integers(0, 1))] = draw(ends)
    text = spell(header) if kind == 0 else draw(malformed(header))
    length = draw(st.one_of(st.none(), st.none(), st.none(), st.sampled_from(INTS)))
    if draw(st.integers(0, 5)) == 0:
        cut = draw(places) % len(data)
        if draw(st.booleans()):
            data = data[:cut]
        else:
            data += bytes(draw(st.integers(1, 99)))
    contents = safetensors(text, data, length)
    if kind == 3:
        contents = draw(damage(contents, 8 + len(text)))
    (folder / "model.safetensors").write_bytes(contents)
    if draw(st.booleans()):
        (folder / "config.json").write_text(json.dumps(good.config))
    return ["import", folder, "--out", "out/model.bin"], imported


@reader
def config(draw, good, folder):
    """config.json"""
    shutil.copy(good.folder / "F32" / "model.safetensors", folder)
    text = draw(malformed(good.config))
    (folder / "config.json").write_bytes(draw(damage(text)) if draw(st.integers(0, 3)) == 0 else text)
    return ["import", folder, "--out", "out/model.bin"], imported


@reader
def index(draw, good, folder):
    """model.safetensors.index.json, with its files"""
    header, data = good.hf["F32"]
    tensors = list(header.items())[1:]
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        part, rest = {}, b""
        for tensor, entry in tensors[i::2]:
            begin, end = entry["data_offsets"]
            part[tensor] = {**entry, "data_offsets": [len(rest), len(rest) + end - begin]}
            rest += data[begin:end]
        (folder / name).write_bytes(safetensors(json.dumps(part).encode(), rest))
    document = {"metadata": {"total_size": len(data)},
                "weight_map": {tensor: names[i % 2] for i, (tensor, _) in enumerate(tensors)}}
    if draw(st.integers(0, 3)) == 0:
        names_to = st.one_of(st.sampled_from(TEXTS), st.just("x.safetensors"), values)
        document["weight_map"]["x"] = draw(names_to)
        os.symlink(*draw(st.sampled_from([(names[0], folder / "x.safetensors"),
                                          ("x.safetensors", folder / "x.safetensors"),
                                          ("/proc/self/mem", folder / "x.safetensors"),
                                          ("/etc/passwd", folder / "x.safetensors")])))
        text = spell(document)
    else:
        text = draw(malformed(document, most=2))
    (folder / "model.safetensors.index.json").write_bytes(text)
    (folder / "config.json").write_text(json.dumps(good.config))
    return ["import", folder, "--out", "out/model.bin"], imported


@reader
def metrics(draw, good, folder):
    """metrics.jsonl and main.log, drawn"""
    numbers = st.one_of(st.integers(0, 10**15), st.floats(), st.sampled_from([*INTS, *FLOATS]))
    for name, lines in zip(("main.log", "metrics.jsonl"), good.lines):
        contents = []
        for line in lines.splitlines()[:draw(st.integers(0, 12))]:
            if name == "main.log":
                line = b" ".join(b"%s:%s" % (pair.split(b":")[0], repr(draw(numbers)).encode())
                                 if draw(st.booleans()) else pair for pair in line.split())
            elif draw(st.booleans()):
                line = draw(malformed(json.loads(line)))
            contents.append(line)
        joined = b"\n".join(contents)
        if draw(st.booleans()):
            joined = draw(damage(joined))
        if draw(st.integers(0, 3)):
            (folder / name).write_bytes(joined)
    path = folder
    if draw(st.booleans()):
        path /= draw(st.sampled_from(["main.log", "metrics.jsonl"]))

    def drawn(out):
        xml.etree.ElementTree.parse(out / "loss.svg")

    return ["plot", path, "--out", "out/loss.svg"], drawn


def prepared(out):
    """The manifest names exactly the files that exist."""
    manifest = json.loads((out / "shards" / "manifest.json").read_bytes())
    names = [shard["name"] for shard in manifest["shards"]]
    assert sorted([*names, "manifest.json", "tokenizer.bin"]) == sorted(os.listdir(out / "shards"))
    sizes = [(out / "shards" / shard["name"]).stat().st_size == 1024 + 2 * shard["tokens"]
             for shard in manifest["shards"]]
    assert all(sizes) and sum(shard["tokens"] for shard in manifest["shards"]) > 0


@reader
def jsonl(draw, good, folder):
    """JSON lines for prepare"""
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        document = {"id": 1, "text": draw(st.text(max_size=40)), "more": {"a": [1]}}
        text = spell(document) if draw(st.booleans()) else draw(malformed(document))
        lines.append(draw(damage(text)) if draw(st.integers(0, 4)) == 0 else text)
    contents = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines)
    name = draw(st.sampled_from(["a.jsonl", "a.jsonl.gz"]))
    if name.endswith(".gz"):
        contents = gzip.compress(contents, 1)
    (folder / name).write_bytes(contents)
    return ["prepare", folder, "--out", "out/shards", "--val-fraction", draw(st.sampled_from([0, 0.5, 1])),
            "--shard-tokens", draw(st.sampled_from([9, 1000]))], prepared


@reader
def gz(draw, good, folder):
    """Compressed text for prepare"""
    text = (good.folder / "text.txt").read_bytes()
    parts = [gzip.compress(part, 1) for part in (text[:99], draw(st.binary(max_size=99)))]
    if draw(st.integers(0, 40)) == 0:        # one that expands a thousandfold
        parts.append(gzip.compress(draw(st.sampled_from([b"\0", b"a ", b"\xf0", b"["])) * 1_500_000, 1))
    contents = b"".join(draw(st.permutations(parts)))
    if draw(st.integers(0, 3)):
        contents = draw(damage(contents, draw(st.sampled_from([12, None]))))
    (folder / draw(st.sampled_from(["a.txt.gz", "a.txt.gz", "a.jsonl.gz"]))).write_bytes(contents)
    return ["prepare", folder, "--out", "out/shards"], prepared


@reader
def hellaswag(draw, good, folder):
    """HellaSwag's JSON lines, evaluated"""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        document = {"ind": 4, "ctx": "A man", "label": 1, "endings": ["a", "b", "", "d"]}
        text = spell(document) if draw(st.booleans()) else draw(malformed(document))
        lines.append(draw(damage(text)) if draw(st.integers(0, 4)) == 0 else text)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    return ["eval", good.folder / "ours" / "model.bin", "--hellaswag", folder / "a.jsonl"], lambda out: None


@reader
def table(draw, good, folder):
    """tokenizer.bin beside a model, to sample, to encode and to export with"""
    shutil.copy(good.folder / "ours" / "model.bin", folder)
    pieces = [bytes([i]) for i in range(256)]
    for _ in range(draw(st.integers(0, 20))):
        pieces[draw(places) % 256] = draw(st.binary(max_size=6))
    head = [20240328, 2, 256, draw(st.sampled_from([0, 0, -1, -5, 255, 256, 10, 2**31 - 1]))]
    if draw(st.integers(0, 4)) == 0:
        head[draw(st.integers(0, 3))] = draw(st.sampled_from([n for n in INTS if -2**31 <= n < 2**31]))
    contents = train_gpt2.header(*head).tobytes() + b"".join(bytes([len(p)]) + p for p in pieces)
    if draw(st.integers(0, 3)) == 0:
        contents = draw(damage(contents))
    (folder / "tokenizer.bin").write_bytes(contents)
    (folder / "a.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n' * 9)
    model = folder / "model.bin"
    return draw(st.sampled_from([
        ["sample", model, "--tokens", 5], ["sample", model, "--tokens", 5, "--prompt", "ab"],
        ["eval", model, "--data", folder / "a.jsonl"],
        ["export", model, "--out", "out/hf"], ["export", model, "--out", "out/m.gguf", "--format", "gguf"],
        ["export", model, "--out", "out/llmc.bin", "--format", "llmc"]])), lambda out: None


@reader
def vocabulary(draw, good, folder):
    """tokenizer.json, or vocab.json and merges.txt, beside a model, to sample and to export with"""
    shutil.copy(good.folder / "F32" / "model.safetensors", folder)
    shutil.copy(good.folder / "F32" / "config.json", folder)
    letters = train_gpt2.load_module("vocabulary").LETTERS
    vocab = {"<|endoftext|>" if i == 0 else letter: i for i, letter in enumerate(letters)}
    vocab["th"] = draw(st.sampled_from([1, 2, 256, 70000]))
    level = {"type": "ByteLevel", "add_prefix_space": False}
    whole = {"added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": True}], "normalizer": None,
             "pre_tokenizer": level, "decoder": level,
             "model": {"type": "BPE", "vocab": vocab, "merges": ["t h"]}}
    files = {"tokenizer.json": whole}
    if draw(st.booleans()):
        files = {"vocab.json": vocab, "added_tokens.json": {"<x>": 255}}
        (folder / "merges.txt").write_bytes(draw(damage("#version: 0.2\nt h\nĠ a\n".encode())))
    files["tokenizer_config.json"] = {"eos_token": "<|endoftext|>", "added_tokens_decoder": {
        "0": {"content": "<|endoftext|>", "special": True}}}
    for name, contents in files.items():
        text = spell(contents) if draw(st.booleans()) else draw(malformed(contents))
        (folder / name).write_bytes(draw(damage(text)) if draw(st.integers(0, 4)) == 0 else text)
    return draw(st.sampled_from([
        ["sample", folder, "--tokens", 5], ["sample", folder, "--tokens", 5, "--prompt", "a b"],
        ["export", folder, "--out", "out/hf"], ["export", folder, "--out", "out/m.gguf", "--format", "gguf"],
        ["export", folder, "--out", "out/llmc.bin", "--format", "llmc"]])), lambda out: None


@reader
def settings(draw, good, folder):
    """run.json of a run that is resumed"""
    shutil.copytree(good.folder / "run", "out/run")
    text = draw(malformed(good.run))
    pathlib.Path("out/run/run.json").write_bytes(
        draw(damage(text)) if draw(st.integers(0, 3)) == 0 else text)
    return ["--resume", "--out", "out/run", "--steps", 4, "--sample-tokens", 0], lambda out: None


@reader
def places_of(draw, good, folder):
    """A folder, a pipe, a link loop, a dangling link or an unreadable file in place of a file"""
    commands = {
        "model.safetensors": ["import", folder, "--out", "out/model.bin"],
        "model.safetensors.index.json": ["import", folder, "--out", "out/model.bin"],
        "config.json": ["import", folder, "--out", "out/model.bin"],
        "model.bin": ["sample", folder / "model.bin"], "tokenizer.bin": ["sample", folder / "model.bin"],
        "metrics.jsonl": ["plot", folder, "--out", "out/loss.svg"],
        "main.log": ["plot", folder, "--out", "out/loss.svg"],
        "a.txt": ["prepare", folder, "--out", "out/shards"],
        "a.jsonl.gz": ["prepare", folder, "--out", "out/shards"],
        "b.jsonl": ["eval", good.folder / "ours" / "model.bin", "--hellaswag", folder / "b.jsonl"],
        "out/run/run.json": ["--resume", "--out", "out/run", "--steps", 4, "--sample-tokens", 0],
        "out/run/metrics.jsonl": ["--resume", "--out", "out/run", "--steps", 4, "--sample-tokens", 0]}
    name = draw(st.sampled_from(list(commands)))
    if name == "config.json":
        shutil.copy(good.folder / "F32" / "model.safetensors", folder)
    if name == "tokenizer.bin":
        shutil.copy(good.folder / "ours" / "model.bin", folder)
    if name.startswith("out/"):
        shutil.copytree(good.folder / "run", "out/run")
        os.remove(name)
    path = pathlib.Path(name) if name.startswith("out/") else folder / name
    draw(st.sampled_from([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path),
                          lambda: path.symlink_to("nothing"), lambda: path.symlink_to("/proc/self/mem")]))()
    return commands[name], lambda out: None


# --- Invariants -------------------------------------------------------------------------------------------
class Watch:
    """Restricts what the process may do to files, while it is on."""
    events = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.link": (1,),
              "os.symlink": (1,), "os.chmod": (0,), "os.truncate": (0,), "shutil.rmtree": (0,)}

    def __init__(self):
        self.allowed = None
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if self.allowed is None:
            return
        if event == "open":
            path, _, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if writes and not (flags & os.O_NOFOLLOW and os.path.islink(path)):
                self.inside(path, event)
        elif event in self.events:
            if max((n for n in arguments[1:] if isinstance(n, int)), default=-1) >= 0 and event != "os.mkdir":
                return                       # relative to an open folder: by rmtree, already checked
            for number in self.events[event]:
                self.inside(arguments[number], event)
        elif event in ("subprocess.Popen", "socket.connect", "os.system", "os.exec", "os.posix_spawn"):
            raise AssertionError(f"{event} {arguments}")

    def inside(self, path, event):
        if isinstance(path, int) or path is None or path == os.devnull:
            return
        path = os.path.realpath(os.fsdecode(path))
        if not any(path == top or path.startswith(top + os.sep) for top in self.allowed):
            raise AssertionError(f"{event}: {path} is not in {' or '.join(self.allowed)}")


def check(command, right, folder, watch, counts):
    """Runs a command of the driver on an example, and verifies the result."""
    size = sum(path.lstat().st_size for path in [*folder.rglob("*"), *pathlib.Path("out").rglob("*")])
    told, shown = io.StringIO(), io.StringIO()
    scratch = os.path.realpath("scratch")
    tempfile.tempdir = scratch
    signal.alarm(20)
    tracemalloc.start()
    begun = time.process_time()
    watch.allowed = [os.path.realpath("out"), scratch]
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(told):
            status = train_gpt2.main([str(word) for word in command])
    finally:
        watch.allowed = None
        seconds = time.process_time() - begun
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.alarm(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert status in (0, 1), status
    counts[status] += 1
    limit = 16e6 + 48 * size
    counts["seconds"], counts["memory"] = max(counts["seconds"], seconds), max(counts["memory"], memory)
    assert memory < limit, f"{memory:,} bytes of memory, for {size:,} in files"
    assert seconds < 1.5, f"{seconds} s"     # a third of that with tracemalloc
    assert os.listdir("scratch") == []
    if status == 0:
        right(pathlib.Path("out"))
        return
    *notes, sentence = told.getvalue().strip().split("\n")
    known = "assuming heads of 64 channels", "is assumed", "have no token and are never sampled"
    assert all(any(words in note for words in known) for note in notes), notes
    assert sentence.startswith("train_gpt2.py: ") and sentence.isprintable(), sentence
    assert "Errno" not in sentence and "choices" not in sentence, sentence
    assert len(sentence) < 1000, sentence
    names = [str(folder), "out/", "the tokenizer", *(path.name for path in folder.rglob("*"))]
    assert command[0] == "--resume" or any(name in sentence for name in names), sentence


def fuzz(name, examples, seed, shrink, good, base, watch):
    """Returns the counts of a reader's examples."""
    counts = collections.Counter()
    folder = base / "in"

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
                         suppress_health_check=list(hypothesis.HealthCheck),
                         phases=[phase for phase in hypothesis.Phase if shrink or phase.name != "shrink"])
    @hypothesis.given(st.data())
    def one(data):
        for path in (folder, base / "out", base / "scratch"):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        command, right = READERS[name](data.draw, good, folder)
        try:
            check(command, right, folder, watch, counts)
        except AssertionError as error:
            raise AssertionError(f"{error}; it was {' '.join(map(str, command))}") from error

    one()
    return counts


def keep(source, target):
    """Keeps a file for inspection; not a pipe, which would block."""
    if os.path.isfile(source):
        shutil.copyfile(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"{', '.join(READERS)} (all)")
    parser.add_argument("-n", type=int, default=500, help="examples per reader (500)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (1)")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest failing example")
    args = parser.parse_args()
    for name in set(args.readers) - set(READERS):
        parser.error(f"unknown reader {name!r}")
    os.environ.update(GPT2_OFFLINE="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    failed = []

    def no_text(_):
        raise train_gpt2.GPT2Error("the default text, which is for --data, would go into dev/data")

    train_gpt2.default_text = no_text

    def too_long(*_):
        raise AssertionError("it blocks")

    signal.signal(signal.SIGALRM, too_long)
    print("| reader | examples | accepted | rejected with a sentence | longest | most memory |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="driver-", dir=memory) as folder:
        base = pathlib.Path(folder).resolve()
        (base / "good").mkdir()
        os.chdir(base)
        good, watch = Good(base / "good"), Watch()
        for name in args.readers or READERS:
            try:
                c = fuzz(name, args.n, args.seed, args.shrink, good, base, watch)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed.append(name)
                kept = ROOT / "build" / "fuzz" / f"driver-{name}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(base / "in", kept, symlinks=True, copy_function=keep)
                frames = traceback.extract_tb(error.__traceback__)
                print(f"{name}: {type(error).__name__}: {str(error)[:1000]}\nfiles in {kept}; from",
                      *(f"{pathlib.Path(f.filename).name}:{f.lineno}" for f in frames[-6:]))
                continue
            what = " ".join(READERS[name].__doc__.split())
            print(f"| {what} | {c[0] + c[1]:,} | {c[0]:,} | {c[1]:,} | {c['seconds']:.2f} s |"
                  f" {c['memory'] / 1e6:.1f} MB |", flush=True)
        os.chdir("/")
    if failed:
        print(f"a guarantee was violated by: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
