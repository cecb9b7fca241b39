"""Tests of processes, notebooks and operating systems: signals, streams, locales, locks, caches, unusual file
systems, and libraries of another version."""
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import train_gpt2
from conftest import HERE, LIB, LIBRARY, REFERENCES, SMALL, TEXT, command, driver, one_sentence, outputs, run
from train_gpt2 import GPT2Error

both_front_ends = pytest.mark.parametrize("front", ["binary", "driver"])
compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs cc")
UNSUPPORTED = sorted(number for number in train_gpt2.UNSUPPORTED if number)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NotebookStream(io.TextIOBase):
    """As ipykernel's stdout: neither reconfigure() nor a file."""
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


@pytest.fixture
def text(tmp_path, monkeypatch):
    """The working directory, with a text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train_main(*words):
    return train_gpt2.main(["--data", "text.txt", *SMALL, *words])


def is_locked(folder):
    """Whether a run holds the lock of a run directory."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(file)


# --- main() inside another program --------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [None, NotebookStream(), object()], ids=["None", "notebook", "object"])
def test_main_runs_repeatedly_in_one_process(text, monkeypatch, stream):
    if stream and not hasattr(stream, "write"):     # write() is all that print() needs
        stream = type("Stream", (), {"write": lambda self, text: None, "flush": lambda self: None})()
    monkeypatch.setattr(sys, "stdout", stream)
    before = [signal.signal(number, signal.default_int_handler) for number in SIGNALS]
    try:
        assert train_main("--out", "run") == 0 and not is_locked("run")
        assert train_gpt2.main(["--resume", "--out", "run", "--steps", "5"]) == 0
        assert train_gpt2.main(["sample", "run", "--tokens", "3"]) == 0
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.default_int_handler] * 3
    finally:
        for number, handler in zip(SIGNALS, before):
            signal.signal(number, handler)
    assert LIB.gpt2_newest("run") == 5
    if isinstance(stream, NotebookStream):
        assert "step 5: saved" in stream.text and "\x1b[K" not in stream.text


def test_a_run_is_freed_at_once(text, capsys):
    gc.collect()
    gc.disable()
    try:
        assert train_main("--out", "run") == 0
        assert not [found for found in gc.get_objects() if type(found) is train_gpt2.Run]
    finally:
        gc.enable()


def test_main_runs_in_a_thread(text, capsys):
    found = []
    thread = threading.Thread(target=lambda: found.append(train_main("--out", "run")))
    thread.start()
    thread.join()
    assert found == [0] and LIB.gpt2_newest("run") == 3 and not is_locked("run")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, GPT2Error])
def test_a_failed_run_releases_its_lock(text, monkeypatch, capsys, error):
    def fail(*_):
        assert is_locked("run")
        raise error

    monkeypatch.setattr(train_gpt2, "train", fail)
    caught = None
    try:
        train_main("--out", "run")
    except ZeroDivisionError as found:
        caught = found                       # its traceback refers to the run, as a notebook's does
    assert not is_locked("run") and bool(caught) == (error == ZeroDivisionError)


def test_a_second_signal_ends_main_and_not_the_program(text, monkeypatch, capfd):
    def train(model, train_loader, val_loader, run):
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
        raise AssertionError("still running")

    monkeypatch.setattr(train_gpt2, "train", train)
    before = [signal.getsignal(number) for number in SIGNALS]
    assert train_main("--out", "run") == 130 and not is_locked("run")
    assert [signal.getsignal(number) for number in SIGNALS] == before
    one_sentence(capfd.readouterr().err, "press Ctrl-C again")


def test_wrong_usage_returns_2(capsys):
    assert train_gpt2.main(["--stepz", "3"]) == 2
    assert train_gpt2.main(["--help"]) == 0


# --- Signals and closed pipes -------------------------------------------------------------------------------
ENDLESS = {"binary": "-x 1000000 -v 0 -g 0 -n 1000000",
           "driver": "--steps 1000000 --val-every 0 --sample-tokens 0 --checkpoint-every 0"}


