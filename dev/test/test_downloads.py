"""Tests of downloads and data sets, against a local server."""
import hashlib
import importlib.util
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys

import pytest

import train_gpt2
from conftest import fetch_module, header, HERE, one_sentence, rejects, run, tokens_of


# --- Downloads ----------------------------------------------------------------------------------------------
BODY = random.Random(1).randbytes(76800)
SHA256 = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def fetch(server, tmp_path):
    """Downloads BODY into the folder data from a server with these faults, with the allowed retries, and
    checks that nothing else is left there. Returns the requested ranges."""
    def fetch(*faults, sha256=SHA256, size=len(BODY), body=BODY, path="/f", **options):
        server.text, server.faults, server.ranges = body, list(faults), []
        progress = train_gpt2.Progress(unit="MB", label=f"{tmp_path}/data/f: ")
        fetch_module.download(server.url + path, str(tmp_path / "data" / "f"), sha256, size,
                              progress=progress, **options)
        assert os.listdir(tmp_path / "data") == ["f"] and (tmp_path / "data" / "f").read_bytes() == body
        return server.ranges

    return fetch


def test_a_download_is_verified_and_not_repeated(fetch, server, tmp_path):
    assert fetch() == [(None, None)]
    assert fetch(404) == fetch(404, sha256=None) == fetch(404, size=None) == []
    assert fetch(404, sha256=None, size=None) == []
    (tmp_path / "data" / "f").write_bytes(BODY[:-1])
    assert len(fetch(sha256=None)) == 1
    (tmp_path / "data" / "f").write_bytes(BODY[:-1] + b"?")
    assert len(fetch()) == 1


@pytest.mark.parametrize("fault, words", [("cut", "ended after 25,600 of 76,800"), ("stall", "timed out")])
def test_a_download_resumes(fetch, tmp_path, fault, words):
    third, tag = len(BODY) // 3, f'"{hashlib.sha1(BODY).hexdigest()}"'
    rest = [(f"bytes={n * third}-", tag) for n in (1, 2, 3)]
    assert fetch(fault, fault, fault, tries=2, timeout=0.2) == [(None, None)] + rest[:2]     # third: the last
    (tmp_path / "data" / "f").unlink()
    part = tmp_path / "data" / "f.part"
    with rejects(words, "resumes after 25,600 bytes in", "f.part", "by hand"):
        fetch(fault, tries=1, timeout=0.2)
    assert part.read_bytes() == BODY[:third] and not (tmp_path / "data" / "f").exists()
    assert fetch(sha256=None, size=None) == rest[:1]


@pytest.mark.parametrize("faults, asked", [
    (["cut", "no ranges"], 2), (["cut", "another part"], 3), (["cut", 416], 3), (["cut", 500, 503, 429], 5),
    (["no tag"], 1), (["chunks"], 1), (["no size"], 1)])
def test_a_download_survives_server_faults(fetch, faults, asked):
    assert len(fetch(*faults)) == asked


@pytest.mark.parametrize("fault", ["", "If-Range ignored"])
def test_a_changed_file_is_downloaded_anew(fetch, fault):
    with rejects("f.part"):
        fetch("cut", tries=1, body=BODY[::-1], sha256=None)
    assert fetch(fault, sha256=None)[0][0] == f"bytes={len(BODY) // 3}-"


@pytest.mark.parametrize("faults, words, asked", [
    ([404], "404", 1), ([403], "403", 1), ([500] * 9, "500", 5), (["cut", 416] * 9, "ended after", 5)])
def test_a_download_gives_up(fetch, server, faults, words, asked):
    with rejects(words, server.url, "by hand"):
        fetch(*faults)
    assert len(server.ranges) == asked


@pytest.mark.parametrize("wrong, words", [
    ({"sha256": "0" * 64}, SHA256), ({"sha256": SHA256[::-1], "size": None}, SHA256),
    ({"sha256": "0" * 64, "body": BODY[::-1]}, "0000")])
def test_a_wrong_file_is_deleted_and_reported(fetch, tmp_path, wrong, words):
    with rejects(words, "deleted"):
        fetch(**wrong)
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize("wrong, words", [
    ({"size": 10}, "76,800 bytes long, expected 10"), ({"body": BODY + b"?", "sha256": None}, "76,801"),
    ({"size": 10**15}, "expected 1,000,000,000,000,000")])
def test_a_file_of_the_wrong_size_is_not_downloaded(fetch, tmp_path, wrong, words):
    with rejects(words, "nothing was downloaded"):
        fetch(**wrong)
    assert os.listdir(tmp_path / "data") == []


def test_a_web_page_is_rejected(fetch, tmp_path):
    with rejects("a web page"):
        fetch("page", sha256=None, size=None)
    assert os.listdir(tmp_path / "data") == []


