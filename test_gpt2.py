"""Tests of the model, the C API, the files of a run, and both command lines.

    make test                                        sets up pytest and runs all tests, dev/test/ included
    python -m pytest test_gpt2.py -k resume          those with "resume" in their names
    GPT2_QUICK=1 python -m pytest test_gpt2.py       all but the 124M model
    GPT2_BUILD=DIR python -m pytest test_gpt2.py     with another build (make BUILD=DIR)

They need pytest and the standard library; those that compare with torch, transformers, tiktoken or gguf are
skipped where these are missing. No test needs the network, and no timing decides a test. A SANITIZE=1 build
needs these in the environment, since Python itself is not built with sanitizers:

    LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0
"""
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "dev" / "test"))
from conftest import (all_within, as_bytes, binary, BUILD, command, data, driver, each_reference, FLAGS,
                      gradients, HERE, LIB, make_data, maker, MATRICES, metrics, one_sentence,
                      open_reference, outputs, random_model, REFERENCES, rejects, relative, results, run,
                      shards, TENSORS, tensors, token_rows, V, whole_runs)
import train_gpt2
from train_gpt2 import GPT2, GPT2Config, GPT2Progress, Loader


# --- The model against its references -----------------------------------------------------------------------
both_front_ends = pytest.mark.parametrize("front", ["binary", "driver"])


@each_reference
def test_logits_loss_and_gradients_match_the_reference(name):
    model, x, y, expected = open_reference(name)
    all_within(1e-5, results(model, x, y), expected)


@each_reference
def test_losses_of_ten_adamw_steps_match_the_reference(name):
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
def test_check_prints_18_rows_that_are_ok(name, front):
    lines = check(front, REFERENCES / f"{name}_reference.bin", REFERENCES / f"{name}_model.bin")
    number = r" +\d\.\d{3}e[-+]\d\d"
    rows = [re.fullmatch(rf"(\w+){number}{number}  ok", line)[1] for line in lines[1:-1]]
    assert rows == ["logits", "loss", *TENSORS] and lines[-1].startswith("OK")


@both_front_ends
@pytest.mark.parametrize("row, at, value", [("lnfb", -4, 1), ("lnfb", -4, math.nan), ("logits", 1720, 9)])
def test_check_fails_for_a_corrupted_reference(tmp_path, front, row, at, value):
    data = bytearray((REFERENCES / "tiny_reference.bin").read_bytes())
    struct.pack_into("<f", data, at % len(data), value)
    (tmp_path / "reference.bin").write_bytes(data)
    lines = check(front, tmp_path / "reference.bin", REFERENCES / "tiny_model.bin", status=1)
    assert [line.split()[0] for line in lines[:-1] if line.endswith("NOT OK")] == [row]
    assert lines[-1].startswith("NOT OK")


# --- The model against a GPT-2 in Python, in doubles --------------------------------------------------------
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
    """The residual stream, T rows of C, after a block with weights w."""
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
    """python_loss as a function of parameters, those of a small model, and its loss and gradients."""
    model = random_model(6, 11, 2, 2, 8)
    x, y = token_rows(2, 5, 11)
    params = {name: values.tolist() for name, values in tensors(model).items()}
    return lambda p: python_loss(p, model.config, x, y), params, *gradients(model, x, y)


@pytest.mark.parametrize("name", TENSORS)
def test_gradients_match_finite_differences_in_double(in_doubles, name):
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


# --- Properties of forward, backward and AdamW --------------------------------------------------------------
def test_logits_do_not_depend_on_later_tokens():
    model = random_model(130, 31, 2, 2, 24)
    x, _ = token_rows(2, 130, 31)
    before = model.logits(x).tolist()
    for t in (1, 50, 97, 129):
        changed = [row[:t] + [(row[t] + 1) % 31] + row[t + 1:] for row in x]
        after = model.logits(changed).tolist()
        assert all(new[:t] == old[:t] and new[t] != old[t] for old, new in zip(before, after))


@pytest.mark.parametrize("shape", [(16, 40, 2, 2, 12), (100, 50257, 1, 2, 8)], ids=["small", "wide"])
def test_gradient_accumulation_equals_one_batch(shape):
    model = random_model(*shape)
    x, y = token_rows(4, shape[0], shape[1])
    loss, whole = gradients(model, x, y)
    model.zero_grad()
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        halves.append(model.forward(x[rows], y[rows], scale=0.5))
        model.backward()
    assert sum(halves) / 2 == pytest.approx(loss, rel=1e-6)
    all_within(1e-5, tensors(model, "grad"), whole)


