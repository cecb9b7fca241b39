"""Times training steps of this project and of PyTorch, where that is installed, in one run.

    make bench                                        every shape, five steps each
    python3 dev/bench/bench.py --shape small --steps 9
    python3 dev/bench/bench.py --torch /path/to/python     another interpreter, one that has torch

Each side runs in its own process, and they alternate step by step, so that drift of the machine affects both;
the median of the ratios is compared. FLOPs of a step are B T (6 P + 6 L T C) for both sides, with P
parameters without padding and attention counted causally. The peak is that of multiply-adds alone, measured
before every step. dev/bench/kernels.c then times each kernel against its bound. Nothing here passes or fails.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

# Name: L, NH, C, V, context, B, T.
SHAPES = {
    "124M 4x64": (12, 12, 768, 50257, 1024, 4, 64),
    "124M 4x256": (12, 12, 768, 50257, 1024, 4, 256),
    "124M 1x1024": (12, 12, 768, 50257, 1024, 1, 1024),
    "124M 4x1024": (12, 12, 768, 50257, 1024, 4, 1024),
    "small 32x256": (6, 6, 384, 256, 256, 32, 256),
}


def ours(shape):
    """Returns a function that makes one training step and returns its times, and the count of parameters."""
    sys.path.insert(0, ROOT)
    import train_gpt2
    L, NH, C, V, context, B, T = shape
    model = train_gpt2.GPT2(train_gpt2.GPT2Config(max_T=context, V=V, L=L, NH=NH, C=C), device="cpu")

    def step():
        x, y = ([[random.randrange(V) for _ in range(T)] for _ in range(B)] for _ in range(2))
        ceiling = model.lib.gpt2_ceiling()
        x, y = train_gpt2.token_rows(x)[0], train_gpt2.token_rows(y)[0]
        times = [time.perf_counter()]
        model.forward(x, y)
        times.append(time.perf_counter())
        model.backward()
        times.append(time.perf_counter())
        model.update(lr=1e-4)
        times.append(time.perf_counter())
        return times, ceiling

    return step, model.num_parameters


def pytorch_model(L, NH, C, V, context):
    """GPT-2 as PyTorch's users write it today; called with x and y (B,T), it gives the mean loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1 = nn.LayerNorm(C)
            self.ln2 = nn.LayerNorm(C)
            self.qkv = nn.Linear(C, 3 * C)
            self.attproj = nn.Linear(C, C)
            self.fc = nn.Linear(C, 4 * C)
            self.fcproj = nn.Linear(4 * C, C)

        def forward(self, x):
            B, T = x.shape[:2]
            qkv = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(C, 2))
            att = F.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + self.attproj(att.transpose(1, 2).reshape(B, T, C))
            return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    class GPT2(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(V, C)
            self.wpe = nn.Embedding(context, C)
            self.blocks = nn.ModuleList(Block() for _ in range(L))
            self.lnf = nn.LayerNorm(C)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, x, y):
            h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
            for block in self.blocks:
                h = block(h)
            return F.cross_entropy(F.linear(self.lnf(h), self.wte.weight).view(-1, V), y.view(-1))

    return GPT2()


def pytorch(shape, mode):
    """The same of PyTorch."""
    import torch
    L, NH, C, V, context, B, T = shape
    model = pytorch_model(L, NH, C, V, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model) if mode == "compile" else model

    def step():
        x, y = torch.randint(0, V, (2, B, T))
        times = [time.perf_counter()]
        loss = run(x, y)
        times.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        return times, 0

    return step, sum(parameter.numel() for parameter in model.parameters())


def worker(side, shape):
    """Makes a step for every line on standard input, and answers with its times in a line of JSON."""
    step, parameters = ours(shape) if side == "ours" else pytorch(shape, side)
    for _ in sys.stdin:
        times, ceiling = step()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024     # its peak so far, in bytes
        answer = {"times": [b - a for a, b in zip(times, times[1:])], "ceiling": ceiling,
                  "parameters": parameters, "memory": memory}
        print(json.dumps(answer), flush=True)


class Side:
    """A worker process, and what it has answered."""

    def __init__(self, side, name, python):
        self.side = side
        self.answers = []
        command = [python, os.path.abspath(__file__), "--worker", side, "--shape", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"bench.py: the {self.side} process ended; see its message above")
        return json.loads(line)

    def total(self):
        return [sum(answer["times"]) for answer in self.answers]


def report(name, sides, ceiling):
    """Prints a row for each side of a shape; ratio: its time over ours, the median over pairs of steps."""
    L, NH, C, V, context, B, T = SHAPES[name]
    for side in sides:
        seconds = statistics.median(side.total())
        parts = zip(*(answer["times"] for answer in side.answers))
        forward, backward, update = (statistics.median(part) for part in parts)
        flops = B * T * (6 * side.answers[0]["parameters"] + 6 * L * T * C)
        ratio = statistics.median(a / b for a, b in zip(side.total(), sides[0].total()))
        print(f"{name:13} {side.side:8} {seconds * 1e3:9.1f} {forward * 1e3:9.1f} {backward * 1e3:9.1f}"
              f" {update * 1e3:8.1f} {flops / seconds * 1e-9:8.1f} {100 * flops / seconds / ceiling:6.1f}%"
              f" {B * T / seconds:9.0f} {side.answers[-1]['memory'] * 1e-9:6.2f} {ratio:6.2f}", flush=True)


def has_torch(python):
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", help="only the shapes whose name contains this")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after two others (5)")
    parser.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="one that has torch")
    parser.add_argument("--modes", default="eager,compile", help="PyTorch's (eager,compile)")
    parser.add_argument("--worker", metavar="SIDE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, SHAPES[args.shape])
    modes = args.modes.split(",") if has_torch(args.torch) else []
    if not modes:
        print("PyTorch is not installed here: this project alone (pip install torch, or --torch PYTHON)")
    print(f"{'shape':13} {'side':8} {'ms/step':>9} {'forward':>9} {'backward':>9} {'update':>8}"
          f" {'GFLOP/s':>8} {'ceiling':>7} {'tokens/s':>9} {'GB':>6} {'ratio':>6}")
    for name in SHAPES:
        if args.shape and args.shape not in name:
            continue
        sides = [Side("ours", name, sys.executable)] + [Side(mode, name, args.torch) for mode in modes]
        for count in range(args.steps + 2):
            for side in sides:
                answer = side.step()
                if count >= 2:
                    side.answers.append(answer)
        report(name, sides, statistics.median(answer["ceiling"] for answer in sides[0].answers))
        for side in sides:
            side.process.stdin.close()
            side.process.wait()
    return None


if __name__ == "__main__":
    main()
