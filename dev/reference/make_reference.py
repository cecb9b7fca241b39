"""Writes the saved references that the C model is compared with: GPT-2 in PyTorch, computed in float64.

    python dev/reference/make_reference.py                    writes every reference of the table, beside this
    python dev/reference/make_reference.py tiny --out DIR     writes one of them, elsewhere
    python dev/reference/make_reference.py --fp32-error       PyTorch's own fp32 against float64; no files
    python dev/reference/make_reference.py --large --out DIR  a 124M model: 1 GB of files, 9 GB of memory

Per reference NAME: NAME_model.bin (weights), NAME_reference.bin (tokens, logits, loss, gradients) and
NAME_losses.json (the losses of ten AdamW steps on that batch, with their settings).

A second, independent GPT-2 (Radford et al. 2019), as short as PyTorch allows, that shares nothing with the C
code but the file formats. It first compares itself with GPT2LMHeadModel of Hugging Face transformers. Needs
PyTorch, which the project itself never does.

The weights are rounded to the precision of the model file first, and float64 starts from the rounded values,
so the file has exactly the numbers that were used. The same PyTorch on the same machine writes the same
bytes.
"""
import argparse
import copy
import ctypes
import json
import math
import pathlib
import struct
import sys
from dataclasses import dataclass

try:
    import torch
    from torch import nn
    from torch.nn import functional as F
except ImportError:
    sys.exit("make_reference.py needs PyTorch, which is not installed: run pip install torch transformers.")


@dataclass(frozen=True)
class Reference:
    """A model's shape, the batch it is run on, and how its random weights are drawn."""
    seed: int
    version: int                # of the model file: 3 holds fp32, 5 bf16
    max_T: int                  # positions that wpe has
    V: int
    L: int
    NH: int
    C: int
    B: int
    T: int
    lr: float = 1e-3            # of the ten AdamW steps
    weight_std: float = 0.2     # of the 2-D tensors; with GPT-2's own 0.02 attention is near uniform
    vector_std: float = 0.2     # of the biases around 0 and of the layer-norm weights around 1

    @property
    def Vp(self):
        """V rounded up to a multiple of 128: the rows that wte has in a file."""
        return (self.V + 127) // 128 * 128


# Together at most 1.5 MB on disk, which is what the shapes were fitted into.
REFERENCES = {
    # nothing is a multiple of anything: head size 13, V just over 128; T < max_T leaves rows of wpe unused
    "tiny": Reference(seed=1, version=3, max_T=40, V=131, L=2, NH=3, C=39, B=3, T=29),
    # one past the round numbers: head size 16 + 1, T = max_T = 64 + 3, V = 256 + 1
    "odd": Reference(seed=2, version=3, max_T=67, V=257, L=2, NH=2, C=34, B=2, T=67),
    # bf16 weights, and a head no wider than one vector
    "bf16": Reference(seed=3, version=5, max_T=24, V=100, L=2, NH=2, C=16, B=3, T=17),
    # the head size of every published GPT-2; bf16 weights because fp32 would not fit
    "head64": Reference(seed=4, version=5, max_T=100, V=60, L=1, NH=1, C=64, B=2, T=100),
}
LARGE = Reference(seed=5, version=3, max_T=1024, V=50257, L=12, NH=12, C=768, B=4, T=64,
                  lr=1e-4, weight_std=0.02, vector_std=0.0)

BETA1 = 0.9
BETA2 = 0.95
EPS = 1e-8
WEIGHT_DECAY = 0.1
DECAYED = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")      # the 2-D tensors
MAX_NORM = 1.0
STEPS = 10

AGREEMENT = 1e-10               # largest relative error against transformers, both in float64


# --- the model ---

