#!/usr/bin/env python3
"""Injects faults into training runs and the library, and verifies what remains.

    make && python3 dev/fuzz/faults.py             everything, with full counts: about a quarter of an hour
    python3 dev/fuzz/faults.py --quick             a few of each, in seconds
    python3 dev/fuzz/faults.py kill disk           these parts only
    python3 dev/fuzz/faults.py --build DIR         with another build of binary and library

Each row of the table says what was tried, how often, and what happened; the status is 1 if a guarantee was
violated. The guarantees: whatever ends a run, each complete checkpoint has the bytes that an undisturbed run
writes at that step; a resumed run ends with the bytes of an undisturbed one; failures are reported in one
sentence; no function of the library crashes, leaks, or cannot be called again after a fault.

Power cuts are not simulated: only the order of flushes and renames is verified. Needs Linux, Python and a C
compiler; as root, the part "disk" also fills a small tmpfs.
"""
import argparse
import array
import contextlib
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

STEPS = 12
SHAPE = dict(max_T=12, V=61, L=2, NH=2, C=12)
FLAGS = {
    "binary": f"-b 2 -t 8 -d 640 -x {STEPS} -k cosine -l 1e-3 -u 2 -q 0.1 -c 0.1 -v 5 -m 3 -s 4 -g 5 -n 1",
    "driver": f"--batch-size 2 --seq-len 8 --total-batch-size 640 --steps {STEPS} --schedule cosine --lr 1e-3"
              " --warmup 2 --final-lr-frac 0.1 --weight-decay 0.1 --val-every 5 --val-batches 3"
              " --sample-every 4 --sample-tokens 5 --checkpoint-every 1",
}
FLAG = {"every": ("-n", "--checkpoint-every"), "keep": ("-nk", "--keep"), "lr": ("-l", "--lr"),
        "steps": ("-x", "--steps"), "decay": ("-c", "--weight-decay")}
FRONTS = list(FLAGS)
FILES = ("model_{:08}.bin", "state_{:08}_00000.bin", "DONE_{:08}")     # of a checkpoint


def header(*entries):
    return struct.pack("<256i", *entries, *[0] * (256 - len(entries)))


def shard(tokens):
    return header(20240520, 1, len(tokens)) + array.array("H", tokens).tobytes()


def make_files(folder):
    """The files that runs and faults.c read."""
    draw = random.Random(1)
    from train_gpt2 import GPT2, GPT2Config
    for name, size in (("train_0", 3000), ("train_1", 2000), ("val_0", 400)):
        (folder / f"{name}.bin").write_bytes(shard([draw.randrange(61) for _ in range(size)]))
    model = GPT2(GPT2Config(*SHAPE.values()), seed=9)
    model.save(str(folder / "model.bin"))
    model.save(str(folder / "bf16.bin"), 5)
    pieces = b"".join(bytes([1, i]) for i in range(61))
    (folder / "tokenizer.bin").write_bytes(header(20240328, 2, 61, 60) + pieces)
    examples = []
    for i in range(10):
        rows = [[draw.randrange(61) for _ in range(draw.randrange(1, 6))] for _ in range(5)]
        words = [word for row in rows for word in (len(row), *row)]
        examples.append(array.array("H", [65535, 2 * (5 + len(words)), i, i % 4, 4, *words]).tobytes())
    choices = header(20240522, 1, 10, max(map(len, examples))) + b"".join(examples)
    (folder / "hellaswag.bin").write_bytes(choices)
    for name in ("model", "reference"):
        to = "reference_model.bin" if name == "model" else "reference.bin"
        shutil.copy(ROOT / "dev" / "reference" / f"tiny_{name}.bin", folder / to)


