"""Tests of third-party models: nanoGPT, other architectures, pickles, what import and export overwrite, and
GGUF in llama.cpp."""
import array
import functools
import json
import os
import pickle
import re
import struct

import pytest

import train_gpt2
from conftest import (as_bytes, as_huggingface, convert, driver, HERE, hub_folder, one_sentence, random_model,
                      relative, reports_error, run, tensors, token_rows, write_safetensors)
from train_gpt2 import GPT2

LINEAR = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def transposed(named):
    """Tensors with Conv1D's matrices as nn.Linear's."""
    result = {}
    for name, (shape, values) in named.items():
        if LINEAR.search(name):
            rows, columns = shape
            values = [values[r * columns + c] for c in range(columns) for r in range(rows)]
            shape = (columns, rows)
        result[name] = shape, values
    return result


def write_folder(folder, named, dtype="F32", **config):
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", named, dtype)
    (folder / "config.json").write_text(json.dumps(config))


# --- Names, layouts, number formats -------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "transformer.", "model.", "model.transformer.",
                                    "_orig_mod.transformer.", "module._orig_mod.transformer."])
@pytest.mark.parametrize("linear", [False, True])
def test_prefixes_are_stripped_and_layouts_inferred(tmp_path, small, prefix, linear):
    named = as_huggingface(small)
    named["lm_head.weight"] = named["wte.weight"]
    if linear:
        named = transposed(named)
    write_folder(tmp_path / "hf", {prefix + name: value for name, value in named.items()}, n_head=3)
    model = train_gpt2.open_model(str(tmp_path / "hf"), "cpu")
    assert as_bytes(tensors(model)) == as_bytes(tensors(small))
    assert convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "m.bin")]) == 0
    assert as_bytes(tensors(GPT2.load(tmp_path / "m.bin"))) == as_bytes(tensors(small))


def test_float64_is_rounded_to_float32(tmp_path, small, monkeypatch):
    named = as_huggingface(small)
    monkeypatch.setattr("conftest.encoded", lambda values, dtype: struct.pack(f"<{len(values)}d", *values))
    shape, values = named["ln_f.weight"]
    named["ln_f.weight"] = shape, [value * (1 + 1e-12) for value in values]
    write_folder(tmp_path / "hf", named, "F64", n_head=3)
    model = train_gpt2.open_model(str(tmp_path / "hf"), "cpu")
    assert as_bytes(tensors(model)) == as_bytes(tensors(small))
    named["ln_f.weight"] = shape, [1e39] * len(values)
    write_folder(tmp_path / "large", named, "F64", n_head=3)
    done = driver("import", tmp_path / "large", "--out", tmp_path / "m.bin", status=1)
    reports_error(done, "model.safetensors", "F64", "float32")


def test_a_model_without_biases_has_zeros(tmp_path, small):
    """nanoGPT's bias=False; a model that lacks some biases only is damaged."""
    named = {name: value for name, value in as_huggingface(small).items() if not name.endswith(".bias")}
    write_folder(tmp_path / "hf", named, n_head=3)
    ours = tensors(train_gpt2.open_model(str(tmp_path / "hf"), "cpu"))
    for name, values in tensors(small).items():
        if name.endswith("b"):
            values = array.array("f", bytes(4 * len(values)))
        assert ours[name] == values, name
    assert convert.main(["import", str(tmp_path / "hf"), str(tmp_path / "m.bin")]) == 0
    assert as_bytes(tensors(GPT2.load(tmp_path / "m.bin"))) == as_bytes(ours)
    named["ln_f.bias"] = as_huggingface(small)["ln_f.bias"]
    write_folder(tmp_path / "some", named, n_head=3)
    reports_error(driver("sample", tmp_path / "some", status=1), "h.0.attn.c_attn.bias", "missing")


# --- Other architectures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "gptj", "gpt_bigcode", "bert", "mistral", "openai-gpt"])
def test_other_architectures_are_rejected_by_name(tmp_path, small, kind):
    """Whatever the folder has: weights, several files, or none."""
    hub_folder(tmp_path / "hf", small, model_type=kind)
    for words in (["sample", "hf"], ["import", "hf", "--out", "m.bin"], ["--init", "hf"],
                  ["export", "hf", "--out", "o"]):
        reports_error(driver(*words, status=1, cwd=tmp_path), "hf/config.json", repr(kind), "'gpt2'")
    (tmp_path / "hf" / "model.safetensors").unlink()
    reports_error(driver("sample", "hf", status=1, cwd=tmp_path), "hf/config.json", repr(kind), "'gpt2'")
    done = run("python3", HERE / "dev" / "convert.py", "import", "hf", "m.bin", status=1, cwd=tmp_path)
    one_sentence(done.stderr, "hf/config.json", repr(kind))


