#!/usr/bin/env python3
# Assigned, so that --help has it under python -OO, which removes docstrings.
__doc__ = """Converts GPT-2 models between this project's model file and third-party formats.

    python3 dev/convert.py import hf/ model.bin                      Hugging Face folder or model.safetensors
    python3 dev/convert.py export model.bin hf/                      folder that transformers loads
    python3 dev/convert.py export model.bin model.gguf --format gguf --type f16
    python3 dev/convert.py unpickle ckpt.pt hf/                      PyTorch checkpoint; needs torch

Standard library only, except for unpickle; no arithmetic beyond transposes and rounding. A tokenizer table
(tokenizer.bin) beside the model is exported with it. train_gpt2.py calls read_model() and FORMATS for its
commands import and export and for --init; these take and give tensors piece by piece, so that a model is
never in memory twice.

    1. Number formats     F32, F16, BF16
    2. Tensor names       ours, Hugging Face's, GGUF's
    3. safetensors, in    read_model
    4. Formats, out       Hugging Face folder, GGUF
    5. Targets            what export and import may overwrite
    6. Pickles            PyTorch's checkpoints to safetensors
    7. Model file         in and out, for the command line
"""
import argparse
import array
import collections
import glob
import json
import math
import os
import re
import shutil
import struct
import sys
import warnings

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
import vocabulary  # noqa: E402
from fileio import counted, Error, naming, printable, regular, waiting, write_file  # noqa: E402

Shape = collections.namedtuple("Shape", "max_T V L NH C")     # as in the header of a model file
WRITER = "written by train_gpt2.py"          # in the files that convert.py writes
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
TABLE = "tokenizer.bin"
MAGIC_MODEL = 20240326
MAGIC_TABLE = 20240328
LARGEST_JSON = 10_000_000                    # bytes; parsed, JSON takes some thirty times as much memory
PIECE = 1 << 16                              # elements that are converted at a time


def silent(done, total):
    """The default of `report`, which is called after each tensor."""


# --- 1. Number formats --------------------------------------------------------------------------------------
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}     # F64 is only read
GGUF_TYPES = {"F32": 0, "F16": 1, "BF16": 30}
LARGEST_F32 = 3.4028235e38


def from_bytes(data, dtype):
    """F32, F16, BF16 or F64 data as an array of float32. Raises OverflowError for an F64 value beyond its
    range."""
    if dtype == "F64":
        values = array.array("d", data)
        if any(LARGEST_F32 < abs(value) < math.inf for value in values):
            raise OverflowError
        return array.array("f", values)
    if dtype == "F16":
        return array.array("f", struct.unpack(f"<{len(data) // 2}e", data))
    if dtype == "BF16":                      # the upper half of a float32
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[0::2], data[1::2]
        data = whole
    return array.array("f", data)