def wait_for_step(process, out, step):
    log = out / "main.log"
    while not log.exists() or f"s:{step} trl" not in log.read_text():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


@both_front_ends
def test_a_closed_pipe_saves_as_sigterm_does(data, tmp_path, front):
    often = {"binary": "", "driver": " --val-every 5"}[front]     # shows a line more often
    words = command(front, data, ENDLESS[front] + often, tmp_path / "run")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    wait_for_step(process, tmp_path / "run", 1)
    process.stdout.close()
    assert process.wait(timeout=60) == 130
    shown = process.stderr.read()
    process.stderr.close()
    step = LIB.gpt2_newest(str(tmp_path / "run"))
    assert step > 0 and "stdout was closed" in shown and f"after step {step}" in shown
    lines = [line for line in shown.splitlines() if "epochs of a text" not in line]
    assert "Traceback" not in shown and len(lines) == 2


@both_front_ends
def test_nohup_protects_from_sighup(data, tmp_path, front):
    words = command(front, data, ENDLESS[front], tmp_path / "run")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGHUP)
    step = (tmp_path / "run" / "main.log").read_text().count("trl") + 20
    wait_for_step(process, tmp_path / "run", step)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    process.stderr.close()


@both_front_ends
def test_closed_standard_files_are_not_taken_by_files_of_the_run(data, whole_runs, tmp_path, front):
    def close():
        for file in range(3):
            os.close(file)

    process = subprocess.Popen(command(front, data, "", tmp_path / "run"), preexec_fn=close)
    assert process.wait(timeout=60) == 0
    assert outputs(tmp_path / "run") == outputs(whole_runs[front][1])
    process = subprocess.Popen(command(front, data, ENDLESS[front], tmp_path / "endless"), preexec_fn=close)
    wait_for_step(process, tmp_path / "endless", 1)
    assert {os.readlink(f"/proc/{process.pid}/fd/{file}") for file in range(3)} == {os.devnull}
    process.kill()
    process.wait()


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 0), (errno.EPIPE, 130), (errno.EIO, 130)])
def test_no_error_of_stdout_loses_training(text, monkeypatch, capsys, number, status):
    class Full(NotebookStream):
        def write(self, line):
            if " tok/s" in line:
                raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Full())
    assert train_main("--out", "run", "--checkpoint-every", "2") == status
    assert LIB.gpt2_newest("run") == (1 if status else 3)
    assert "Traceback" not in capsys.readouterr().err


def test_commands_into_a_closed_pipe_end_silently(byte_model, tmp_path):
    check = ["check", REFERENCES / "tiny_reference.bin"]
    for words in (["--help"], ["plot", "--help"], ["sample", byte_model[1], "--tokens", 99], check):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, HERE / "train_gpt2.py", *map(str, words)], stdout=writer,
                              stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONUNBUFFERED": ""})
        os.close(writer)
        assert done.returncode in (0, 1) and "roken" not in done.stderr and "Traceback" not in done.stderr