def shapes(r):
    """Name -> shape of the 16 tensors in file order, wte without its padding rows; weights are (out, in)."""
    L, C = r.L, r.C
    return {
        "wte": (r.V, C), "wpe": (r.max_T, C),
        "ln1w": (L, C), "ln1b": (L, C),
        "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C),
        "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }


def file_dtype(r):
    return torch.bfloat16 if r.version == 5 else torch.float32


def draw_weights(r, generator):
    """Name -> float64 tensor whose values the model file can hold exactly.

    As GPT-2's initialisation, with the two residual projections scaled by 1/sqrt(2 L), but at r's spreads."""
    weights = {}
    for name, shape in shapes(r).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name in ("attprojw", "fcprojw"):
            value = noise * r.weight_std / math.sqrt(2 * r.L)
        elif name in DECAYED:
            value = noise * r.weight_std
        elif name in ("ln1w", "ln2w", "lnfw"):
            value = 1 + noise * r.vector_std
        else:
            value = noise * r.vector_std
        weights[name] = value.to(file_dtype(r)).double()
    return weights


def draw_tokens(r, generator):
    """x, y (B,T) int64, y being x's successors. The first and the last id occur as input and as target."""
    tokens = torch.randint(r.V, (r.B, r.T + 1), generator=generator)
    tokens[0, 1] = r.V - 1
    tokens[-1, 2] = 0
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class GPT2(nn.Module):
    """The transformer of Radford et al. 2019, its 16 parameters stacked over layers as in a model file."""

    def __init__(self, r, weights):
        super().__init__()
        self.r = r
        for name, weight in weights.items():
            setattr(self, name, nn.Parameter(weight.clone()))

    def attention(self, h, l):
        """softmax(q k^T / sqrt(hs)) v per head (Vaswani et al. 2017, eq. 1), causal; h and result (B,T,C)."""
        B, T, C = h.shape
        NH = self.r.NH
        qkv = F.linear(h, self.qkvw[l], self.qkvb[l])                           # (B, T, 3C)
        q, k, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=2))
        scores = q @ k.transpose(2, 3) / math.sqrt(C // NH)                     # (B, NH, T, T)
        ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
        att = scores.masked_fill(ahead, -math.inf).softmax(dim=3)
        mixed = (att @ v).transpose(1, 2).reshape(B, T, C)
        return F.linear(mixed, self.attprojw[l], self.attprojb[l])

    def mlp(self, h, l):
        hidden = F.gelu(F.linear(h, self.fcw[l], self.fcb[l]), approximate="tanh")     # (B, T, 4C)
        return F.linear(hidden, self.fcprojw[l], self.fcprojb[l])

    def norm(self, h, weight, bias):
        return F.layer_norm(h, (self.r.C,), weight, bias, eps=1e-5)

    def forward(self, x, y):
        """Logits (B,T,V) for x (B,T), and the mean cross-entropy against y (B,T) in nats per token."""
        h = self.wte[x] + self.wpe[:x.shape[1]]                                 # (B, T, C)
        for l in range(self.r.L):
            h = h + self.attention(self.norm(h, self.ln1w[l], self.ln1b[l]), l)
            h = h + self.mlp(self.norm(h, self.ln2w[l], self.ln2b[l]), l)
        logits = F.linear(self.norm(h, self.lnfw, self.lnfb), self.wte)         # the head is tied to wte
        log_probs = logits.log_softmax(dim=2)
        loss = -log_probs.gather(2, y.unsqueeze(2)).mean()
        return logits, loss


def run(model, x, y):
    """One forward and backward. Name -> tensor: logits, loss, then the gradients in file order."""
    model.zero_grad()
    logits, loss = model(x, y)
    loss.backward()
    results = {"logits": logits.detach(), "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        results[name] = parameter.grad.clone()
    return results


def train(model, x, y, lr):
    """STEPS updates of AdamW (Loshchilov & Hutter 2019, algorithm 2) on one batch; changes the model.

    Returns the losses and the global L2 gradient norms before clipping, two lists, [i] being before update
    i + 1. Clipping scales by MAX_NORM / norm, without the 1e-6 that PyTorch's own adds to the norm."""
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if name in DECAYED]
    others = [p for name, p in parameters.items() if name not in DECAYED]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(BETA1, BETA2), eps=EPS)
    losses = []
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        _, loss = model(x, y)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
        if norm > MAX_NORM:
            for p in parameters.values():
                p.grad.mul_(MAX_NORM / norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms


def relative_error(ours, truth):
    """||ours - truth|| / ||truth|| in the L2 norm."""
    truth = truth.double()
    return float((ours.double() - truth).norm() / truth.norm())


# --- the check against Hugging Face transformers ---

HF_NAMES = {
    "wte": "transformer.wte.weight", "wpe": "transformer.wpe.weight",
    "ln1w": "transformer.h.{}.ln_1.weight", "ln1b": "transformer.h.{}.ln_1.bias",
    "qkvw": "transformer.h.{}.attn.c_attn.weight", "qkvb": "transformer.h.{}.attn.c_attn.bias",
    "attprojw": "transformer.h.{}.attn.c_proj.weight", "attprojb": "transformer.h.{}.attn.c_proj.bias",
    "ln2w": "transformer.h.{}.ln_2.weight", "ln2b": "transformer.h.{}.ln_2.bias",
    "fcw": "transformer.h.{}.mlp.c_fc.weight", "fcb": "transformer.h.{}.mlp.c_fc.bias",
    "fcprojw": "transformer.h.{}.mlp.c_proj.weight", "fcprojb": "transformer.h.{}.mlp.c_proj.bias",
    "lnfw": "transformer.ln_f.weight", "lnfb": "transformer.ln_f.bias",
}
HF_TRANSPOSED = ("qkvw", "attprojw", "fcw", "fcprojw")      # their Conv1D keeps weights as (in, out)


def run_transformers(transformers, r, weights, x, y):
    """As run(), by GPT2LMHeadModel from the same weights in float64."""
    config = transformers.GPT2Config(
        vocab_size=r.V, n_positions=r.max_T, n_embd=r.C, n_layer=r.L, n_head=r.NH,
        activation_function="gelu_new", layer_norm_epsilon=1e-5, attn_implementation="eager",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).double()
    parameters = dict(model.named_parameters())

    def theirs(name):
        """Their parameters for one of our tensors: one per layer, or one where there are no layers."""
        layers = range(r.L) if "{}" in HF_NAMES[name] else [0]
        return [parameters[HF_NAMES[name].format(l)] for l in layers]

    with torch.no_grad():
        for name, weight in weights.items():
            parts = theirs(name)
            for parameter, value in zip(parts, weight.view(len(parts), *weight.shape[-parts[0].dim():])):
                parameter.copy_(value.T if name in HF_TRANSPOSED else value)

    logits = model(x, use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())       # their own loss would round to fp32
    loss.backward()
    results = {"logits": logits.detach(), "loss": loss.detach()}
    for name, weight in weights.items():
        grads = [p.grad.T if name in HF_TRANSPOSED else p.grad for p in theirs(name)]
        results[name] = torch.stack(grads).view(weight.shape)
    return results


def check_against_transformers(transformers, label, r, weights, x, y, results):
    """Exits with one sentence if the two models disagree; else prints how well they agree."""
    theirs = run_transformers(transformers, r, weights, x, y)
    errors = {name: relative_error(results[name], theirs[name]) for name in theirs}
    worst = max(errors, key=errors.get)
    if not errors[worst] <= AGREEMENT:
        sys.exit(f"{label}: {worst} differs from that of transformers {transformers.__version__} by "
                 f"{errors[worst]:.1e}, expected at most {AGREEMENT:.0e}, so its files were not written: "
                 "find out which of the two models changed.")
    print(f"{label}: agrees with transformers {transformers.__version__}, logits {errors['logits']:.1e}, "
          f"loss {errors['loss']:.1e}, gradients at most {max(list(errors.values())[2:]):.1e} (relative)")


def import_transformers(required):
    """The module, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        if required:
            sys.exit("--require-transformers: transformers is not installed: run pip install transformers.")
        print("transformers is not installed: the check against it is skipped.")
        return None
    return transformers


# --- files (little-endian, as is every machine that PyTorch is built for) ---

def raw_bytes(tensor, dtype):
    """The tensor's elements as `dtype`, in order. Without NumPy, which PyTorch does not always bring."""
    tensor = tensor.to(dtype).contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def write_tensors(file, r, tensors, dtype):
    """The 16 tensors in file order, wte with its Vp - V padding rows of zeros."""
    for name in shapes(r):
        file.write(raw_bytes(tensors[name], dtype))
        if name == "wte":
            file.write(raw_bytes(torch.zeros(r.Vp - r.V, r.C), dtype))


def header(*entries):
    return struct.pack("<256i", *entries, *[0] * (256 - len(entries)))


def write_model(path, r, weights):
    with open(path, "wb") as file:
        file.write(header(20240326, r.version, r.max_T, r.V, r.L, r.NH, r.C, r.Vp))
        write_tensors(file, r, weights, file_dtype(r))


def write_reference(path, r, x, y, results):
    with open(path, "wb") as file:
        file.write(header(20240327, 2, r.B, r.T))
        file.write(raw_bytes(x, torch.int32))
        file.write(raw_bytes(y, torch.int32))
        file.write(raw_bytes(results["logits"], torch.float32))
        file.write(raw_bytes(results["loss"], torch.float32))
        write_tensors(file, r, results, torch.float32)


def write_losses(path, r, losses, norms):
    contents = {
        "about": "AdamW in float64 on the batch of the reference file; [i] is before update i + 1, "
                 "gradient norms are global and before clipping",
        "torch": torch.__version__,
        "lr": r.lr, "beta1": BETA1, "beta2": BETA2, "eps": EPS,
        "weight_decay": WEIGHT_DECAY, "decayed": list(DECAYED), "max_norm": MAX_NORM,
        "losses": losses, "gradient_norms": norms,
    }
    path.write_text(json.dumps(contents, indent=1) + "\n")


# --- the commands ---

def write_files(label, folder, r, weights, x, y, model, results):
    paths = [folder / f"{label}_{part}" for part in ("model.bin", "reference.bin", "losses.json")]
    losses, norms = train(model, x, y, r.lr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_model(paths[0], r, weights)
        write_reference(paths[1], r, x, y, results)
        write_losses(paths[2], r, losses, norms)
    except OSError as error:
        where = error.filename or folder
        sys.exit(f"{where}: cannot be written ({error.strerror}): choose another folder with --out.")
    print(f"{label}: loss {losses[0]:.4f} to {losses[-1]:.4f}, "
          f"gradient norm {norms[0]:.3f} to {norms[-1]:.3f}")
    for path in paths:
        print(f"{label}: wrote {path}, {path.stat().st_size:,} bytes")


def fp32_errors(r, x, y, model, results):
    """Row name -> relative error of the same computation in fp32; `losses` is the worst of the ten losses."""
    model32 = copy.deepcopy(model).float()
    errors = {name: relative_error(value, results[name]) for name, value in run(model32, x, y).items()}
    losses32, _ = train(model32, x, y, r.lr)
    losses64, _ = train(model, x, y, r.lr)
    errors["losses"] = max(abs(a - b) / b for a, b in zip(losses32, losses64))
    return errors


def print_table(columns):
    """columns: reference name -> row name -> number."""
    print("\nrelative error (L2) of PyTorch in fp32 against float64")
    print(f"{'':10}" + "".join(f"{label:>10}" for label in columns))
    for row in next(iter(columns.values())):
        print(f"{row:10}" + "".join(f"{errors[row]:10.1e}" for errors in columns.values()))


def main():
    parser = argparse.ArgumentParser(
        description="Makes the saved references that the C model is held against (PyTorch, float64).",
        epilog="references: " + ", ".join(REFERENCES))
    parser.add_argument("names", nargs="*", metavar="NAME", help="references to make (default: all)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path,
                        help="folder to write to (default: this script's)")
    parser.add_argument("--require-transformers", action="store_true",
                        help="fail where transformers is not installed, instead of skipping the check")
    parser.add_argument("--fp32-error", action="store_true",
                        help="print the error of PyTorch's own fp32 against float64, and write nothing")
    parser.add_argument("--large", action="store_true", help="make the 124M reference, into --out")
    args = parser.parse_args()
    for name in args.names:
        if name not in REFERENCES:
            parser.error(f"there is no reference {name}: choose from {', '.join(REFERENCES)}.")
    if args.large and args.names:
        parser.error("--large makes one reference of its own: leave the names out.")
    if args.large and not args.out and not args.fp32_error:
        parser.error("--large writes 1 GB, which has no place beside this script: name a folder with --out.")

    transformers = import_transformers(args.require_transformers)
    if args.large:
        chosen = {"large": LARGE}
    else:
        chosen = {name: REFERENCES[name] for name in args.names or REFERENCES}
        torch.set_num_threads(1)        # the same order of every sum, whatever the machine's number of cores
    folder = args.out or pathlib.Path(__file__).resolve().parent
    errors = {}
    for label, r in chosen.items():
        generator = torch.Generator().manual_seed(r.seed)
        weights = draw_weights(r, generator)
        x, y = draw_tokens(r, generator)
        model = GPT2(r, weights)
        results = run(model, x, y)
        if transformers:
            check_against_transformers(transformers, label, r, weights, x, y, results)
        if args.fp32_error:
            errors[label] = fp32_errors(r, x, y, model, results)
        else:
            write_files(label, folder, r, weights, x, y, model, results)
    if errors:
        print_table(errors)


if __name__ == "__main__":
    main()
