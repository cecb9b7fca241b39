"""Tests of generation, HellaSwag, and the commands sample and eval."""
import ctypes
import itertools
import json
import math
import random
import re
import statistics
import struct
import subprocess
import sys

import pytest

import train_gpt2
from conftest import (driver, example, header, hellaswag_file, HERE, LIB, random_model, rejects,
                      reports_error)
from train_gpt2 import GPT2, GPT2Config


# --- Generation ---------------------------------------------------------------------------------------------
def draws(model, tokens, n, temperature, top_k=0, top_p=1.0):
    """n tokens that continue the same prompt."""
    rng = ctypes.c_uint64(1)
    ids = (ctypes.c_int32 * len(tokens))(*tokens)
    place = (model.handle, ids, len(tokens), temperature, top_k, top_p, None, ctypes.byref(rng))
    return [LIB.gpt2_next(*place) for _ in range(n)]


def test_temperature_0_is_greedy():
    model = random_model(12, 31, 2, 2, 8)
    text = [5]
    for token in model.generate(text.copy(), 20, temperature=0):
        first = max(len(text) - 12 + 5, 0) // 6 * 6     # max_T is 12: the last 7 to 12 tokens count
        last = model.logits([text[first:]]).tolist()[0][-1]
        assert token == last.index(max(last))
        text.append(token)
    assert draws(model, text, 9, 0) == draws(model, text, 9, 1e-6) == draws(model, text, 9, 1.0, top_k=1)


def test_top_k_allows_the_k_most_probable():
    model = random_model(12, 31, 2, 2, 8, spread=0.1)
    last = model.logits([[3, 1, 4]]).tolist()[0][-1]
    for k in (2, 5, 31, 99):
        most_probable = sorted(range(31), key=lambda i: -last[i])[:k]
        assert set(draws(model, [3, 1, 4], 800, 1.0, k)) == set(most_probable)


def test_top_p_allows_the_smallest_set():
    model = random_model(12, 31, 2, 2, 8, spread=0.1)
    weights = [math.exp(logit) for logit in model.logits([[3, 1, 4]]).tolist()[0][-1]]
    most_probable = sorted(range(31), key=lambda i: -weights[i])

    def fewest(count, share):
        total, chosen = sum(weights[i] for i in most_probable[:count]), []
        while sum(weights[i] for i in chosen) < share * total:
            chosen.append(most_probable[len(chosen)])
        return set(chosen)

    for top_k, top_p in ((0, 0.1), (0, 0.5), (0, 0.93), (9, 0.5), (9, 0.99)):
        assert set(draws(model, [3, 1, 4], 900, 1.0, top_k, top_p)) == fewest(top_k or 31, top_p)
    assert set(draws(model, [3, 1, 4], 50, 1.0, 0, 0.0)) == {most_probable[0]}


def test_cached_keys_and_values_change_nothing():
    """Texts with and without a common prefix, a batch and a changed parameter in between: the logits of the
    last token are those of a model without a cache."""
    kept, anew = random_model(24, 41, 2, 2, 16), random_model(24, 41, 2, 2, 16)
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
        expected = anew.logits([text]).tolist()[0][-1]
        assert list(ours) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_frequencies_match_the_softmax(temperature):
    model = random_model(12, 11, 1, 2, 8, spread=0.4)
    shares = [math.exp(logit / temperature) for logit in model.logits([[3, 1, 4]]).tolist()[0][-1]]
    n = 4000
    drawn = draws(model, [3, 1, 4], n, temperature)
    expected = [n * share / sum(shares) for share in shares]
    chi = sum((drawn.count(i) - e) ** 2 / e for i, e in enumerate(expected) if e >= 5)
    assert chi < 40                  # at most ten degrees of freedom: one seed in 60,000 exceeds it


def test_a_seed_determines_the_text():
    model = random_model(12, 31, 1, 2, 8, spread=0.1)
    first, again, other = (list(model.generate([1], 50, rng=seed)) for seed in (1, 1, 2))
    assert first == again != other
    rng = ctypes.c_uint64(1)
    part = list(model.generate([1], 20, rng=rng))
    assert part + list(model.generate([1] + part, 30, rng=rng)) == first


# --- HellaSwag ----------------------------------------------------------------------------------------------
def verdicts(text, nats):
    """How often the right completion has the lowest sum of nats(tokens), and the lowest mean."""
    right = [0, 0]
    for context, completions, label in text:
        sums = [sum(nats(context + completion)[-len(completion):]) for completion in completions]
        means = [total / len(completion) for total, completion in zip(sums, completions)]
        for k, scores in enumerate((sums, means)):
            right[k] += scores.index(min(scores)) == label
    return right