def test_evaluation_and_generation_do_not_change_training():
    """Other batch sizes, evaluations, and another model in the same process."""
    models = [random_model(40, 31, 2, 3, 15), random_model(29, 7, 1, 1, 8)]
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
    """The number of threads, and a hash of the results of models of odd shapes. Runs in its own process."""
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


def test_bits_do_not_depend_on_the_number_of_threads():
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
    for given in (1, 2, 3):                     # fewer than requested
        assert found(4, OMP_THREAD_LIMIT=str(given))[1] == alone[1]


@pytest.mark.parametrize("decay, clip, size", [(0.1, 1.0, 1.0), (0.0, 1e9, 1.0), (0.1, 0.0, 1e-6)])
def test_adamw_matches_the_formula(decay, clip, size):
    lr, beta1, beta2, eps = 0.01, 0.75, 0.96875, 1e-7     # betas that are exact as float
    draw = random.Random(1)
    model = random_model(4, 5, 2, 2, 4)
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
    for kind, expected in (("param", p), ("m", m), ("v", v)):
        all_within(1e-6, tensors(model, kind), expected)


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


# --- What the C API rejects ---------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [
    (0, 8, 1, 1, 8), (8, 0, 1, 1, 8), (8, 8, 0, 1, 8), (8, 8, 1, 0, 8), (8, 8, 1, 1, 0), (-8, 8, 1, 1, 8),
    (8, -1, 1, 1, 8), (8, 8, 1, -1, 8), (8, 8, 1, 3, 8), (2**25, 8, 1, 1, 8), (8, 2**25, 1, 1, 8),
    (8, 8, 2**13, 1, 8), (8, 8, 1, 1, 2**17), (2**31 - 1,) * 5])
def test_invalid_shapes_are_rejected(shape):
    with rejects("context %d, V %d, L %d, NH %d, C %d" % shape):
        GPT2(GPT2Config(*shape))


def raw_forward(model, x, y, B, T):
    """gpt2_forward without the checks of the GPT2 class."""
    loss = ctypes.c_float()
    x, y = ((ctypes.c_int32 * len(ids))(*ids) for ids in (x, y))
    LIB.gpt2_forward(model.handle, x, y, B, T, 1.0, ctypes.byref(loss))
    return loss.value


def test_incomplete_gradients_are_rejected():
    model = random_model(8, 5, 1, 1, 4)
    model.forward([[0, 1, 2]], [[1, 2, 3]])
    with rejects("incomplete", "gpt2_backward"):
        model.get("wte", "grad")
    with rejects("incomplete", "gpt2_backward"):
        model.update(lr=0.1)
    assert math.isnan(LIB.gpt2_grad_norm(model.handle))
    model.backward()
    assert model.grad_norm() > 0 and any(model.get("lnfb", "grad"))


def test_invalid_batches_are_rejected():
    model = random_model(8, 5, 1, 1, 4)
    for B, T in ((0, 4), (4, 0), (-1, 4), (4, -1), (1, 9), (0, 0)):
        with rejects(f"{B} x {T}", 8):
            raw_forward(model, [0] * 16, [0] * 16, B, T)
    for token in (-1, 5, 127, 2**31 - 1, -2**31):
        with rejects("token 2 of x", token, "0 to 4"):
            raw_forward(model, [0, 0, token, 0], [0] * 4, 2, 2)
        with rejects("token 3 of y", token, "0 to 4"):
            raw_forward(model, [0] * 4, [0, 0, 0, token], 2, 2)
        with rejects("token 0 of x", token):
            model.logits([[token]])
        with rejects("token 1 of x", token):
            next(model.generate([1, token], 1))
    assert math.isfinite(raw_forward(model, [0] * 4, [4] * 4, 2, 2))


