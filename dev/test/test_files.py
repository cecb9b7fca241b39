"""Tests of token shards and the loader, model files, and initial values."""
import array
import ctypes
import errno
import itertools
import math
import os
import pathlib
import random
import statistics
import struct

import pytest

import train_gpt2
from conftest import (as_bytes, damaged, header, hellaswag_file, LIB, MATRICES, random_model, rejects,
                      SCALES, shards, TENSORS, tensors, unsealed)
from train_gpt2 import GPT2, GPT2Config, GPT2Progress, Loader


# --- Shards and the loader; tokens that count up show their position ----------------------------------------
def batch(loader):
    x, y = loader.next()
    return [list(row) for row in x], [list(row) for row in y]


def sequential(token_lists, B, T):
    """The batches of an epoch in the order of karpathy/llm.c."""
    for tokens in map(list, token_lists):
        for at in range(0, len(tokens) - B * T, B * T):
            rows = range(at, at + B * T, T)
            yield [tokens[i:i + T] for i in rows], [tokens[i + 1:i + T + 1] for i in rows]


@pytest.mark.parametrize("B, T", [(3, 4), (1, 12), (12, 1), (1, 1)])
@pytest.mark.parametrize("sizes", [[25], [24], [13], [43, 13, 5, 30], [12, 100, 1, 0, 64], [200, 13, 13]])
def test_an_unshuffled_epoch_is_sequential(tmp_path, sizes, B, T):
    lists = [range(1000 * i, 1000 * i + size) for i, size in enumerate(sizes)]
    loader = Loader(shards(tmp_path, *lists), B, T, 65536)
    expected = list(sequential(lists, B, T))
    assert (loader.shards, loader.tokens, loader.batches) == (len(sizes), sum(sizes), len(expected))
    for _ in range(2):               # next epoch
        assert [batch(loader) for _ in expected] == expected
    batch(loader)
    loader.reset()
    assert batch(loader) == expected[0]


