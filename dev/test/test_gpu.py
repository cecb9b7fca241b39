"""Tests of train_gpt2.cu, on an emulated GPU or a real one."""
import array
import functools
import json
import math
import os
import pathlib
import re
import signal

import pytest

import train_gpt2
from conftest import (as_bytes, command, each_reference, HERE, make_data, one_sentence, open_reference,
                      outputs, random_model, REFERENCES, reject_wrong_adamw, relative, results, run,
                      TENSORS, tensors, token_rows, V)
from train_gpt2 import GPT2, GPT2Config


# GPT2_GPU_BUILD=DIR has the builds under test: those of `make emulated`, or on a machine with a GPU the real
# ones (see dev/cuda/on_gpu.sh). dev/cuda/emulate.h lists what the emulation detects.
GPU_BUILD = pathlib.Path(os.environ.get("GPT2_GPU_BUILD", HERE / "build" / "emulated")).resolve()
EMULATED = (GPU_BUILD / "selftest").exists()
needs_gpu_build = pytest.mark.skipif(not (GPU_BUILD / "libgpt2cu_fp32.so").exists(),
                                     reason="needs `make emulated` (a C++ compiler), or a GPU's build")
needs_emulation = pytest.mark.skipif(not EMULATED, reason="needs `make emulated` (a C++ compiler)")
each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16"])
on_hopper = pytest.param("hopper", marks=needs_emulation)     # bf16 with wgmma, for heads of 64
each_code = pytest.mark.parametrize("precision", ["fp32", "bf16", on_hopper])
SUFFIX = {"fp32": "_fp32", "bf16": "", "hopper": "_hopper"}
BF16 = json.loads((HERE / "dev" / "cuda" / "bf16_errors.json").read_text())


load_library = train_gpt2.library.__wrapped__      # on_gpu has another


def gpu_file(name, precision):
    stem, dot, extension = name.partition(".")
    return GPU_BUILD / f"{stem}{SUFFIX[precision]}{dot}{extension}"


@functools.lru_cache(maxsize=None)
def gpu_library(precision):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_LIBRARY", str(gpu_file("libgpt2cu.so", precision)))
        return load_library("cuda")


@pytest.fixture
def on_gpu(precision, monkeypatch):
    """Within the test, models are on the GPU."""
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library(precision))


def bf16_limits(name):
    """Tolerance of bf16 against a reference: a little more than the error of PyTorch in bf16. Single numbers
    may be close by chance, so theirs is the largest of all references."""
    limits = {row: BF16["factor"] * error for row, error in BF16["errors"][name].items()}
    for row in ("loss", "losses"):
        limits[row] = BF16["factor"] * max(errors[row] for errors in BF16["errors"].values())
    return limits


@needs_gpu_build
@each_code
@each_reference
def test_gpu_logits_loss_and_gradients_match_the_reference(name, precision, on_gpu):
    model, x, y, expected = open_reference(name)
    ours = results(model, x, y)
    limits = dict.fromkeys(expected, 1e-5)
    if precision != "fp32":
        limits = bf16_limits(name)
    errors = {row: relative(ours[row], expected[row]) for row in expected}
    assert {row: error for row, error in errors.items() if not error <= limits[row]} == {}


@needs_gpu_build
@each_precision
@each_reference
def test_gpu_losses_of_ten_adamw_steps_match_the_reference(name, precision, on_gpu):
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
def test_a_gpu_update_rejects_what_would_give_nan(precision, on_gpu):
    reject_wrong_adamw()


@needs_gpu_build
@each_code
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1, 1, 1, 1), (130, 127, 2, 2, 64, 2, 130), (64, 300, 1, 2, 64, 3, 64),
    (65, 129, 1, 4, 32, 1, 65), (200, 60, 1, 1, 64, 1, 193), (400, 60, 1, 1, 64, 1, 333),
    (70, 60, 1, 2, 128, 1, 70), (40, 1700, 1, 1, 80, 2, 33), (8, 9000, 1, 1, 8, 1, 8),
    (9, 300, 4, 7, 3, 21, 3)])
