#!/usr/bin/env python3
"""Uses the library with models and batches of more than 2^31 elements or bytes, and verifies the results.

    make && python3 dev/fuzz/sizes.py              everything that memory allows: a few minutes
    python3 dev/fuzz/sizes.py xl                   a model of GPT-2 XL's shape, in a sparse file
    python3 dev/fuzz/sizes.py logits batch         more than 2^31 logits; more than 2^31 activations

A product of sizes that overflows accesses the wrong memory: results then differ from those of a small part,
which are computed in the same run, or from a formula. The status is 1 if they do. With traps on signed
overflow:

    F="-fsanitize=signed-integer-overflow,pointer-overflow,shift,float-cast-overflow,bounds"
    mkdir -p build/trap && make BUILD=build/trap CC=clang OPENMP=0 EXTRA="$F -fsanitize-trap=all"
    GPT2_LIBRARY=build/trap/libgpt2.so python3 dev/fuzz/sizes.py

Needs 12 GB of memory; the tests verify the sizes themselves and XL's file.
"""
import argparse
import ctypes
import math
import mmap
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, GPT2Config  # noqa: E402

XL = (1024, 50257, 48, 25, 1600)


def int32s(*values):
    return (ctypes.c_int32 * len(values))(*values)


def sparse_xl(path):
    """A model file of GPT-2 XL as one hole, 6.2 GB."""
    shapes = train_gpt2.tensor_shapes(GPT2Config(*XL), train_gpt2.library("cpu"))
    with open(path, "wb") as file:
        file.write(train_gpt2.header(20240326, 3, *XL, 50304))
        file.truncate(1024 + 4 * sum(map(math.prod, shapes.values())))


def put(model, name, at, value):
    number = ctypes.c_float(value)
    model.lib.gpt2_set(model.handle, list(model.shapes).index(name), 0, at, 1, ctypes.byref(number))


def got(model, name, at):
    number = ctypes.c_float()
    model.lib.gpt2_get(model.handle, list(model.shapes).index(name), 0, at, 1, ctypes.byref(number))
    return number.value


def xl():
    """The first and the last element of each tensor, and the loss of 8 tokens by a formula."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "xl.bin")
        sparse_xl(path)
        with GPT2.load(path, "cpu") as model:
            ends = [(name, at) for name, shape in model.shapes.items() for at in (0, math.prod(shape) - 1)]
            for number, (name, at) in enumerate(ends):
                put(model, name, at, number + 1)
            right = [got(model, name, at) for name, at in ends] == [*range(1, len(ends) + 1)]
            for name, at in ends:
                put(model, name, at, 0)
            # Logits are 7 for token 50256, else 0: the sum of 50,256 equal terms rounds predictably.
            put(model, "lnfb", 1599, 7)
            put(model, "wte", 50256 * 1600 + 1599, 1)
            loss = model.forward([[50256, 0, 1, 2, 3, 4, 5, 6]], [[50256] * 8], train=False)
            expected = math.log(50256 + math.exp(7)) - 7
            return right and abs(loss - expected) < 3e-4, f"loss {loss:.6f}, by the formula {expected:.6f}"


def logits():
    """V 65,536 and B T 33,000: 2.16e9 logits; those of the last row are those of the row alone."""
    V, T, B = 65536, 1000, 33
    with GPT2(GPT2Config(T, V, 1, 1, 4), seed=1, device="cpu") as model:
        rows = [[(b * 7919 + 31 * t) % V for t in range(T)] for b in range(B)]
        x = int32s(*(token for row in rows for token in row))
        out = mmap.mmap(-1, 4 * B * T * V)
        address = ctypes.addressof(ctypes.c_char.from_buffer(out))
        model.lib.gpt2_logits(model.handle, x, B, T, 0, address)
        whole = ctypes.string_at(address + 4 * (B - 1) * T * V, 4 * T * V)
        model.lib.gpt2_logits(model.handle, int32s(*rows[-1]), 1, T, 0, address)
        return whole == ctypes.string_at(address, 4 * T * V), "bits compared"


def batch():
    """L 36, C 64, B T 91,136: 2.17e9 activations; loss and gradient of equal rows are those of one."""
    T, B, config = 1024, 89, GPT2Config(1024, 64, 36, 1, 64)
    row = [(31 * t * t + t) % 64 for t in range(T + 1)]
    losses, gradients = [], []
    for rows in (1, B):
        with GPT2(config, seed=1, device="cpu") as model:
            losses.append(model.forward([row[:-1]] * rows, [row[1:]] * rows))
            of_each = ctypes.cast(losses_of(model), ctypes.POINTER(ctypes.c_float))
            alike = all(of_each[b * T + t] == of_each[t] for b in range(rows) for t in range(0, T, 7))
            model.backward()
            gradients.append(b"".join(bytes(model.get(name, "grad")) for name in model.shapes))
    one, all_rows = (memoryview(g).cast("f") for g in gradients)
    difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(one, all_rows)) / sum(a * a for a in one))
    right = alike and abs(losses[0] - losses[1]) < 1e-5 and difference < 1e-4
    return right, f"loss {losses[0]:.6f} and {losses[1]:.6f}, gradients differ by {difference:.1e}"


def losses_of(model):
    function = model.lib.gpt2_losses
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    return function(model.handle)


PARTS = {xl: 8e9, logits: 11e9, batch: 12e9}     # bytes of memory, page cache included


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = {part.__name__: part for part in PARTS}
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(names)} (all)")
    args = parser.parse_args()
    for name in set(args.parts) - set(names):
        parser.error(f"there is no part {name!r}")
    wrong = 0
    print("| part | what was computed | result |\n|---|---|---|", flush=True)
    for name in args.parts or names:
        part, begun = names[name], time.perf_counter()
        if train_gpt2.memory_there() < PARTS[part]:
            result = f"not tried: needs {PARTS[part] / 1e9:.0f} GB of memory"
        else:
            right, what = part()
            wrong += not right
            result = f"{'right' if right else 'WRONG'} ({what}) in {time.perf_counter() - begun:.0f} s"
        print(f"| {name} | {' '.join(part.__doc__.split())} | {result} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