def to_bytes(values, dtype):
    """An array of float32 as F32, F16 or BF16, rounded to nearest, ties to even; NaN stays NaN.

    Raises OverflowError for a value beyond F16's range."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        return struct.pack(f"<{len(values)}e", *values)
    # As gpt2_save rounds, for all values at once: one long integer with 32 bits for each.
    ones = int.from_bytes(b"\1\0\0\0" * len(values), "little")
    bits = int.from_bytes(values.tobytes(), "little")
    nan = (bits & ones * 0x7FFFFFFF) + ones * 0x7FFFFF >> 31 & ones
    top = bits >> 16 & ones * 0xFFFF | nan << 6
    up = (bits & ones * 0xFFFF) + ones * 0x7FFF + (top & ones) >> 16 & (ones ^ nan)
    data = (top + up).to_bytes(4 * len(values), "little")
    halves = bytearray(2 * len(values))
    halves[0::2], halves[1::2] = data[0::4], data[1::4]
    return halves


def columns(values, count):
    """Yields the columns of a matrix, given as an array of its rows: the rows of its transpose."""
    return (values[column::count] for column in range(count))


# --- 2. Tensor names ----------------------------------------------------------------------------------------
NAMES = {                                    # ours, without w or b: Hugging Face's, GGUF's; * is the layer
    "wte": ("wte", "token_embd"), "wpe": ("wpe", "position_embd"), "ln1": ("h.*.ln_1", "blk.*.attn_norm"),
    "qkv": ("h.*.attn.c_attn", "blk.*.attn_qkv"), "attproj": ("h.*.attn.c_proj", "blk.*.attn_output"),
    "ln2": ("h.*.ln_2", "blk.*.ffn_norm"), "fc": ("h.*.mlp.c_fc", "blk.*.ffn_up"),
    "fcproj": ("h.*.mlp.c_proj", "blk.*.ffn_down"), "lnf": ("ln_f", "output_norm"),
}


def tensor_shapes(shape):
    """The shapes of the 16 tensors by name, in the order of the model file; wte without padding rows."""
    _, V, L, _, C = shape
    return {"wte": (V, C), "wpe": (shape.max_T, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C),
            "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
            "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
            "lnfw": (C,), "lnfb": (C,)}


class Part(collections.namedtuple("Part", "name first shape transposed dtype")):
    """One layer of our tensor `name`, from element `first` on, with its shape and dtype in the other format.

    transposed: it is (in,out) there, as in Conv1D, and (out,in) here, as in nn.Linear."""
    @property
    def size(self):
        """Bytes in the other format."""
        return math.prod(self.shape) * BYTES[self.dtype]


def model_parts(shape, dtype="F32", gguf=False, linear=False):
    """All parts of a model by Hugging Face's names, or by GGUF's; linear: matrices are (out,in)."""
    parts = {}
    for name, dimensions in tensor_shapes(shape).items():
        other = NAMES.get(name) or NAMES[name[:-1]]
        suffix = ".bias" if name.endswith("b") else ".weight"
        other = other[gguf] + suffix
        layers = 1
        if "*" in other:
            layers, *dimensions = dimensions
        count = math.prod(dimensions)
        transposed = "*" in other and len(dimensions) == 2 and not gguf and not linear
        if transposed:
            dimensions = dimensions[::-1]
        kind = dtype
        if gguf and (len(dimensions) == 1 or name == "wpe"):     # llama.cpp needs these in F32
            kind = "F32"
        for layer in range(layers):
            parts[other.replace("*", str(layer))] = Part(name, layer * count, tuple(dimensions), transposed,
                                                         kind)
    return parts


# --- 3. safetensors, in -------------------------------------------------------------------------------------
# Settings of a Hugging Face config.json with the values that GPT-2 has here; the first is the default.
SUPPORTED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "layer_norm_epsilon": (1e-5,),
             "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)}
Stored = collections.namedtuple("Stored", "path begin end dtype shape")     # a tensor in a safetensors file


def read_json(path):
    """The JSON object in a file."""
    if os.path.getsize(path) > LARGEST_JSON:
        raise Error(f"{path} has {os.path.getsize(path):,} bytes, expected at most {LARGEST_JSON:,}")
    with naming(path), open(path, "rb", opener=regular) as file:
        return {**json.loads(file.read())}


def read_safetensors(path):
    """The tensors that a safetensors file stores, by name: 8 bytes with the length of a JSON header, the
    header, and the data of all tensors without gaps."""
    with naming(path), open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, LARGEST_JSON):
            raise Error(f"{path} has {counted(size, 'byte')}, expected a header of at most"
                        f" {LARGEST_JSON:,} bytes that does not end at byte {start}")
        header = json.loads(file.read(start - 8))
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
        dtype = printable(f"{entry['dtype']:.9}")
        fits = len(shape) < 9 and all(type(n) is int and 0 <= n <= size for n in (begin, end, *shape))
        if not fits or dtype in BYTES and math.prod(shape) * BYTES[dtype] != end - begin:
            raise Error(f"{path}: the dtype, shape and data_offsets of {name[:99]!r} do not agree")
        stored[name] = Stored(path, start + begin, start + end, dtype, shape)
    ends = [start, *sorted(tensor.end for tensor in stored.values())]
    if ends != [*sorted(tensor.begin for tensor in stored.values()), size]:
        raise Error(f"{path}: the tensors end at byte {ends[-1]}, expected the end of the file, {size},"
                    " without gaps or overlaps")
    return stored


def read_tensor(tensor):
    """Yields the elements of a Stored tensor as arrays of float32."""
    size = PIECE * BYTES[tensor.dtype]
    with naming(tensor.path), open(tensor.path, "rb", opener=regular) as file:
        file.seek(tensor.begin)
        for at in range(tensor.begin, tensor.end, size):
            data = file.read(min(size, tensor.end - at))
            if len(data) < min(size, tensor.end - at):
                raise Error(f"{tensor.path} became shorter while it was read; try again")
            try:
                yield from_bytes(data, tensor.dtype)
            except OverflowError:
                raise Error(f"{tensor.path} has F64 values beyond float32's range, {LARGEST_F32:g}; scale"
                            " them") from None


def read_heads(path, C):
    """The number of heads in a config.json, all other settings of which must be supported."""
    if not os.path.lexists(path):            # a dangling link is an error
        print(f"{path} is missing; assuming heads of 64 channels", file=sys.stderr)
        return max(C // 64, 1)
    config = read_json(path)
    heads = config.get("n_head", 12)
    if type(heads) is not int or not 0 < heads <= C:
        raise Error(f"{path}: n_head is {heads!r:.99}, expected a divisor of {C}")
    for name, values in SUPPORTED.items():
        if config.get(name, values[0]) not in values:
            raise Error(f"{path}: {name} is {config[name]!r:.99}, expected {' or '.join(map(str, values))},"
                        " as in GPT-2")
    return heads


# What the names of tensors tell about other architectures.
ARCHITECTURES = {
    "lora_": "a LoRA adapter", "self_attn.q_proj": "Llama or a relative", "c_attn_q": "GPT-BigCode",
    "attention.query_key_value": "GPT-NeoX or Falcon", "attn.attention.k_proj": "GPT-Neo",
    "attn.q_proj": "GPT-J", "attention.self.query": "BERT", "SelfAttention": "T5",
    "self_attn.k_proj": "OPT", "mixer.": "Mamba"}
PREFIX = re.compile(r"^((module|_orig_mod|transformer|model)\.)+")     # of DDP, torch.compile and others


def check_architecture(folder):
    """Raises Error if a folder says that its model is not a GPT-2."""
    config = os.path.join(folder, "config.json")
    adapter = os.path.join(folder, "adapter_config.json")
    kind = "gpt2"
    if os.path.lexists(config):
        kind = read_json(config).get("model_type", kind)
    if kind != "gpt2":
        raise Error(f"{config}: model_type is {kind!r:.60}, expected 'gpt2'")
    if os.path.lexists(adapter) and not os.path.lexists(os.path.join(folder, WEIGHTS)):
        raise Error(f"{adapter} describes a LoRA adapter, expected a whole model; merge it into its base"
                    " model (merge_and_unload() of the package peft) and save that")


def check_names(path, stored):
    """Raises Error if the names of the tensors are those of another architecture."""
    if "wte.weight" in stored:
        return
    for part, kind in ARCHITECTURES.items():
        name = next((name for name in stored if part in name), None)
        if name:
            raise Error(f"{path} has a tensor {name[:99]!r}, as {kind} has, expected GPT-2's")


def read_stored(path):
    """All Stored tensors of a model.safetensors, or of the files that an index names; without the masks."""
    folder, *names = os.path.split(path)
    if path.endswith(".json"):
        names = read_json(path)["weight_map"].values()
        if not all(re.fullmatch(r"[\w-]+\.safetensors", name) for name in names):
            raise Error(f"{path}: weight_map names a file unlike model-00001-of-00002.safetensors")
    stored = {}
    for file in sorted(set(names)):
        for name, tensor in read_safetensors(os.path.join(folder, file)).items():
            name = PREFIX.sub("", name)
            if name in stored:
                raise Error(f"{path} has {name[:99]!r} twice")
            if not re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name):     # the causal mask
                stored[name] = tensor
    return stored


def check_stored(path, stored, parts, wte_shape):
    """Raises unless the tensors are exactly those of the parts, and lm_head, if it is there, is wte."""
    found = {name: t.shape if t.dtype in BYTES else t.dtype for name, t in stored.items()}
    expected = {name: part.shape for name, part in parts.items()}
    head, wte = stored.get("lm_head.weight"), stored.get("wte.weight")
    if head:
        expected["lm_head.weight"] = wte_shape
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            raise Error(f"{path}: {name[:99]!r} is {found.get(name, 'missing')}, expected"
                        f" {expected.get(name, 'no such tensor')} ({', '.join(BYTES)})")
    if head and any(a.tobytes() != b.tobytes() for a, b in zip(read_tensor(head), read_tensor(wte))):
        raise Error(f"{path}: lm_head.weight differs from wte.weight; expected tied weights, as in GPT-2")


def read_pieces(stored, parts, report):
    """Yields (tensor, first element, array of float32) for all parts of a model."""
    for done, (name, part) in enumerate(parts.items(), 1):
        pieces = read_tensor(stored[name])
        if part.transposed:
            pieces = columns(array.array("f", b"".join(pieces)), part.shape[1])
        first = part.first
        for piece in pieces:
            yield part.name, first, piece
            first += len(piece)
        report(done, len(parts))


def read_model(path, report=silent):
    """The Shape of the GPT-2 in a model.safetensors or its index, and an iterator of its pieces: (tensor's
    name, first element, array of float32); biases that no layer has, as in nanoGPT's bias=False, are absent
    and 0."""
    folder = os.path.dirname(path)
    try:
        check_architecture(folder)
        stored = read_stored(path)
        check_names(path, stored)
        (V, C), (max_T, _) = stored["wte.weight"].shape, stored["wpe.weight"].shape
        L = sum(name.endswith(".ln_1.weight") for name in stored)
        shape = Shape(max_T, V, L, read_heads(os.path.join(folder, "config.json"), C), C)
        attention = stored.get("h.0.attn.c_attn.weight")
        parts = model_parts(shape, linear=bool(attention) and attention.shape == (3 * C, C))
        if not any(name.endswith(".bias") for name in stored):
            parts = {name: part for name, part in parts.items() if not name.endswith(".bias")}
        check_stored(path, stored, parts, (V, C))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Error(f"{path} is not a GPT-2 in Hugging Face's format ({type(error).__name__}: {error});"
                    " expected its tensors and their descriptions") from None
    return shape, read_pieces(stored, parts, report)


# --- 4. Formats, out ----------------------------------------------------------------------------------------
# Each takes a target path, a Shape, read(name, first, count) for the elements of a tensor as an array of
# float32, the Vocabulary of the tokenizer (see vocabulary.py) or None, and F32, F16 or BF16.
def model_bytes(parts, read, report, align=1):
    """Yields the data of all parts, each padded to a multiple of align."""
    for done, part in enumerate(parts.values(), 1):
        count = math.prod(part.shape)
        size = count if part.transposed else PIECE
        for at in range(0, count, size):
            values = read(part.name, part.first + at, min(size, count - at))
            pieces = columns(values, part.shape[0]) if part.transposed else [values]
            for piece in pieces:
                yield to_bytes(piece, part.dtype)
        yield bytes(-part.size % align)
        report(done, len(parts))


def hf_config(shape, end):
    """The settings of a config.json; end is the id of end-of-text or None."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
            "n_embd": shape.C, "n_head": shape.NH, "n_layer": shape.L, "n_positions": shape.max_T,
            "n_ctx": shape.max_T, "vocab_size": shape.V, "layer_norm_epsilon": 1e-5, "bos_token_id": end,
            "eos_token_id": end, **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)}


