"""Tests of tokenizers: a model's own vocabulary, in Hugging Face's files; ids without a token."""
import array
import functools
import itertools
import json
import random
import re

import pytest

import train_gpt2
from conftest import (binary, command, driver, header, hub_folder, make_data, prepare, random_model, rejects,
                      reports_error, run, SMALL, TEXT, tokens_of, vocabulary)
from train_gpt2 import GPT2, GPT2Config

MIXED = ("To be, or not to be: don't! ¿Qué? Übung, naïve — “quotes”\r\n\r\n\tThe 漢字 日本語。 😀👍🏽 12345 ½"
         "      spaces   \n\n  e\u0301 \xa0 \u2028 'll 'LL\r\n")
MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("e", "r"), ("o", "r"), ("\u0120", "\u0120"),
          ("1", "2")]
END = "<|endoftext|>"


def own_vocabulary(seed=1, extra=(), **data):
    """The contents of a tokenizer.json: bytes, end-of-text and a few merges, in a random order of ids; then
    extra tokens. data replaces parts of it."""
    tokens = [*vocabulary.LETTERS, *(a + b for a, b in MERGES), END]
    random.Random(seed).shuffle(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [vocabulary.added_token(vocab[END], END)]
    added += [vocabulary.added_token(len(tokens) + i, token) for i, token in enumerate(extra)]
    return {**vocabulary.tokenizer_json(vocab, MERGES, added), **data}


def write_tokenizer(folder, contents, files="json", **config):
    """Writes a tokenizer into a folder as tokenizer.json, or as a pair of vocab.json and merges.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **config}))
    if files == "json":
        (folder / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
        return folder
    model = contents["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    more = {token["content"]: token["id"] for token in contents["added_tokens"]
            if token["content"] not in model["vocab"]}
    if more:
        (folder / "added_tokens.json").write_text(json.dumps(more))
    return folder


def pieces_of(contents):
    return vocabulary.Vocabulary(contents, "", -1).pieces


def own_model(folder, V, contents=None, files="json"):
    """A folder in Hugging Face's format with a random model and a vocabulary of its own; and the model."""
    model = random_model(16, V, 1, 2, 8)
    write_tokenizer(hub_folder(folder, model), contents or own_vocabulary(), files)
    return model


def no_package(folder, *names):
    """The environment of a Python in which these packages are missing."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text("raise ImportError")
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


# --- A model's own vocabulary -------------------------------------------------------------------------------
@pytest.mark.parametrize("files", ["json", "pair"])
def test_a_model_decodes_and_exports_its_own_vocabulary(tmp_path, files):
    """No package is needed for that."""
    contents = own_vocabulary()
    V = len(pieces_of(contents))
    model = own_model(tmp_path / "hf", V, contents, files)
    environment = no_package(tmp_path / "none", "tiktoken", "tokenizers")
    end = contents["model"]["vocab"][END]
    ids = list(itertools.takewhile(lambda i: i != end, model.generate([end], 30, temperature=0)))
    expected = b"".join(pieces_of(contents)[i] for i in ids).decode(errors="replace") + "\n"
    sample = functools.partial(driver, "sample", "--tokens", 30, "--temperature", 0, cwd=tmp_path,
                               **environment)
    assert sample("hf").stdout == expected
    driver("export", "hf", "--out", "again", cwd=tmp_path, **environment)
    assert json.loads((tmp_path / "again" / "vocab.json").read_text()) == contents["model"]["vocab"]
    lines = (tmp_path / "again" / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert lines[1:] == contents["model"]["merges"]
    driver("import", "again", "--out", "llmc/model.bin", cwd=tmp_path, **environment)
    assert sample("again").stdout == sample("llmc/model.bin").stdout == expected
    table = (tmp_path / "llmc" / "tokenizer.bin").read_bytes()
    assert table[:1024] == header(20240328, 2, V, end)
    reports_error(sample("hf", "--prompt", "the", status=1), "hf", "pip install tiktoken")


def test_texts_are_encoded_by_the_models_own_vocabulary_tiktoken(tmp_path):
    """In fine-tuning, evaluation, prompts and a run's samples; the run keeps the vocabulary."""
    pytest.importorskip("tiktoken")
    contents = own_vocabulary()
    model = own_model(tmp_path / "hf", len(pieces_of(contents)), contents)
    (tmp_path / "text.txt").write_text(MIXED * 9, encoding="utf-8")
    encode = vocabulary.Vocabulary(contents, "", contents["model"]["vocab"][END]).encoder()
    words = "--init hf --data text.txt --batch-size 2 --steps 2 --sample-tokens 0".split()
    driver(*words, cwd=tmp_path)
    tokens = [i for name in ("train", "val")
              for i in tokens_of(tmp_path / "runs" / "1" / "tokens" / f"{name}_000000.bin")]
    assert tokens == encode(MIXED * 9)
    assert json.loads((tmp_path / "runs" / "1" / "tokenizer.json").read_text()) == contents
    shown = driver("sample", "hf", "--prompt", "the the" + END + "or", "--tokens", 9, "--temperature", 0,
                   cwd=tmp_path).stdout
    end = contents["model"]["vocab"][END]
    context = [*encode("the the"), end, *encode("or")]
    ids = list(itertools.takewhile(lambda i: i != end, model.generate(context, 9, temperature=0)))
    pieces = pieces_of(contents)
    assert shown == f"the the{END}or" + b"".join(pieces[i] for i in ids).decode(errors="replace") + "\n"
    for source in ("hf", "runs/1"):          # the run's, by its table and tokenizer.json
        driver("eval", source, "--data", "text.txt", cwd=tmp_path)
        driver("export", source, "--out", f"out{len(source)}", cwd=tmp_path)
        vocab = json.loads((tmp_path / f"out{len(source)}" / "vocab.json").read_text())
        assert vocab == contents["model"]["vocab"]


SPLIT = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": r"\p{L}+|\p{N}{1,3}|\s*[\r\n]+|[^\p{L}\p{N}]"},
     "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
CHAT = ("<|user|>", "<|bot|>")


@pytest.mark.parametrize("files, contents, text", [
    ("json", own_vocabulary(), MIXED),
    ("pair", own_vocabulary(2), MIXED),
    ("json", own_vocabulary(3, CHAT), "<|user|>the <|bot|> or\n<|user|>" + MIXED),
    ("pair", own_vocabulary(4, CHAT), "<|user|>the <|bot|> or\n<|user|>" + MIXED),
    ("json", own_vocabulary(5, normalizer={"type": "NFC"}), MIXED),
    ("json", own_vocabulary(6, normalizer={"type": "Lowercase"}), MIXED),
    ("json", own_vocabulary(7, pre_tokenizer=SPLIT), MIXED),
    ("json", own_vocabulary(8, pre_tokenizer=PREFIX), MIXED)])
def test_ids_equal_those_of_transformers(tmp_path, files, contents, text):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path / "hf", contents, files, eos_token=END)
    if files == "json":                      # its class would replace the pre-tokenizer by GPT-2's
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "hf" / "tokenizer.json"), eos_token=END)
    else:
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    (tmp_path / "text.txt").write_bytes((text * 3).encode())
    prepare("text.txt", "--tokenizer", "hf", "--val-fraction", 0, cwd=tmp_path)
    tokens = tokens_of(tmp_path / "out" / "train_000000.bin")
    assert tokens == reference(text * 3)["input_ids"]
    tokenizer = train_gpt2.Tokenizer.load(str(tmp_path / "out" / "tokenizer.bin"), train_gpt2.library("cpu"))
    assert tokenizer.decode(tokens) == reference.decode(tokens, clean_up_tokenization_spaces=False)