def test_lora_adapters_are_rejected(tmp_path, small):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    write_safetensors(tmp_path / "lora" / "adapter_model.safetensors", {name: ((2, 3), [0.0] * 6)})
    reports_error(driver("sample", "lora", status=1, cwd=tmp_path), "adapter_config.json", "LoRA", "merge")
    done = driver("sample", "lora/adapter_model.safetensors", status=1, cwd=tmp_path)
    reports_error(done, "LoRA")


@pytest.mark.parametrize("name, kind", [
    ("model.layers.0.self_attn.q_proj.weight", "Llama"),
    ("transformer.h.0.attn.attention.k_proj.weight", "GPT-Neo"),
    ("gpt_neox.layers.0.attention.query_key_value.weight", "GPT-NeoX"),
    ("transformer.h.0.attn.q_proj.weight", "GPT-J"),
    ("bert.encoder.layer.0.attention.self.query.weight", "BERT"), ("unlike.anything", "wte.weight")])
def test_names_of_tensors_tell_the_architecture(tmp_path, name, kind):
    write_safetensors(tmp_path / "model.safetensors", {name: ((2, 2), [0.0] * 4)})
    reports_error(driver("sample", "model.safetensors", status=1, cwd=tmp_path), "model.safetensors", kind)


# --- Pickles ------------------------------------------------------------------------------------------------
def nanogpt(torch, bias, gelu, V=65, T=16, L=2, H=3, C=24):
    """A GPT as in nanoGPT: nn.Linear, a tied head, biases or not."""
    nn, F = torch.nn, torch.nn.functional

    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(C) + 0.5)
            self.bias = nn.Parameter(torch.randn(C)) if bias else None

        def forward(self, x):
            return F.layer_norm(x, (C,), self.weight, self.bias, 1e-5)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.c_attn, self.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
            self.register_buffer("bias", torch.tril(torch.ones(T, T)).view(1, 1, T, T))

        def forward(self, x):
            B, t, _ = x.shape
            q, k, v = (part.view(B, t, H, C // H).transpose(1, 2) for part in self.c_attn(x).split(C, 2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(B, t, C))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2 = Norm(), Attention(), Norm()
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C, bias=bias),
                                      "c_proj": nn.Linear(4 * C, C, bias=bias)})

        def forward(self, x):
            x = x + self.attn(self.ln_1(x))
            hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate=gelu)
            return x + self.mlp["c_proj"](hidden)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.ModuleDict({
                "wte": nn.Embedding(V, C), "wpe": nn.Embedding(T, C),
                "h": nn.ModuleList([Block() for _ in range(L)]), "ln_f": Norm()})
            self.lm_head = nn.Linear(C, V, bias=False)
            self.transformer["wte"].weight = self.lm_head.weight

        def forward(self, tokens):
            t = self.transformer
            x = t["wte"](tokens) + t["wpe"](torch.arange(tokens.shape[1]))
            for block in t["h"]:
                x = block(x)
            return self.lm_head(t["ln_f"](x))

    torch.manual_seed(1)
    return GPT()


