"""Counts the instructions in the loops of kernels, as compiled by nvcc: a bound on speed, without a GPU.

    python3 dev/cuda/instructions.py --cublas DIR                  flash attention, for sm_90a
    python3 dev/cuda/instructions.py --kernel layernorm --arch 80

Each of an SM's four schedulers issues at most one instruction per cycle, so the instructions of a loop other
than its products can be its bound: HMMA, of 16 x 8 x 16 for a warp, and Hopper's HGMMA, of 64 x 64 x 16 for
four warps, which counts as 8. For each loop of 50 instructions or more: their number, their number per
product, and the most frequent ones. A loop's count includes inner loops once, and both sides of branches,
such as the masks that only tiles on the diagonal take.

The exit status is 1 if a kernel spills registers or waits for each HGMMA ("serialized"). Needs nvcc, and
nvdisasm from the CUDA toolkit or from the Python package nvidia-cuda-nvdisasm.
"""
import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def compile_kernels(args, cubin):
    """Compiles to machine code; returns registers and bytes of spills by kernel, and whether it has HGMMAs
    that the compiler has serialized."""
    arch = {"90": "90a"}.get(args.arch, args.arch)
    command = ["nvcc", "-O3", "-std=c++17", "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-ftz=true",
               "-Xptxas", "-v", "-cubin", "-o", cubin, os.path.join(ROOT, "train_gpt2.cu")]
    if args.cublas:
        command.insert(1, f"-I{os.path.join(args.cublas, 'include')}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"instructions.py: nvcc failed: {done.stderr.strip().splitlines()[0]}; cublasLt.h is in the"
                 " include of --cublas")
    text = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
    sizes = {name: (int(registers), int(stores) + int(loads))
             for name, stores, loads, registers in re.findall(text, done.stderr, re.DOTALL)}
    return sizes, "serialized" in done.stderr


def read_code(nvdisasm, cubin):
    """By kernel, its instructions and labels in order: ("HMMA", ""), ("BRA", ".L_x_1"), ("", ".L_x_1")."""
    code, lines = {}, None
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\w+):", line):
            lines = code.setdefault(section[1], [])
        elif label := re.match(r"(\.L_x_\d+):", line):
            lines.append(("", label[1]))
        elif found := re.match(r"\s+/\*\w+\*/\s+(?:@!?U?P\w+ )?(\w+)[^`;]*(?:`\((\.L_x_\d+)\))?", line):
            lines.append((found[1], found[2] or ""))
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="90", help="compute capability, such as 80 (90, with wgmma)")
    parser.add_argument("--kernel", default="flash", help="kernels whose name has this")
    parser.add_argument("--cublas", help="cuBLASLt's folder, as make's CUBLAS")
    parser.add_argument("--nvdisasm", default=shutil.which("nvdisasm"), help="where that is")
    args = parser.parse_args()
    if not args.nvdisasm:
        sys.exit("instructions.py: there is no nvdisasm; pip install nvidia-cuda-nvdisasm, and name the"
                 " program in it with --nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernels.cubin")
        sizes, serialized = compile_kernels(args, cubin)
        code = read_code(args.nvdisasm, cubin)
    for kernel, lines in code.items():
        if args.kernel not in kernel:
            continue
        name = re.sub(r"^_Z\d+(\w+?_kernel).*", r"\1", kernel)
        print("{}: {} registers, {} bytes of spills".format(name, *sizes[kernel]))
        labels = {label: at for at, (word, label) in enumerate(lines) if not word}
        for at, (word, label) in enumerate(lines):
            body = collections.Counter(word for word, _ in lines[labels.get(label, at):at] if word)
            if word == "BRA" and sum(body.values()) >= 50:
                count, products = sum(body.values()) + 1, body["HMMA"] + 8 * body["HGMMA"]
                each = f"{count / products:.2f} for each of {products} products" if products else "no product"
                print(f"  a loop of {count}, {each}:", *(f"{n} {what}" for what, n in body.most_common(9)))
    return serialized or any(spills for _, spills in sizes.values())


if __name__ == "__main__":
    sys.exit(main())