def test_both_packages_give_the_same_ids_tokenizers(tmp_path):
    """For random texts with all kinds of spaces; without tiktoken, tokenizers is used."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    draw = random.Random(1)
    bits = [*" \n\t\r'.,!1", "  ", " \n ", "'s", "'ll", "the", " ther", "Ünï", "漢字", "。", "—", "\x1c",
            "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u3000", "\u200b", "\ufeff", "😀", "½",
            "Ⅷ", "\u0301"]
    own = vocabulary.Vocabulary(own_vocabulary(), "", 0)
    assert own.is_plain
    fast, other = own._by_tiktoken(), own._by_tokenizers()
    for _ in range(1000):
        text = "".join(draw.choices(bits, k=draw.randrange(40)))
        assert fast(text) == other(text), text


def test_tiktoken_is_used_only_where_it_gives_the_same_ids():
    """A token with two merges, or with one that the ranks do not lead to, has other ids in tiktoken."""
    def plain(merges, **changes):
        tokens = {**dict.fromkeys([*vocabulary.LETTERS, *("".join(m) for m in merges), END])}
        data = vocabulary.tokenizer_json({token: i for i, token in enumerate(tokens)}, merges, [])
        data["model"].update(changes)
        return vocabulary.Vocabulary(data, "", -1).is_plain

    assert plain([("a", "b"), ("ab", "c")])
    assert not plain([("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])     # abc twice
    assert not plain([("a", "b"), ("b", "c"), ("a", "bc")])                   # ab comes first
    assert not plain([("a", "b")], ignore_merges=True)
    assert not plain([("a", "b")], unk_token="<unk>")


def test_bytes_without_a_token_are_reported_tokenizers(tmp_path):
    """The package would drop them."""
    pytest.importorskip("tokenizers")
    contents = own_vocabulary()
    del contents["model"]["vocab"]["\u0120"], contents["model"]["vocab"]["\u0120the"]
    contents["model"]["merges"] = ["t h"]
    write_tokenizer(tmp_path / "hf", contents)
    (tmp_path / "text.txt").write_text("no space here")
    done = prepare("text.txt", "--tokenizer", "hf", status=1, cwd=tmp_path)
    reports_error(done, "0x20", "tokenizer.json")
    (tmp_path / "text.txt").write_text("the-or" * 2_000_000)     # in several processes
    (tmp_path / "more.txt").write_text("a b" * 2_000_000)
    reports_error(prepare("text.txt", "more.txt", "--tokenizer", "hf", status=1, cwd=tmp_path), "0x20")


@pytest.mark.parametrize("change, words", [
    ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, ["WordPiece", "byte-level BPE"]),
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, ["Unigram"]),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, ["WordLevel"]),
    ({"pre_tokenizer": {"type": "Metaspace"}, "decoder": None}, ["SentencePiece"]),
    ({"model": {"type": "BPE", "vocab": {"\u2581the": 0}, "merges": []}}, ["\u2581the", "byte-level BPE"]),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, ["two tokens", "id 0"]),
    ({"model": {"type": "BPE", "vocab": {"a": 70_000}, "merges": []}}, ["70000", "65,535"]),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, ["-1"]),
    ({"model": {"type": "BPE", "vocab": {"a" * 300: 0}, "merges": []}}, ["300 bytes", "255"]),
    ({"model": {"type": "BPE", "vocab": {"a": "0"}, "merges": []}}, ["the id '0'", "65,535"]),
    ({"model": {"type": "BPE"}}, ["is not a tokenizer"]), ({"added_tokens": 3}, ["is not a tokenizer"])])
def test_other_tokenizers_are_rejected_by_name(tmp_path, change, words):
    write_tokenizer(tmp_path / "hf", own_vocabulary(**change))
    (tmp_path / "text.txt").write_text("abc" * 20)
    done = prepare("text.txt", "--tokenizer", "hf", status=1, cwd=tmp_path)
    reports_error(done, "hf/tokenizer.json", *words)


@pytest.mark.parametrize("name, kind", [("vocab.txt", "WordPiece"), ("tokenizer.model", "SentencePiece"),
                                        ("spiece.model", "SentencePiece")])
def test_files_of_other_tokenizers_are_rejected(tmp_path, name, kind):
    hub_folder(tmp_path / "hf", random_model(8, 256, 1, 1, 4))
    (tmp_path / "hf" / name).write_text("a")
    reports_error(driver("sample", "hf", cwd=tmp_path, status=1), name, kind, "byte-level BPE")


def test_a_missing_merges_file_is_reported(tmp_path):
    write_tokenizer(tmp_path / "hf", own_vocabulary(), "pair")
    (tmp_path / "hf" / "merges.txt").unlink()
    with rejects("merges.txt is missing"):
        vocabulary.read(str(tmp_path / "hf"))


# --- Which tokenizer ----------------------------------------------------------------------------------------
def test_the_table_beside_a_model_comes_first(tmp_path):
    model = own_model(tmp_path / "hf", 264)
    train_gpt2.Tokenizer([b"<%d>" % i for i in range(264)], 5).save(str(tmp_path / "hf" / "tokenizer.bin"))
    shown = driver("sample", "hf", "--tokens", 5, "--temperature", 0, cwd=tmp_path).stdout
    ids = itertools.takewhile(lambda i: i != 5, model.generate([5], 5, temperature=0))
    assert shown == "".join(f"<{i}>" for i in ids) + "\n"


def test_a_bare_model_file_has_an_assumed_tokenizer_which_is_stated(tmp_path):
    """By its vocabulary size; never that of a folder in Hugging Face's format."""
    (tmp_path / "tiktoken.py").write_text(
        "class Encoding:\n"
        "    decode_single_token_bytes = staticmethod(lambda i: b'<%d>' % i)\n"
        "get_encoding = {'gpt2': Encoding()}.get\n")
    environment = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for V, name, start in ((256, "bytes", 10), (50257, "gpt2", 50256), (50304, "gpt2", 50256)):
        model = GPT2(GPT2Config(4, V, 1, 1, 2))
        (tmp_path / name).mkdir(exist_ok=True)
        model.save(tmp_path / name / "model.bin")
        sample = functools.partial(driver, "sample", "--tokens", 3, "--temperature", 0, cwd=tmp_path,
                                   **environment)
        done = sample(f"{name}/model.bin")
        assert f"{name}/model.bin has no tokenizer beside it" in done.stderr
        assert f"size of {V}, --tokenizer {name} is assumed" in done.stderr
        ids = list(model.generate([start], 3, temperature=0))
        if name == "gpt2":
            assert done.stdout == "".join(f"<{i}>" for i in ids) + "\n"
        assert "assumed" not in sample(f"{name}/model.bin", "--tokenizer", name).stderr
        hub_folder(tmp_path / f"hf{V}", model)
        reports_error(sample(f"hf{V}", status=1), f"hf{V}/model.safetensors", str(V), "--tokenizer")
    GPT2(GPT2Config(4, 300, 1, 1, 2)).save(tmp_path / "other.bin")
    reports_error(sample("other.bin", status=1), "other.bin", "300", "--tokenizer")


