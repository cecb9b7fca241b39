#!/usr/bin/env python3
"""Byte-level BPE vocabularies (Sennrich et al. 2016, on bytes as in GPT-2) in Hugging Face's formats.

    read(path)             the Vocabulary of a tokenizer.json, of vocab.json and merges.txt, or of a folder
    from_table(pieces)     the Vocabulary of a tokenizer table, from which the merges are recovered
    train(texts, size)     a new Vocabulary, by the package tokenizers
    Vocabulary.encoder()   encodes text, by tiktoken or tokenizers, whichever gives transformers' ids

Reading needs the standard library only; tiktoken and tokenizers are imported when text is encoded or a
vocabulary is trained. train_gpt2.py uses it for --tokenizer, for models with their own vocabulary and for
train-tokenizer, convert.py to export tokenizers.
"""
import contextlib
import functools
import importlib
import itertools
import json
import os
import sys

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from fileio import Error, naming, printable, regular  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
PAIRS = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}     # the second: OpenAI's names
OTHERS = {"vocab.txt": "WordPiece", "tokenizer.model": "SentencePiece", "spiece.model": "SentencePiece",
          "sentencepiece.bpe.model": "SentencePiece"}
EXPECTED = "expected a byte-level BPE, as GPT-2 has"
LARGEST_JSON = 50_000_000                    # bytes
MOST = 1 << 16                               # tokens; shards have uint16
LONGEST = 255                                # bytes of a token; a table has one byte for it
# How GPT-2 splits text before merging: contractions; letters, digits or other characters, after at most one
# space; whitespace. The package tokenizers calls this pre-tokenizer ByteLevel, llama.cpp gpt-2.
GPT2_PATTERN = r"'(?:[stmd]|re|ve|ll)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"


def byte_letters():
    """GPT-2's letter for each byte: Latin-1 where that is printable, U+0100 and on for the others."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: bytes([byte]) for byte, letter in enumerate(LETTERS)}


def merge_of(piece, rank, ranks):
    """The two parts that the last merge of a token joins: what the merges of lower rank make of its bytes.
    Returns None if they do not leave two parts."""
    parts = [piece[i:i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        new, i = min((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
        if new >= rank:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spelled(piece):
    """Bytes in GPT-2's letters."""
    return "".join(LETTERS[byte] for byte in piece)


def unspelled(token):
    """The bytes of a token in GPT-2's letters."""
    return b"".join(BYTES[letter] for letter in token)


def components(part):
    """All components of a pre_tokenizer, normalizer or decoder of a tokenizer.json, as a flat list."""
    if not isinstance(part, dict):
        return []
    inner = [item for key in ("pretokenizers", "normalizers", "decoders") for item in part.get(key, ())]
    if part.get("type") != "Sequence":
        return [part]
    return [found for item in inner for found in components(item)]


def check_kind(data, source):
    """Raises Error unless a tokenizer.json has a byte-level BPE."""
    kind = data["model"].get("type", "BPE")      # older files have no type
    levels = [part["type"] for key in ("pre_tokenizer", "decoder") for part in components(data.get(key))]
    if kind == "BPE" and (data["model"].get("byte_fallback") or "ByteLevel" not in levels):
        kind = "SentencePiece (a BPE of characters)"
    if kind != "BPE":
        raise Error(f"{source} is a {printable(str(kind)):.40} tokenizer, {EXPECTED}")


