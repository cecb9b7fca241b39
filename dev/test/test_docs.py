"""Tests of the commands, examples and links of README.md and dev/doc/."""
import array
import gzip
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

import train_gpt2
from conftest import as_huggingface, BINARY, hellaswag_file, HERE, LIBRARY, run, TENSORS, TEXT
from train_gpt2 import GPT2, GPT2Config, GPT2Error


# --- A layer of your own: dev/doc/layers.md -----------------------------------------------------------------
DOC = HERE / "dev" / "doc"
needs_tools = pytest.mark.skipif(not all(map(shutil.which, ("cc", "make", "git", "python3"))),
                                 reason="the document's commands need cc, make, git and python3")


@pytest.fixture
def workshop(tmp_path):
    """A folder with copies of the files that the commands use."""
    (tmp_path / "dev" / "doc").mkdir(parents=True)
    for name in ("train_gpt2.c", "train_gpt2.py", "Makefile"):
        shutil.copy(HERE / name, tmp_path / name)
    for name in ("layers.md", "own_layer.c", "examples.c"):
        shutil.copy(DOC / name, tmp_path / "dev" / "doc" / name)
    return tmp_path


def fenced(document, language):
    """The code blocks of a Markdown document in a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", document.read_text(), re.M | re.S)


def shown_script(word):
    """The first block of shell commands in layers.md that contains a word, as a script."""
    return "set -e\n" + next(block for block in fenced(DOC / "layers.md", "sh") if word in block)


def test_layers_md_names_existing_functions():
    text, own = ((DOC / name).read_text() for name in ("layers.md", "own_layer.c"))
    source = (HERE / "train_gpt2.c").read_text() + own
    names = {*re.findall(r"`(\w+)\(\)`", text), *re.findall(r"\b[a-z]\w*_(?:forward|backward)\w*", text)}
    assert len(names) > 25
    assert [name for name in names if not re.search(rf"^\w[\w *]*\b{name}\(", source, re.M)] == []
    assert "QUERIES = 96" in text and "QUERIES = 96" in source
    layer = own[own.index("/* Swish"):own.index("/* === 2. ")].strip()
    assert layer in re.sub(r"^\+", "", text, flags=re.M)


@needs_tools
def test_own_layer_passes_and_a_wrong_one_fails(workshop):
    script = shown_script("own_layer.c")
    example = workshop / "dev" / "doc" / "own_layer.c"
    right = example.read_text()
    assert all(f"     {line}\n" in right for line in script.splitlines()[1:])
    rows = run("sh", "-c", script, cwd=workshop).stdout.splitlines()
    assert len(rows) == 5 and all(re.fullmatch(r".+ \d\.\de-0\d  ok", row) for row in rows)
    shown = re.findall(r"^(.+) \d\.\de-0\d  ok$", (DOC / "layers.md").read_text(), re.M)
    assert [row[:22] for row in rows] == shown
    example.write_text(right.replace("sigma + b * bend", "sigma + bend"))
    rows = run("sh", "-c", script, cwd=workshop, status=1).stdout.splitlines()
    assert [row[:4] for row in rows if row.endswith("NOT OK")] == ["dinp"] * 2


@needs_tools
def test_the_diff_in_layers_md_gives_a_correct_model(workshop):
    environment = {"cwd": workshop, "MAKEFLAGS": "", "GIT_CEILING_DIRECTORIES": str(workshop.parent),
                   "GPT2_LIBRARY": str(workshop / "libgpt2.so")}
    run("sh", "-c", shown_script("```diff"), **environment)
    shown = run("sh", "-c", shown_script("```python"), **environment).stdout
    assert re.findall(r"^(\w+) +gradient", shown, re.M) == [*TENSORS, "swish"]
    run(sys.executable, "train_gpt2.py", "--data", "dev/doc/layers.md", "--out", "run", "--sample-tokens", 20,
        *"--layers 2 --heads 2 --channels 32 --context 32 --batch-size 4 --steps 50 --warmup 5".split(),
        "--val-batches", 2, **environment)
    losses = [float(loss) for loss in re.findall(r"trl:(\S+)", (workshop / "run" / "main.log").read_text())]
    assert losses[0] == pytest.approx(math.log(256), abs=0.3) and max(losses[-5:]) < losses[0] - 0.8


@needs_tools
def test_the_worked_example_and_the_exercises_of_layers_md(workshop):
    document = (DOC / "layers.md").read_text()
    rows = run("sh", "-c", shown_script("examples.c"), cwd=workshop).stdout.splitlines()
    assert "\n".join(rows[:4]) in document
    text = " ".join(document.split())
    answers = {row[:18].strip(): row[18:].split() for row in rows}
    for name, label in (("layer norm dinp", "dinp = "), ("layer norm dw", "dw = "),
                        ("dlogits", "one-hot = ")):
        assert f"{label}({', '.join(answers[name])})" in text
    assert f"log 5/8 = {answers['cross-entropy'][0]}" in text
    for value in answers["GELU'"]:
        assert f"is 0: {value}." in text
    assert f"{10 * 256 * 4 * 512 * 4:,} bytes" in text
    for gradient in (0.3, 0.003):            # the first update of AdamW
        model = GPT2(GPT2Config(1, 1, 1, 1, 1), seed=None)
        model.set("lnfb", [1.0])
        model.set("lnfb", [gradient], "grad")
        model.update(0.1, weight_decay=0, grad_clip=0)
        assert f"become {model.get('lnfb')[0]:.4f}" in text


# --- The README ---------------------------------------------------------------------------------------------
# Flags that shorten a command, by its first words. Of a repeated flag the last value counts.
SHORTER = {
    "python3 train_gpt2.py": "--steps {n} --val-batches 1 --sample-tokens 5 --seq-len 32 --batch-size 2"
                             " --val-every 2",
    "python3 train_gpt2.py --resume-step": "--resume-step 3 --steps {n} --sample-tokens 5",
    "python3 train_gpt2.py train --init": "--steps {n} --val-batches 1 --sample-tokens 5",
    "./train_gpt2 -i": "-x {n} -g 5 -m 1", "python3 train_gpt2.py sample": "--tokens 9",
    "SHARDS=1": "-e d2 -b 1 -t 64 -d 64 -m 1 -g 5 -n 0"}
# Lines that .ci/run runs or that need a GPU (dev/cuda/on_gpu.sh); test_downloads.py tests those of fetch.py.
ELSEWHERE = ("make test", "python3 dev/data/gpt2_vocab.py", "make cuda", "./train_gpt2cu", ".venv/")


# What commands with these words need.
PACKAGES = {"train-tokenizer": "tokenizers", "my_tokenizer.json": "tokenizers", "unpickle": "torch",
            "ckpt_hf": "torch"}


def installed(package):
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def sandbox(tmp_path):
    """A folder with the built project and the files that the README mentions."""
    for name in ("train_gpt2.c", "train_gpt2.py", "Makefile"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copytree(HERE / "dev", tmp_path / "dev", ignore=shutil.ignore_patterns("*.txt", "*.safetensors"))
    for built in (BINARY, LIBRARY):
        shutil.copyfile(built, tmp_path / built.name)
        (tmp_path / built.name).chmod(0o755)
    (tmp_path / "my_book.txt").write_text(TEXT * 20, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(TEXT * 9, encoding="utf-8")
    stories = "".join(json.dumps({"text": f"Story {i}. " + TEXT[:200]}) + "\n" for i in range(60))
    (tmp_path / "stories.jsonl.gz").write_bytes(gzip.compress(stories.encode()))
    for name in ("train.bin", "val.bin"):    # nanoGPT's
        (tmp_path / name).write_bytes(array.array("H", [i * 7919 % 50257 for i in range(2000)]).tobytes())
    data = tmp_path / "dev" / "data"
    GPT2(GPT2Config(1024, 50257, 1, 1, 16)).save(tmp_path / "small.bin")
    hub = data / "gpt2"
    train_gpt2.export_model(GPT2.load(tmp_path / "small.bin"), None, "hf", str(hub), "F32")
    if installed("torch"):
        import torch
        weights = {name: torch.tensor(values).view(shape) for name, (shape, values) in
                   as_huggingface(GPT2(GPT2Config(16, 50257, 1, 2, 4))).items()}
        torch.save({"model": weights, "model_args": {"n_head": 2}}, tmp_path / "ckpt.pt")
    for split in ("train_000001", "val_000000"):
        tokens = array.array("H", [i * 7919 % 50257 for i in range(2000)])
        (data / "fineweb10B").mkdir(exist_ok=True)
        train_gpt2.write_shard(data / "fineweb10B" / f"fineweb_{split}.bin", tokens)
    (data / "hellaswag").mkdir()
    hellaswag_file(data / "hellaswag" / "hellaswag_val.bin", 50257, 3, longest=9)
    return tmp_path


def test_the_commands_of_the_readme(sandbox, monkeypatch):
    """Each command of the README succeeds, in the order of the README."""
    sys.path.insert(0, str(HERE / "dev" / "data"))
    fetch = importlib.import_module("fetch")
    try:
        bpe = bool(train_gpt2.GPT2Tokenizer.bpe())
    except GPT2Error:
        bpe = False
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    lines = "".join(fenced(HERE / "README.md", "sh")).splitlines()
    assert len(lines) > 30
    for n, line in enumerate(lines, 3):
        line = line.split("  #")[0].strip()  # a comment
        first, _, last = line.rpartition(" && ")
        words = last.split()
        needed = [package for word, package in PACKAGES.items() if word in words]
        if line.startswith(ELSEWHERE) or ("gpt2" in words and not bpe) or not all(map(installed, needed)):
            continue
        if "dev/data/fetch.py" in words:
            fetch.make_parser().parse_args(words[2:])
            continue
        command_words = ("sample", "eval", "prepare", "train-tokenizer", "plot", "export", "import", "check")
        key = next((k for k in sorted(SHORTER, key=len, reverse=True) if last.startswith(k)), "")
        if key == "python3 train_gpt2.py" and words[2:3] and words[2] in (*command_words, "train"):
            key = ""
        full = f"{first or 'true'} && {last} {SHORTER.get(key, '').format(n=n)}"
        done = subprocess.run(full, shell=True, cwd=sandbox, capture_output=True, text=True, timeout=120,
                              stdin=subprocess.DEVNULL, errors="replace", env={**os.environ, "PATH": path})
        assert done.returncode == 0, f"{full}\n{done.stdout[-800:]}\n{done.stderr[-800:]}"


# Programs that run example.py: as a script, statement by statement as a notebook does, in a thread.
WAYS = {"script": "exec(open('example.py').read())",
        "notebook": """import ast