def test_gpu_results_match_the_cpu(shape, precision, monkeypatch):
    max_T, vocabulary, L, NH, hs, B, T = shape
    spread = min(0.2, 1 / math.sqrt(NH * hs))
    ours = random_model(max_T, vocabulary, L, NH, NH * hs, spread)
    x, y = token_rows(B, T, vocabulary)
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library(precision))
    reference = GPT2(ours.config)
    for name in TENSORS:
        reference.set(name, ours.get(name))
    expected, found = results(ours, x, y), results(reference, x, y)
    worst = {row: max(errors[row] for errors in BF16["errors"].values()) for row in expected}
    limits = dict.fromkeys(expected, 1e-5)
    if precision != "fp32":
        limits = {row: 2 * worst[row] for row in expected}
    scale = max(math.sqrt(math.fsum(v * v for v in expected[row])) for row in TENSORS)
    for row, limit in limits.items():
        norm = math.sqrt(math.fsum(v * v for v in expected[row]))
        assert relative(found[row], expected[row]) <= limit or norm < 1e-4 * scale, row


def gpu_run(data, precision, out, flags="", resume=False, **environment):
    """A run of the GPU binary, and its files."""
    words = command("binary", data, flags, out, resume)
    run(gpu_file("train_gpt2cu", precision), *words[1:], **environment)
    return outputs(out)


