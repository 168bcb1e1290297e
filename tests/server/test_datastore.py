"""`outrider datastore`: from text files to a file that fits a model, and one clear line for everything that cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.datastore import Datastore
from server import cli
from server import datastore as command
from server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama_dir)


def outrider(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = cli.main(["datastore", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def complaint(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    code, out, err = outrider(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("outrider: error: ") and err.count("\n") == 1
    return err.strip()


def test_build_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("The cat sat on the mat. The cat sat on the hat.", encoding="utf-8")
    lines = [{"prompt": "Who sat? ", "completion": "The dog sat."}, {"text": "Nobody"}, {"content": "é"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "some.store"
    code, said, err = outrider(capsys, "build", tmp_path / "a.txt", tmp_path / "b.jsonl", "--model", tiny_llama_dir, "--out", out)
    assert (code, err) == (0, "")
    assert "documents     4" in said
    store = Datastore(out, tokenizer.vocab_size)
    for text in ("The cat sat on the", "Who sat? The dog"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        matches = store.find(ids, len(ids), 2)
        assert matches.length == len(ids)
        assert (store.continuations(matches, 1, 10) >= 0).all()

    code, said, err = outrider(capsys, "info", out, "--model", tiny_llama_dir)
    assert (code, err) == (0, "")
    assert "checksum      right" in said and f"fits          {tiny_llama_dir}" in said


def test_other_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "a b", "answer": "c"}\n', encoding="utf-8")
    assert "q.jsonl:1: none of the fields text, prompt" in complaint(
        capsys, "build", file, "--model", tiny_llama_dir, "--out", tmp_path / "s"
    )
    assert list(command.read(file, ["question", "answer"])) == ["a bc"]
    code, _, _ = outrider(
        capsys, "build", file, "--model", tiny_llama_dir, "--out", tmp_path / "s", "--field", "question", "--field", "answer"
    )
    assert code == 0


def test_a_datastore_of_another_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path, smollm2_gguf: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    out = tmp_path / "some.store"
    assert outrider(capsys, "build", tmp_path / "a.txt", "--model", tiny_llama_dir, "--out", out)[0] == 0
    code, _, err = outrider(capsys, "info", out, "--model", smollm2_gguf)
    assert code == 2 and "built for another tokenizer" in err
    code, _, err = outrider(capsys, "info", smollm2_gguf)
    assert code == 2 and "not a file that `outrider datastore build` wrote" in err


def test_one_vocabulary_has_one_fingerprint(smollm2_dir: Path, smollm2_gguf: Path, tokenizer: Tokenizer) -> None:
    one, other = Tokenizer.load(smollm2_dir), Tokenizer.load(smollm2_gguf)
    size = min(one.vocab_size, other.vocab_size)
    assert one.fingerprint(size) == other.fingerprint(size) != one.fingerprint(size - 1)
    assert one.fingerprint(200) != tokenizer.fingerprint(200)


def test_what_cannot_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("some text", encoding="utf-8")
    common = ("--model", tiny_llama_dir, "--out", tmp_path / "s")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"', encoding="utf-8")
    (tmp_path / "list.jsonl").write_text("[1]", encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    for name, expected in {
        "absent.txt": "no such file",
        "data.bin": "neither .txt nor .jsonl",
        "latin.txt": "latin.txt: not UTF-8",
        "bad.jsonl": "bad.jsonl:2: not JSON",
        "list.jsonl": "list.jsonl:1: none of the fields",
        "empty.txt": "no text to store",
    }.items():
        assert expected in complaint(capsys, "build", tmp_path / name, *common)
    assert "no such folder" in complaint(capsys, "build", text, "--model", tiny_llama_dir, "--out", tmp_path / "no" / "s")
    assert "no such model" in complaint(capsys, "build", text, "--model", "./none", "--out", tmp_path / "s")
    assert "required: --out; see outrider datastore --help" in complaint(capsys, "build", text)
    assert "see outrider datastore --help" in complaint(capsys)
    assert not (tmp_path / "s").exists()


def test_long_documents_are_encoded_in_portions(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PORTION", 20)
    text = "".join(f"line number {i} of the text\n" for i in range(50)) + "end"
    ids = command.encode(tokenizer, text)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