def test_a_shuffled_epoch_has_every_sequence_once(tmp_path):
    B, T = 5, 7                      # 11 T tokens: ten rows at any offset; B T + 1: one batch at offset 0
    ranges = [range(1000 * i, 1000 * i + n) for i, n in enumerate((11 * T, B * T + 1, 11 * T, 2 * T))]
    pattern = shards(tmp_path, *ranges)

    def epochs(seed):
        """The start of each row of each epoch."""
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
    assert len({tuple(start // 1000 for start in starts) for starts in seen}) > 1     # order of shards
    assert len({min(starts) for starts in seen}) > 1                                   # offset of rows


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_restored_loader_resumes_at_any_position(tmp_path, shuffle):
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
def test_a_token_of_another_vocabulary_is_rejected(tmp_path, shard, at):
    lists = [[3] * 26, [3] * 26]
    lists[shard][at] = 50
    loader = Loader(shards(tmp_path, *lists), 5, 5, 50)
    with rejects(f"train_00{shard}.bin': token {at} is 50, expected less than V = 50"):
        for _ in range(2):
            loader.next()


def test_more_than_2_to_the_31_bytes_of_tokens_are_read(tmp_path):
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
    assert len({row.index(mark) for row, mark in zip(rows, marks)}) == 1     # all rows have one offset
    assert max(marks) * T > 2**30    # two bytes per token


def test_invalid_loaders_are_rejected(tmp_path):
    for sizes, B, T in (([12], 3, 4), ([12, 5, 0], 3, 4), ([1], 1, 1), ([0], 1, 1), ([0, 1], 1, 1)):
        pattern = shards(tmp_path / f"{sizes}", *map(range, sizes)).replace("[", "[[]")
        with rejects(train_gpt2.counted(sum(sizes), "token"), B * T + 1):
            Loader(pattern, B, T, 65536)
    pattern = shards(tmp_path, range(40))
    for B, T, V in ((0, 4, 9), (4, 0, 9), (4, 4, 0), (-1, 4, 9)):
        with rejects(f"B {B}, T {T}, V {V}"):
            Loader(pattern, B, T, V)
    with rejects("none", "prepare"):
        Loader(str(tmp_path / "none*.bin"), 1, 4, 9)
    with rejects(tmp_path, "regular file"):
        Loader(str(tmp_path), 1, 4, 9)
    for other in (range(20), range(1, 41)):
        shards(tmp_path, range(40))
        loader = Loader(pattern, 1, 4, 100)
        loader.next()
        shards(tmp_path, other)
        os.utime(tmp_path / "train_000.bin", (1, 1))     # two writes may be within one tick of the clock
        with rejects(f"{len(other)} tokens", 40, "changed"):
            loader.next()


def test_evaluate_averages_the_first_batches(tmp_path):
    model = random_model(8, 40, 1, 2, 8)
    loader = Loader(shards(tmp_path, range(40), range(7)), 2, 5, 40)
    losses = [model.forward(*loader.next(), train=False) for _ in range(3)]
    for n, expected in ((1, losses[:1]), (2, losses[:2]), (3, losses), (99, losses)):
        assert model.evaluate(loader, n) == pytest.approx(statistics.fmean(expected), rel=1e-6)


# --- Files and initial values -------------------------------------------------------------------------------
def test_a_model_file_is_a_header_and_the_tensors_in_order(tmp_path):
    model = random_model(7, 131, 2, 3, 9)
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
    model = random_model(7, 131, 2, 2, 8)
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
    """By kind, a valid file and the function that opens it."""
    folder = tmp_path_factory.mktemp("good")
    shards(folder, range(40))
    model = random_model(7, 5, 2, 2, 8)
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
def test_a_damaged_file_is_rejected_by_name(good_files, tmp_path, kind, damage):
    good, opens = good_files[kind]
    opens(str(good))
    bad = tmp_path / good.name
    bad.write_bytes(damage(good.read_bytes()))
    with rejects(bad):
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
def test_unreadable_paths_are_rejected(good_files, tmp_path, kind, make, words):
    good, opens = good_files[kind]
    make(tmp_path / good.name)
    root = os.geteuid() == 0 and make == make_unreadable
    if root:                             # root may read everything
        os.seteuid(65534)
    try:
        with rejects(tmp_path / good.name, words if kind != "shard" else ""):     # glob may skip it
            opens(str(tmp_path / good.name))
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("kind", ["model", "state"])
def test_checksums_detect_changed_files(good_files, tmp_path, kind):
    good, opens = good_files[kind]
    path, whole, draw = tmp_path / good.name, good.read_bytes(), random.Random(1)

    def reject(broken):
        path.write_bytes(broken)
        with rejects(path, "checksum"):
            opens(str(path))

    bits = range(8 * 4, 8 * len(whole))     # the magic number is checked first
    for bit in (*draw.sample(bits, 200), 8 * 1016, 8 * 1024, bits[-1]):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        reject(broken)
    for _ in range(50):                      # two blocks swapped
        a, b = (slice(at, at + 64) for at in draw.sample(range(1024, len(whole) - 64, 64), 2))
        broken = bytearray(whole)
        broken[a], broken[b] = whole[b], whole[a]
        if broken != whole:
            reject(broken)
    path.write_bytes(unsealed(whole))        # of another program, without a checksum
    opens(str(path))


def test_a_state_with_invalid_counts_is_rejected(good_files, tmp_path):
    good, opens = good_files["state"]
    path = tmp_path / good.name
    for word in (0, 2, 3, 266):          # step, values in the windows, updates
        for value in (-1, -2**63, 2**62, 2**63 - 1):
            contents = bytearray(unsealed(good.read_bytes()))
            struct.pack_into("<q", contents, 1024 + 8 * word, value)
            path.write_bytes(contents)
            with rejects(path, value):
                opens(str(path))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_continues_from_any_position(tmp_path, shuffle):
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


def test_a_reference_of_another_shape_is_rejected(good_files, tmp_path):
    good, opens = good_files["reference"]
    path, contents = tmp_path / "reference.bin", good.read_bytes()
    for B, T in ((2**31 - 1, 2**31 - 1), (-1, -1), (0, 0), (2**30, 4), (-2**31, -2**31)):
        path.write_bytes(damaged(damaged(contents, 2, B), 3, T))
        with rejects(path, f"B {B}, T {T}"):
            opens(str(path))
    path.write_bytes(header(20240327, 2, 1, 8) + contents[1024:] + bytes(4 * 6 * 7))
    with rejects(path, "B 1, T 8"):      # a model of 7 positions
        opens(str(path))
    for at, token in ((0, -1), (1, 5), (2, 2**31 - 1), (3, -2**31)):
        path.write_bytes(damaged(contents, 256 + at, token))
        with rejects(path, f"token {at % 2} of {'xy'[at // 2]} is {token}, expected 0 to 4"):
            opens(str(path))


@pytest.mark.parametrize("end", [-1, -2, -2**31, 3, 2**31 - 1])
def test_a_table_may_lack_end_of_text(tmp_path, end):
    (tmp_path / "tokenizer.bin").write_bytes(header(20240328, 2, 3, end) + b"\1a\0\2bc")
    assert train_gpt2.Tokenizer.load(tmp_path / "tokenizer.bin", LIB).end == -1


def test_initial_values_match_gpt2():
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