def token_ids(data):
    """The id of each token of a tokenizer.json."""
    added = {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
    return {**data["model"]["vocab"], **added}


class Vocabulary:
    """A byte-level BPE. pieces: the bytes of each id, b"" for an id without a token; end: the id of
    end-of-text, or -1; data: the contents of its tokenizer.json; source: its file."""

    def __init__(self, data, source, end):
        """Raises Error if a token cannot be one of a byte-level BPE."""
        self.data, self.source, self.end = data, source, end
        model = data["model"]
        self.vocab = model["vocab"]
        self.merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
                       for merge in model["merges"]]
        self.added = {token["content"]: token for token in data.get("added_tokens") or ()}
        self.pieces = self._pieces(token_ids(data))

    def _pieces(self, ids):
        wrong = [i for i in ids.values() if type(i) is not int or not 0 <= i < MOST]
        if wrong or not ids:
            raise Error(f"{self.source} has the id {[*wrong, None][0]!r:.20}, expected integers from 0 to"
                        f" {MOST - 1:,}, since shards store 16 bits per token")
        pieces = [b""] * (1 + max(ids.values()))
        for token, i in ids.items():
            if pieces[i]:
                raise Error(f"{self.source} has two tokens with the id {i}")
            if token in self.added:
                pieces[i] = token.encode()
            elif {*token} <= BYTES.keys():
                pieces[i] = unspelled(token)
            else:
                raise Error(f"{self.source} has a token {token!r:.60} that is not spelled in the letters for"
                            f" bytes, {EXPECTED}")
            if len(pieces[i]) > LONGEST:
                raise Error(f"{self.source}: token {i} has {len(pieces[i])} bytes, expected at most"
                            f" {LONGEST}")
        return pieces

    def json(self):
        """The contents of its tokenizer.json, as bytes."""
        return json.dumps(self.data, ensure_ascii=False).encode()

    def files(self, max_T):
        """The contents of its files in a Hugging Face folder by name."""
        end = None
        if self.end >= 0:
            end = self.pieces[self.end].decode()
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_T,
                  "bos_token": end, "eos_token": end, "unk_token": end}
        files = {FILE: self.json()}
        if self.splits_as_gpt2 and end:
            config["tokenizer_class"] = "GPT2Tokenizer"
            files["vocab.json"] = json.dumps(self.vocab, ensure_ascii=False, indent=1).encode()
            lines = ["#version: 0.2", *map(" ".join, self.merges), ""]
            files["merges.txt"] = "\n".join(lines).encode()
        files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
        return files

    def gguf(self, V):
        """Its metadata in a GGUF file for a model with V ids. Raises Error if llama.cpp would split text in
        another way."""
        if not self.splits_as_gpt2:
            raise Error(f"{self.source} does not split text as GPT-2 does, which is what a GGUF file can say;"
                        " use --format hf, and llama.cpp's own converter")
        normal, control, user_defined, unused = 1, 3, 4, 5
        kinds, tokens = [], []
        added = {token["id"]: token for token in self.added.values()}
        for i, piece in enumerate(self.pieces + [b""] * (V - len(self.pieces))):
            token, kind = spelled(piece), normal
            if i in added:
                token, kind = added[i]["content"], user_defined
                if added[i]["special"]:
                    kind = control
            elif not piece:
                token, kind = f"[PAD{i}]", unused
            tokens.append(token)
            kinds.append(kind)
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
                    "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
                    "tokenizer.ggml.merges": [" ".join(pair) for pair in self.merges]}
        if self.end >= 0:
            metadata["tokenizer.ggml.bos_token_id"] = metadata["tokenizer.ggml.eos_token_id"] = self.end
        return metadata

    @functools.cached_property
    def splits_as_gpt2(self):
        """Whether text is split by GPT-2's pattern, without a normalizer before it. Then parts of a text can
        be encoded on their own, wherever the pattern splits."""
        if components(self.data.get("normalizer")):
            return False
        gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        found = components(self.data.get("pre_tokenizer"))
        return len(found) == 1 and all(found[0].get(key, value) == value for key, value in gpt2.items())

    @functools.cached_property
    def is_plain(self):
        """Whether tiktoken gives the same ids. It merges the pair whose union has the lowest rank, whatever
        the two are, so each token must have one merge, which must be the last one that the ranks lead to."""
        model = self.data["model"]
        settings = [model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix",
                                               "end_of_word_suffix", "ignore_merges")]
        settings += [token.get(key) for token in self.added.values()
                     for key in ("single_word", "lstrip", "rstrip")]
        contents = sorted(self.added)        # a prefix of another comes right before it
        nested = any(b.startswith(a) for a, b in zip(contents, contents[1:]))
        ranks = self.ranks()
        complete = len(ranks) == 256 + len(self.merges) and self.vocab.keys() >= {*map(spelled, ranks)}
        if any(settings) or nested or not self.splits_as_gpt2 or not complete:
            return False
        pairs = [[unspelled(a), unspelled(b)] for a, b in self.merges]
        return all(merge_of(a + b, ranks[a + b], ranks) == [a, b] for a, b in pairs)

    def ranks(self):
        """tiktoken's mergeable ranks: bytes, then merges in order."""
        ranks = {bytes([byte]): byte for byte in range(256)}
        for a, b in self.merges:
            ranks.setdefault(unspelled(a) + unspelled(b), len(ranks))
        return ranks

    def encoder(self):
        """A function from a str to a list of ids: those of transformers, except that end-of-text in the text
        is ordinary text. Surrogates, which stand for bytes that are not UTF-8, become U+FFFD. Raises Error
        without the package."""
        encode = self._by_tiktoken() or self._by_tokenizers()
        missing = {*range(256)} - {piece[0] for piece in self.pieces if len(piece) == 1}

        def checked(text):
            data = text.encode(errors="surrogateescape")
            absent = missing.intersection(data)
            if absent:
                raise Error(f"the text has the byte {min(absent):#04x}, for which {self.source} has no token;"
                            " remove it, or use another tokenizer")
            return encode(data.decode(errors="replace"))

        return checked

    def _by_tiktoken(self):
        if not self.is_plain:
            return None
        try:
            import tiktoken
        except ImportError:
            return None
        ranks = self.ranks()
        special = [token for token in self.added if self.added[token]["id"] != self.end]
        ids = [self.vocab[spelled(piece)] for piece in ranks] + [self.added[t]["id"] for t in special]
        bpe = tiktoken.Encoding(self.source, pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                special_tokens={token: len(ranks) + i for i, token in enumerate(special)})
        return lambda text: [ids[rank] for rank in bpe.encode(text, allowed_special={*special},
                                                              disallowed_special=())]

    def _by_tokenizers(self):
        install = "tokenizers"
        if self.is_plain:
            install = "tiktoken"             # faster
        tokenizers = package("tokenizers", f"encoding text with {self.source} needs {install}", install)
        added = [token for token in self.added.values() if token["id"] != self.end]
        data = {**self.data, "added_tokens": added, "truncation": None, "padding": None}
        try:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
        except Exception as error:           # the package has no exceptions of its own
            raise Error(f"the package tokenizers rejects {self.source}: {error}") from None
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def package(name, need, install):
    """An optional package. Raises Error with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Error(f"{need}; pip install {install}") from None


# --- Files --------------------------------------------------------------------------------------------------
def read_json(path):
    """The JSON object in a file; an empty one if there is no such file."""
    if not os.path.lexists(path):
        return {}
    if os.path.getsize(path) > LARGEST_JSON:
        raise Error(f"{path} has {os.path.getsize(path):,} bytes, expected at most {LARGEST_JSON:,}")
    with naming(path), open(path, "rb", opener=regular) as file:
        return {**json.loads(file.read())}


def read(path):
    """The Vocabulary in a tokenizer.json, in a vocab.json and the merges.txt beside it, or in a folder that
    has them; None if a folder has no tokenizer. The files of a folder that describe special tokens are taken
    into account. Raises Error for anything but a byte-level BPE."""
    folder, name = os.path.split(path)
    if os.path.isdir(path):
        folder = path
        names = (FILE, *PAIRS)
        configs = [os.path.join(folder, name) for name in ("config.json", "tokenizer_config.json")]
        if any(map(os.path.exists, configs)):
            names += (*OTHERS,)              # elsewhere vocab.txt may be anything
        present = [name for name in names if os.path.lexists(os.path.join(folder, name))]
        if not present:
            return None
        name = present[0]
    file = os.path.join(folder, name)
    if name in OTHERS:
        raise Error(f"{file} is a {OTHERS[name]} tokenizer, {EXPECTED}")
    try:
        data = read_json(file)
        config = {**read_json(os.path.join(folder, "special_tokens_map.json")),
                  **read_json(os.path.join(folder, "tokenizer_config.json"))}
        if not isinstance(data.get("model"), dict):
            data = from_pair(data, file, config)
        add_tokens(data, folder, config)
        check_kind(data, file)
        ids = token_ids(data)
        return Vocabulary(data, file, ids.get(content(config.get("eos_token")), ids.get(END_OF_TEXT, -1)))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise Error(f"{file} is not a tokenizer ({type(error).__name__}: {error!s:.99}); expected a"
                    f" {FILE}, or a vocab.json with merges.txt beside it") from None


def check_target(path):
    """Raises Error if a file exists and is not a tokenizer.json, which is all that is overwritten."""
    data = {}                                # for anything but a JSON object
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        data = read_json(path)
    if not isinstance(data.get("model"), dict):
        raise Error(f"{path} exists and is not a {FILE}; choose another --out")


def content(token):
    """The text of a special token, given as such or as a description."""
    if isinstance(token, dict):
        return token["content"]
    return token


def added_token(i, text, special=True, **flags):
    """An entry of added_tokens in a tokenizer.json."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": i, "content": text, **plain, "special": special, **flags}