def test_the_hubs_sha256_is_verified(fetch, server, tmp_path):
    for linked in (SHA256, "0" * 40):        # of a small file: the SHA-1 of git
        server.linked = f'"{linked}"'
        fetch("/moved", "/cdn", sha256=None, size=None)
        (tmp_path / "data" / "f").unlink()
    fetch("/moved", "cut", sha256=None, size=None)
    (tmp_path / "data" / "f").unlink()
    server.linked = '"%s"' % ("0" * 64)
    with rejects(SHA256, "0" * 64, "deleted"):
        fetch("/moved", sha256=None, size=None)
    assert os.listdir(tmp_path / "data") == []


def test_redirects_lead_to_https_or_stay_on_the_host(fetch, server):
    fetch("/moved", "/moved/for good")
    assert server.requests == ["/f", "/moved", "/moved/for%20good"]
    for url in ("http://localhost:1/f", "http://far.invalid/f", "ftp://127.0.0.1/f", "file:///etc/passwd"):
        with rejects(url.split(":")[0] + ":"):
            fetch(url, sha256="new")
    with rejects("loop"):
        fetch(*["/f"] * 20, sha256="new")


def test_proxies_are_honoured(fetch, server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("https_proxy", server.url)
    server.text = BODY
    fetch_module.download("http://far.invalid/f", str(tmp_path / "f"), SHA256)
    with rejects("502"):
        fetch("https://far.invalid/f", tries=1)
    assert server.requests == ["http://far.invalid/f", "/f", "far.invalid:443"]


def test_other_downloads_are_rejected(fetch, server, tmp_path, monkeypatch):
    for url in "ftp://127.0.0.1/f file:///etc/passwd /etc/passwd http:// https://[ http://a:b/".split():
        with rejects(url):
            fetch_module.download(url, str(tmp_path / "f"), tries=1)
    with rejects("has no Content-Length"):
        fetch("no size", size=None)
    monkeypatch.setenv("GPT2_OFFLINE", "1")
    with rejects("GPT2_OFFLINE", "data/f is missing or invalid", f"download {server.url}/f by hand"):
        fetch()
    assert server.ranges == [] and os.listdir(tmp_path) == ["data"] and os.listdir(tmp_path / "data") == []


def test_a_download_shows_progress(fetch, server, monkeypatch, capsys):
    usual = train_gpt2.Progress.__init__

    def eager(self, *arguments, **named):
        usual(self, *arguments, **named)
        self.interval = 0

    monkeypatch.setattr(train_gpt2.Progress, "__init__", eager)
    fetch("cut")
    shown = capsys.readouterr().err
    assert re.search(r"data/f: 0\.1 of 0\.1 MB \| \d+\.\d MB/s \| 00:00 left\n", shown)
    assert f"{server.url}/f: the connection ended after 25,600 of 76,800 bytes; retrying in 1 s" in shown


# --- Data sets ----------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(server, tmp_path, monkeypatch):
    """Runs dev/data/fetch.py on these files in the folder /base of the server, taken as the right ones."""
    spec = importlib.util.spec_from_file_location("fetch", HERE / "dev" / "data" / "fetch.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fetch", module)     # where worker processes find their function
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", str(tmp_path))
    monkeypatch.setattr(train_gpt2, "DATA", str(tmp_path))     # the cache of the default text
    monkeypatch.setattr(train_gpt2.GPT2Tokenizer, "bpe", staticmethod(lambda: type("Encoding", (), {
        "decode_single_token_bytes": staticmethod(lambda i: b"<%d>" % i),
        "encode_ordinary": staticmethod(lambda text: [50000 + ord(letter) for letter in text])})))

    def datasets(name, files, *flags, status=0):
        for file, contents in files.items():
            server.files["/base/" + file] = contents
            if module.SOURCES[name][1][file]:
                module.SOURCES[name][1][file] = hashlib.sha256(contents).hexdigest()
        words = [name, "--out", str(tmp_path / name), "--url", server.url + "/base/", *map(str, flags)]
        assert module.main(words) == status
        return tmp_path / name

    return datasets


def test_tiny_shakespeare_gives_llmcs_shards(datasets, server):
    text = "First Citizen:\nBefore we proceed\n\nAll:\nSpeak, speak.\n" + "\n\nROMEO: aye\n" * 3000
    folder = datasets("tinyshakespeare", {"input.txt": text.encode()})
    val, train = (tokens_of(folder / f"tiny_shakespeare_{split}.bin") for split in ("val", "train"))
    assert bytes(val + train) == b"\0" + text.encode().replace(b"\n\n", b"\n\n\0") and len(val) == 32768
    datasets("tinyshakespeare", {}, "--tokenizer", "gpt2")
    assert tokens_of(folder / "tiny_shakespeare_val.bin")[:3] == [50256, 50000 + ord("F"), 50000 + ord("i")]
    assert server.requests == ["/base/input.txt"] and (folder.parent / "tinyshakespeare.txt").exists()


def test_tinystories_are_streamed_into_shards(datasets):
    stories = [f"Once upon a time there were {n} little – dogs.\n\nThe end." for n in range(500)]
    names = [f"TinyStoriesV2-GPT4-{split}.txt" for split in ("train", "valid")]
    text = "\n<|endoftext|>\n".join(stories).encode()
    files = {names[0]: text, names[1]: b"Tim hid.\n<|endoftext|>\n"}
    folder = datasets("tinystories", files, "--tokenizer", "bytes", "--shard-tokens", 9000)
    train = [tokens_of(path) for path in sorted(folder.glob("train_*.bin"))]
    assert bytes(sum(train, [])) == b"\0" + "\0".join(stories).encode()
    assert [len(shard) for shard in train[:-1]] == [9000] * 3 and 0 < len(train[3]) <= 9000
    assert bytes(tokens_of(folder / "val_000000.bin")) == b"\0Tim hid."
    datasets("tinystories", {}, "--tokenizer", "gpt2")
    assert sorted(os.listdir(folder)) == [*names, "tokenizer.bin", "train_000000.bin", "val_000000.bin"]
    found = train_gpt2.split_shards(train_gpt2.find_data([str(folder)]).shards)
    assert found == ([str(folder / "train_000000.bin")], [str(folder / "val_000000.bin")])


def test_fineweb_shards_are_kept_as_published(datasets, server, capsys):
    names = ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    files = {name: header(20240520, 1, 5) + bytes(range(10)) for name in names}
    folder = datasets("fineweb", files, "--shards", 1)
    assert tokens_of(folder / names[1]) == tokens_of(folder / names[0]) == [256, 770, 1284, 1798, 2312]
    datasets("fineweb", {}, "--shards", 2)
    assert server.requests == ["/base/" + name for name in names]
    assert sorted(os.listdir(folder)) == [*sorted(names), "tokenizer.bin"]
    for contents in (files[names[0]][:-1], header(20240520, 1, 6) + bytes(10), b"<html>", header(7, 1, 0)):
        (folder / names[1]).unlink(missing_ok=True)
        capsys.readouterr()
        datasets("fineweb", {names[1]: contents}, "--shards", 1, status=1)
        one_sentence(capsys.readouterr().err, names[1], "token shard", "deleted")
        assert not (folder / names[1]).exists()


def test_hellaswag_gives_llmcs_file(datasets, capsys):
    examples = [("A man is", ["up.", "–", "", "a" * 90], 3), ("b", [*"cdef"], 0), ("", [""] * 4, 1)]
    lines = [json.dumps({"ind": 7, "ctx": ctx, "label": label, "endings": endings}) + "\n"
             for ctx, endings, label in examples]
    folder = datasets("hellaswag", {"hellaswag_val.jsonl": "".join(lines).encode()})
    expected, longest = b"", 0
    for index, (context, endings, label) in enumerate(examples):
        texts = [context] + [" " + ending for ending in endings]
        size = 10 + sum(2 + 2 * len(text) for text in texts)
        expected += struct.pack("<5H", 65535, size, index, label, 4)
        expected += b"".join(struct.pack(f"<{len(text) + 1}H", len(text), *(50000 + ord(c) for c in text))
                             for text in texts)
        longest = max(longest, size)
    assert (folder / "hellaswag_val.bin").read_bytes() == header(20240522, 1, 3, longest) + expected
    wrong_label, too_long = lines[0].replace("3,", "99999,"), lines[0].replace("aa", "a" * 40000)
    malformed = ['{"ctx": 3, "label": 0, "endings": ["a", "b", "c", "d"]}', "[" * 100_000,
            '{"ctx": "a", "label": 0, "endings": "abcd"}', '{"ctx": "a", "label": 0, "endings": ["a"]}',
            '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}']
    for line in ("{", "[]", '{"ctx": "a"}', wrong_label, too_long, *malformed):
        datasets("hellaswag", {"hellaswag_val.jsonl": line.encode()}, status=1)
        one_sentence(capsys.readouterr().err.splitlines()[-1], "hellaswag_val.jsonl", "line 1")


def test_an_interrupted_data_set_resumes(server, tmp_path):
    server.text, server.faults = BODY * 10, ["stall"]
    fetch = HERE / "dev" / "data" / "fetch.py"
    words = sys.executable, fetch, "fineweb", "--out", tmp_path, "--url", server.url
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.PIPE, text=True)
    part = tmp_path / "fineweb_val_000000.bin.part"
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
    one_sentence(run(*words, status=1).stderr, "fineweb_val_000000.bin.part", "another process")
    process.send_signal(signal.SIGINT)
    one_sentence(process.communicate(timeout=30)[1], "stopped", "resumes after", part.name, server.url)
    assert process.returncode == 130
    one_sentence(run(*words, status=1).stderr, "not a token shard")     # it is complete now
    assert server.ranges[-1][0] == f"bytes={len(BODY) * 10 // 3}-"
    one_sentence(run(*words, status=1, GPT2_OFFLINE="1").stderr, "GPT2_OFFLINE", "by hand")
