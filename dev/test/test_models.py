"""Tests of third-party models: safetensors, Hugging Face folders, GGUF."""
import array
import functools
import http.server
import json
import math
import os
import random
import shutil
import struct
import sys
import threading

import pytest

import train_gpt2
from conftest import (as_bytes, as_huggingface, convert, driver, encoded, header, HERE, hub_folder,
                      one_sentence, random_model, rejects, relative, reports_error, run, tensors, TEXT,
                      token_rows, vocabulary, with_entry, write_safetensors)
from train_gpt2 import GPT2, GPT2Config, GPT2Error


SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def decoded(data, dtype):
    if dtype == "BF16":
        data = b"".join(b"\0\0" + data[i:i + 2] for i in range(0, len(data), 2))
    code = {"F16": "<e"}.get(dtype, "<f")
    return [value for value, in struct.iter_unpack(code, data)]


def read_safetensors(path):
    """Names, with dtype, shape and bytes."""
    contents = path.read_bytes()
    start = 8 + struct.unpack("<Q", contents[:8])[0]
    assert start % 8 == 0
    entries = json.loads(contents[8:start])
    assert entries.pop("__metadata__") == {"format": "pt", "writer": convert.WRITER}
    return {name: (entry["dtype"], tuple(entry["shape"]), contents[start:][slice(*entry["data_offsets"])])
            for name, entry in entries.items()}


@pytest.mark.parametrize("dtype, prefix, head", [
    ("F32", "", False), ("F32", "transformer.", True), ("F16", "transformer.", False), ("BF16", "", True)])
def test_a_model_is_imported_exactly(tmp_path, small, dtype, prefix, head):
    reference = as_huggingface(small)
    reference["h.1.attn.masked_bias"] = (), [-1e4]
    found = {prefix + name: value for name, value in reversed(reference.items())}
    if head:
        found["lm_head.weight"] = reference["wte.weight"]
    write_safetensors(tmp_path / "any.safetensors", found, dtype)
    (tmp_path / "config.json").write_text('{"n_head": 3, "model_type": "gpt2"}')
    model = train_gpt2.open_model(str(tmp_path / "any.safetensors"), "cpu")
    assert repr(model.config) == repr(small.config)
    for name, (shape, values) in as_huggingface(model).items():
        assert values == decoded(encoded(reference[name][1], dtype), dtype), name
    assert not any(tensors(model)["wte"][130 * 12:])
    x, y = token_rows(2, 7, 130)
    assert dtype != "F32" or model.forward(x, y, train=False) == small.forward(x, y, train=False)


