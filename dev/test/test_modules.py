"""Tests of the optional modules of the driver: loaded only where needed, not needed to train and sample."""
import functools
import os
import shutil
import sys

import pytest

from conftest import driver, HERE, LIBRARY, one_sentence, REFERENCES, run, SMALL, TEXT

MODULES = ("dev/convert.py", "dev/curves.py", "dev/data/fetch.py", "dev/fileio.py",
           "dev/vocabulary.py")


@pytest.mark.parametrize("name", MODULES)
def test_a_module_does_not_import_the_driver(name):
    folder, file = os.path.split(HERE / name)
    code = f"import sys, {file[:-3]}; print('train_gpt2' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=folder).stdout == "False\n"


def test_importing_the_driver_loads_no_module():
    names = {"convert", "curves", "fetch", "fileio", "vocabulary"}
    code = f"import sys, train_gpt2; print(*{names} & set(sys.modules))"
    assert run(sys.executable, "-c", code, cwd=HERE).stdout == "\n"


def test_driver_and_library_work_alone(tmp_path):
    shutil.copy(HERE / "train_gpt2.py", tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    for kind in ("model", "reference"):
        shutil.copy(REFERENCES / f"tiny_{kind}.bin", tmp_path)

    def copy(*words, status=0):
        return run(sys.executable, "train_gpt2.py", *words, cwd=tmp_path, status=status,
                   GPT2_LIBRARY=str(LIBRARY))

    copy(*SMALL, "--data", "text.txt", "--val-every", 1)
    copy("--resume", "--steps", 4)
    copy("sample", "--tokens", 5)
    assert "per byte" in copy("eval", "--data", "text.txt").stdout
    copy("prepare", "text.txt", "--out", "shards")
    assert "OK" in copy("check", "tiny_reference.bin").stdout
    copy("export", "--format", "llmc", "--out", "model.bin")
    for words, name in (("export --out hf", "convert.py"), ("plot runs/1", "curves.py"),
                        ("sample gpt2", "fetch.py")):
        one_sentence(copy(*words.split(), status=1).stderr, name, "missing", "copy the folder dev")


def test_convert_alone_matches_the_driver(tmp_path):
    model = REFERENCES / "tiny_model.bin"
    convert = functools.partial(run, sys.executable, HERE / "dev" / "convert.py")
    gguf = ("--format", "gguf", "--type", "f16")
    for folder in ("alone", "driver"):
        (tmp_path / folder).mkdir()
    convert("export", model, tmp_path / "alone" / "hf")
    convert("export", model, tmp_path / "alone" / "m.gguf", *gguf)
    driver("export", model, "--out", tmp_path / "driver" / "hf")
    driver("export", model, "--out", tmp_path / "driver" / "m.gguf", *gguf)
    for name in ("hf/model.safetensors", "hf/config.json", "m.gguf"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "driver" / name).read_bytes()
    convert("import", tmp_path / "alone" / "hf", tmp_path / "back.bin")
    original, back = model.read_bytes(), (tmp_path / "back.bin").read_bytes()
    assert back[1024:] == original[1024:] and back[:32] == original[:32]
    one_sentence(convert("import", model, tmp_path / "x.bin", status=1).stderr, "tiny_model.bin")
    assert not (tmp_path / "x.bin").exists()