def test_calls_out_of_order_are_rejected_without_effect():
    model = random_model(8, 5, 1, 1, 4)
    x, y = token_rows(2, 8, 5)
    before = as_bytes(tensors(model))
    with rejects("gpt2_forward"):
        model.backward()
    model.forward(x, y, train=False)
    with rejects("gpt2_forward"):
        model.backward()
    _, once = gradients(model, x, y)
    with rejects("gpt2_forward"):
        model.backward()
    model.forward(x, y)
    for too_early in (lambda: model.update(lr=0.1), lambda: model.forward(x, y), lambda: model.logits(x)):
        with rejects("gpt2_backward"):
            too_early()
    model.backward()
    all_within(1e-6, tensors(model, "grad"), {name: [2 * g for g in once[name]] for name in TENSORS})
    assert as_bytes(tensors(model)) == before and model.updates == 0
    model.zero_grad()
    assert model.grad_norm() == 0 and not any(as_bytes(tensors(model, "grad")))
    model.forward(y, x)
    model.forward(x, y)              # no gradient yet, so this replaces the previous one
    model.backward()
    assert as_bytes(tensors(model, "grad")) == as_bytes(once)


def test_parts_of_a_tensor_are_read_and_written():
    model = random_model(8, 5, 2, 1, 4)
    before = tensors(model)["fcb"].tolist()     # tensor 11, of 32 elements
    buffer = (ctypes.c_float * 3)(7, 8, 9)
    LIB.gpt2_set(model.handle, 11, 0, 29, 3, buffer)
    assert tensors(model)["fcb"].tolist() == before[:29] + [7, 8, 9]
    LIB.gpt2_get(model.handle, 11, 0, 28, 3, buffer)
    assert list(buffer) == [before[28], 7, 8]
    for place in ((16, 0, 0, 1), (-1, 0, 0, 1), (11, 4, 0, 1), (11, -1, 0, 1), (11, 0, -1, 1), (11, 0, 0, -1),
                  (11, 0, 0, 33), (11, 0, 32, 1), (11, 0, 2**63 - 1, 1), (11, 0, 1, 2**63 - 1)):
        for access in (LIB.gpt2_get, LIB.gpt2_set):
            with rejects(f"tensor {place[0]}"):
                access(model.handle, *place, buffer)


@pytest.mark.parametrize("call, words", [
    (lambda model, folder: model.save(folder / "model.bin", 4), "version is 4"),
    (lambda model, folder: model.save(folder / "none" / "model.bin"), "none/model.bin"),
    (lambda model, folder: model.get("wq"), "'wq'"),
    (lambda model, folder: model.get("wte", "adam"), "'adam'"),
    (lambda model, folder: model.set("wpe", [1.0, 2.0, 3.0]), "3 numbers"),
    (lambda model, folder: model.forward([[1, 2], [3]], [[1, 2], [3]]), "one length"),
    (lambda model, folder: model.forward([[1, 2]], [[1], [2]]), "the same"),
    (lambda model, folder: next(model.generate([], 1)), "1 x 0"),
    (lambda model, folder: LIB.gpt2_lr("foo", 0, 10, 0, 1e-3, 0), "'foo'"),
    (lambda model, folder: LIB.gpt2_descriptor("", ctypes.byref(GPT2Config())), "''"),
    (lambda model, folder: LIB.gpt2_descriptor("d012", ctypes.byref(GPT2Config())), "'d012'"),
    (lambda model, folder: LIB.gpt2_descriptor("d12x", ctypes.byref(GPT2Config())), "'d12x'"),
    (lambda model, folder: [model.set("lnfw", [math.nan] * 4), *model.generate([1], 1)], "diverged")])
def test_other_misuse_is_rejected(tmp_path, call, words):
    with rejects(words):
        call(random_model(8, 5, 1, 1, 4), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Schedules, z-scores, shapes ----------------------------------------------------------------------------
def llmc_lr(schedule, step, steps, warmup, lr, final):
    """The learning rate of karpathy/llm.c, but with a warm-up for every schedule."""
    done = (step - warmup) / (steps - warmup)
    decay_point = int(0.8 * steps)
    late = max(0, step - decay_point) / (steps - decay_point)
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1,
            "wsd": 1 - math.sqrt(late)}
    return lr * (step + 1) / warmup if step < warmup else lr * final + left[schedule] * (lr - lr * final)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps, warmup, final", [(100, 0, 0.0), (100, 7, 0.1), (100, 1, 1.0), (40, 39, 0.5)])
def test_learning_rates_match_llmc(schedule, steps, warmup, final):
    for step in range(steps):
        ours = LIB.gpt2_lr(schedule, step, steps, warmup, 6e-4, final)
        expected = llmc_lr(schedule, step, steps, warmup, 6e-4, final)
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-11), step