def safetensors_header(tensors):
    """The header of a safetensors file that stores tensors in order, given as dtype and shape by name."""
    entries, at = {"__metadata__": {"format": "pt", "writer": WRITER}}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (at, at + size)}
        at += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def write_hf(folder, shape, read, tokenizer, dtype, report=silent):
    """Writes a folder that transformers loads."""
    end, files = None, {}
    if tokenizer and tokenizer.end >= 0:
        end = tokenizer.end
    if tokenizer:
        files.update(tokenizer.files(shape.max_T))
    files["config.json"] = json.dumps(hf_config(shape, end), indent=1).encode()
    os.makedirs(folder, exist_ok=True)
    for name, content in files.items():
        write_file(os.path.join(folder, name), content)
    parts = model_parts(shape, dtype)
    header = safetensors_header({"transformer." + name: (p.dtype, p.shape) for name, p in parts.items()})
    write_file(os.path.join(folder, WEIGHTS), header, model_bytes(parts, read, report))


def gguf_value(value):
    """The GGUF type code of a metadata value, and its bytes."""
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, list):              # of int32 or of strings
        code = 8
        if value and isinstance(value[0], int):
            code = 5
        return 9, struct.pack("<IQ", code, len(value)) + b"".join(gguf_value(item)[1] for item in value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return 4, struct.pack("<I", value)


def gguf_metadata(name, shape, tokenizer):
    """The metadata of a GGUF file by key."""
    metadata = {
        "general.architecture": "gpt2", "general.name": name, "general.description": WRITER,
        "general.alignment": 32,
        "gpt2.context_length": shape.max_T, "gpt2.embedding_length": shape.C,
        "gpt2.feed_forward_length": 4 * shape.C, "gpt2.block_count": shape.L,
        "gpt2.attention.head_count": shape.NH, "gpt2.vocab_size": shape.V,
        "gpt2.attention.layer_norm_epsilon": 1e-5, "tokenizer.ggml.model": "no_vocab"}
    if tokenizer:
        metadata.update(tokenizer.gguf(shape.V))
    return metadata


def write_gguf(path, shape, read, tokenizer, dtype, report=silent, untied=False):
    """Writes a GGUF file, version 3, for llama.cpp: metadata, names and offsets of the tensors, then their
    data, aligned to 32 bytes. The head is tied to token_embd; untied: it is written as output.weight as well,
    which llama.cpp before March 2025 and gpt4all need."""
    metadata = gguf_metadata(os.path.basename(path), shape, tokenizer)
    parts, at = model_parts(shape, dtype, gguf=True), 0
    if untied:
        parts["output.weight"] = parts["token_embd.weight"]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(parts), len(metadata))
    for key, value in metadata.items():
        code, data = gguf_value(value)
        header += gguf_value(key)[1] + struct.pack("<I", code) + data
    for name, part in parts.items():
        dimensions = struct.pack(f"<I{len(part.shape)}Q", len(part.shape), *part.shape[::-1])
        header += gguf_value(name)[1] + dimensions + struct.pack("<IQ", GGUF_TYPES[part.dtype], at)
        at += part.size + -part.size % 32
    write_file(path, header, bytes(-len(header) % 32), model_bytes(parts, read, report, 32))


