"""The library under test, helpers, and fixtures shared by several files of tests."""
import array
import contextlib
import functools
import hashlib
import http.server
import importlib
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time

import pytest

HERE = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("GPT2_BUILD", HERE)).resolve()
BINARY = BUILD / "train_gpt2"
LIBRARY = BUILD / "libgpt2.so"
REFERENCES = HERE / "dev" / "reference"
TENSORS = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb".split()
MATRICES = "wte wpe qkvw attprojw fcw fcprojw".split()     # with weight decay, initially random
SCALES = "ln1w ln2w lnfw".split()                           # initially 1; the others are 0

if not BINARY.exists() or not LIBRARY.exists():
    pytest.exit(f"{BUILD} has no train_gpt2 and libgpt2.so; run `make` first", 1)

# For this process and its children: the library under test, no network, and one thread unless a test sets
# more, since threads only slow down models this small.
os.environ.update(GPT2_LIBRARY=str(LIBRARY), GPT2_OFFLINE="1", PIP_NO_INDEX="1", PIP_FIND_LINKS="",
                  PIP_CONFIG_FILE=os.devnull, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ASAN_OPTIONS"] = os.environ.get("ASAN_OPTIONS", "") + ":allocator_may_return_null=1"
sys.path.insert(0, str(HERE))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, GPT2Config, GPT2Error  # noqa: E402

LIB = train_gpt2.library("cpu")
convert, curves, fetch_module, fileio = map(train_gpt2.load_module, ("convert", "curves", "data/fetch", "fileio"))
vocabulary = train_gpt2.load_module("vocabulary")


def without_progress(text):
    """stderr without the lines that show what takes longer than a second, as it may on a busy machine."""
    return re.sub(r"^.* \| ([^|\n]+/s|[\d:]+ left|\d\d:\d\d)\n", "", text, flags=re.M)


def one_sentence(text, *words):
    """The text is one sentence for a user and contains these words."""
    text = without_progress(text).strip()
    assert text and "\n" not in text and "Traceback" not in text, text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


@contextlib.contextmanager
def rejects(*words):
    """The library rejects a call with one sentence that contains these words."""
    with pytest.raises((GPT2Error, convert.Error)) as caught:
        yield
    one_sentence(str(caught.value), *words)


def run(*command, status=0, cwd=None, **environment):
    """Runs a program, which must exit with this status."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    done.stderr = without_progress(done.stderr)
    return done


binary = functools.partial(run, BINARY)
driver = functools.partial(run, sys.executable, HERE / "train_gpt2.py")


def header(*entries):
    return struct.pack("<256i", *entries, *[0] * (256 - len(entries)))


def unsealed(contents):
    """The contents of a model or state file without the checksum at the end of the header."""
    return contents[:1016] + bytes(8) + contents[1024:]


def damaged(contents, at, value):
    """The contents of a file with one int32 of the header replaced, without a checksum."""
    contents = unsealed(contents)
    return contents[:4 * at] + struct.pack("<i", value) + contents[4 * at + 4:]


def shards(folder, *token_lists, name="train"):
    """Writes token shards; returns a glob that matches them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, tokens in enumerate(token_lists):
        contents = header(20240520, 1, len(tokens)) + array.array("H", tokens).tobytes()
        (folder / f"{name}_{i:03}.bin").write_bytes(contents)
    return str(folder / f"{name}_*.bin")


def tokens_of(path):
    contents = path.read_bytes()
    assert contents[:1024] == header(20240520, 1, (len(contents) - 1024) // 2)
    return array.array("H", contents[1024:]).tolist()


def token_rows(B, T, V):
    """Random x and y (B,T), nested lists."""
    draw = random.Random(1)
    rows = [[draw.randrange(V) for _ in range(T + 1)] for _ in range(B)]
    return [row[:-1] for row in rows], [row[1:] for row in rows]


def relative(ours, expected):
    """L2 norm of the difference, divided by that of `expected` unless that is 0."""
    assert len(ours) == len(expected)
    difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(ours, expected)))
    return difference / (math.sqrt(math.fsum(b * b for b in expected)) or 1)