def test_zscores_are_over_the_last_128_values():
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
def test_descriptors_give_gpt2s_sizes(name, shape, parameters):
    config = GPT2Config()
    LIB.gpt2_descriptor(name, ctypes.byref(config))
    assert (config.max_T, config.V, config.L, config.NH, config.C) == (1024, 50257, *shape)
    P = LIB.gpt2_parameters(ctypes.byref(config))
    assert P == (parameters or P)
    assert LIB.gpt2_flops_per_token(ctypes.byref(config), 64) == 6 * P + 6 * config.L * 64 * config.C


# --- Runs of both front ends --------------------------------------------------------------------------------
def test_both_front_ends_write_the_same_bytes(whole_runs):
    by_binary, by_driver = (outputs(folder) for _, folder in whole_runs.values())
    assert sorted(by_binary) == sorted(by_driver) == [
        "DONE_00000004", "DONE_00000008", "main.log", "model_00000004.bin", "model_00000008.bin",
        "state_00000004_00000.bin", "state_00000008_00000.bin"]
    assert [name for name in by_binary if by_driver[name] != by_binary[name]] == []


def test_a_run_logs_every_step(whole_runs):
    (shown, folder), (shown_by_driver, _) = whole_runs.values()
    lines = (folder / "main.log").read_text().splitlines()
    trained = [re.fullmatch(r"s:(\d+) trl:(\d\.\d{4}) lr:(0\.\d{6}) norm:\d+\.\d\d", line) for line in lines]
    validated = [re.fullmatch(r"s:(\d+) tel:\d\.\d{4}", line) for line in lines]
    assert all(a or b for a, b in zip(trained, validated))
    assert [int(match[1]) for match in trained if match] == list(range(8))
    assert [int(match[1]) for match in validated if match] == [0, 3, 6, 8]
    rates = [float(match[3]) for match in trained if match]
    assert rates == [pytest.approx(llmc_lr("linear", step, 8, 2, 1e-3, 0.1), abs=6e-7) for step in range(8)]
    line = r"^step (\d)/8 \| loss \d\.\d+ \| lr \S+ \| norm \S+ \| .* tok/s \| .*% MFU \| .* left$"
    assert re.findall(line, shown, re.M) == list("12345678")
    assert len(re.findall(r"^---\n(\d+ ){7}\n---$", shown, re.M)) == 2     # samples
    line = r"^step 8/8 \| .* left \| loss \d\.\d+ \| lr \S+ \| norm \S+ \| .* tok/s \| \d+% MFU$"
    assert re.search(line, shown_by_driver, re.M) and "\r" not in shown_by_driver


@pytest.mark.parametrize("first, then", list(itertools.product(FLAGS, FLAGS)))
def test_a_resumed_run_ends_with_the_same_bytes(data, whole_runs, tmp_path, first, then):
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
def test_old_checkpoints_are_removed(data, tmp_path, front, flags, kept):
    run(*command(front, data, flags, tmp_path / "run"))
    names = ("DONE_{:08}", "model_{:08}.bin", "state_{:08}_00000.bin")
    expected = {name.format(step) for name in names for step in kept}
    assert set(outputs(tmp_path / "run")) == expected | {"main.log"}


def test_only_complete_and_matching_checkpoints_are_resumed(data, whole_runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole_runs["binary"][1], folder)
    pattern = str(data / "data" / "train_*.bin")
    whole = GPT2.load(folder / "model_00000008.bin")

    def restore(B=3, T=19, pattern=pattern, seed=42, step=8, model=whole):
        loader = Loader(pattern, B, T, V, True, seed)
        LIB.gpt2_restore(str(folder), step, model.handle, loader.handle, ctypes.byref(GPT2Progress()))

    restore(B=2)                     # another B is allowed
    with rejects("T 19", "this model, 18"):
        restore(T=18)
    with rejects("833 tokens", 400):
        restore(pattern=pattern.replace("train", "val"))
    with rejects("seed 42", 43):
        restore(seed=43)
    with rejects("state_00000008", "another model"):
        restore(model=random_model(4, 5, 1, 1, 4))
    with rejects("state_00000005"):
        restore(step=5)
    assert LIB.gpt2_newest(str(folder)) == 8
    (folder / "DONE_00000008").rename(folder / "DONE_00000008.tmp")
    assert (LIB.gpt2_newest(str(folder)), LIB.gpt2_newest(str(tmp_path / "none"))) == (4, -1)
    with rejects("none"):
        LIB.gpt2_checkpoint(str(tmp_path / "none"), whole.handle, None, ctypes.byref(GPT2Progress()), 1, 0, 0)