class Faults:
    """Files, an undisturbed run, and the table of results."""

    def __init__(self, folder, build, quick):
        self.folder = folder
        self.build = build
        self.quick = quick
        self.draw = random.Random(7)
        self.wrong = []
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "GPT2_LIBRARY": str(build / "libgpt2.so"),
                    "GPT2_OFFLINE": "1", "GOMP_SPINCOUNT": "10000"}
        make_files(folder)
        self.whole = folder / "whole"
        begun = time.perf_counter()
        done = self.run("binary", self.whole)
        self.seconds = time.perf_counter() - begun
        if done.returncode:
            sys.exit(f"the undisturbed run fails: {done.stderr}")

    # --- Shared by the parts ---
    def row(self, part, what, times, happened):
        print(f"| {part} | {what} | {times:,} | {happened} |", flush=True)

    def check(self, right, what):
        if not right:
            self.wrong.append(what)
            print(f"| VIOLATION | {what} | | |", flush=True)
        return right

    def command(self, front, out, resume=False, model="model.bin", data=None, **changes):
        data = data or self.folder
        if front == "binary":
            words = [self.build / "train_gpt2", "-i", data / "train_*.bin", "-j", data / "val_*.bin",
                     "-e", self.folder / model, "-o", out, "-y", int(resume)]
        else:
            words = [sys.executable, ROOT / "train_gpt2.py", "--data", data / "train_*.bin", "--val-data",
                     data / "val_*.bin", "--out", out,
                     *(["--resume"] if resume else ["--init", self.folder / model])]
        words += FLAGS[front].split()
        for name, value in changes.items():
            words += [FLAG[name][FRONTS.index(front)], value]
        return [str(word) for word in words]

    def start(self, front, out, threads=1, **options):
        extra = {name: options.pop(name) for name in ("preexec_fn",) if name in options}
        out.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(self.command(front, out, **options), stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True,
                                env={**self.env, "OMP_NUM_THREADS": str(threads)}, **extra)

    def run(self, front, out, **options):
        process = self.start(front, out, **options)
        process.stdout, process.stderr = process.communicate(timeout=300)
        return process

    def steps(self, out):
        """Steps of complete checkpoints."""
        return sorted(int(path.name[5:]) for path in out.glob("DONE_????????"))

    def files_whole(self, out, what):
        """Each checkpoint has the same bytes as that of the undisturbed run."""
        for step in self.steps(out):
            for name in FILES:
                ours, theirs = out / name.format(step), self.whole / name.format(step)
                self.check(ours.exists() and ours.read_bytes() == theirs.read_bytes(), f"{what}: {ours.name}")

    def tidy(self, out, what):
        """No files of incomplete checkpoints and no temporary files are left."""
        found = {path.name for pattern in ("model_*", "state_*", "*.tmp") for path in out.glob(pattern)}
        left = found - {name.format(step) for step in self.steps(out) for name in FILES}
        self.check(not left, f"{what}: left {sorted(left)}")

    def goes_on(self, front, out, what, **options):
        """Resumed, or restarted if there is no checkpoint, the run ends with the right bytes."""
        resume = bool(self.steps(out))
        if not resume:
            shutil.rmtree(out)
        done = self.run(front, out, resume=resume, **options)
        if self.check(done.returncode == 0, f"{what}: resumed by the {front}: {done.stderr.strip()}"):
            self.check(STEPS in self.steps(out), f"{what}: no last checkpoint")
            self.files_whole(out, what)
            self.tidy(out, what)

    def sentence(self, process, words, what):
        """The program ended with status 1 and one sentence that contains these words."""
        text = process.stderr.strip()
        good = process.returncode == 1 and text and "\n" not in text and "Traceback" not in text
        good = good and all(word in text for word in words)
        self.check(good, f"{what}: status {process.returncode}: {text}")

    def wait_for(self, process, log, words, most=60):
        """Waits until a log contains these words; False if the program ended before."""
        until = time.perf_counter() + most
        while time.perf_counter() < until and process.poll() is None:
            if log.exists() and words in log.read_text():
                return True
            time.sleep(0.001)
        return False

    def fresh(self):
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        return out

    def begun(self, out, step):
        """A run directory as after a step of the undisturbed run."""
        out.mkdir()
        for name in FILES:
            shutil.copy(self.whole / name.format(step), out)
        lines = (self.whole / "main.log").read_text().partition(f"s:{step} ")[0]
        (out / "main.log").write_text(lines)

    # --- The parts ---
    def kill(self, numbers=(signal.SIGKILL,), part="kill"):
        count, tries = (2 if self.quick else 200), 0
        while count > tries:
            first, then = FRONTS[tries % 2], FRONTS[tries // 2 % 2]
            number = numbers[tries // 2 % len(numbers)]
            options = {"threads": 1 + tries // 4 % 2, "keep": 3 * (tries // 8 % 2),
                       "every": 1 + tries // 16 % 2}
            out = self.fresh()
            what = f"{number.name} number {tries} of a run by the {first}, resumed by the {then}"
            process = self.start(first, out, **options)
            if part == "kill":
                self.wait_for(process, out / "main.log", "")
            else:
                self.wait_for(process, out / "main.log", "trl")
            time.sleep(self.draw.uniform(0, 1.2 * self.running[first]))
            process.send_signal(number)
            process.stdout, process.stderr = process.communicate(timeout=60)
            if process.returncode == 0:
                continue                     # the run was faster than the signal
            finished = STEPS in self.steps(out) and process.returncode == -number
            if part == "stop" and first == "driver" and finished:
                continue                     # training had ended, only Python was still running
            tries += 1
            self.files_whole(out, what)
            if part == "stop" and self.check(process.returncode == 130, f"{what}: {process.returncode}"):
                said = re.search(r"after step (\d+)", process.stdout)
                self.check(said and int(said[1]) in self.steps(out), f"{what}: the last step is not saved")
                self.tidy(out, what)
            self.goes_on(then, out, what, threads=2 - tries // 4 % 2)
        names = " and ".join(number.name for number in numbers)
        self.row(part, f"{names} at a random moment of a run that saves each or each other step, by binary"
                 " and driver in turn; resumed by either, with other threads", tries,
                 "every whole checkpoint, and the end, has the undisturbed run's bytes")

    @property
    def running(self):
        """Seconds that each front end trains, from the first line of its log to its end."""
        if not hasattr(self, "_running"):
            self._running = {}
            for front in FRONTS:
                out = self.fresh()
                process = self.start(front, out)
                self.wait_for(process, out / "main.log", "")
                begun = time.perf_counter()
                process.communicate()
                self._running[front] = time.perf_counter() - begun
        return self._running

    def stop(self):
        self.kill((signal.SIGTERM, signal.SIGINT), "stop")

    def disk(self):
        sizes = [(self.whole / name.format(4)).stat().st_size for name in FILES[:2]]
        limits = {"model file": sizes[0] - 1000, "state file": sizes[0] + 1000}
        happened = "sentence; the checkpoint before is whole and all that is left; resumes to the right bytes"
        tries = 0
        for what, limit in limits.items():
            for front in FRONTS:
                out = self.fresh()
                self.begun(out, 4)

                def preexec():
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                self.full_disk(front, out, f"a {what} that may not grow, {front}", "File too large",
                               preexec_fn=preexec)
                tries += 1
        self.row("disk", "RLIMIT_FSIZE stops the model or the state file of a checkpoint", tries, happened)
        tries, small = 0, self.folder / "small"
        small.mkdir()
        for room in (0, 8, 40) if not self.quick else (8,):     # KiB
            for front in FRONTS:
                made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small],
                                      capture_output=True)
                if made.returncode:
                    self.row("disk", "a full tmpfs", 0, "not tried: no right to mount one")
                    return
                try:
                    out = small / "run"
                    self.begun(out, 4)
                    with contextlib.suppress(OSError), open(small / "filler", "wb", buffering=0) as file:
                        while True:
                            file.write(bytes(4096))
                    os.truncate(small / "filler", os.path.getsize(small / "filler") - 1024 * room)
                    self.full_disk(front, out, f"a disk with {room} KiB left, {front}", "No space left",
                                   free=small / "filler")
                    tries += 1
                finally:
                    subprocess.run(["umount", small], check=True)
        self.row("disk", "a tmpfs that is full, or has room for a part of a checkpoint", tries, happened)

    def full_disk(self, front, out, what, reason, free=None, **options):
        process = self.run(front, out, resume=True, **options)
        lines = process.stderr.strip().splitlines()
        self.check(process.returncode == 1 and lines, f"{what}: {process.returncode}, {process.stderr}")
        for line in lines:
            self.check(reason in line and str(out) in line, f"{what}: {line}")
        self.check(self.steps(out) == [4], f"{what}: checkpoints {self.steps(out)}")
        self.files_whole(out, what)
        self.tidy(out, what)
        if free:
            free.unlink()
        self.goes_on(front, out, what)

    def shards(self):
        data, tries = self.folder / "data", 0
        damages = {
            "cut short": lambda path: os.truncate(path, path.stat().st_size - 100),
            "emptied": lambda path: os.truncate(path, 0),
            "deleted": lambda path: path.unlink(),
            "of as many 1s": lambda path: path.write_bytes(shard([1] * (path.stat().st_size // 2 - 512))),
            "replaced by a longer one": lambda path: path.write_bytes(shard([1] * 4000)),
            "of tokens >= V": lambda path: path.write_bytes(shard([99] * (path.stat().st_size // 2 - 512))),
            "no shard": lambda path: path.write_bytes(bytes(9000)),
            "a directory": lambda path: (path.unlink(), path.mkdir()),
        }

        def copy_shards():
            shutil.rmtree(data, ignore_errors=True)
            data.mkdir()
            for path in self.folder.glob("*_?.bin"):
                shutil.copy(path, data)

        for name, damage in list(damages.items())[:2 if self.quick else None]:
            for front in FRONTS:
                done = False
                while not done:
                    copy_shards()
                    out, what = self.fresh(), f"a shard {name} during a run by the {front}"
                    process = self.start(front, out, data=data)
                    if self.wait_for(process, out / "main.log", "s:2 trl"):
                        process.send_signal(signal.SIGSTOP)
                        for path in data.glob("train_*.bin"):
                            damage(path)
                        process.send_signal(signal.SIGCONT)
                    process.stdout, process.stderr = process.communicate(timeout=60)
                    done = process.returncode != 0     # else the run was faster
                self.sentence(process, ["train_"], what)
                self.files_whole(out, what)
                self.tidy(out, what)
                copy_shards()
                self.goes_on(front, out, what, data=data)
                tries += 1
        self.row("shards", "all shards cut, emptied, deleted, replaced, … during a run", tries,
                 "sentence that names one; all checkpoints are whole; with the shards back, resumes to the"
                 " right bytes")

    def nan(self):
        from train_gpt2 import GPT2
        model = GPT2.load(str(self.folder / "model.bin"))
        model.set("lnfw", [math.nan] * 12)
        model.save(str(self.folder / "nan.bin"))
        model = GPT2.load(str(self.folder / "model.bin"))
        wte = array.array("f", model.get("wte").tobytes())
        model.set("lnfw", [1e-25] * 12)      # same logits; squares of gradients overflow
        model.set("wte", [1e25 * value for value in wte])
        model.set("lnfb", [0.0] * 12)
        model.save(str(self.folder / "inf.bin"))
        cases = [("a loss that is NaN", {"model": "nan.bin"}),
                 ("a gradient that is infinite", {"model": "inf.bin"})]
        for lr in (1e3, 1e9, 1e15, 1e30, 1e39, 1e300):
            cases += [(f"a learning rate of {lr:g}", {"lr": lr, "decay": decay}) for decay in (0, 0.1)]
        tries = stopped = 0
        for what, changes in cases[:3] + cases[-1:] if self.quick else cases:
            for front in FRONTS:
                out = self.fresh()
                process = self.run(front, out, **changes)
                what_by = f"{what}, {front}"
                if process.returncode:
                    self.sentence(process, [], what_by)
                    stopped += 1
                for path in (*out.glob("model_*"), *out.glob("state_*"), *out.glob("best*")):
                    begin = 1024 + (0 if "state" not in path.name else 2120)
                    values = array.array("f", path.read_bytes()[begin:])
                    self.check(all(map(math.isfinite, values)), f"{what_by}: {path.name} is NaN or infinite")
                whole = all((out / name.format(step)).exists() for step in self.steps(out) for name in FILES)
                self.check(whole, f"{what_by}: a file of a checkpoint is missing")
                tries += 1
        self.row("nan", "a loss or gradient that is NaN or infinite, learning rates of 1e3 to 1e300", tries,
                 f"{stopped} stopped with a sentence; no saved file has a NaN or infinite value")

    def built(self, *sanitizers):
        """Builds faults.c; None if no compiler can. UBSan of Clang detects more than that of GCC."""
        path = self.folder / "faults"
        flags = [f"-DSANITIZE_{name}" for name in sanitizers]
        if sanitizers:
            flags += [f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"]
        for compiler in ("clang", "gcc", "cc"):
            words = [compiler, "-O1", "-g", "-std=gnu11", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", *flags,
                     "-o", path, HERE / "faults.c", "-lm", "-lpthread", "-ldl"]
            with contextlib.suppress(OSError):     # no such compiler
                if subprocess.run(words, capture_output=True, env=self.own_env).returncode == 0:
                    return path
        return None

    @property
    def own_env(self):
        """The environment of programs with a sanitizer of their own."""
        env = {name: value for name, value in self.env.items() if name not in ("LD_PRELOAD", "ASAN_OPTIONS")}
        return {**env, "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0"}

    def run_c(self, program, *words):
        done = subprocess.run([program, self.folder, *words], capture_output=True, text=True,
                              env=self.own_env)
        self.check(done.returncode == 0, f"faults {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def calls(self):
        """Each call of a kind fails, in each scenario."""
        sanitizers = ("undefined",) if self.quick else ("undefined", "address")
        self.fresh()                         # where faults.c creates its files
        program = self.built(*sanitizers)
        if not program:
            program, sanitizers = self.built(), ("none",)
        once = ["once"] * self.quick
        kinds = {"alloc": "malloc, calloc, aligned_alloc, mmap return NULL", "short": "fread returns less",
                 "read": "fread, fseeko: EIO", "write": "fwrite, fflush, fsync, fclose, rename, fopen fail",
                 "open": "fopen, opendir, stat fail"}
        for kind, what in kinds.items():
            lines = [line.split("\t") for line in self.run_c(program, kind, *once).splitlines()]
            failed = sum(int(line[3]) for line in lines)
            self.row("calls", f"{what}: the n-th, then all from the n-th on, in {len(lines)} uses of the"
                     f" library (sanitizers: {' and '.join(sanitizers)})",
                     sum(int(line[2]) for line in lines),
                     f"{failed} failed with a sentence, the others did without; then all worked, to the same"
                     " bits, and nothing leaked")
        shown = self.run_c(program, "order").strip()
        expected = ", ".join(f"flush {name}.tmp, rename {name}" + ", flush run" * (name[0] != "m")
                             for name in (text.format(2) for text in FILES))
        self.check(shown == expected, f"order: {shown}")
        self.row("calls", "the order in which a checkpoint reaches the disk", 1, shown)

    def cycles(self):
        from train_gpt2 import GPT2, GPT2Config, Loader
        count, sizes = (200 if self.quick else 1000), []
        pattern = str(self.folder / "train_*.bin")
        for cycle in range(count):
            model = GPT2(GPT2Config(*SHAPE.values()), seed=cycle)
            with Loader(pattern, 2, 8, 61, shuffle=True) as loader:
                model.forward(*loader.next())
                model.backward()
                model.update(1e-3)
                list(model.generate([1], 3))
            model.close()
            if cycle % 10 == 9:
                with open("/proc/self/statm") as file:
                    sizes.append(int(file.read().split()[1]) * resource.getpagesize() >> 10)
        middle, end = max(sizes[:len(sizes) // 2]), max(sizes[len(sizes) // 2:])
        self.check(end <= middle + 512, f"cycles: {middle} KiB, then {end} KiB")
        self.row("cycles", "a model made, trained, sampled from and freed, with a loader", count,
                 f"resident {middle:,} KiB at most in the first half, {end:,} in the second")

    def threads(self):
        from train_gpt2 import GPT2, GPT2Config, Loader
        shapes = [GPT2Config(*SHAPE.values()), GPT2Config(20, 61, 3, 3, 39)]
        pattern = str(self.folder / "train_*.bin")

        def trained(i, results):
            model, loader = GPT2(shapes[i], seed=i), Loader(pattern, 2, 8 + i, 61, shuffle=True, seed=i)
            for _ in range(20):
                model.forward(*loader.next())
                model.backward()
                model.update(1e-3)
            results[i] = b"".join(model.get(name).tobytes() for name in model.shapes)
            results[i] += bytes(list(model.generate([1], 9)))

        alone, tries = {}, 3 if self.quick else 50
        for i in range(2):
            trained(i, alone)
        for _ in range(tries):
            together = {}
            workers = [threading.Thread(target=trained, args=(i, together)) for i in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            self.check(together == alone, "threads: not the bits of a model alone")
        self.row("threads", "two models trained at once on two threads of a process", tries,
                 "the bits of each alone")
        if not self.quick:
            program = self.built("thread")
            if program:
                self.run_c(program, "threads")
            self.row("threads", "the same under ThreadSanitizer", int(bool(program)), "nothing to report")


PARTS = ("kill", "stop", "disk", "shards", "nan", "calls", "cycles", "threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all of them)")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--build", default=ROOT, type=pathlib.Path, help="of train_gpt2 and libgpt2.so")
    args = parser.parse_args()
    for part in set(args.parts) - set(PARTS):
        parser.error(f"there is no part {part!r}")
    os.environ["GPT2_LIBRARY"] = str(args.build.resolve() / "libgpt2.so")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    print("| part | what was tried | times | what happened |\n|---|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as folder:
        faults = Faults(pathlib.Path(folder), args.build.resolve(), args.quick)
        for part in args.parts or PARTS:
            getattr(faults, part)()
    return int(bool(faults.wrong))


if __name__ == "__main__":
    sys.exit(main())
