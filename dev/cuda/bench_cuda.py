"""Times training steps on a GPU, of this project and of PyTorch, where that is installed.

    make cuda && python3 dev/cuda/bench_cuda.py                     every shape, PyTorch for the first two
    python3 dev/cuda/bench_cuda.py --shape d12 --seconds 600        more time: PyTorch for the others too

Each side of a shape runs in its own process, with all memory; of several batch sizes the largest that fits
counts. PyTorch as its users write it: torch.compile, autocast to bf16, scaled_dot_product_attention, fused
AdamW, a vocabulary padded to 50304. FLOPs per token are 6 P + 6 L T C for both, with P parameters without
padding; MFU is the fraction of the GPU's dense bf16 peak. Times are of whole steps, from tokens in host
memory to updated parameters, the median of 3 groups of steps. dev/cuda/profile.cu shows where in a step the
time goes. Nothing here passes or fails.
"""
import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

# Name: L, NH, C, batch sizes to try, steps in a group. T is 1024.
SHAPES = {
    "d12 64x1024": (12, 12, 768, (64, 32, 16, 8), 8),
    "d12 4x1024": (12, 12, 768, (4,), 40),
    "d24": (24, 16, 1024, (64, 48, 32, 24, 16, 8, 4), 5),
    "d36": (36, 20, 1280, (48, 32, 24, 16, 8, 4, 2), 4),
    "d48": (48, 25, 1600, (32, 24, 16, 12, 8, 4, 2, 1), 3),
}
T, V = 1024, 50257

# Dense bf16 FLOP/s by a part of the name, from NVIDIA's data sheets.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "GH200": 989.4e12,
         "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12,
         "RTX 4090": 165.2e12, "RTX 3090": 71e12, "B200": 2250e12}


def smi(field):
    """A field of nvidia-smi for the first GPU, or an empty string."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def ours(shape, B):
    """Returns a function that runs a training step and returns its loss."""
    sys.path.insert(0, ROOT)
    import train_gpt2
    L, NH, C = shape[:3]
    model = train_gpt2.GPT2(train_gpt2.GPT2Config(max_T=T, V=V, L=L, NH=NH, C=C), device="cuda")
    draw = random.Random(1)
    rows = [[draw.randrange(V) for _ in range(T + 1)] for _ in range(B)]
    x = train_gpt2.token_rows([row[:-1] for row in rows])[0]
    y = train_gpt2.token_rows([row[1:] for row in rows])[0]

    def step():
        loss = model.forward(x, y)
        model.backward()
        model.update(lr=1e-4)
        return loss

    return step


def pytorch(shape, B):
    """The same for PyTorch."""
    import torch
    sys.path.insert(0, os.path.join(ROOT, "dev", "bench"))
    from bench import pytorch_model
    L, NH, C = shape[:3]
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    model = pytorch_model(L, NH, C, (V + 127) // 128 * 128, T).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    run = torch.compile(model)
    x, y = torch.randint(0, V, (2, B, T)).pin_memory()

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(x.cuda(non_blocking=True), y.cuda(non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronized():
        loss = float(step())
        torch.cuda.synchronize()
        return loss

    step.synchronized = synchronized
    return step


def worker(side, name, B):
    """Prints the seconds of a step, in groups, as a line of JSON."""
    steps = SHAPES[name][4]
    step = {"ours": ours, "pytorch": pytorch}[side](SHAPES[name], B)
    last = getattr(step, "synchronized", step)
    loss = last()
    for _ in range(2):
        last()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(steps - 1):
            step()
        last()
        times.append((time.perf_counter() - begin) / steps)
    print(json.dumps({"times": times, "loss": float(loss), "memory": smi("memory.used")}), flush=True)


def measure(side, name, seconds):
    """(batch size, answer) of the largest batch that fits; None and a reason where there is none."""
    reason = "no time left"
    for B in SHAPES[name][3]:
        if seconds < 15:
            break
        begin = time.monotonic()
        command = [sys.executable, os.path.abspath(__file__), "--worker", side, name, str(B)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return None, "no time left"
        seconds -= time.monotonic() - begin
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"times"')]
        if done.returncode == 0 and lines:
            return B, json.loads(lines[-1])
        words = done.stderr.strip().splitlines()
        reason = words[-1] if words else f"status {done.returncode}"
        if "memory" not in reason.lower():
            break
    return None, reason


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="", help="only the shapes whose name contains this")
    parser.add_argument("--seconds", type=float, default=240, help="for all together (240)")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "SHAPE", "B"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], args.worker[1], int(args.worker[2]))
    gpu = smi("name")
    if not gpu:
        sys.exit("bench_cuda.py: nvidia-smi finds no GPU here, and without one there is nothing to time")
    peak = next((PEAKS[part] for part in sorted(PEAKS, key=len, reverse=True) if part in gpu), None)
    deadline = time.monotonic() + args.seconds
    has_torch = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0
    facts = [gpu, "bf16 peak unknown"]
    if peak:
        facts[1] = f"bf16 peak {peak * 1e-12:.0f} TFLOP/s"
    if not has_torch:
        facts.append("no PyTorch here")
    print(", ".join(facts))
    print(f"{'shape':13} {'side':8} {'B':>3} {'ms/step':>9} {'tokens/s':>10} {'MFU':>6} {'GB':>6} {'loss':>7}"
          " ratio")
    names = [name for name in SHAPES if args.shape in name]
    plan = [(name, "ours") for name in names]
    if has_torch:                        # the first two shapes, then the others without PyTorch, then PyTorch
        theirs = [(name, "pytorch") for name in names]
        plan = sorted(plan[:2] + theirs[:2], key=lambda pair: names.index(pair[0])) + plan[2:] + theirs[2:]
    found = {}
    for name, side in plan:
        L, _, C = SHAPES[name][:3]
        B, answer = measure(side, name, deadline - time.monotonic())
        if B is None:
            print(f"{name:13} {side:8} {answer}", flush=True)
            continue
        seconds = statistics.median(answer["times"])
        parameters = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
        found[name, side] = rate = B * T / seconds
        mfu = "     ?"
        if peak:
            mfu = f"{100 * rate * (6 * parameters + 6 * L * T * C) / peak:5.1f}%"
        ratio = found.get((name, "ours"), float("nan")) / rate
        memory = float(answer["memory"] or "nan") * 1.048576e-3
        print(f"{name:13} {side:8} {B:3} {seconds * 1e3:9.2f} {rate:10.0f} {mfu} {memory:6.1f}"
              f" {answer['loss']:7.3f} {ratio:5.2f}", flush=True)
    if not all((name, "ours") in found for name in names[:2]):
        return "bench_cuda.py: not every shape was timed"
    return None


if __name__ == "__main__":
    sys.exit(main())
