"""Times generation token by token on the CPU, next to Hugging Face transformers.

    python3 dev/bench/generate.py                                 this project only
    python3 dev/bench/generate.py --torch /path/to/python         and transformers, in that Python
    python3 dev/bench/generate.py --prompt 900 --tokens 60        after a long prompt

GPT-2 124M with random weights, greedy decoding, one sequence, key-value cache on both sides. Each new token
reads every weight once, so memory bandwidth is the bound; it is measured beside, by a gradient norm. Both
sides run in their own processes and alternate. Passes or fails nothing.
"""
import argparse
import os
import random
import statistics
import sys
import time

from bench import ROOT, Worker, serve

PARAMETERS = 124_439_808


def ours(prompt, tokens):
    """Returns a function that generates a text and returns its times and the memory bandwidth."""
    sys.path.insert(0, ROOT)
    import ctypes
    import train_gpt2
    config = train_gpt2.GPT2Config()
    train_gpt2.library("cpu").gpt2_descriptor("d12", ctypes.byref(config))
    model = train_gpt2.GPT2(config, device="cpu")
    gradient_bytes = 4 * sum(train_gpt2.math.prod(shape) for shape in model.shapes.values())

    def generate():
        begun = time.perf_counter()
        model.set("lnfb", [0.0] * config.C, "grad")     # discards the cached norm
        model.grad_norm()
        bandwidth = gradient_bytes / (time.perf_counter() - begun)
        times = [time.perf_counter()]
        for _ in model.generate([random.randrange(config.V) for _ in range(prompt)], tokens, temperature=0):
            times.append(time.perf_counter())
        per_token = (times[-1] - times[1]) / (tokens - 1)
        return {"prompt": times[1] - times[0], "token": per_token, "bandwidth": bandwidth}

    return generate


def transformers(prompt, tokens):
    """Returns the same function for transformers, without bandwidth."""
    import torch
    import transformers
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()

    def seconds(ids, n):
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0,
                           attention_mask=torch.ones_like(ids))
        return time.perf_counter() - begun

    def generate():
        ids = torch.randint(50257, (1, prompt))
        first = seconds(ids, 1)
        return {"prompt": first, "token": (seconds(ids, tokens) - first) / (tokens - 1)}

    return generate


SIDES = {"ours": ours, "transformers": transformers}


def report(name, rows, prompt):
    """Prints the medians of one side."""
    first, per_token = (statistics.median(row[key] for row in rows) for key in ("prompt", "token"))
    line = f"{name:12} {prompt} prompt tokens in {first:.3f} s, then {per_token * 1e3:.1f} ms/token:" \
           f" {1 / per_token:.1f} tokens/s"
    if "bandwidth" in rows[0]:
        bandwidth = statistics.median(row["bandwidth"] for row in rows)
        fraction = statistics.median(4 * PARAMETERS / row["token"] / row["bandwidth"] for row in rows)
        line += f", {fraction:.0%} of the bound by {bandwidth / 1e9:.1f} GB/s"
    print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", metavar="PYTHON", help="a Python that has torch and transformers")
    parser.add_argument("--prompt", type=int, default=16, help="prompt tokens (16)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to generate (100)")
    parser.add_argument("--texts", type=int, default=5, help="timed texts, after one to warm up (5)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)     # of a worker process
    args = parser.parse_args()
    if args.side:
        return serve(SIDES[args.side](args.prompt, args.tokens))
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    pythons = {"ours": sys.executable}
    if args.torch:
        pythons["transformers"] = args.torch
    workers = [Worker(side, [python, __file__, "--side", side, "--prompt", str(args.prompt),
                             "--tokens", str(args.tokens)]) for side, python in pythons.items()]
    for count in range(args.texts + 1):
        for worker in workers:
            worker.step(keep=count > 0)
    for worker in workers:
        report(worker.name, worker.answers, args.prompt)
        worker.close()
    if args.torch:
        pairs = list(zip(workers[1].answers, workers[0].answers))
        token, first = (statistics.median(a[key] / b[key] for a, b in pairs) for key in ("token", "prompt"))
        print(f"transformers / ours: {token:.2f} per token, {first:.2f} for the prompt")
    return None


if __name__ == "__main__":
    main()
