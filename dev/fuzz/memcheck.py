#!/usr/bin/env python3
"""Runs tests of the library, and runs of the binary, under valgrind's memcheck.

    make memcheck                                      builds without AVX and OpenMP, then both: 5 minutes
    python3 dev/fuzz/memcheck.py --build DIR binary    only the runs of the binary, of that build

"tests" are the files of tests that call the library or the binary most; a driver that a test starts does not
run under valgrind. A record counts if it names train_gpt2.c in a stack: an invalid access, a jump that
depends on uninitialized memory, a lost block. "binary" trains, saves, resumes, validates, samples, checks a
reference and evaluates HellaSwag, also with damaged files; a successful run must free each block. The status
is 1 if there was such a record. Python's own records are only counted. Needs valgrind, and a build with -g
and without AVX-512, which valgrind 3.19 does not support: make ARCH=x86-64 OPENMP=0 EXTRA=-g.
"""
import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TESTS = ["test_gpt2.py", *(f"dev/test/test_{area}.py" for area in ("files", "sampling", "command_line"))]
TOO_SLOW = "torch or 2_to_the_31 or gpt2_xl or signal or interrupted or in_double or d12"
MEMCHECK = ["valgrind", "--leak-check=full", "--num-callers=30", "--trace-children=yes",
            "--trace-children-skip=*python*,*/sh,*/cc,*/gcc"]
OURS = re.compile(r"train_gpt2\.c:\d+|libgpt2\.so|(?:^|/)train_gpt2\)")


def records(log):
    """Yields valgrind's records in a log: the paragraphs with a stack."""
    text = re.sub(r"(?m)^==\d+== ?", "", log.read_text(errors="replace"))
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r"(?m)^ +(at|by) 0x", paragraph):
            yield paragraph


def row(part, what, times, happened):
    print(f"| {part} | {what} | {times:,} | {happened} |", flush=True)


def tests(build, folder):
    """Runs the tests under valgrind. Returns whether no record names the library."""
    command = [*MEMCHECK, "--show-leak-kinds=definite", f"--log-file={folder}/tests.%p.log", sys.executable,
               "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, "-k", f"not ({TOO_SLOW})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace",
                          env={**os.environ, "PYTHONMALLOC": "malloc", "GPT2_BUILD": str(build)})
    found = [record for log in folder.glob("tests.*.log") for record in records(log)]
    ours = [record for record in found if OURS.search(record)]
    passed = sum(map(int, re.findall(r"(\d+) passed", done.stdout)))
    row("tests", " ".join(TESTS), passed,
        f"{done.stdout.strip().splitlines()[-1]}; records that name the library: {len(ours)};"
        f" that name Python only: {len(found) - len(ours)}")
    print(*ours[:20], sep="\n\n", end="\n" * bool(ours))
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:])
    return not ours and done.returncode == 0


def binary(build, folder):
    """Runs the binary under valgrind. Returns whether no record names it."""
    os.environ["GPT2_LIBRARY"] = str(build / "libgpt2.so")
    sys.path.insert(0, str(HERE))
    import faults
    faults.make_files(folder)
    small = "-i train_*.bin -j val_*.bin -b 2 -t 8 -d 32 -v 2 -m 2 -s 3 -g 4 -l 1e-3"
    (folder / "dev" / "data" / "hellaswag").mkdir(parents=True)
    shutil.copy(folder / "hellaswag.bin", folder / "dev" / "data" / "hellaswag" / "hellaswag_val.bin")
    for name, cut in (("reference.bin", "short.bin"), ("model.bin", "cut.bin")):
        (folder / cut).write_bytes((folder / name).read_bytes()[:-1])
    runs = [("help", "--help", 0),
            ("train, validate, sample, checkpoint", f"{small} -e model.bin -x 4 -o run -n 1 -nk 2", 0),
            ("resume", f"{small} -e model.bin -x 6 -o run -n 1 -nk 2 -y 1", 0),
            ("resume of what has ended", f"{small} -e model.bin -x 6 -o run -n 1 -nk 2 -y 1", 0),
            ("a model of bf16", f"{small} -e bf16.bin -x 1", 0),
            ("one batch, outliers skipped", f"{small} -e model.bin -x 140 -v 0 -s 0 -a 1 -sl 1 -sg 1", 0),
            ("HellaSwag", f"{small} -e model.bin -x 1 -h 1", 0),
            ("check", "-e reference_model.bin --check reference.bin", 0),
            ("check by a short reference", "-e reference_model.bin --check short.bin", 1),
            ("a model that is cut", f"{small} -e cut.bin -x 1", 1),
            ("shards that are none", f"{small} -e model.bin -i model.bin -x 1", 1),
            ("a run directory that is a file", f"{small} -e model.bin -o model.bin -x 1", 1),
            ("a learning rate that diverges", f"{small} -e model.bin -x 3 -l 1e30", 1),
            ("no such flag", "--nothing", 2)]
    right = True
    for what, words, status in runs:
        log, kinds = folder / "binary.log", "definite,indirect,possible" if status else "all"
        command = [*MEMCHECK, f"--show-leak-kinds={kinds}", "--track-origins=yes", f"--log-file={log}",
                   build / "train_gpt2", *words.split()]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        found = list(records(log))
        row("binary", what, 1, f"status {done.returncode}, records: {len(found)}")
        print(*found[:5], sep="\n\n", end="\n" * bool(found))
        if done.returncode != status:
            print(done.stdout[-1000:], done.stderr[-1000:])
        right &= not found and done.returncode == status
    return right


PARTS = {"tests": tests, "binary": binary}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (both)")
    parser.add_argument("--build", default=ROOT / "build" / "valgrind", type=pathlib.Path,
                        help="of train_gpt2 and libgpt2.so")
    args = parser.parse_args()
    for part in set(args.parts) - set(PARTS):
        parser.error(f"there is no part {part!r}")
    if not shutil.which("valgrind"):
        sys.exit("make memcheck needs valgrind (on Debian: apt install valgrind libc6-dbg)")
    if not (args.build / "libgpt2.so").exists():
        sys.exit(f"{args.build} has no libgpt2.so; make memcheck builds it")
    print("| part | what ran under memcheck | times | what happened |\n|---|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="memcheck-") as folder:
        results = [PARTS[part](args.build.resolve(), pathlib.Path(folder)) for part in args.parts or PARTS]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