def all_within(limit, ours, expected):
    """Compares arrays by name, by their relative error."""
    errors = {name: relative(ours[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"not within {limit}: {wrong}"


def tensors(model, kind="param"):
    """The 16 tensors by name, each flat."""
    return {name: array.array("f", model.get(name, kind).tobytes()) for name in TENSORS}


def as_bytes(named):
    return b"".join(values.tobytes() for values in named.values())


def random_model(max_T, V, L, NH, C, spread=0.3):
    """A model in which every parameter matters; initial values are too near to 0 or 1."""
    draw = random.Random(1)
    model = GPT2(GPT2Config(max_T, V, L, NH, C))
    for name, shape in model.shapes.items():
        padding = math.prod(shape) - V * C if name == "wte" else 0
        values = [draw.gauss(float(name in SCALES), spread) for _ in range(math.prod(shape) - padding)]
        model.set(name, values + [0.0] * padding)
    return model


def gradients(model, x, y):
    """The loss and the 16 gradients."""
    model.zero_grad()
    loss = model.forward(x, y)
    model.backward()
    return loss, tensors(model, "grad")


def results(model, x, y):
    """Logits, loss and gradients by name."""
    loss, named = gradients(model, x, y)
    return {"logits": array.array("f", model.logits(x).tobytes()), "loss": [loss], **named}


each_reference = pytest.mark.parametrize("name", ["tiny", "odd", "bf16", "head64"])


def open_reference(name):
    """The model of a reference, its x and y (B,T), and its logits, loss and gradients."""
    model = GPT2.load(REFERENCES / f"{name}_model.bin")
    with open(REFERENCES / f"{name}_reference.bin", "rb") as file:
        def take(kind, n):
            values = array.array(kind)
            values.fromfile(file, n)
            return values.tolist()

        magic, version, B, T = take("i", 256)[:4]
        x, y = ([take("i", T) for _ in range(B)] for _ in "xy")
        expected = {"logits": take("f", B * T * model.config.V), "loss": take("f", 1)}
        expected.update((tensor, take("f", math.prod(model.shapes[tensor]))) for tensor in TENSORS)
        assert (magic, version, file.read()) == (20240327, 2, b"")
    return model, x, y, expected


def example(index, label, context, completions):
    """An example in the format of llm.c."""
    tokens = [len(context), *context]
    for completion in completions:
        tokens += [len(completion), *completion]
    return struct.pack(f"<{5 + len(tokens)}H", 65535, 2 * (5 + len(tokens)), index, label, 4, *tokens)


def hellaswag_file(path, V, n, longest, seed=1):
    """A file of n random examples, and their contents."""
    draw = random.Random(seed)
    text = [([draw.randrange(V) for _ in range(draw.randrange(1, longest))],
             [[draw.randrange(V) for _ in range(draw.randrange(1, 8))] for _ in range(4)], draw.randrange(4))
            for _ in range(n)]
    path.write_bytes(header(20240522, 1, n, 0) + b"".join(
        example(i, label, context, completions) for i, (context, completions, label) in enumerate(text)))
    return text


V = 97
FLAGS = {
    "binary": "-b 3 -t 19 -d 114 -x 8 -k linear -l 1e-3 -u 2 -q 0.1 -c 0.1 -v 3 -m 5 -s 4 -g 7 -n 4",
    "driver": "--batch-size 3 --seq-len 19 --total-batch-size 114 --steps 8 --schedule linear --lr 1e-3"
              " --warmup 2 --final-lr-frac 0.1 --weight-decay 0.1 --val-every 3 --val-batches 5"
              " --sample-every 4 --sample-tokens 7 --checkpoint-every 4",
}


def make_data(folder, config=GPT2Config(24, V, 2, 3, 39)):
    """Shards in folder/data, and a model for them."""
    draw = random.Random(1)
    for name, sizes in (("train", (500, 333)), ("val", (400,))):
        shards(folder / "data", *([draw.randrange(V) for _ in range(size)] for size in sizes), name=name)
    GPT2(config, seed=9).save(folder / "model.bin")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("run"))


def command(front, data, flags, out=None, resume=False):
    """A run on the data, with FLAGS and then the given flags."""
    if front == "binary":
        words = [BINARY, "-i", data / "data" / "train_*.bin", "-j", data / "data" / "val_*.bin",
                 "-e", data / "model.bin"]
        if out:
            words += ["-o", out, "-y", int(resume)]
    else:
        words = [sys.executable, HERE / "train_gpt2.py", "--data", data / "data", "--out", out]
        words += ["--resume"] if resume else ["--init", data / "model.bin"]
    return [str(word) for word in [*words, *FLAGS[front].split(), *flags.split()]]


def outputs(folder):
    """The files that both front ends must write identically."""
    drivers_own = ("run.json", "metrics.jsonl", "loss.html", "loss.svg", "best.bin")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in drivers_own}


@pytest.fixture(scope="module")
def whole_runs(data):
    """By front end, the output of an uninterrupted run, and its directory."""
    found = {}
    for front, threads in (("binary", "2"), ("driver", "1")):
        shown = run(*command(front, data, "", data / front), OMP_NUM_THREADS=threads).stdout
        found[front] = shown, data / front
    return found


def reports_error(done, *words):
    """A front end reported a mistake in one sentence."""
    one_sentence(done.stderr, "train_gpt2", *words)


TEXT = "ROMEO:\nWhat light? It is the east – and Juliet is the sun.\n" * 40
SMALL = ("--layers 1 --heads 1 --channels 16 --context 16 --batch-size 2 --steps 3 --val-batches 2"
         " --val-every 2 --sample-tokens 30").split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output of a run on a text, and its directory."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return driver("--data", "text.txt", *SMALL, cwd=folder).stdout, folder / "runs" / "1"


@pytest.fixture
def byte_model(tmp_path):
    """A model of bytes with uneven probabilities, and its file."""
    model = random_model(16, 256, 1, 2, 8, spread=0.2)
    model.save(tmp_path / "model.bin")
    train_gpt2.ByteTokenizer().save(str(tmp_path / "tokenizer.bin"))
    return model, tmp_path / "model.bin"


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


LAYER_NAMES = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc",
               "fcproj": "mlp.c_proj"}


