"""Times generation, token by token, of this project and of transformers' generate, on the CPU, in one run.

    python3 dev/bench/generate.py                                 this project and the speed of memory
    python3 dev/bench/generate.py --torch /path/to/python         and transformers in that Python
    python3 dev/bench/generate.py --prompt 900 --tokens 60        after a long prompt

GPT-2 124M with random weights, greedy, one sequence, keys and values cached by both. Each new token reads
every weight once, so memory bandwidth is the limit; it is measured in the same run, by the norm of a gradient
of the model's size. Both sides run in their own processes and alternate text by text. Nothing here passes or
fails.
"""
import argparse
import os
import random
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def ours(prompt, tokens):
    """A function that generates and returns seconds for the prompt, seconds a token, bytes/s of memory."""
    sys.path.insert(0, ROOT)
    import ctypes
    import train_gpt2
    config = train_gpt2.GPT2Config()
    train_gpt2.library("cpu").gpt2_descriptor("d12", ctypes.byref(config))
    model = train_gpt2.GPT2(config, device="cpu")
    size = 4 * sum(train_gpt2.math.prod(shape) for shape in model.shapes.values())

    def text():
        begun = time.perf_counter()
        model.set("lnfb", [0.0] * config.C, "grad")     # so that the norm is not known
        model.grad_norm()
        speed = size / (time.perf_counter() - begun)
        times = [time.perf_counter()]
        for _ in model.generate([random.randrange(config.V) for _ in range(prompt)], tokens, temperature=0):
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / (tokens - 1), speed

    return text


def theirs(prompt, tokens):
    """The same of transformers; no bytes/s."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()

    def generate(ids, n):
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                           attention_mask=torch.ones_like(ids))
        return time.perf_counter() - begun

    def text():
        ids = torch.randint(50257, (1, prompt))
        first = generate(ids, 1)
        return first, (generate(ids, tokens) - first) / (tokens - 1), 0

    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="a Python that has torch and transformers")
    parser.add_argument("--prompt", type=int, default=16, help="tokens before")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to generate")
    parser.add_argument("--texts", type=int, default=5, help="how often")
    parser.add_argument("--side", choices=("ours", "theirs"), help=argparse.SUPPRESS)     # of a process
    args = parser.parse_args()
    if args.side:
        text = {"ours": ours, "theirs": theirs}[args.side](args.prompt, args.tokens)
        for _ in sys.stdin:
            print(*text(), flush=True)
        return
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sides = {"ours": sys.executable, **({"theirs": args.torch} if args.torch else {})}
    processes = {side: subprocess.Popen([python, __file__, "--side", side, "--prompt", str(args.prompt),
                                         "--tokens", str(args.tokens)], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
                 for side, python in sides.items()}
    rows = {side: [] for side in sides}
    for turn in range(args.texts + 1):
        for side, process in processes.items():
            print("go", file=process.stdin, flush=True)
            rows[side].append([float(word) for word in process.stdout.readline().split()])
    for side in sides:                       # the first text warms up
        first, each, speed = (statistics.median(column) for column in zip(*rows[side][1:]))
        print(f"{side:6} {args.prompt} tokens read in {first:.3f} s, then {each * 1e3:.1f} ms a token:"
              f" {1 / each:.1f} tokens/s", end="")
        share = statistics.median(124_439_808 * 4 / row[1] / row[2] for row in rows[side][1:] if row[2]) \
            if speed else 0
        print(f", {share:.0%} of what {speed / 1e9:.1f} GB/s allow" if share else "")
    if args.torch:
        pairs = list(zip(rows["theirs"], rows["ours"]))[1:]
        print(f"ratio  {statistics.median(a[1] / b[1] for a, b in pairs):.2f} a token,"
              f" {statistics.median(a[0] / b[0] for a, b in pairs):.2f} for the prompt")
    for process in processes.values():
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