shared = {}
for statement in ast.parse(open("example.py").read()).body:
    exec(compile(ast.Module([statement], []), "<cell>", "exec"), shared)""",
        "thread": """import threading
thread = threading.Thread(target=exec, args=(open("example.py").read(), {}))
thread.start()
thread.join()"""}


@pytest.mark.parametrize("way", WAYS)
def test_the_python_of_the_readme(tmp_path, way):
    """The example runs as pasted, in a fresh interpreter."""
    code = next(block for block in fenced(HERE / "README.md", "python") if "train_gpt2" in block)
    (tmp_path / "example.py").write_text(code)
    shown = run(sys.executable, "-c", WAYS[way], cwd=tmp_path, PYTHONPATH=str(HERE)).stdout
    losses = [float(line.split()[1]) for line in shown.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert GPT2.load(tmp_path / "model.bin").config.C == 128


DOCUMENTS = [HERE / "README.md", HERE / "CHANGELOG.md", *sorted(DOC.glob("*.md")),
             HERE / "dev" / "reference" / "README.md", HERE / "dev" / "data" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(HERE)))
def test_links_paths_and_functions_in_a_document_exist(document):
    text = document.read_text()
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.*)$", text, re.M)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        assert "://" in link or not path or (document.parent / path).exists(), link
        assert path or anchor in anchors, link
    for path in re.findall(r"`((?:dev|\.ci)/[\w./]+\w|\w+\.(?:c|cu|py))`", text):
        folders = (HERE, document.parent, HERE / "dev" / "test", HERE / "dev" / "cuda")
        assert any((folder / path).exists() for folder in folders), path
    sources = "".join(path.read_text() for pattern in ("*.c", "*.cu", "*.py", "dev/**/*.[ch]", "dev/**/*.py",
                                                       "dev/**/*.cu") for path in HERE.glob(pattern))
    for name in re.findall(r"`(\w+)\(\)`", text):
        assert re.search(rf"\b{name}\(", sources), name
