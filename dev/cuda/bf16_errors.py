"""Measures how far PyTorch in bf16 is from the references in float64: the tolerance of the bf16 build.

    pip install torch
    python dev/cuda/bf16_errors.py                  writes bf16_errors.json beside this, and prints a table

The model is that of dev/reference/make_reference.py with parameters, activations and their gradients in bf16,
PyTorch's fused attention, and the loss of fp32 logits: usual mixed precision. AdamW works on fp32 masters, of
which the bf16 parameters are rounded copies. PyTorch thus rounds as often as train_gpt2.cu does, at other
places: errors of the same size are rounding, larger ones are mistakes. test_gpu.py allows FACTOR times
PyTorch's error, and for a loss (a single number, whose error may be small by chance) the largest of all.
"""
import copy
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "reference"))
import make_reference  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

FACTOR = 1.5


class GPT2(make_reference.GPT2):
    """The model of the references, with the usual changes for bf16."""

    def attention(self, h, l):
        B, T, C = h.shape
        qkv = F.linear(h, self.qkvw[l], self.qkvb[l])
        q, k, v = (part.view(B, T, self.r.NH, -1).transpose(1, 2) for part in qkv.split(C, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(B, T, C), self.attprojw[l], self.attprojb[l])

    def forward(self, x, y):
        h = self.wte[x] + self.wpe[:x.shape[1]]
        for l in range(self.r.L):
            h = h + self.attention(self.norm(h, self.ln1w[l], self.ln1b[l]), l)
            h = h + self.mlp(self.norm(h, self.ln2w[l], self.ln2b[l]), l)
        logits = F.linear(self.norm(h, self.lnfw, self.lnfb), self.wte)
        return logits, F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class Masters(torch.nn.Module):
    """fp32 master parameters with the bf16 model, so that make_reference.train can train both as one."""

    def __init__(self, model):
        super().__init__()
        self.half = [model]                             # in a list, so that its parameters are not registered
        for name, parameter in model.named_parameters():
            setattr(self, name, torch.nn.Parameter(parameter.detach().float()))

    def forward(self, x, y):
        model = self.half[0]
        pairs = [(getattr(self, name), half) for name, half in model.named_parameters()]
        for master, half in pairs:
            half.data.copy_(master.data)
            half.grad = None
        logits, loss = model(x, y)
        loss.backward()

        class Hand(torch.autograd.Function):  # passes bf16 gradients to the masters in backward()
            @staticmethod
            def forward(context, value, *masters):
                return value.clone()

            @staticmethod
            def backward(context, slope):
                return (None, *(half.grad.float() * slope for _, half in pairs))

        return logits, Hand.apply(loss.detach(), *(master for master, _ in pairs))


def errors_of(r):
    """Row -> relative error of one reference: logits, loss, 16 gradients, and `losses`, the worst of ten."""
    generator = torch.Generator().manual_seed(r.seed)
    weights = make_reference.draw_weights(r, generator)
    x, y = make_reference.draw_tokens(r, generator)
    truth = make_reference.GPT2(r, weights)
    model = GPT2(r, weights).bfloat16()
    theirs = make_reference.run(truth, x, y)
    errors = {name: make_reference.relative_error(value, theirs[name])
              for name, value in make_reference.run(model, x, y).items()}
    losses, _ = make_reference.train(Masters(copy.deepcopy(model)), x, y, r.lr)
    truths, _ = make_reference.train(truth, x, y, r.lr)
    errors["losses"] = max(abs(a - b) / b for a, b in zip(losses, truths))
    return errors


def main():
    torch.set_num_threads(1)
    table = {name: errors_of(r) for name, r in make_reference.REFERENCES.items()}
    rows = list(next(iter(table.values())))
    print(f"{'':10}" + "".join(f"{name:>10}" for name in table))
    for row in rows:
        print(f"{row:10}" + "".join(f"{errors[row]:10.1e}" for errors in table.values()))
    contents = {
        "about": "relative error (L2) of PyTorch in bf16 against float64, by dev/cuda/bf16_errors.py; "
                 "losses: the worst of ten; the tests allow factor times as much",
        "torch": torch.__version__, "factor": FACTOR,
        "errors": {name: {row: float(f"{error:.2e}") for row, error in errors.items()}
                   for name, errors in table.items()},
    }
    (HERE / "bf16_errors.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
