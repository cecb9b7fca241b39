"""Reading and writing files safely; shared by convert.py, curves.py and data/fetch.py.

train_gpt2.py has the same few functions of its own, since it must work without this folder.
"""
import contextlib
import errno
import hashlib
import os
import stat
import sys
import threading
import time


class Error(Exception):
    """One sentence for the user."""


def counted(number, noun):
    """A number and a regular noun, such as "1 file" or "1,234 bytes"."""
    if number != 1:
        noun += "s"
    return f"{number:,} {noun}"


def printable(text):
    """Text from a file without control characters, which could manipulate the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def regular(path, flags):
    """An opener for open() that rejects anything but a regular file; a pipe, for instance, would block."""
    file = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


@contextlib.contextmanager
def waiting(what):
    """Shows on stderr, by a thread, what takes longer than a second: the words and the time, every few
    seconds."""
    over, begun = threading.Event(), time.monotonic()

    def watch():
        seconds = 0.7
        while not over.wait(seconds):
            minutes, spent = divmod(round(time.monotonic() - begun), 60)
            print(f"{what} | {minutes:02}:{spent:02}", file=sys.stderr, flush=True)
            seconds = 4

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def naming(path):
    """Adds the path to an OSError from read or write, which lacks it."""
    try:
        yield
    except OSError as error:
        if error.strerror:
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


def write_file(path, *parts):
    """Writes a file atomically. The parts are bytes-like, or generators of them."""
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


def sha256_of(path):
    """The SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