FORMATS = {"hf": write_hf, "gguf": write_gguf}


# --- 5. Targets ---------------------------------------------------------------------------------------------
HF_FILES = ("config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
# Nothing is overwritten but what this project wrote in the same format, as its first bytes tell.
KINDS = {"model": ("a model file", struct.pack("<i", MAGIC_MODEL)),
         "gguf": ("a GGUF file that it wrote", b"GGUF"), "hf": ("a model that it wrote", b"")}


def check_target(path, format):
    """Raises Error if a model of this format ("model", "gguf" or "hf") must not be written to a path."""
    what, magic = KINDS[format]
    if format == "hf":
        if os.path.lexists(path) and not os.path.isdir(path):
            raise Error(f"{path} exists and is not a folder, as --format hf needs; choose another --out")
        written = [os.path.join(path, name) for name in (WEIGHTS, INDEX, *HF_FILES)]
        if not any(map(os.path.lexists, written)):
            return
        path = written[0]
    elif os.path.isdir(path):
        raise Error(f"{path} is a folder, expected the name of a file; choose another --out")
    elif not os.path.lexists(path):
        return
    head = b""
    if os.path.isfile(path):
        with naming(path), open(path, "rb", opener=regular) as file:
            head = file.read(1000)
    if not head.startswith(magic) or format != "model" and WRITER.encode() not in head:
        raise Error(f"{path} is not {what}, as it would have to be to be overwritten; choose another --out")


# --- 6. Pickles ---------------------------------------------------------------------------------------------
STATES = ("model", "state_dict", "model_state_dict", "module")     # keys under which checkpoints have weights
COPIED = (*HF_FILES, "generation_config.json", "special_tokens_map.json", "added_tokens.json")


def load_pickle(path):
    """What is in a file that torch.save wrote, without executing code that it may contain."""
    try:
        import torch
    except ImportError:
        raise Error("reading a pickle needs torch; pip install torch") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:               # pickle.UnpicklingError, RuntimeError and others
        raise Error(f"torch cannot load {path} without executing code in it ({type(error).__name__}); save"
                    " only the model's state_dict()") from None


def weights_in(checkpoint, path):
    """The tensors by name in what load_pickle returned: at the top level, or under one of STATES."""
    if not isinstance(checkpoint, dict):
        raise Error(f"{path} has a {type(checkpoint).__name__}, expected tensors by name")
    weights = {name: value for name, value in checkpoint.items() if hasattr(value, "data_ptr")}
    if any(value.dim() == 2 for value in weights.values()):
        return weights
    for key in STATES:
        if isinstance(checkpoint.get(key), dict):
            return weights_in(checkpoint[key], path)
    raise Error(f"{path} has {', '.join(map(str, checkpoint))!s:.200}, expected tensors by name, or"
                f" {', '.join(STATES)} with them")


def unpickle(path, folder):
    """Writes the tensors of a pickle, or of all files pytorch_model-0000N-of-0000M.bin that belong to it, as
    they are into model.safetensors in a folder, with config.json and the tokenizer: those beside the pickle,
    or a config.json by nanoGPT's model_args."""
    import ctypes
    target = os.path.join(folder, WEIGHTS)
    if os.path.lexists(target):
        raise Error(f"{target} exists; choose another folder")
    pattern = re.sub(r"\d{5}-of-", "[0-9]" * 5 + "-of-", glob.escape(path))
    checkpoints = [load_pickle(name) for name in sorted(glob.glob(pattern)) or [path]]
    dtypes = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16",
              "torch.bfloat16": "BF16"}
    tensors, seen = {}, set()
    for checkpoint in checkpoints:
        for name, tensor in weights_in(checkpoint, path).items():
            place = tensor.data_ptr(), tuple(tensor.shape)
            if str(tensor.dtype) in dtypes and place not in seen:     # no masks; a tied head once
                tensors[name] = tensor.contiguous()
                seen.add(place)
    os.makedirs(folder, exist_ok=True)
    beside = os.path.dirname(path)
    for name in COPIED:
        source, copy = os.path.join(beside, name), os.path.join(folder, name)
        if os.path.isfile(source) and not os.path.lexists(copy):
            shutil.copyfile(source, copy)
    arguments = checkpoints[0].get("model_args")
    config = os.path.join(folder, "config.json")
    if isinstance(arguments, dict) and "n_head" in arguments and not os.path.lexists(config):
        print("nanoGPT's exact GELU becomes GPT-2's tanh approximation, which changes logits slightly",
              file=sys.stderr)
        settings = {"model_type": "gpt2", "n_head": arguments["n_head"], "activation_function": "gelu_new"}
        write_file(config, json.dumps(settings, indent=1).encode())
    header = safetensors_header({name: (dtypes[str(t.dtype)], tuple(t.shape)) for name, t in tensors.items()})
    write_file(target, header, (ctypes.string_at(t.data_ptr(), t.numel() * t.element_size())
                                for t in tensors.values()))