def test_the_binary_overfits_one_batch(data):
    flags = "-a 1 -b 2 -t 16 -d 32 -x 80 -l 1e-2 -u 0 -k constant -c 0 -v 0 -s 0 -g 0 -n 0"
    losses = re.findall(r"\| loss (\d+\.\d+)", run(*command("binary", data, flags)).stdout)
    assert len(losses) == 80 and float(losses[-1]) < 0.01


@both_front_ends
def test_nonfinite_steps_are_skipped_up_to_a_limit(data, tmp_path, front):
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


def test_the_limit_of_skipped_steps_is_for_consecutive_ones(data, tmp_path, monkeypatch):
    losses = iter([factor for factor in (1, math.nan, math.nan, 1, math.nan, math.nan, 1) for _ in range(2)])
    forward = GPT2.forward                   # of two batches for a step
    monkeypatch.setattr(GPT2, "forward", lambda *args, **named: forward(*args, **named) * next(losses))
    flags = "--skip-not-finite 2 --steps 7 --val-every 0 --sample-tokens 0"
    assert not train_gpt2.main(command("driver", data, flags, tmp_path / "run")[2:])
    assert GPT2.load(tmp_path / "run" / "model_00000007.bin")
    state = (tmp_path / "run" / "state_00000007_00000.bin").read_bytes()
    assert struct.unpack_from("<4q", state, 1024)[2:] == (3, 7)     # only the losses were NaN


@pytest.mark.parametrize("flag, column", [("-sl", 0), ("-sg", 1)])
def test_an_outlier_is_skipped_without_effect(tmp_path, flag, column):
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
        assert skipped[i] == (z > 0.7) or abs(z - 0.7) < 0.01     # displayed values are rounded


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@both_front_ends
def test_an_interrupted_run_saves_and_prints_how_to_resume(data, tmp_path, front, number):
    out = tmp_path / "run"
    log = out / "main.log"
    flags = {"binary": "-x 1000000 -v 0 -g 0",
             "driver": "--steps 1000000 --val-every 0 --sample-tokens 0"}[front]
    with open(tmp_path / "shown", "w") as shown, open(tmp_path / "errors", "w") as errors:
        process = subprocess.Popen(command(front, data, flags, out), stdout=shown, stderr=errors,
                                   preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))     # if nohup
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


# --- Against PyTorch ----------------------------------------------------------------------------------------
def agrees(maker, shape, expected_of):
    """Results for a random model and batch are those of expected_of(r, weights, x, y)."""
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
    expected = expected_of(r, weights, torch.tensor(x), torch.tensor(y))
    assert len(expected) == 18
    all_within(1e-5, results(model, x, y), {name: padded(name, tensor) for name, tensor in expected.items()})


@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1, 1, 1), (7, 2, 3, 5, 1, 3, 7), (50, 127, 2, 3, 5, 2, 48), (49, 128, 1, 1, 64, 3, 49),
    (97, 129, 2, 2, 16, 1, 97), (130, 300, 1, 4, 80, 1, 130), (128, 1700, 1, 1, 80, 2, 128),
    (9, 300, 4, 7, 3, 21, 3)])
def test_odd_shapes_agree_with_torch(maker, shape):
    agrees(maker, shape, lambda r, weights, x, y: maker.run(maker.GPT2(r, weights), x, y))


def test_a_model_agrees_with_transformers(maker):
    transformers = pytest.importorskip("transformers")
    agrees(maker, (33, 200, 2, 3, 12, 2, 31), functools.partial(maker.run_transformers, transformers))


# --- GPT-2 itself -------------------------------------------------------------------------------------------
@pytest.mark.skipif("GPT2_QUICK" in os.environ, reason="slow, and GPT2_QUICK is set")
@pytest.mark.skipif(not os.environ.get("CI"), reason="takes half a minute; run with CI=1 in the environment")
def test_d12_takes_the_same_step_in_both_front_ends(tmp_path):
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