def test_hellaswag_counts_the_most_probable_completions(tmp_path):
    model = random_model(24, 41, 2, 2, 16)
    text = hellaswag_file(tmp_path / "h.bin", 41, 60, longest=40)     # some contexts are truncated

    def nats(tokens):
        tokens = tokens[-25:]
        rows = model.logits([tokens[:-1]]).tolist()[0]
        return [math.log(sum(map(math.exp, row))) - row[token] for row, token in zip(rows, tokens[1:])]

    # a context is cut to fit the longest completion of its example
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
    expected = maker.GPT2(r, weights)
    model = GPT2(GPT2Config(64, 131, 2, 2, 32))
    for name, weight in weights.items():
        numbers = weight.flatten().tolist()
        model.set(name, numbers + [0.0] * ((256 - 131) * 32 if name == "wte" else 0))
    text = hellaswag_file(tmp_path / "h.bin", 131, 50, longest=50)

    def nats(tokens):
        x, y = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
        with torch.no_grad():
            logits = expected(x, y)[0]
        return torch.nn.functional.cross_entropy(logits[0], y[0], reduction="none").tolist()

    assert list(model.hellaswag(tmp_path / "h.bin", 0, 50)) == [*verdicts(text, nats), 50]


def test_a_damaged_hellaswag_file_is_rejected(tmp_path):
    model, path = random_model(24, 41, 1, 2, 8), tmp_path / "h.bin"
    hellaswag_file(path, 41, 3, longest=9)
    whole = path.read_bytes()
    for at, value in ((0, 1), (1, 11), (1, 5000), (3, 4), (4, 3), (5, 0), (5, 60000), (6 + whole[1034], 0)):
        broken = bytearray(whole)
        broken[1024 + 2 * at:1026 + 2 * at] = struct.pack("<H", value)
        path.write_bytes(broken)
        with rejects(path):
            model.hellaswag(path, 0, 3)
    for size in (1023, 1030, len(whole) - 1):
        path.write_bytes(whole[:size])
        with rejects(path):
            model.hellaswag(path, 0, 3)
    hellaswag_file(path, 99, 3, longest=9)
    first, second = example(0, 0, [1], [[2]] * 4), example(1, 0, [1, 2], [[3, 41]] * 4)
    path.write_bytes(header(20240522, 1, 2) + first + second)
    with rejects(path, "example '1': token", "is 41, expected 0 to 40"):
        model.hellaswag(path, 0, 3)


# --- Sampling and evaluation --------------------------------------------------------------------------------
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
    assert "longer than the model's context of 16 tokens; the last 8 or more were used" in whole.stderr
    stop = text[3:5]
    assert sample("--tokens", 60, "--stop", stop).stdout == prompt + text.split(stop)[0] + "\n"
    words = [sys.executable, HERE / "train_gpt2.py", "sample", path, "--prompt", "-", "--tokens", "60"]
    by_stdin = subprocess.run(words, input=prompt, capture_output=True, text=True, errors="replace")
    assert by_stdin.stdout == whole.stdout
    three = sample("--tokens", 9, "--num-samples", 3).stdout
    each = [sample("--tokens", 9, "--seed", 42 + i).stdout for i in range(3)]
    assert three == "---\n".join(each) and len(set(each)) == 3


def test_a_conversation_keeps_its_context(byte_model):
    """Each answer continues all previous lines and answers; the end of input ends the session."""
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
    assert f"{rows * T:,} tokens in sequences of 16" in shown and f"{rows * T:,} bytes" in shown
    driver("prepare", tmp_path / "my.txt", "--out", tmp_path / "shards", "--val-fraction", 0)
    assert driver("eval", path, "--data", tmp_path / "shards" / "train_*.bin").stdout == shown
    reports_error(driver("eval", path, status=1), "--data")


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
            assert f"accuracy {right / count:.4f}, by the mean over tokens {by_length / count:.4f}" in shown
            assert f"over {count} examples" in shown
    (tmp_path / "h.jsonl").write_text('{"ctx": "a", "endings": ["b"]}\n')
    reports_error(driver("eval", path, "--hellaswag", tmp_path / "h.jsonl", status=1), "h.jsonl: line 1")