@pytest.mark.parametrize("dtype", SIZES)
def test_a_model_is_exported_rounded_to_nearest(tmp_path, small, dtype):
    model = random_model(7, 130, 2, 3, 12)
    odd = [1, 2, 3, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3e-6, 65504, -math.inf, math.nan,
           2.0**-24]
    values = array.array("f", odd + tensors(model)["wpe"][len(odd):].tolist())
    nans = [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001] if dtype == "BF16" else []
    model.set("wpe", array.array("f", array.array("I", nans).tobytes() + values[len(nans):].tobytes()))
    model.save(tmp_path / "model.bin")
    driver("export", "model.bin", "--out", "hf", "--type", dtype.lower(), cwd=tmp_path)
    found = read_safetensors(tmp_path / "hf" / "model.safetensors")
    reference = as_huggingface(model)
    assert set(found) == {"transformer." + name for name in reference}
    if dtype == "BF16":                      # rounded as in the library
        model.save(tmp_path / "model5.bin", version=5)
        reference = as_huggingface(GPT2.load(tmp_path / "model5.bin"))
    for name, (shape, values) in reference.items():
        assert found["transformer." + name] == (dtype, shape, encoded(values, dtype)), name
    again = train_gpt2.open_model(str(tmp_path / "hf"), "cpu")
    assert repr(again.config) == repr(model.config)
    driver("export", "hf", "--out", "again", "--type", dtype.lower(), cwd=tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_f16_rejects_values_beyond_its_range(tmp_path):
    model = random_model(4, 5, 1, 1, 4)
    model.set("lnfb", [1e5, 0, 0, 0])
    model.save(tmp_path / "model.bin")
    done = driver(*"export model.bin --type f16 --out hf".split(), cwd=tmp_path, status=1)
    reports_error(done, "65504", "bf16")
    assert list(tmp_path.glob("hf/model*")) == []
    reports_error(driver(*"export none.bin --format llmc --type f16 --out x".split(), status=1), "bf16")


def test_an_index_of_several_files_is_imported(tmp_path, small):
    reference = as_huggingface(small)
    names = sorted(reference)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        write_safetensors(tmp_path / file, {name: reference[name] for name in part})
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: file for file, part in files.items() for name in part}
    (tmp_path / "config.json").write_text('{"n_head": 3}')

    def opened(**changed):
        index.write_text(json.dumps({"weight_map": {**weight_map, **changed}}))
        return train_gpt2.open_model(str(tmp_path), "cpu")

    assert as_bytes(tensors(opened())) == as_bytes(tensors(small))
    for name in ("../x.safetensors", "/etc/passwd", "", ".safetensors", "a\0.safetensors", 3, None, [[]]):
        with rejects("weight_map" if isinstance(name, str) else "TypeError"):
            opened(x=name)
    with pytest.raises(OSError):
        opened(x="none.safetensors")
    shutil.copy(tmp_path / list(files)[0], tmp_path / "copy.safetensors")
    with rejects("twice"):
        opened(x="copy.safetensors")
    index.write_text('{"weight_map": 3}')
    with rejects("not a GPT-2"):
        train_gpt2.open_model(str(tmp_path), "cpu")


def rename(name, new):
    return lambda entries: entries.update({new: entries.pop(name)})


@pytest.mark.parametrize("change, words", [
    (with_entry("dtype", "I64"), "'ln_f.bias' is I64"), (with_entry("dtype", ["F32"]), "TypeError"),
    (with_entry("dtype", "F16", "wte.weight"), "wte.weight"),
    (with_entry("shape", [12, 130], "wte.weight"), "(390,)"),
    (with_entry("shape", [1560], "wte.weight"), "not a GPT-2"),
    (with_entry("shape", 3, "wte.weight"), "not a GPT-2"), (with_entry("shape", [2**31, 2**31]), "ln_f.bias"),
    (with_entry("shape", [-12]), "ln_f.bias"), (with_entry("shape", [math.nan]), "ln_f.bias"),
    (with_entry("shape", [12.0]), "ln_f.bias"), (with_entry("shape", [True] * 8 + [12]), "ln_f.bias"),
    (with_entry("shape", "12"), "ln_f.bias"), (with_entry("shape", [3, 4]), "(3, 4), expected (12,)"),
    (with_entry("data_offsets", [0, 48]), "overlaps"), (with_entry("data_offsets", 1), "TypeError"),
    (with_entry("data_offsets", [-48, 0]), "ln_f.bias"),
    (with_entry("data_offsets", [10**9, 10**9 + 48]), "ln_f"),
    (lambda entries: entries.update(x=3), "TypeError"), (lambda entries: entries.clear(), "end at byte 10"),
    (lambda entries: entries.pop("wpe.weight"), "gaps"),
    (rename("ln_f.bias", "ln_f.basis"), "'ln_f.basis' is (12,), expected no such"),
    (rename("h.1.ln_2.bias", "score"), "'h.1.ln_2.bias' is missing, expected (12,)"),
    (rename("h.1.ln_1.bias", "h.2.ln_1.weight"), "'h.1.ln_1.bias' is missing"),
    (rename("wpe.weight", "transformer.wte.weight"), "'wte.weight' twice")])
def test_a_malformed_safetensors_header_is_reported(tmp_path, small, change, words):
    write_safetensors(tmp_path / "model.safetensors", as_huggingface(small), change=change)
    with rejects(words):
        train_gpt2.open_model(str(tmp_path), "cpu")


