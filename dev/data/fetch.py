#!/usr/bin/env python3
"""Fetches data sets, and makes token shards of those that are text.

    python3 dev/data/fetch.py tinyshakespeare                  1 MB of text, bytes as tokens
    python3 dev/data/fetch.py tinyshakespeare --tokenizer gpt2
    python3 dev/data/fetch.py tinystories                      2.2 GB of text, GPT-2's tokens
    python3 dev/data/fetch.py fineweb --shards 10              1 of 10 billion tokens of the web, 2 GB
    python3 dev/data/fetch.py hellaswag                        10,042 questions for evaluation

A download that was interrupted goes on with the next call, and what is there already is not fetched again.
Every file is checked: by its sha256 where that is known, else by its format. --url names a server that has
the same files, the environment's HF_ENDPOINT a mirror of the Hugging Face hub, and https_proxy a proxy.

What it refuses to be: a package (it takes the standard library and train_gpt2.py), or a cleaner of texts:
they come as their makers published them. dev/data/README.md says who that is, and under which licences.
"""
import argparse
import array
import glob
import os
import shutil
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
import train_gpt2  # noqa: E402
from train_gpt2 import GPT2Error, download  # noqa: E402

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/datasets"
END_OF_STORY = b"<|endoftext|>"

# Where each comes from: the folder, of one version for all time where there is such a url, and its files with
# their sha256 (None: not known to us, and the format is checked instead).
SOURCES = {
    "tinyshakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare", {
        "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}),
    "tinystories": (f"{HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", {
        "TinyStoriesV2-GPT4-train.txt": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        "TinyStoriesV2-GPT4-valid.txt": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"}),
    "fineweb": (f"{HUB}/kjj0/fineweb10B-gpt2/resolve/889765ea1f903759787add96995d81171b632d0c", {
        "fineweb_val_000000.bin": None, **{f"fineweb_train_{n:06d}.bin": None for n in range(1, 104)}}),
    "hellaswag": ("https://raw.githubusercontent.com/rowanz/hellaswag/master/data", {
        "hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}),
}


def fetch(args, name, path=None):
    """Downloads a file of the data set into its folder, or as `path`, which it returns."""
    url, files = SOURCES[args.dataset]
    path = path or os.path.join(args.out, name)
    download(f"{(args.url or url).rstrip('/')}/{name}", path, files[name])
    return path


# --- Tiny Shakespeare ---------------------------------------------------------------------------------------
def tinyshakespeare(args):
    """Shards as karpathy/llm.c makes them: each speech begins with end-of-text, and the first 32,768 tokens
    are for validation."""
    tokenizer = train_gpt2.TOKENIZERS[args.tokenizer]()
    path = os.path.relpath(os.path.join(HERE, "tinyshakespeare.txt"))     # the driver's, too
    text = train_gpt2.read_file(fetch(args, "input.txt", path)).decode()
    tokens = array.array("H")
    for speech in text.replace("\n\n", "\n\n\0").split("\0"):
        tokens.append(tokenizer.end)
        tokens += tokenizer.encode(speech)
    for split, part in (("val", tokens[:32768]), ("train", tokens[32768:])):
        path = os.path.join(args.out, f"tiny_shakespeare_{split}.bin")
        train_gpt2.write_shard(path, part)
        print(f"{path}: {len(part):,} tokens")
    tokenizer.save(os.path.join(args.out, train_gpt2.TABLE))


# --- TinyStories --------------------------------------------------------------------------------------------
def stories(path):
    """Yields the stories of a file, which does not fit into memory."""
    with open(path, "rb") as file:
        rest = b""
        while data := file.read(1 << 20):
            *whole, rest = (rest + data).split(END_OF_STORY)
            yield from whole
        yield rest


def shard_stories(tokenizer, path, folder, split, size):
    """Writes the stories of a file as shards of `size` tokens. Returns how many tokens they are."""
    progress = train_gpt2.Progress(os.path.getsize(path) / 1e6, "MB", f"{split}: ")

    def parts():
        for story in stories(path):
            progress.advance((len(story) + len(END_OF_STORY)) / 1e6)
            if story.strip():
                yield tokenizer.end
                yield story.strip()

    tokens, shards = array.array("H"), 0
    for part in train_gpt2.encode_all(tokenizer.encode, parts(), parallel=True):
        tokens += part
        while len(tokens) >= size:
            train_gpt2.write_shard(os.path.join(folder, f"{split}_{shards:06d}.bin"), tokens[:size])
            shards += 1
            del tokens[:size]
    if tokens:
        train_gpt2.write_shard(os.path.join(folder, f"{split}_{shards:06d}.bin"), tokens)
    progress.say(f"{split}: {shards * size + len(tokens):,} tokens")


def tinystories(args):
    """Shards of the stories, each of which begins with end-of-text; the makers' validation file is ours."""
    tokenizer = train_gpt2.TOKENIZERS[args.tokenizer]()
    texts = [(split, fetch(args, f"TinyStoriesV2-GPT4-{theirs}.txt"))
             for split, theirs in (("val", "valid"), ("train", "train"))]
    with tempfile.TemporaryDirectory(dir=args.out) as folder:     # all shards are there, or those from before
        for split, path in texts:
            shard_stories(tokenizer, path, folder, split, args.shard_tokens)
        for old in glob.glob(os.path.join(glob.escape(args.out), "*_[0-9]*.bin")):
            os.remove(old)
        for new in os.listdir(folder):
            os.replace(os.path.join(folder, new), os.path.join(args.out, new))
    tokenizer.save(os.path.join(args.out, train_gpt2.TABLE))


# --- FineWeb ------------------------------------------------------------------------------------------------
def check_shard(path):
    """Deletes a file that is not a token shard, and says so. Returns how many tokens it has."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        found = array.array("i", file.read(1024).ljust(1024, b"\0"))[:3].tolist()
    expected = [train_gpt2.MAGIC_SHARD, 1, (size - 1024) // 2]
    if found != expected or size % 2:
        os.remove(path)
        raise GPT2Error(f"{path} is no token shard: it begins with {found}, expected {expected};"
                        " it is deleted, try again")
    return found[2]


def fineweb(args):
    """The first shards of 10 billion tokens, GPT-2's, as they are; and the shard for validation."""
    names = list(SOURCES["fineweb"][1])[:1 + args.shards]
    missing = [name for name in names if not os.path.exists(os.path.join(args.out, name))]
    free = shutil.disk_usage(args.out).free
    if free < 200e6 * len(missing):
        raise GPT2Error(f"{args.out} has {free / 1e9:.1f} GB free, expected {len(missing) * 0.2:.1f} GB for"
                        f" {len(missing)} shards; take fewer with --shards, or another --out")
    total = 0
    for n, name in enumerate(names, 1):
        tokens = check_shard(fetch(args, name))
        total += tokens
        print(f"{n}/{len(names)} {name}: {tokens:,} tokens, {total:,} so far", flush=True)
    try:
        train_gpt2.GPT2Tokenizer().save(os.path.join(args.out, train_gpt2.TABLE))
    except GPT2Error as error:
        print(f"without a tokenizer table, samples will be numbers: {error}")


# --- HellaSwag ----------------------------------------------------------------------------------------------
def hellaswag(args):
    """The 10,042 questions of the validation part, as the multiple-choice file of karpathy/llm.c."""
    encode = train_gpt2.GPT2Tokenizer.bpe().encode_ordinary
    source = fetch(args, "hellaswag_val.jsonl")
    path = os.path.join(args.out, "hellaswag_val.bin")
    print(f"{path}: {train_gpt2.write_choices(path, source, encode):,} examples")


# --- The command line ---------------------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nWhat it refuses")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True,
                                     title="data sets (each has its own --help)")

    def add(run, text, out, rows):
        command = datasets.add_parser(run.__name__, help=text, description=text)
        command.set_defaults(run=run)
        command.add_argument("--out", metavar="DIR", default=os.path.join(HERE, out),
                             help=f"where the files go (dev/data/{out})")
        command.add_argument("--url", help=f"folder that has them ({SOURCES[run.__name__][0]})")
        train_gpt2.add_flags(command, rows)

    kinds = tuple(train_gpt2.TOKENIZERS)
    add(tinyshakespeare, "tiny Shakespeare, 1 MB of text", "tinyshakespeare", [
        ("tokenizer", "bytes", kinds, "what a token is")])
    add(tinystories, "TinyStories, 2.2 GB of simple stories", "tinystories", [
        ("tokenizer", "gpt2", kinds, "what a token is"),
        ("shard-tokens", 100_000_000, train_gpt2.COUNT, "tokens in a shard")])
    add(fineweb, "FineWeb, 10 billion of GPT-2's tokens, 20 GB", "fineweb10B", [
        ("shards", 103, train_gpt2.number(int, 0, 103), "shards of 100 million tokens to train on")])
    add(hellaswag, "HellaSwag, 10,042 questions about what comes next", "hellaswag", [])
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.out = os.path.relpath(args.out)
    try:
        os.makedirs(args.out, exist_ok=True)
        args.run(args)
        return 0
    except (GPT2Error, OSError) as error:
        print(f"fetch.py: {train_gpt2.describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
