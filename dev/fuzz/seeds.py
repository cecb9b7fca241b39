"""Writes seed inputs for dev/fuzz/readers.c, by the project's own writers.

    python3 dev/fuzz/seeds.py FOLDER        FOLDER/model/..., FOLDER/state/... and so on

Small valid files of every kind that a reader accepts. Their sizes match `shape` and the loader in readers.c.
"""
import ctypes
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2, GPT2Config, GPT2Progress, Loader  # noqa: E402

READERS = "model state shards tokenizer hellaswag reference strings".split()     # as in readers.c
SHAPE = GPT2Config(8, 11, 1, 1, 2)
B, T, SEED, STEP = 2, 3, 9, 7


def reference(model):
    """A reference for gpt2_check, of one batch; see dev/reference."""
    x, y = [[1, 2, 10]], [[2, 10, 0]]
    logits = model.logits(x)
    loss = ctypes.c_float(model.forward(x, y))
    model.backward()
    ids = (ctypes.c_int32 * 6)(*x[0], *y[0])
    parts = [ids, logits, loss, *(model.get(name, "grad") for name in model.shapes)]
    return b"".join(bytes(part) for part in (train_gpt2.header(20240327, 2, 1, 3), *parts))


def unsealed(path):
    """A file without the checksum in its header, because of which any change would be rejected."""
    contents = path.read_bytes()
    return contents[:1016] + bytes(8) + contents[1024:]


def seeds(folder):
    """Yields the reader, its three bytes of options and the contents of a file."""
    path = folder / "file.bin"
    for config in (SHAPE, GPT2Config(3, 130, 2, 2, 2), GPT2Config(1, 1, 1, 1, 1)):
        for version in (3, 5):
            GPT2(config).save(path, version)
            yield "model", (0, 0, 0), unsealed(path)
    model = GPT2(SHAPE)
    for tokens in (b"", b"\1\0" * 2, b"\1\0\2\0\x0a\0\0\0" * 10, b"\xff\xff\1\0" * 30):
        train_gpt2.write_shard(path, memoryview(tokens).cast("H"))
        for options in ((0, 0, 0), (5, 1, 2), (7, 3, 7), (14, 0, 3), (15, 1, 1)):
            yield "shards", options, path.read_bytes()
    train_gpt2.write_shard(folder / "shard.bin", memoryview(b"\1\0\2\0\3\0\0\0" + bytes(72)).cast("H"))
    loader = Loader(str(folder / "shard.bin"), B, T, SHAPE.V, shuffle=True, seed=SEED)
    progress = GPT2Progress(step=STEP, rng=1)
    for given, options in ((loader.handle, (2, 0, 0)), (loader.handle, (3, 0, 0)), (None, (0, 0, 0))):
        model.lib.gpt2_checkpoint(str(folder), model.handle, given, ctypes.byref(progress), 0, 0, 0)
        yield "state", options, unsealed(folder / f"state_{STEP:08}_00000.bin")
        loader.next()
    train_gpt2.ByteTokenizer().save(path)
    yield "tokenizer", (0, 0, 0), path.read_bytes()
    train_gpt2.Tokenizer([b"", b"a", b"bc" * 127], 2).save(path)
    yield "tokenizer", (0, 0, 0), path.read_bytes()
    line = json.dumps({"ctx": "one two three", "endings": ["a", "bc", "d e", "f"], "label": 1}) + "\n"
    for count, words in ((3, 11), (1, 3), (0, 1)):
        lines = folder / "choices.jsonl"
        lines.write_text(line * count)
        train_gpt2.write_choices(path, lines, lambda text: [len(word) % words for word in text.split()])
        for options in ((0, 7, 0), (1, 1, 0)):
            yield "hellaswag", options, path.read_bytes()
    yield "reference", (0, 0, 0), reference(model)
    for text in ("d2", "d48", "cosine", "linear", "constant", "wsd", ""):
        yield "strings", (0, 0, 0), text.encode()


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for number, (reader, options, contents) in enumerate(seeds(pathlib.Path(folder))):
            into = pathlib.Path(sys.argv[1], reader)
            into.mkdir(parents=True, exist_ok=True)
            (into / f"{number:03}").write_bytes(bytes([READERS.index(reader), *options]) + contents)


if __name__ == "__main__":
    main()