@pytest.mark.parametrize("length, header, words", [
    (None, b"", "0 bytes"), (None, b"\x10", "1 byte,"), (2**64 - 1, b"", "8 bytes"), (9, b"{}", "10 bytes"),
    (2, b"[]", "not a GPT-2"), (2, b"{}", "wte.weight"), (2, b"{}more", "end at byte 10"),
    (1, b"\xff", "decode"), (10**5, b"[" * 10**5, "not a"), (10**5, b'{"a":' * 20000, "not a")])
def test_a_file_that_is_not_safetensors_is_reported(tmp_path, length, header, words):
    begin = b"" if length is None else struct.pack("<Q", length)
    (tmp_path / "model.safetensors").write_bytes(begin + header)
    reports_error(driver("import", tmp_path, "--out", tmp_path / "model.bin", status=1), words)
    assert not (tmp_path / "model.bin").exists()


@pytest.mark.parametrize("setting, words", [
    ({"n_head": 5}, "NH 5"), ({"n_head": 0}, "n_head is 0"), ({"n_head": 13}, "n_head is 13, expected a"),
    ({"n_head": "3"}, "n_head"), ({"n_head": 3.0}, "n_head"), ({"n_head": [[]]}, "n_head"),
    ({"activation_function": "gelu"}, "function is 'gelu'"), ({"activation_function": {}}, "is {}"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"), ({"layer_norm_epsilon": 1e-6}, "1e-06"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")])
def test_unsupported_configs_are_rejected(tmp_path, small, setting, words):
    hub_folder(tmp_path, small, **setting)
    with rejects(words):
        train_gpt2.open_model(str(tmp_path), "cpu")


def test_without_a_config_a_head_has_64_channels(tmp_path, capfd):
    for C, heads in ((128, 2), (32, 1)):
        write_safetensors(tmp_path / "model.safetensors", as_huggingface(GPT2(GPT2Config(4, 5, 1, 1, C))))
        assert train_gpt2.open_model(str(tmp_path), "cpu").config.NH == heads
        one_sentence(capfd.readouterr().err, "config.json", "64")


def test_an_untied_head_is_rejected(tmp_path, small):
    reference = as_huggingface(small)
    (rows, C), values = reference["wte.weight"]
    reference["lm_head.weight"] = (rows, C), [*values[:-1], values[-1] + 1]
    write_safetensors(tmp_path / "model.safetensors", reference)
    with rejects("lm_head.weight", "tied"):
        train_gpt2.open_model(str(tmp_path), "cpu")


def test_mutated_model_files_do_not_crash(tmp_path, small, capfd):
    folder = hub_folder(tmp_path / "m", small, activation_function="gelu_new", layer_norm_epsilon=1e-5)
    good = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}
    start = 8 + struct.unpack("<Q", good["model.safetensors"][:8])[0]
    draw = random.Random(1)
    pieces = b'[ ] { } " - , : NaN null true 1e999 0 \xff \0 999999999999999999999 h.1. [[[[['.split(b" ")
    outcomes = {"loaded": 0, "rejected": 0}
    for trial in range(400):
        name = draw.choice(list(good))
        contents = bytearray(good[name])
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(min(len(contents), start))
            new = draw.choice(pieces) if trial % 2 else bytes([draw.randrange(256)])
            contents[at:at + draw.randrange(3)] = new
        if name == "model.safetensors" and trial % 3:     # the length may still match
            contents[:8] = struct.pack("<Q", start - 8 + len(contents) - len(good[name]))
        if trial % 10 == 0:
            contents = contents[:draw.randrange(len(contents))]
        for each, valid in {**good, name: contents}.items():
            (folder / each).write_bytes(valid)
        try:
            train_gpt2.open_model(str(folder), "cpu")
            outcomes["loaded"] += 1
        except GPT2Error as error:
            one_sentence(str(error), folder if "config" not in str(error) else "")
            outcomes["rejected"] += 1
    assert outcomes["rejected"] > 200 and outcomes["loaded"] > 5, outcomes