def encoded(values, dtype):
    """Numbers as the bytes of a file; BF16 is a float32 truncated to its upper half."""
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    data = struct.pack(f"<{len(values)}f", *values)
    if dtype == "BF16":
        return b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))
    return data


def as_huggingface(model):
    """The tensors of a model as transformers names and transposes them: shapes and numbers."""
    c, expected = model.config, {}
    for name, values in tensors(model).items():
        if name in ("wte", "wpe"):
            rows = c.V if name == "wte" else c.max_T
            expected[f"{name}.weight"] = (rows, c.C), values[:rows * c.C].tolist()
            continue
        stem, kind = name[:-1], {"w": "weight", "b": "bias"}[name[-1]]
        for layer in range(1 if stem == "lnf" else c.L):
            shape = model.shapes[name][stem != "lnf":]
            size = math.prod(shape)
            part = values[layer * size:(layer + 1) * size].tolist()
            if len(shape) == 2:
                part = [part[o * shape[1] + i] for i in range(shape[1]) for o in range(shape[0])]
            where = "ln_f" if stem == "lnf" else f"h.{layer}.{LAYER_NAMES[stem]}"
            expected[f"{where}.{kind}"] = shape[::-1], part
    return expected


def write_safetensors(path, expected, dtype="F32", change=lambda entries: None):
    """A safetensors file of shapes and numbers by name; change(entries) may edit its header."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, values) in expected.items():
        begin, data = len(data), data + encoded(values, dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(data)]}
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def hub_folder(folder, model, **config):
    """A folder as on the Hugging Face hub: no prefix, a mask in every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    T = model.config.max_T
    masks = {f"h.{layer}.attn.bias": ((1, 1, T, T), [1.0] * T * T) for layer in range(model.config.L)}
    write_safetensors(folder / "model.safetensors", {**as_huggingface(model), **masks})
    (folder / "config.json").write_text(json.dumps({"n_head": model.config.NH, **config}))
    return folder