@pytest.fixture(scope="module")
def gpu_runs(data, tmp_path_factory):
    """By precision, the files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("gpu")
    return functools.lru_cache(lambda precision: gpu_run(data, precision, folder / precision))


def started_by(files, folder):
    """A folder with only the checkpoint of step 4, as of a run that was stopped there."""
    for name in ("DONE_00000004", "model_00000004.bin", "state_00000004_00000.bin"):
        (folder / name).write_bytes(files[name])
    (folder / "main.log").write_bytes(files["main.log"].partition(b"s:4 ")[0])
    return folder


EACH_ORDER = [{}, {"GPT2_EMULATE_ORDER": "descending"}, {"GPT2_EMULATE_STREAMS": "at-once"}]


@needs_gpu_build
@each_precision
@pytest.mark.parametrize("environment", EACH_ORDER)
def test_a_gpu_run_is_reproducible(data, gpu_runs, tmp_path, precision, environment):
    again = gpu_run(data, precision, tmp_path / "run", **environment)
    whole = gpu_runs(precision)
    assert sorted(again) == sorted(whole) and len(whole) == 7
    assert [name for name in whole if again[name] != whole[name]] == []


@needs_gpu_build
@pytest.mark.parametrize("precision", ["bf16", on_hopper])
def test_a_gpu_run_with_heads_of_64_channels_is_reproducible(tmp_path, precision):
    """Head size 64 has attention kernels of its own."""
    make_data(tmp_path, GPT2Config(160, V, 1, 2, 128))
    flags = "-b 2 -t 150 -d 300 -x 2 -v 0 -g 0 -n 2"
    whole, *others = (gpu_run(tmp_path, precision, tmp_path / str(i), flags, **environment)
                      for i, environment in enumerate(EACH_ORDER))
    assert len(whole) == 4
    assert [name for name in whole for other in others if other[name] != whole[name]] == []


@needs_gpu_build
@each_precision
def test_a_resumed_gpu_run_ends_with_the_same_bytes(data, gpu_runs, tmp_path, precision):
    whole = gpu_runs(precision)
    resumed = gpu_run(data, precision, started_by(whole, tmp_path), resume=True)
    assert [name for name in whole if resumed[name] != whole[name]] == []


def parameters_of(contents):
    """The parameters of a model file of version 3."""
    return array.array("f", contents[1024:])


@needs_gpu_build
@each_precision
@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_moves_between_devices(data, whole_runs, gpu_runs, tmp_path, precision, first):
    cpu = outputs(whole_runs["binary"][1])
    if first == "cpu":
        ended = gpu_run(data, precision, started_by(cpu, tmp_path), resume=True)
    else:
        started_by(gpu_runs(precision), tmp_path)
        run(*command("binary", data, "", tmp_path, resume=True))
        ended = outputs(tmp_path)
    limit, limit_of_path, limit_of_loss = (1e-5, 0.01, 2e-4) if precision == "fp32" else (0.01, 0.3, 0.02)
    name = "model_00000008.bin"
    start = parameters_of((data / "model.bin").read_bytes())
    ours, expected = ([a - b for a, b in zip(parameters_of(files[name]), start)] for files in (ended, cpu))
    assert relative(parameters_of(ended[name]), parameters_of(cpu[name])) <= limit
    assert relative(ours, expected) <= limit_of_path
    logs = [re.findall(r"(s:\d+ t[re]l:)(\S+)", files["main.log"].decode()) for files in (ended, cpu)]
    assert [step for step, _ in logs[0]] == [step for step, _ in logs[1]] and len(logs[0]) == 12
    for (_, a), (_, b) in zip(*logs):
        assert float(a) == pytest.approx(float(b), abs=limit_of_loss)


@needs_gpu_build
@each_precision
def test_gpu_recomputation_gives_the_same_activations(data, gpu_runs, tmp_path, precision):
    whole = gpu_runs(precision)
    for level in "12":
        again = gpu_run(data, precision, tmp_path / level, flags=f"-r {level}")
        assert [name for name in whole if again[name] != whole[name]] == []


@needs_gpu_build
@pytest.mark.parametrize("name", ["tiny", "head64"])
@pytest.mark.parametrize("precision", ["bf16"])
def test_gpu_training_without_master_weights(name, precision, on_gpu):
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
def test_gpu_graphs_survive_evicted_plans(precision, on_gpu):
    """A graph is captured when a pass runs for the second time; no plan can be created meanwhile."""
    x, y = token_rows(2, 16, 70)

    def gradients(model):
        loss = model.forward(x, y)
        model.backward()
        grads = [bytes(model.get(name, "grad")) for name in ("wte", "qkvw", "fcb")]
        model.zero_grad()
        return loss, grads

    model = random_model(16, 70, 2, 2, 32)
    first = gradients(model)
    for T in range(1, 16):                   # five plans each; 64 are kept
        model.logits([row[:T] for row in x])
    assert [gradients(model) for _ in range(3)] == [first] * 3


@needs_gpu_build
def test_gpu_and_cpu_generate_the_same_text(monkeypatch):
    ours = random_model(24, 61, 2, 2, 32)
    monkeypatch.setattr(train_gpt2, "library", lambda device="auto": gpu_library("fp32"))
    expected = GPT2(ours.config)
    for name in TENSORS:
        expected.set(name, ours.get(name))
    for temperature in (0, 0.8):             # past max_T, where half of the context is dropped
        texts = [list(model.generate([1, 2, 3], 60, temperature, top_k=20)) for model in (ours, expected)]
        assert texts[0] == texts[1] and len(set(texts[0])) > 5


@needs_emulation
@each_precision
def test_a_gpu_with_too_little_memory_is_reported(data, tmp_path, precision):
    for memory in ("1000", "33700000", "34500000"):     # 32 MiB are the workspace of cuBLASLt
        done = run(gpu_file("train_gpt2cu", precision), *command("binary", data, "", tmp_path / memory)[1:],
                   status=1, GPT2_EMULATE_MEMORY=memory)
        one_sentence(done.stderr, "memory")


@needs_emulation
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_the_emulation_passes_its_self_test(order):
    assert run(GPU_BUILD / "selftest", "results", GPT2_EMULATE_ORDER=order).stdout == "ok\n"


@needs_emulation
def test_the_profile_lists_every_kernel_with_its_bound():
    lines = run(GPU_BUILD / "profile", REFERENCES / "head64_model.bin", "2", "64").stdout.splitlines()[2:]
    bounds = {line.split()[0]: line.split()[-1] for line in lines if "_kernel" in line}
    source = (HERE / "train_gpt2.cu").read_text()
    kernel = r"^(?:template <.*> )?(?:__global__ void|FLASH_KERNEL\(\w+\))\s(\w+)\("
    kernels = set(re.findall(kernel, source, re.M))
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
def test_the_emulation_detects_mistakes(name, order):
    status = -signal.SIGSEGV if name.startswith("host_") and "pointer" not in name else 0
    done = run(GPU_BUILD / "selftest", name, status=status, GPT2_EMULATE_ORDER=order)
    assert re.search(MISTAKES[name], done.stdout + done.stderr), done.stdout + done.stderr


@needs_emulation
def test_the_emulation_detects_a_missing_barrier():
    shown = {name: {run(GPU_BUILD / "selftest", name, GPT2_EMULATE_ORDER=order).stdout
                    for order in ("ascending", "descending")} for name in ("no_barrier", "with_barrier")}
    assert len(shown["no_barrier"]) == 2 and len(shown["with_barrier"]) == 1