def test_a_hub_model_is_downloaded_once(tmp_path, small, monkeypatch):
    hub_folder(tmp_path / "gpt2" / "resolve" / "main", small)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            requests.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    monkeypatch.setattr(train_gpt2, "DATA", str(tmp_path / "dev" / "data"))
    with rejects("GPT2_OFFLINE"):
        train_gpt2.open_model("gpt2", "cpu")
    monkeypatch.delenv("GPT2_OFFLINE")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        for _ in range(2):
            assert as_bytes(tensors(train_gpt2.open_model("gpt2", "cpu"))) == as_bytes(tensors(small))
        httpd.shutdown()
    folder = tmp_path / "dev" / "data" / "gpt2"
    assert len(requests) == 2 and sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name, contents, words", [
    ("model.pt", b"anything", "convert"), ("pytorch_model.bin", b"PK\3\4" + b"\0" * 99, "convert"),
    ("model.bin", b"\x80\x02\x8a\ncsomething", "convert.py unpickle"),
    ("model.gguf", b"GGUF" + b"{" * 99, "GGUF"),
    ("model.txt", b"To be or not to be", "20240326"), ("empty", b"", "20240326")])
def test_unsupported_model_files_are_reported(tmp_path, name, contents, words):
    (tmp_path / name).write_bytes(contents)
    sources = [tmp_path / name]
    if name == "pytorch_model.bin":
        sources.append(tmp_path)
    for source in sources:
        reports_error(driver("import", source, "--out", tmp_path / "out.bin", status=1), name, words)
    reports_error(driver("--init", tmp_path / name, "--out", tmp_path / "run", status=1), name, words)


def test_fine_tuning_a_huggingface_model_and_exporting_it(tmp_path):
    hub_folder(tmp_path / "hf", GPT2(GPT2Config(16, 256, 1, 1, 16)))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words = "--init hf --data text.txt --batch-size 2 --steps 2 --sample-tokens 0".split()
    reports_error(driver(*words, status=1, cwd=tmp_path), "hf/model.safetensors", "256", "--tokenizer")
    driver(*words, "--tokenizer", "bytes", cwd=tmp_path)
    driver("export", "--out", "ours", cwd=tmp_path)
    ours, run = (train_gpt2.open_model(str(tmp_path / name), "cpu") for name in ("ours", "runs/1"))
    assert as_bytes(tensors(ours)) == as_bytes(tensors(run))
    assert sorted(os.listdir(tmp_path / "ours")) == ["config.json", "merges.txt", "model.safetensors",
                                                     "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    texts = [driver("sample", name, "--tokens", 9, cwd=tmp_path).stdout for name in ("ours", "runs/1")]
    assert texts[0] == texts[1]


def test_llmc_exports_include_the_tokenizer(tmp_path, small):
    small.save(tmp_path / "3.bin")
    small.save(tmp_path / "5.bin", version=5)
    hub_folder(tmp_path / "reference", small)
    pieces = b"".join(bytes([len(piece)]) + piece for piece in (b"<%d>" % i for i in range(130)))
    table = header(20240328, 2, 130, 7) + pieces
    (tmp_path / "reference" / "tokenizer.bin").write_bytes(table)
    for out, words in (("3", "import reference"), ("5", "export reference --format llmc --type bf16")):
        (tmp_path / "out").mkdir(exist_ok=True)
        driver(*words.split(), "--out", "out/model.bin", cwd=tmp_path)
        assert (tmp_path / "out" / "model.bin").read_bytes() == (tmp_path / f"{out}.bin").read_bytes()
        assert (tmp_path / "out" / "tokenizer.bin").read_bytes() == table
    (tmp_path / "reference" / "tokenizer.bin").write_bytes(table.replace(b"<3>", b"<4>"))
    done = driver("import", "reference", "--out", "out/model.bin", cwd=tmp_path, status=1)
    reports_error(done, "out/tokenizer.bin")


@pytest.fixture
def toy_bpe():
    """A tokenizer of lower-case letters, a space, end-of-text and seven merges; and the merges."""
    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"e", b"r"), (b"h", b"er"), (b"the", b"r"),
              (b"ther", b"e")]
    pieces = [*(bytes([letter]) for letter in b"abcdefghijklmnopqrstuvwxyz "), b"<|endoftext|>"]
    return train_gpt2.GPT2Tokenizer(pieces + [a + b for a, b in merges], end=27), merges