# --- 7. Model file ------------------------------------------------------------------------------------------
def tensor_starts(shape):
    """The first element of each tensor in a model file, and their total; wte is padded to 128 rows."""
    starts, at = {}, 0
    for name, dimensions in tensor_shapes(shape).items():
        starts[name] = at
        at += math.prod(dimensions)
        if name == "wte":
            at += -shape.V % 128 * shape.C
    return starts, at


def write_model(path, shape, pieces):
    """Writes a model file, version 3 (fp32), from the pieces that read_model yields."""
    starts, total = tensor_starts(shape)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with naming(path), open(temporary, "wb") as file:
            header = [MAGIC_MODEL, 3, *shape, shape.V + -shape.V % 128]
            file.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
            file.truncate(1024 + 4 * total)
            for name, first, values in pieces:
                file.seek(1024 + 4 * (starts[name] + first))
                file.write(values.tobytes())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def open_model(file, path):
    """The Shape of an open model file, version 3 or 5, and read(name, first, count) for its tensors."""
    header = struct.unpack("<256i", file.read(1024).ljust(1024, b"\0"))
    dtype = {3: "F32", 5: "BF16"}.get(header[1])
    shape = Shape(*header[2:7])
    if header[0] != MAGIC_MODEL or not dtype or min(shape) < 1:
        raise Error(f"{path} begins with {header[:2]}, expected a model file: {MAGIC_MODEL} and version 3"
                    " or 5")
    starts, total = tensor_starts(shape)
    size = os.fstat(file.fileno()).st_size
    if size != 1024 + BYTES[dtype] * total:
        raise Error(f"{path} has {size} bytes, expected {1024 + BYTES[dtype] * total} for {shape}")

    def read(name, first, count):
        file.seek(1024 + BYTES[dtype] * (starts[name] + first))
        return from_bytes(file.read(BYTES[dtype] * count), dtype)

    return shape, read