def printed_command(done):
    """The conversion command at the end of a message, as words."""
    return re.search(r"python3 (\S*dev/convert\.py unpickle .*)$", done.stderr.strip())[1].split()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_nanogpts_checkpoint_gives_its_logits_torch(tmp_path, bias, compiled):
    """By the command that is printed for it. The first GPT has the tanh approximation of GELU, as OpenAI's;
    with nanoGPT's exact GELU the logits differ by as much as the two functions do."""
    torch = pytest.importorskip("torch")
    for gelu, limit in (("tanh", 1e-5), ("none", 2e-3)):
        folder = tmp_path / gelu
        folder.mkdir()
        reference = nanogpt(torch, bias, gelu).eval()
        prefix = "_orig_mod." if compiled else ""
        state = {prefix + name: value for name, value in reference.state_dict().items()}
        optimizer = torch.optim.AdamW(reference.parameters())
        torch.save({"model": state, "optimizer": optimizer.state_dict(), "iter_num": 5,
                    "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x", "bias": bias},
                    "model_args": {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "bias": bias,
                                   "vocab_size": 65, "dropout": 0.0}}, folder / "ckpt.pt")
        refused = driver("import", "ckpt.pt", "--out", "model.bin", status=1, cwd=folder)
        reports_error(refused, "ckpt.pt", "pickle", "torch")
        done = run(train_gpt2.sys.executable, *printed_command(refused), cwd=folder)
        assert "GELU" in done.stderr
        driver("import", "ckpt_hf", "--out", "model.bin", cwd=folder)
        model = GPT2.load(folder / "model.bin")
        assert (model.config.NH, model.config.V, model.config.max_T) == (3, 65, 16)
        x, _ = token_rows(2, 16, 65)
        ours = model.logits(x)
        expected = reference(torch.tensor(x)).flatten().tolist()
        assert relative(array.array("f", ours.tobytes()), expected) < limit


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model_state_dict", "module", "model"])
def test_pickles_are_converted_by_the_printed_command_torch(tmp_path, small, wrapped):
    """pytorch_model.bin of transformers, in one file or several, and checkpoints of other trainers."""
    torch = pytest.importorskip("torch")
    state = {f"transformer.{name}": torch.tensor(values).view(shape)
             for name, (shape, values) in as_huggingface(small).items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_head": 3}')
    if wrapped:
        torch.save({"epoch": 3, wrapped: state}, folder / "pytorch_model.bin")
    else:
        names = list(state)
        for i in (0, 1):
            torch.save({name: state[name] for name in names[i::2]},
                       folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
    refused = driver("--init", "hf", status=1, cwd=tmp_path)
    reports_error(refused, "pytorch_model", "pickle")
    words = printed_command(refused)
    run(train_gpt2.sys.executable, *words, cwd=tmp_path)
    model = train_gpt2.open_model(str(tmp_path / words[-1]), "cpu")
    assert as_bytes(tensors(model)) == as_bytes(tensors(small))
    again = run(train_gpt2.sys.executable, *words, cwd=tmp_path, status=1)
    one_sentence(again.stderr, "model.safetensors exists")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_that_executes_code_is_not_executed_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "c.pt").write_bytes(b"nothing of the kind")
    torch.save([1, 2], tmp_path / "d.pt")
    torch.save({"lr": 1, "steps": torch.zeros(3)}, tmp_path / "e.pt")
    for name, words in {"a.pt": "executing code", "b.pt": "executing code", "c.pt": "executing code",
                        "d.pt": "a list", "e.pt": "lr, steps", "f.pt": "f.pt"}.items():
        done = run(train_gpt2.sys.executable, HERE / "dev" / "convert.py", "unpickle", name, "out", status=1,
                   cwd=tmp_path)
        one_sentence(done.stderr, name, words)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_unpickle_needs_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    done = run(train_gpt2.sys.executable, HERE / "dev" / "convert.py", "unpickle", "a.pt", "out", status=1,
               cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    one_sentence(done.stderr, "pip install torch")


# --- What import and export overwrite -----------------------------------------------------------------------
def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_overwrites_only_what_it_wrote(tmp_path, small):
    hub_folder(tmp_path / "source", small)
    table = str(tmp_path / "source" / "tokenizer.bin")
    train_gpt2.Tokenizer([b"<%d>" % i for i in range(130)], 7).save(table)
    (tmp_path / "notes.txt").write_text("dear diary")
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(900))
    hub_folder(tmp_path / "llama", small, model_type="llama")
    hub_folder(tmp_path / "gpt2", small, model_type="gpt2")      # somebody else's
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):     # somebody's tokenizer
        (tmp_path / f"own_{name}").mkdir()
        (tmp_path / f"own_{name}" / name).write_text("mine")
    before = snapshot(tmp_path)
    export = functools.partial(driver, cwd=tmp_path, status=1)
    for words, name in [("import source --out notes.txt", "notes.txt"),
                        ("import source --out folder", "folder"),
                        ("import source --out source/model.safetensors", "source/model.safetensors"),
                        ("export source --format llmc --out notes.txt", "notes.txt"),
                        ("export source --format llmc --out folder", "folder"),
                        ("export source --format gguf --out other.gguf", "other.gguf"),
                        ("export source --format gguf --out notes.txt", "notes.txt"),
                        ("export source --format gguf --out folder", "folder"),
                        ("export source --out notes.txt", "notes.txt"),
                        ("export source --out llama", "llama"),
                        ("export source --out own_tokenizer.json", "own_tokenizer.json"),
                        ("export source --out own_vocab.json", "own_vocab.json"),
                        ("export source --out own_merges.txt", "own_merges.txt"),
                        ("export source --out gpt2", "gpt2"), ("export source --out config", "config"),
                        ("export source --out source", "source")]:
        reports_error(export(*words.split()), name, "--out")
        command, *rest = words.replace("--out ", "").replace("--format", "").split()
        if command == "import":
            done = run("python3", HERE / "dev" / "convert.py", "import", *rest, cwd=tmp_path, status=1)
            one_sentence(done.stderr, name)
    assert snapshot(tmp_path) == before
    (tmp_path / "source" / "tokenizer.bin").unlink()     # not a BPE
    for words in ("import source --out m.bin", "export source --format llmc --type bf16 --out m.bin",
                  "export source --format gguf --out m.gguf", "export source --out hf",
                  "export m.bin --format llmc --out m.bin", "export hf --out hf"):
        for _ in range(2):                   # its own output may be replaced
            driver(*words.split(), cwd=tmp_path)
    reports_error(export("export", "source", "--untied", "--out", "x"), "--untied", "gguf")


