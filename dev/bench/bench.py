"""Times training steps on the CPU, next to PyTorch if it is installed.

    make bench                                             every shape, five steps each
    python3 dev/bench/bench.py --shape small --steps 9
    python3 dev/bench/bench.py --torch /path/to/python     PyTorch in another interpreter

Both sides run in their own processes and alternate step by step, so that a change of clock speed affects
both; the ratio is the median over pairs of steps. FLOPs per step are B T (6 P + 6 L T C) for both: P
parameters without padding, causal attention. The peak (multiply-adds only) is measured before every step.
Passes or fails nothing.
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
    """Returns a function that runs one training step and returns its times."""
    sys.path.insert(0, ROOT)
    import train_gpt2
    L, NH, C, V, context, B, T = shape
    model = train_gpt2.GPT2(train_gpt2.GPT2Config(max_T=context, V=V, L=L, NH=NH, C=C), device="cpu")

    def step():
        x, y = ([[random.randrange(V) for _ in range(T)] for _ in range(B)] for _ in range(2))
        peak = model.lib.gpt2_ceiling()
        x, y = train_gpt2.token_rows(x)[0], train_gpt2.token_rows(y)[0]
        times = [time.perf_counter()]
        model.forward(x, y)
        times.append(time.perf_counter())
        model.backward()
        times.append(time.perf_counter())
        model.update(lr=1e-4)
        times.append(time.perf_counter())
        return answer(times, model.num_parameters, peak)

    return step


def pytorch_model(L, NH, C, V, context):
    """GPT-2 in idiomatic PyTorch; called with x and y (B,T), it returns the mean loss."""
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
    """Returns the same function for PyTorch; mode is eager or compile."""
    import torch
    L, NH, C, V, context, B, T = shape
    model = pytorch_model(L, NH, C, V, context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    run = model
    if mode == "compile":
        run = torch.compile(model)

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
        return answer(times, parameters)

    return step


def answer(times, parameters, peak=0):
    """What a step reports: seconds of its three phases, FLOP/s of the peak, maximum resident bytes so far."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    phases = [after - before for before, after in zip(times, times[1:])]
    return {"times": phases, "parameters": parameters, "peak": peak, "memory": memory}


def serve(step):
    """In a worker process: runs a step for every line on standard input and prints its result as JSON."""
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


class Worker:
    """A process that runs serve(), and its results."""

    def __init__(self, name, command):
        self.name = name
        self.answers = []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, keep=True):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} process ended; its message is above")
        if keep:
            self.answers.append(json.loads(line))

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def totals(self):
        return [sum(answer["times"]) for answer in self.answers]


HEADINGS = (f"{'shape':13} {'side':8} {'ms/step':>9} {'forward':>9} {'backward':>9} {'update':>8}"
            f" {'GFLOP/s':>8} {'MFU':>7} {'tokens/s':>9} {'GB':>6} {'ratio':>6}")


def report(name, workers):
    """Prints a row per side; ratio is its time over ours."""
    L, NH, C, V, context, B, T = SHAPES[name]
    peak = statistics.median(answer["peak"] for answer in workers[0].answers)
    for worker in workers:
        seconds = statistics.median(worker.totals())
        phases = zip(*(answer["times"] for answer in worker.answers))
        forward, backward, update = (statistics.median(phase) * 1e3 for phase in phases)
        flops = B * T * (6 * worker.answers[0]["parameters"] + 6 * L * T * C)
        ratio = statistics.median(a / b for a, b in zip(worker.totals(), workers[0].totals()))
        print(f"{name:13} {worker.name:8} {seconds * 1e3:9.1f} {forward:9.1f} {backward:9.1f} {update:8.1f}"
              f" {flops / seconds * 1e-9:8.1f} {100 * flops / seconds / peak:6.1f}% {B * T / seconds:9.0f}"
              f" {worker.answers[-1]['memory'] * 1e-9:6.2f} {ratio:6.2f}", flush=True)


def has_torch(python):
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", help="only the shapes whose name contains this")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per side, after two to warm up (5)")
    parser.add_argument("--torch", metavar="PYTHON", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--modes", default="eager,compile", help="of PyTorch (eager,compile)")
    parser.add_argument("--worker", metavar="SIDE", help=argparse.SUPPRESS)     # in a worker process
    args = parser.parse_args()
    if args.worker == "ours":
        return serve(ours(SHAPES[args.shape]))
    if args.worker:
        return serve(pytorch(SHAPES[args.shape], args.worker))
    pythons = {"ours": sys.executable}
    if has_torch(args.torch):
        pythons.update(dict.fromkeys(args.modes.split(","), args.torch))
    else:
        print("PyTorch is not installed: timing this project only (pip install torch, or --torch PYTHON)")
    print(HEADINGS)
    for name in SHAPES:
        if args.shape and args.shape not in name:
            continue
        workers = [Worker(side, [python, os.path.abspath(__file__), "--worker", side, "--shape", name])
                   for side, python in pythons.items()]
        for count in range(args.steps + 2):
            for worker in workers:
                worker.step(keep=count >= 2)
        report(name, workers)
        for worker in workers:
            worker.close()
    return None


if __name__ == "__main__":
    main()