def from_pair(vocab, file, config):
    """The contents of a tokenizer.json from those of a vocab.json and the merges.txt beside it."""
    folder, name = os.path.split(file)
    path = os.path.join(folder, PAIRS.get(name, "merges.txt"))
    if not os.path.exists(path):
        raise Error(f"{path} is missing, which {file} needs for a byte-level BPE")
    with naming(path), open(path, "rb", opener=regular) as stream:
        lines = stream.read().decode().split("\n")
    merges = [line.rstrip("\r").split(" ") for line in lines if line and not line.startswith("#version")]
    names = {content(config.get(f"{kind}_token", END_OF_TEXT)) for kind in ("bos", "eos", "unk", "pad")}
    return tokenizer_json(vocab, [merge for merge in merges if merge != [""]],
                          [added_token(vocab[name], name) for name in sorted(names & vocab.keys())],
                          bool(config.get("add_prefix_space")))


def tokenizer_json(vocab, merges, added, prefix_space=False):
    """The contents of a tokenizer.json for GPT-2's kind of tokenizer."""
    level = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": level, "post_processor": None, "decoder": {**level},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                      "ignore_merges": False, "vocab": vocab, "merges": [" ".join(pair) for pair in merges]}}


def add_tokens(data, folder, config):
    """Adds to a tokenizer.json's contents the tokens of added_tokens.json and tokenizer_config.json."""
    tokens = {text: added_token(i, text, special=False)
              for text, i in read_json(os.path.join(folder, "added_tokens.json")).items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = {**added_token(int(i), token["content"]), **token, "id": int(i)}
    data["added_tokens"] = data.get("added_tokens") or []
    known = {token["content"] for token in data["added_tokens"]}
    data["added_tokens"] += [tokens[text] for text in tokens if text not in known]
    data["added_tokens"].sort(key=lambda token: token["id"])


def from_table(pieces, end):
    """The Vocabulary of a tokenizer table: the bytes of each token, in the order of the merges, which are
    recovered, and the id of end-of-text. Text is taken to be split as GPT-2 does. Raises Error for any other
    kind of tokenizer."""
    ranks = {piece: rank for rank, piece in enumerate(pieces) if rank != end}
    vocab, merges = {}, []
    for rank, piece in enumerate(pieces):
        if rank == end:
            vocab[END_OF_TEXT] = rank
            continue
        parts = merge_of(piece, rank, ranks)
        if not parts or ranks[piece] != rank or not ranks.keys() >= {*parts} or end < 0:
            raise Error(f"token {rank} of the tokenizer does not belong to a byte-level BPE with end-of-text;"
                        " without tokenizer.bin the model is exported alone")
        vocab[spelled(piece)] = rank
        if len(parts) == 2:
            merges.append([spelled(part) for part in parts])
    return Vocabulary(tokenizer_json(vocab, merges, [added_token(end, END_OF_TEXT)]), "the tokenizer",
                      end)


def train(texts, size):
    """A Vocabulary of at most `size` tokens, trained on an iterable of str: <|endoftext|>, the 256 bytes, and
    the merges of the pairs that are most frequent then."""
    tokenizers = package("tokenizers", "training a tokenizer needs tokenizers", "tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return Vocabulary(json.loads(tokenizer.to_str()), FILE, end=0)