def read_table(path):
    """The Vocabulary of a tokenizer table, or of the tokenizer.json beside it; None if there is no table."""
    if not os.path.exists(path):
        return None
    with naming(path), open(path, "rb", opener=regular) as file:
        data = file.read()
    magic, version, V, end = struct.unpack("<4i", data[:16].ljust(16, b"\0"))
    pieces, at = [], 1024
    while magic == MAGIC_TABLE and version == 2 and len(pieces) < V and at < len(data):
        pieces.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    if len(pieces) != V or at != len(data):
        raise Error(f"{path} is not a tokenizer table; remove it to export the model alone")
    complete = os.path.join(os.path.dirname(path), vocabulary.FILE)
    if os.path.exists(complete):
        return vocabulary.read(complete)
    return vocabulary.from_table(pieces, end)


def import_command(args):
    check_target(args.target, "model")
    source = args.source
    if os.path.isdir(source):
        check_architecture(source)
    if os.path.isdir(source):
        names = [name for name in (WEIGHTS, INDEX) if os.path.exists(os.path.join(source, name))]
        if not names:
            raise Error(f"{source} has no {WEIGHTS} or {INDEX}")
        source = os.path.join(source, names[0])
    shape, pieces = read_model(source)
    write_model(args.target, shape, pieces)