def test_a_tokenizers_merges_are_recovered(toy_bpe):
    tokenizer, merges = toy_bpe
    recovered = vocabulary.from_table(tokenizer.pieces, tokenizer.end)
    tokens = list(recovered.vocab)
    assert recovered.merges == [tuple(piece.decode().replace(" ", "\u0120") for piece in pair)
                                for pair in merges]
    assert tokens[24:30] == ["y", "z", "\u0120", "<|endoftext|>", "th", "the"] and len(tokens) == 35
    byte = train_gpt2.ByteTokenizer()
    recovered = vocabulary.from_table(byte.pieces, byte.end)
    tokens, pairs = list(recovered.vocab), recovered.merges
    assert [tokens[i] for i in (0, 10, 65, 0xAD, 0xFF)] == ["<|endoftext|>", "\u010a", "A", "\u0143", "\xff"]
    assert pairs == [] and len(set(tokens)) == 256
    for piece, end in ((b"abc", 27), (b"", 27), (b"a", 27), (b"aZ", 27), (b"th", 27), (b"ab", -1)):
        pieces = [*tokenizer.pieces[:28], piece, *tokenizer.pieces[28:]]
        with rejects("of the tokenizer", "byte-level BPE"):
            vocabulary.from_table(pieces, end)


def gpt2s_vocabulary():
    pytest.importorskip("tiktoken")
    try:
        return train_gpt2.GPT2Tokenizer()
    except GPT2Error as error:
        pytest.skip(str(error))


def test_transformers_reads_exported_tokenizers(tmp_path, toy_bpe):
    transformers = pytest.importorskip("transformers")
    text = TEXT + "It's 12345,\t\u65e5\u672c \x7f \U0001f600  don't\r\n\n  'll"
    for tokenizer in (train_gpt2.ByteTokenizer(), gpt2s_vocabulary()):
        model = GPT2(GPT2Config(4, len(tokenizer.pieces), 1, 1, 2))
        train_gpt2.export_model(model, tokenizer, "hf", tmp_path, "F32")
        for kind in (transformers.AutoTokenizer, transformers.GPT2TokenizerFast):
            reference = kind.from_pretrained(tmp_path)
            tokens = reference(text)["input_ids"]
            assert tokens == tokenizer.encode(text).tolist() and reference.decode(tokens) == text
            assert reference("<|endoftext|>")["input_ids"] == [reference.eos_token_id] == [tokenizer.end]
            assert len(reference) == len(tokenizer.pieces)
    tokenizer, _ = toy_bpe
    train_gpt2.export_model(GPT2(GPT2Config(4, 35, 1, 1, 2)), tokenizer, "hf", tmp_path, "F32")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [tokenizer.pieces[i] for i in reference("the other here")["input_ids"]] == [
        b"the", b" ", b"o", b"ther", b" ", b"her", b"e"]


@pytest.mark.parametrize("dtype", SIZES)
def test_logits_match_transformers(tmp_path, dtype):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=131, n_positions=33, n_embd=36, n_layer=2, n_head=3)
    reference = transformers.GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    x, _ = token_rows(2, 31, 131)

    def their_logits(model):
        return model.float()(torch.tensor(x)).logits.detach().flatten().tolist()

    def our_logits(source):
        return array.array("f", train_gpt2.open_model(str(source), "cpu").logits(x).tobytes())

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    reference.to(kind).save_pretrained(tmp_path / "reference", max_shard_size="40KB")     # in several files
    assert relative(our_logits(tmp_path / "reference"), their_logits(reference)) < 2e-6
    ours = random_model(33, 131, 2, 3, 36, spread=0.2)
    ours.save(tmp_path / "ours.bin")
    driver("export", tmp_path / "ours.bin", "--type", dtype.lower(), "--out", tmp_path / "ours")
    loaded, about = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()) and loaded.eval().dtype in (kind, torch.float32)     # before version 5
    back = their_logits(loaded)
    assert relative(our_logits(tmp_path / "ours"), back) < 2e-6
    assert relative(our_logits(tmp_path / "ours.bin"), back) < {"F32": 2e-6, "F16": 2e-3, "BF16": 2e-2}[dtype]
    assert transformers.GPT2Model.from_pretrained(tmp_path / "ours").config.n_head == 3