@pytest.fixture(scope="module")
def small():
    return random_model(7, 130, 2, 3, 12)


def with_entry(key, value, name="ln_f.bias"):
    def change(entries):
        entries[name][key] = value
    return change


prepare = functools.partial(driver, "prepare", "--out", "out")


def json_lines(*texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def bpe():
    """tiktoken's GPT-2, where its vocabulary is in tiktoken's cache."""
    tiktoken = pytest.importorskip("tiktoken")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    for name in ("vocab.bpe", "encoder.json"):
        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/" + name
        if not os.path.exists(os.path.join(folder, hashlib.sha1(url.encode()).hexdigest())):
            pytest.skip("tiktoken's cache has not GPT-2's vocabulary; run dev/data/gpt2_vocab.py")
    return tiktoken.get_encoding("gpt2")


class Server(http.server.ThreadingHTTPServer):
    """A local web server that replaces GitHub and the Hugging Face hub. It serves `files` by path, and `text`
    for any other path. Each request takes a fault from `faults`: one of the words below, a status to answer
    with, or a url to redirect to (with status 308 if "for good")."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.text, self.faults, self.linked = {}, b"not Shakespeare", [], None
        self.requests, self.ranges = [], []      # requested paths, and (Range, If-Range)
        self.end_of_stall = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        state = self.server
        path = self.path.replace("http://far.invalid", "")     # a request to a proxy
        text = state.files.get(path, state.text)
        state.requests.append(self.path)
        asked = self.headers["Range"], self.headers["If-Range"]
        state.ranges.append(asked)
        fault, first = "", 0
        if state.faults:
            fault = state.faults.pop(0)
        tag = f'"{hashlib.sha1(text).hexdigest()}"'
        if asked[0] and fault != "no ranges" and (fault == "If-Range ignored" or asked[1] == tag):
            first = int(asked[0][len("bytes="):-1])
        if isinstance(fault, int) or "/" in fault:
            self.redirect(fault)
        else:
            self.send_text(text, first, tag, fault)

    def redirect(self, fault):
        status = fault
        if not isinstance(fault, int):
            status = 308 if "for good" in fault else 302
        self.send_response(status)
        self.send_header("Location", str(fault))
        if self.server.linked:
            self.send_header("X-Linked-ETag", self.server.linked)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_text(self, text, first, tag, fault):
        self.send_response(206 if first else 200)
        self.send_header("Connection", "close")
        if fault == "page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if fault != "no tag":
            self.send_header("ETag", tag)
        if first:
            begin = 0 if fault == "another part" else first
            self.send_header("Content-Range", f"bytes {begin}-{len(text) - 1}/{len(text)}")
        if fault == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            text = b"5\r\n" + text[:5] + b"\r\n%x\r\n" % (len(text) - 5) + text[5:] + b"\r\n0\r\n\r\n"
        elif fault != "no size":
            self.send_header("Content-Length", str(len(text) - first))
        self.end_headers()
        end = len(text)
        if fault in ("cut", "stall"):
            end = first + len(text) // 3
        self.wfile.write(text[first:end])
        if fault == "stall":
            self.wfile.flush()
            self.server.end_of_stall.wait(60)

    def do_CONNECT(self):
        self.server.requests.append(self.path)
        self.send_error(502)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("GPT2_TINYSHAKESPEARE_URL", httpd.url + "/input.txt")
        monkeypatch.delenv("GPT2_OFFLINE")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)     # between retries
        yield httpd
        httpd.end_of_stall.set()
        httpd.shutdown()


@pytest.fixture(scope="module")
def maker():
    """The module that computes the references, an independent GPT-2 in float64."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(REFERENCES))
    return importlib.import_module("make_reference")