def test_sigterm_removes_incomplete_shards(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    process = subprocess.Popen([sys.executable, HERE / "train_gpt2.py", "--data", "pipe"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(tmp_path / "pipe", "w") as pipe:
        pipe.write("a")
        pipe.flush()
        while not list(tmp_path.glob("runs/1/tokens/prepare-*")):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        while process.poll() is None:        # Python may miss one just before it reads
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
        assert process.returncode == 130
    assert process.communicate()[0] == "" and not list(tmp_path.glob("runs/1/tokens/*"))


# --- Python's options, links, missing modules ---------------------------------------------------------------
def test_without_docstrings_help_is_the_same():
    for file in ("train_gpt2.py", "dev/convert.py", "dev/data/fetch.py"):
        words = [HERE / file, "--help"]
        assert run(sys.executable, "-OO", *words).stdout == run(sys.executable, *words).stdout


def test_a_link_to_the_driver_finds_its_library(text):
    (text / "real").mkdir()
    shutil.copy(HERE / "train_gpt2.py", text / "real")
    shutil.copy(LIBRARY, text / "real" / "libgpt2.so")
    (text / "link.py").symlink_to("real/train_gpt2.py")
    done = run(sys.executable, "-OO", "link.py", "--data", "text.txt", *SMALL, cwd=text, GPT2_LIBRARY="")
    assert "python3 link.py sample" in done.stdout


WITHOUT = """
import runpy, sys
name, *sys.argv = sys.argv[1:]
sys.modules[name] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_fcntl_wsl_is_named(text):
    without = functools.partial(run, sys.executable, "-c", WITHOUT, "fcntl", HERE / "train_gpt2.py")
    for words in (["--data", "text.txt", *SMALL], ["sample", "model.bin"]):
        one_sentence(without(*words, status=1).stderr, "fcntl", "WSL")
    one_sentence(run(sys.executable, "-c", "import sys; sys.modules['fcntl'] = None\n"
                     "import train_gpt2\ntry: train_gpt2.lock_folder('.')\n"
                     "except train_gpt2.GPT2Error as error: print(error)", cwd=HERE).stdout, "fcntl", "WSL")
    done = run(sys.executable, "-c", WITHOUT, "fcntl", HERE / "dev" / "data" / "fetch.py", "--help")
    assert "Downloads" in done.stdout


def test_without_readline_conversations_work(byte_model):
    words = [HERE / "train_gpt2.py", "sample", byte_model[1], "--interactive", "--tokens", "3"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, "readline", *words], input=b"a\n",
                          capture_output=True)
    assert done.returncode == 0 and b"tokens read" in done.stderr and b"Traceback" not in done.stderr


# --- Locales ------------------------------------------------------------------------------------------------
LOCALES = [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"LC_ALL": "C"},
           {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii:strict"},
           {"PYTHONIOENCODING": "latin-1:strict"}]
PROMPT = "Grüße \N{SNOWMAN}".encode() + b"\xff\xc3"     # the last bytes are not UTF-8


def sample_bytes(model, environment, *words, text=b""):
    done = subprocess.run([sys.executable, HERE / "train_gpt2.py", "sample", model, *words, "--tokens", "6",
                           "--temperature", "0"], input=text, capture_output=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    return done.stdout


def shown_in(text, environment):
    """What stdout has for a text."""
    encoding = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    if environment.get("PYTHONUTF8") == "0":
        encoding = "ascii"
    return text.encode(encoding, "replace")


@pytest.mark.parametrize("environment", LOCALES, ids=lambda found: " ".join(map("=".join, found.items())))
def test_prompts_are_the_same_in_every_locale(byte_model, environment):
    model, path = byte_model
    tokens = [*PROMPT, *model.generate(list(PROMPT), 6, 0)]
    expected = PROMPT.decode(errors="replace") + bytes(tokens[len(PROMPT):]).decode(errors="replace") + "\n"
    for words, text in ((["--prompt", "-"], PROMPT), (["--prompt", PROMPT], b"")):
        assert sample_bytes(path, environment, *words, text=text) == shown_in(expected, environment)
    start = PROMPT.decode(errors="replace")
    assert "\N{REPLACEMENT CHARACTER}" in expected[len(start):]
    stopped = start + expected[len(start):].partition("\N{REPLACEMENT CHARACTER}")[0] + "\n"
    stop = "\N{REPLACEMENT CHARACTER}".encode()
    found = sample_bytes(path, environment, "--prompt", PROMPT, "--stop", stop)
    assert found == shown_in(stopped, environment)


@pytest.mark.parametrize("environment", LOCALES[:1] + LOCALES[3:4], ids=["C", "ascii"])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_typed_lines_are_the_same_in_every_locale(byte_model, environment, terminal):
    ours, theirs = pty.openpty()
    output = theirs if terminal else subprocess.DEVNULL     # readline needs both
    line = "ü\N{SNOWMAN}ß".encode() if terminal else PROMPT
    process = subprocess.Popen([sys.executable, HERE / "train_gpt2.py", "sample", byte_model[1],
                                "--interactive", "--tokens", "2"], stdin=theirs, stdout=output,
                               stderr=subprocess.PIPE, env={**os.environ, **environment, "TERM": "xterm"})
    os.close(theirs)
    shown = process.stderr.readline()        # "Type a line"
    if terminal:
        os.read(ours, 99)                    # the prompt: readline has set the terminal up
    os.write(ours, line + b"\n")
    shown = process.stderr.readline()
    process.kill()
    process.communicate()
    os.close(ours)
    assert f"({len(line) + 2} tokens read".encode() in shown     # with a start and an end of line


@pytest.mark.parametrize("words", ["--prompt -", "--interactive"])
def test_a_closed_stdin_is_reported(byte_model, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "stdin", None)
    assert train_gpt2.main(["sample", str(byte_model[1]), *words.split()]) == 1
    one_sentence(capsys.readouterr().err, "stdin is closed")


def test_a_path_that_the_locale_cannot_encode_is_reported(byte_model):
    done = driver("sample", "nö.bin", status=1, **LOCALES[0])
    one_sentence(done.stderr, "No such file")
    found = run(sys.executable, "-c", "import train_gpt2; print(train_gpt2.main(['sample', 'n\\xf6.bin']))",
                cwd=HERE, **LOCALES[0])
    assert found.stdout == "1\n" and "Traceback" not in found.stderr


# --- Caches -------------------------------------------------------------------------------------------------
@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """The driver in a read-only folder. (That it is below a file stops root, too.)"""
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_gpt2, "DATA", str(tmp_path / "file" / "data"))
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def test_a_read_only_install_caches_in_the_users_folder(read_only, monkeypatch, capsys):
    for name, folder in (("XDG_CACHE_HOME", "XDG_CACHE_HOME"), ("HOME", "HOME/.cache")):
        path = read_only / folder / "train_gpt2" / "python_topics.txt"
        assert train_gpt2.default_text("run") == str(path) and path.stat().st_size > 100_000
        assert train_gpt2.cache_path("gpt2") == str(path.parent / "gpt2")
        monkeypatch.delenv(name)
    assert not (read_only / "run").exists()


def test_without_any_cache_the_default_text_works(read_only, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only / "file"))
    assert train_gpt2.main([*SMALL, "--out", "run"]) == 0 and LIB.gpt2_newest("run") == 3
    assert train_gpt2.main(["--resume", "--out", "run", "--steps", "4"]) == 0
    assert not (read_only / "HOME").exists()


def test_what_is_cached_in_a_read_only_install_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "DATA", str(tmp_path))
    monkeypatch.setattr(train_gpt2, "is_writable", lambda folder: not folder.startswith(str(tmp_path)))
    (tmp_path / "gpt2").mkdir()
    assert train_gpt2.cache_path("gpt2") == str(tmp_path / "gpt2")
    assert train_gpt2.cache_path("gpt2-xl") != str(tmp_path / "gpt2-xl")


# --- Scripts that start processes ---------------------------------------------------------------------------
SCRIPT = """
import multiprocessing, sys
sys.path.insert(0, {here!r})
import train_gpt2
if True:
    open("starts", "a").write("x")
    multiprocessing.set_start_method({method!r}, force=True)
    train_gpt2.cpu_count = lambda: 1
    {call}
"""
CALLS = ["train_gpt2.prepare(['text.txt'], 'out', train_gpt2.ByteTokenizer())",
         "sys.exit(train_gpt2.main(['prepare', 'text.txt', '--out', 'out']))"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_guard_is_told_so_once(tmp_path, method):
    (tmp_path / "text.txt").write_bytes(b"word " * 900_000)
    for call in CALLS:
        script = SCRIPT.format(here=str(HERE), method=method, call=call)
        (tmp_path / "script.py").write_text(script)
        done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count('if __name__ == "__main__":') == 1, done.stderr
        assert done.stderr.count("Traceback") == ("main(" not in call)     # the script's own
        assert len((tmp_path / "starts").read_text()) <= 4     # it, and 2 processes or the fork server
        assert not os.listdir(tmp_path / "out")
        (tmp_path / "starts").unlink()
    (tmp_path / "script.py").write_text(script.replace("if True", 'if __name__ == "__main__"'))
    run(sys.executable, "script.py", cwd=tmp_path)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_users_own_process_without_a_guard_is_told_so(tmp_path):
    call = ("multiprocessing.Process(target=print).start() if __name__ == '__main__'"
            " else train_gpt2.main(['--help'])")
    (tmp_path / "script.py").write_text(SCRIPT.format(here=str(HERE), method="spawn", call=call))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    one_sentence(done.stderr, "multiprocessing", '__name__ == "__main__"')
    assert done.stdout == ""


# --- File systems that lack a feature -----------------------------------------------------------------------
CALLS_THAT_FAIL = ["flock", "mmap", "ftruncate", "fsync", "fsyncdir"]
WARNINGS = {"flock": "without locks", "fsync": "cannot flush", "fsyncdir": "cannot flush"}

# Runs the driver for each call and errno. Prints status and stderr of each.
EACH_CALL = """
import contextlib, io, json, os, sys
import train_gpt2
calls, errors, words = json.loads(sys.argv[1])
for call in calls:
    for error in errors:
        os.environ.update(FAILING_CALL=call, FAILING_ERRNO=str(error))
        shown = io.StringIO()
        train_gpt2.warn_once.cache_clear()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(shown):
            status = train_gpt2.main([word.replace("OUT", f"run/{call}{error}") for word in words])
        print(json.dumps([call, error, status, shown.getvalue()]))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    path = tmp_path_factory.mktemp("shim") / "filesystem.so"
    run("cc", "-shared", "-fPIC", "-o", path, HERE / "dev" / "fuzz" / "filesystem.c", "-ldl")
    return {"LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {path}".strip()}     # after a sanitizer's


def check_what_is_left(folder, call, shown):
    """The run is complete, with one warning where it was less safe."""
    if call in WARNINGS:
        one_sentence(shown, WARNINGS[call])
    else:
        assert shown == ""
    assert LIB.gpt2_newest(str(folder)) == 4 and not list(folder.glob("**/*.tmp"))
    assert sorted(path.name for path in folder.glob("DONE_*")) == ["DONE_00000002", "DONE_00000004"]


@compiler
def test_the_driver_works_on_limited_file_systems(text, shim):
    words = ["--data", "text.txt", *SMALL, "--steps", "4", "--checkpoint-every", "2", "--out", "OUT"]
    arguments = json.dumps([CALLS_THAT_FAIL, UNSUPPORTED, words])
    (text / "run").mkdir()
    done = run(sys.executable, "-c", EACH_CALL, arguments, cwd=text, PYTHONPATH=HERE, **shim,
               FAILING_FOLDER=text / "run")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(CALLS_THAT_FAIL) * len(UNSUPPORTED)
    for call, error, status, shown in results:
        assert status == 0, (call, error, shown)
        check_what_is_left(text / "run" / f"{call}{error}", call, shown)
    assert "--resume" not in done.stderr


@compiler
def test_the_binary_works_on_limited_file_systems(data, tmp_path, shim):
    for call in CALLS_THAT_FAIL:
        for error in UNSUPPORTED:
            folder = tmp_path / f"{call}{error}"
            limited = {**shim, "FAILING_FOLDER": str(tmp_path), "FAILING_CALL": call,
                       "FAILING_ERRNO": str(error)}
            done = run(*command("binary", data, "-n 2 -x 4 -v 0 -g 0", folder), **limited)
            check_what_is_left(folder, call, done.stderr)


@compiler
def test_models_are_read_where_they_cannot_be_mapped(byte_model, shim, tmp_path):
    model, path = byte_model
    words = ["sample", path, "--tokens", 9, "--temperature", 0]
    limited = {**shim, "FAILING_FOLDER": str(tmp_path), "FAILING_CALL": "mmap"}
    for error in (errno.ENODEV, errno.ENOMEM):
        assert driver(*words, **limited, FAILING_ERRNO=str(error)).stdout == driver(*words).stdout


@compiler
@both_front_ends
def test_other_errors_of_a_file_system_are_reported(data, tmp_path, shim, front):
    limited = {**shim, "FAILING_FOLDER": str(tmp_path), "FAILING_ERRNO": str(errno.EIO)}
    for call in ("flock", "fsync"):
        words = command(front, data, "", tmp_path / "run")
        done = run(*words, **limited, FAILING_CALL=call, status=1)
        assert os.strerror(errno.EIO) in done.stderr.splitlines()[-1] and str(tmp_path) in done.stderr
        assert not list(tmp_path.glob("run/DONE*"))


@compiler
def test_a_finished_checkpoint_is_never_removed(tmp_path, shim):
    code = """if True:
        import ctypes, os, train_gpt2
        model = train_gpt2.GPT2(train_gpt2.GPT2Config(8, 5, 1, 1, 4))
        for step in (1, 2):                  # each flushes the folder before and after DONE has its name
            progress = train_gpt2.GPT2Progress(step=step)
            model.lib.gpt2_checkpoint("run", model.handle, None, ctypes.byref(progress), 1, 1, 0)
        print(sorted(os.listdir("run")), model.lib.gpt2_warning())
    """
    (tmp_path / "run").mkdir()
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=HERE, **shim, FAILING_CALL="fsyncdir",
                FAILING_AFTER="3", FAILING_FOLDER=str(tmp_path), FAILING_ERRNO=str(errno.EIO)).stdout
    assert "DONE_00000001" in found and "DONE_00000002" in found and os.strerror(errno.EIO) in found


# --- Libraries of another version ---------------------------------------------------------------------------
@compiler
@pytest.mark.parametrize("code", ["", "int gpt2_api_version(void) { return 1; }"])
def test_a_library_of_another_api_version_is_rejected(tmp_path, byte_model, code):
    (tmp_path / "old.c").write_text(code + "\nint gpt2_free;")
    run("cc", "-shared", "-fPIC", "-o", tmp_path / "old.so", tmp_path / "old.c")
    for words in (["sample", byte_model[1]], ["--version"]):
        done = driver(*words, status=1, GPT2_LIBRARY=tmp_path / "old.so")
        one_sentence(done.stderr, tmp_path / "old.so", "API version", train_gpt2.API_VERSION, "run `make`")


@compiler
def test_an_outdated_gpu_library_is_reported_and_not_skipped(tmp_path, byte_model):
    shutil.copy(HERE / "train_gpt2.py", tmp_path)
    shutil.copy(LIBRARY, tmp_path / "libgpt2.so")
    (tmp_path / "old.c").write_text("int gpt2_free;")
    run("cc", "-shared", "-fPIC", "-o", tmp_path / "libgpt2cu.so", tmp_path / "old.c")
    done = run(sys.executable, tmp_path / "train_gpt2.py", "sample", byte_model[1], status=1, GPT2_LIBRARY="")
    one_sentence(done.stderr, "libgpt2cu.so", "API version none", "`make cuda`")


def test_the_api_version_is_raised_with_each_change():
    """When this fails, raise GPT2_API_VERSION and API_VERSION, and enter here what was found."""
    source = (HERE / "train_gpt2.c").read_text()
    api = re.search(r"visibility push\(default\)\n(.*?)#pragma GCC visibility pop", source, re.DOTALL)[1]
    version = int(re.search(r"GPT2_API_VERSION = (\d+)", api)[1])
    api = re.sub(r"/\*.*?\*/|#define GPT2_VERSION[^\n]*|GPT2_API_VERSION = \d+|\s", "", api, flags=re.DOTALL)
    assert version == train_gpt2.API_VERSION == LIB.gpt2_api_version()
    assert (version, hashlib.sha256(api.encode()).hexdigest()[:16]) == (2, "ac873c50227be876")