@pytest.mark.parametrize("dtype", SIZES)
def test_gguf_reader_finds_the_whole_model(tmp_path, toy_bpe, dtype):
    gguf = pytest.importorskip("gguf")
    model, (tokenizer, merges) = random_model(7, 35, 2, 3, 12), toy_bpe
    model.save(tmp_path / "model.bin")
    tokenizer.save(tmp_path / "tokenizer.bin")
    driver(*f"export model.bin --format gguf --type {dtype.lower()} --out m.gguf".split(), cwd=tmp_path)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert facts["general.architecture"] == "gpt2" and facts["general.alignment"] == 32
    keys = "context_length embedding_length feed_forward_length block_count attention.head_count vocab_size"
    assert [facts[f"gpt2.{key}"] for key in keys.split()] == [7, 12, 48, 2, 3, 35]
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    found = (facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.merges"])
    recovered = vocabulary.from_table(tokenizer.pieces, tokenizer.end)
    assert found == (list(recovered.vocab), [" ".join(pair) for pair in recovered.merges])
    assert len(found[1]) == len(merges)
    assert facts["tokenizer.ggml.token_type"] == [3 if i == 27 else 1 for i in range(35)]
    assert facts["tokenizer.ggml.bos_token_id"] == facts["tokenizer.ggml.eos_token_id"] == 27
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    reference = as_huggingface(model)
    assert len(found) == len(reference)
    for name, (shape, values) in reference.items():
        tensor = found[names.get_name(name, try_suffixes=(".weight", ".bias"))]
        if len(shape) == 2 and "h." in name:
            values = [values[i * shape[1] + o] for o in range(shape[1]) for i in range(shape[0])]
            shape = shape[::-1]
        kind = dtype if len(shape) == 2 and name != "wpe.weight" else "F32"
        assert (tensor.tensor_type.name, tensor.shape.tolist()) == (kind, [*shape[::-1]])
        assert tensor.data_offset % 32 == 0
        limit = {"F32": 0, "F16": 1e-3, "BF16": 1e-2}[kind]
        assert relative(decoded(tensor.data.tobytes(), kind), values) <= limit
    assert os.path.getsize(tmp_path / "m.gguf") % 32 == 0


def test_import_and_export_need_little_memory(tmp_path):
    if "LD_PRELOAD" in os.environ or not os.path.exists("/proc/self/status"):
        pytest.skip("a sanitizer takes memory of its own, and only Linux tells how much it was")
    GPT2(GPT2Config(64, 45000, 2, 4, 256)).save(tmp_path / "model.bin")     # 53 MB
    script = """if True:
        import re, sys, train_gpt2
        def most():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        lib, before = train_gpt2.library("cpu"), most()
        assert train_gpt2.main(sys.argv[1:]) == 0
        print(most() - before)"""
    (tmp_path / "tokenizer.bin").write_bytes(b"not a tokenizer")     # none is needed
    for words in ("export model.bin --out hf", "export model.bin --out hf16 --type f16",
                  "import hf --out in.bin", "import hf16 --out in.bin"):
        taken = run(sys.executable, "-c", script, *words.split(), cwd=tmp_path, PYTHONPATH=str(HERE)).stdout
        assert int(taken.split()[-1]) < 1.2 * os.path.getsize(tmp_path / "model.bin"), words