def test_tokenizer_selects_one_but_not_against_the_models_own(tmp_path):
    own_model(tmp_path / "hf", 264)
    write_tokenizer(tmp_path / "other", own_vocabulary(9))
    sample = functools.partial(driver, "sample", "--tokens", 3, cwd=tmp_path)
    done = sample("hf", "--tokenizer", "other", status=1)
    reports_error(done, "other", "hf/model.safetensors", "differ, expected")
    reports_error(sample("hf", "--tokenizer", "nosuch", status=2), "nosuch")
    driver("import", "hf", "--out", "bare/model.bin", cwd=tmp_path)
    for name in ("tokenizer.bin", "tokenizer.json"):
        (tmp_path / "bare" / name).unlink()
    expected = sample("hf").stdout
    for source in ("hf", "hf/tokenizer.json", tmp_path / "hf"):
        assert sample("bare/model.bin", "--tokenizer", source).stdout == expected
    driver("export", "bare/model.bin", "--tokenizer", "hf", "--out", "again", cwd=tmp_path)
    assert sample("again").stdout == expected


def test_training_shards_and_tokenizer_must_agree(tmp_path):
    """Without a table beside the shards, --tokenizer names the run's; options of texts are rejected."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare("text.txt", cwd=tmp_path)
    write_tokenizer(tmp_path / "hf", own_vocabulary())
    train = functools.partial(driver, "--data", "out", *SMALL, "--sample-tokens", 0, cwd=tmp_path)
    reports_error(train("--tokenizer", "hf", status=1), "out/train_000000.bin", "--tokenizer")
    for flag, value in (("--encoding", "latin-1"), ("--text-field", "a"), ("--document-separator", "")):
        reports_error(train(flag, value, status=1), flag, "out/train_000000.bin")
    train("--tokenizer", "bytes", "--out", "run")
    done = driver("eval", "run/best.bin", "--data", "out", "--encoding", "latin-1", status=1, cwd=tmp_path)
    reports_error(done, "--encoding", "is for texts")
    reports_error(driver("--resume", "--out", "run", "--tokenizer", "hf", status=1, cwd=tmp_path), "hf")
    GPT2(GPT2Config(16, 264, 1, 1, 8)).save(tmp_path / "bare.bin")
    done = driver("eval", "bare.bin", "--data", "out", "--tokenizer", "hf", status=1, cwd=tmp_path)
    reports_error(done, "hf", "differ, expected")
    (tmp_path / "out" / "tokenizer.bin").unlink()
    train("--tokenizer", "hf", "--out", "named")
    assert GPT2.load(tmp_path / "named" / "model_00000003.bin").config.V == 264


def test_a_run_of_gpt2_tokens_samples_without_tiktoken(tmp_path, bpe):
    """Only a prompt needs it, and the message does not advise what sample cannot do."""
    model = GPT2(GPT2Config(4, 50257, 1, 1, 2))
    model.save(tmp_path / "model.bin")
    train_gpt2.GPT2Tokenizer().save(str(tmp_path / "tokenizer.bin"))
    environment = no_package(tmp_path / "none", "tiktoken")
    ids = list(model.generate([50256], 3, temperature=0))
    words = ("sample", "model.bin", "--tokens", 3, "--temperature", 0)
    assert driver(*words, cwd=tmp_path, **environment).stdout == bpe.decode(ids) + "\n"
    done = driver(*words, "--prompt", "the", status=1, cwd=tmp_path, **environment)
    reports_error(done, "pip install tiktoken")
    assert "bytes" not in done.stderr


def test_a_prompt_may_have_end_of_text(byte_model):
    model, path = byte_model
    shown = driver("sample", path, "--prompt", f"ab{END}cd", "--tokens", 9, "--temperature", 0).stdout
    ids = itertools.takewhile(bool, model.generate([97, 98, 0, 99, 100], 9, temperature=0))
    assert shown == f"ab{END}cd" + bytes(ids).decode(errors="replace") + "\n"


# --- Ids without a token ------------------------------------------------------------------------------------
@pytest.fixture
def padded(tmp_path):
    """A folder with a model of 300 ids, of which 264 and the added token 266 have a token, and which prefers
    the others."""
    contents = own_vocabulary()
    contents["added_tokens"].append(vocabulary.added_token(266, "<|bot|>"))
    model = random_model(16, 300, 1, 2, 8, spread=0.02)
    wte = array.array("f", model.get("wte").tobytes())
    direction = [0.1 * (-1) ** i for i in range(8)]
    for i in (265, 270, 299):
        wte[8 * i:8 * i + 8] = array.array("f", [500 * value for value in direction])
    model.set("wte", wte)
    model.set("lnfw", [0.0] * 8)
    model.set("lnfb", direction)
    assert {*model.generate([0], 20)} <= {265, 270, 299}
    write_tokenizer(hub_folder(tmp_path / "hf", model), contents)
    return tmp_path, model, contents


def test_ids_without_a_token_are_never_sampled(padded):
    folder, model, contents = padded
    pieces = pieces_of(contents)
    assert len(pieces) == 267 and pieces[266] == b"<|bot|>" and pieces[265] == b""
    for flags in ("--temperature 1", "--temperature 0", "--top-k 2", "--top-p 0.5", "--temperature 100"):
        done = driver("sample", "hf", "--tokens", 60, *flags.split(), cwd=folder)
        assert "34 of 300 ids without a token" in done.stderr or "33 of 300" in done.stderr
        assert len(done.stdout) > 1
    allowed = bytes(i < 264 or i == 266 for i in range(300))
    drawn = {*model.generate([0], 5000, temperature=100.0, allowed=allowed)}
    assert all(allowed[i] for i in drawn) and len(drawn) > 200
    with rejects("299 bytes", "300"):
        next(model.generate([0], 1, allowed=allowed[1:]))


def test_a_model_larger_than_its_vocabulary_works_everywhere_tiktoken(padded):
    pytest.importorskip("tiktoken")
    folder, model, contents = padded
    (folder / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    driver("eval", "hf", "--data", "text.txt", cwd=folder)
    driver(*"--init hf --data text.txt --batch-size 2 --steps 2 --sample-tokens 9".split(), cwd=folder)
    driver("export", "runs/1", "--out", "again", cwd=folder)
    assert json.loads((folder / "again" / "config.json").read_text())["vocab_size"] == 300
    driver("import", "again", "--out", "llmc/model.bin", cwd=folder)
    flags = "-i runs/1/tokens/train_*.bin -b 1 -t 16 -x 1 -s 1 -g 60".split()
    shown = binary("-e", "llmc/model.bin", *flags, cwd=folder).stdout
    assert re.search(r"^---\n.+\n---$", shown, re.M | re.S)


def test_a_vocabulary_larger_than_the_model_is_rejected(tmp_path):
    own_model(tmp_path / "hf", 260)
    for words in (["sample", "hf"], ["export", "hf", "--tokenizer", "hf", "--out", "x"],
                  ["--init", "hf", "--data", "text.txt"], ["eval", "hf", "--data", "text.txt"]):
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        reports_error(driver(*words, status=1, cwd=tmp_path), "264 tokens", "at most", "260")
    make_data(tmp_path)
    pieces = b"".join(b"\1a" for _ in range(98))
    (tmp_path / "data" / "tokenizer.bin").write_bytes(header(20240328, 2, 98, 5) + pieces)
    reports_error(run(*command("binary", tmp_path, "-x 1 -n 0"), status=1), "98 tokens", "tokenizer.bin")


def test_gguf_has_a_token_for_each_id_gguf(padded):
    gguf = pytest.importorskip("gguf")
    folder, _, contents = padded
    driver("export", "hf", "--format", "gguf", "--out", "m.gguf", cwd=folder)
    facts = {key: field.contents() for key, field in gguf.GGUFReader(folder / "m.gguf").fields.items()}
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    vocab = contents["model"]["vocab"]
    assert len(tokens) == len(kinds) == facts["gpt2.vocab_size"] == 300
    assert all(tokens[i] == token for token, i in vocab.items())
    assert tokens[266] == "<|bot|>" and tokens[265] == "[PAD265]" and tokens[299] == "[PAD299]"
    assert [i for i, kind in enumerate(kinds) if kind == 3] == [vocab[END], 266]     # control
    assert [i for i, kind in enumerate(kinds) if kind == 5] == [264, 265, *range(267, 300)]     # unused
    assert facts["tokenizer.ggml.merges"] == contents["model"]["merges"]


def test_gguf_rejects_another_pre_tokenizer(tmp_path):
    own_model(tmp_path / "hf", 264, own_vocabulary(pre_tokenizer=SPLIT))
    done = driver("export", "hf", "--format", "gguf", "--out", "m.gguf", status=1, cwd=tmp_path)
    reports_error(done, "hf/tokenizer.json", "--format hf")
    assert not (tmp_path / "m.gguf").exists()


# --- train-tokenizer ----------------------------------------------------------------------------------------
def test_a_trained_tokenizer_is_used_by_a_run_tokenizers(tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    text = (TEXT + MIXED) * 20
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text, encoding="utf-8")
    shown = driver("train-tokenizer", "texts", "--vocab-size", 300, "--out", "my/t.json", cwd=tmp_path).stdout
    assert "300 tokens" in shown and "--tokenizer my/t.json --data texts" in shown
    trained = vocabulary.read(str(tmp_path / "my" / "t.json"))
    assert len(trained.pieces) == 300 and trained.pieces[0] == END.encode() and trained.end == 0
    assert trained.is_plain
    driver("--data", "texts", "--tokenizer", "my/t.json", *SMALL, "--sample-tokens", 5, cwd=tmp_path)
    tokens = tokens_of(tmp_path / "runs" / "1" / "tokens" / "train_000000.bin")
    assert len(tokens) < 0.75 * len(text.encode())
    model = GPT2.load(tmp_path / "runs" / "1" / "model_00000003.bin")
    assert model.config.V == 300
    assert driver("sample", "--prompt", "the", "--tokens", 9, cwd=tmp_path).stdout.startswith("the")
    driver("train-tokenizer", "texts", "--vocab-size", 300, "--out", "again.json", cwd=tmp_path)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "my" / "t.json").read_bytes()


def test_train_tokenizer_reports_mistakes_tokenizers(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    train = functools.partial(driver, "train-tokenizer", cwd=tmp_path)
    reports_error(train("text.txt", "--vocab-size", 256, status=2), "256", "257")
    reports_error(train("text.txt", "--vocab-size", 300, "--out", "text.txt", status=1), "text.txt", ".json")
    reports_error(train("none.txt", "--vocab-size", 300, status=1), "none.txt")
    for contents in ('{"name": "a package"}', '{"model": "x"}', "[1]", "not JSON"):
        (tmp_path / "mine.json").write_text(contents)
        done = train("text.txt", "--vocab-size", 300, "--out", "mine.json", status=1)
        reports_error(done, "mine.json exists", "--out")
        assert (tmp_path / "mine.json").read_text() == contents
    environment = no_package(tmp_path / "none", "tokenizers")
    done = train("text.txt", "--vocab-size", 300, status=1, **environment)
    reports_error(done, "pip install tokenizers")
    assert not (tmp_path / "tokenizer.json").exists()
    pytest.importorskip("tokenizers")
    reports_error(train("empty.txt", "--vocab-size", 300, status=1), "empty.txt", "no text")