# --- GGUF ---------------------------------------------------------------------------------------------------
def own_tokenizer(folder):
    """A tokenizer.json of the bytes, a few merges and end-of-text, the last."""
    vocabulary = train_gpt2.load_module("vocabulary")
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("e", "r"), ("o", "u")]
    tokens = [*vocabulary.LETTERS, *("".join(pair) for pair in merges), "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [vocabulary.added_token(len(tokens) - 1, tokens[-1])]
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary.tokenizer_json(vocab, merges, added)))
    own = vocabulary.read(str(folder))
    return own.encoder(), own.pieces


@pytest.mark.parametrize("flags, tensors_in_file", [("", 28), ("--untied", 29), ("--untied --type f16", 29)])
def test_llama_cpp_generates_the_same_text_xllamacpp(tmp_path, flags, tensors_in_file):
    """Greedy text from a prompt, by llama.cpp and by us."""
    xllamacpp = pytest.importorskip("xllamacpp")
    pytest.importorskip("tiktoken")
    encode, pieces = own_tokenizer(tmp_path)
    model = random_model(64, len(pieces), 2, 4, 64, spread=0.15)
    wte, away = array.array("f", model.get("wte").tobytes()), [0.3 * (-1) ** i for i in range(64)]
    for i, piece in enumerate(pieces):
        if not piece.decode(errors="replace").isprintable() or not piece.isascii() or len(piece) > 9:
            wte[64 * i:64 * i + 64] = array.array("f", [-9 * value for value in away])     # never sampled
    model.set("wte", wte)
    model.set("lnfb", away)
    hub_folder(tmp_path / "hf", model)
    (tmp_path / "tokenizer.json").rename(tmp_path / "hf" / "tokenizer.json")
    driver("export", "hf", "--format", "gguf", "--out", "m.gguf", *flags.split(), cwd=tmp_path)
    data, name = (tmp_path / "m.gguf").read_bytes(), struct.pack("<Q", 13) + b"output.weight"
    assert struct.unpack("<Q", data[8:16])[0] == tensors_in_file and (name in data) == bool(flags)
    prompt = "the other hour, there"
    ids = list(model.generate(encode(prompt), 12, temperature=0))
    assert len({*ids}) > 3
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "m.gguf")
    params.n_ctx, params.warmup, params.n_gpu_layers, params.cpuparams.n_threads = 64, False, 0, 1
    done = xllamacpp.Server(params).handle_completions({"prompt": prompt, "n_predict": 12, "temperature": 0})
    if isinstance(done, (str, bytes)):
        done = json.loads(done)
    assert done["usage"]["prompt_tokens"] == len(encode(prompt))
    assert done["choices"][0]["text"] == b"".join(pieces[i] for i in ids).decode()