def unpickle_command(args):
    unpickle(args.source, args.target)


def export_command(args):
    check_target(args.target, args.format)
    options = {"untied": True} if args.untied else {}
    if args.untied and args.format != "gguf":
        raise Error("--untied is for --format gguf")
    tokenizer = read_table(os.path.join(os.path.dirname(args.source), TABLE))
    with open(args.source, "rb", opener=regular) as file:
        shape, read = open_model(file, args.source)
        FORMATS[args.format](args.target, shape, read, tokenizer, args.type.upper(), **options)


def main(argv=None):
    """Runs a command. Returns the exit status: 0, 1 for a failure, 2 for wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\nStandard")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("import", help="Hugging Face model to model file")
    command.set_defaults(run=import_command)
    command.add_argument("source", help="model.safetensors or its folder")
    command.add_argument("target", help="model file to write")
    command = commands.add_parser("export", help="model file to a Hugging Face folder or a GGUF file")
    command.set_defaults(run=export_command)
    command.add_argument("source", help="model file")
    command.add_argument("target", help="folder or file to write")
    command.add_argument("--format", choices=tuple(FORMATS), default="hf", help="target format (hf)")
    command.add_argument("--type", choices=("f32", "f16", "bf16"), default="f32", help="number format (f32)")
    command.add_argument("--untied", action="store_true", help="write output.weight as well, for llama.cpp"
                         " before March 2025 and gpt4all")
    command = commands.add_parser("unpickle", help="PyTorch checkpoint to model.safetensors; needs torch")
    command.set_defaults(run=unpickle_command)
    command.add_argument("source", help="nanoGPT's ckpt.pt, pytorch_model.bin or another file of torch.save")
    command.add_argument("target", help="folder to write")
    args = parser.parse_args(argv)
    try:
        with waiting(f"converting {args.source}"):
            args.run(args)
        return 0
    except OverflowError:
        print(f"convert.py: {args.source} has values beyond F16's range, 65504; use --type f32 or bf16",
              file=sys.stderr)
    except (Error, OSError) as error:
        print(f"convert.py: {printable(str(error))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
