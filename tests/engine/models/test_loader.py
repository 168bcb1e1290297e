"""safetensors directories: every tensor of transformers' state dict arrives, and damage is an error that names its place."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.models import loader
from engine.models.loader import iter_weights, load_config
from tests.engine.models import tiny


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(iter_weights(str(path), load_config(str(path))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save(tiny.model(tiny.config("Llama")), tmp_path / "model")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("shard", ["50MB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_the_state_dict(family: str, tied: bool, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_MAPPED_BYTES", 10_000)  # the files are opened several times over
    biases = {"attention_bias": True, "mlp_bias": True} if family == "Llama" else {}
    made = tiny.model(tiny.config(family, tie_word_embeddings=tied, **biases))
    path = tiny.save(made, tmp_path / "model", max_shard_size=shard)
    assert (len(list(path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    wanted = made.state_dict()
    if tied:
        del wanted["lm_head.weight"]
    found = read(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_own_their_memory(folder: Path) -> None:
    """A view into the mapped file would keep all of it resident."""
    tensors = read(folder)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [tuple(int(at, 16) for at in line[0].split("-")) for line in maps if line[-1].startswith(str(folder))]
    assert not ranges, "the file is still mapped"
    assert len(tensors) == 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_types_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tiny.save(tiny.model(tiny.config("Llama")).to(dtype), tmp_path)
    assert load_config(str(path)).dtype == str(dtype).removeprefix("torch.")
    assert {t.dtype for t in read(path).values()} == {dtype}


def test_the_copy_of_a_tied_head_and_old_rotary_tables_are_left_out(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(tiny.config("Llama", tie_word_embeddings=True)), tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    plain = read(folder)
    edit(folder, add)
    assert read(folder).keys() == plain.keys()


@pytest.mark.parametrize("shard", ["50MB", "30KB"])
@pytest.mark.parametrize("row", [0, 50, 95])
def test_a_head_of_its_own_is_used_whatever_the_config_says(
    row: int, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers: a copy of the embedding is one, and another matrix, if only by a row, is not."""
    monkeypatch.setattr(loader, "_MAPPED_BYTES", 10_000)  # compared in pieces
    made = tiny.model(tiny.config("Llama"))
    made.lm_head.weight.copy_(made.model.embed_tokens.weight)
    folder = tiny.save(made, tmp_path, max_shard_size=shard)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert load_config(str(folder)).tie_word_embeddings
    assert "lm_head.weight" not in read(folder)
    assert not caplog.records
    made.lm_head.weight[row] += 1
    made.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not load_config(str(folder)).tie_word_embeddings
    assert "it is another matrix" in caplog.text
    assert torch.equal(read(folder)["lm_head.weight"], theirs.lm_head.weight)
    assert torch.equal(read(folder)["model.embed_tokens.weight"], theirs.model.embed_tokens.weight)


def test_a_tied_config_needs_no_files(tmp_path: Path) -> None:
    """Before they are downloaded `--check` reads the config; damage is told when the weights are read."""
    folder = tiny.save(tiny.model(tiny.config("Llama", tie_word_embeddings=True)), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9])
    assert load_config(str(folder)).tie_word_embeddings
    file.unlink()
    assert load_config(str(folder)).tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool])
@pytest.mark.parametrize("shape", [(96, 64), (96, 0), ()])
def test_heads_that_cannot_be_compared_are_refused_with_the_weights(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tiny.save(tiny.model(tiny.config("Llama", tie_word_embeddings=True)), tmp_path)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(shape).to(dtype) for name in names}))
    load_config(str(folder))
    with pytest.raises(ValueError, match=r"tensor (model\.embed_tokens|lm_head)\.weight has"):
        read(folder)


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), "unexpected tensor model.layers.2"),
        (lambda t: t.update({Q: t[Q].T[:32].contiguous()}), rf"tensor {Q} has shape \(32, 64\), the config says \(64, 64\)"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"tensor {Q} has type I8"),
        (lambda t: t.update({Q: t[Q].double()}), f"tensor {Q} has type F64"),
    ],
)
def test_what_does_not_fit_the_config_is_named(change: Callable[[Any], Any], words: str, folder: Path) -> None:
    edit(folder, change)
    with pytest.raises(ValueError, match=words):
        read(folder)


def test_errors_come_before_the_first_tensor(folder: Path) -> None:
    edit(folder, lambda t: t.pop(Q))
    with pytest.raises(ValueError, match="missing"):
        next(iter_weights(str(folder), load_config(str(folder))))


def test_truncated_at_any_point(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    config = load_config(str(folder))
    for cut in [0, 1, 7, 8, *random.Random(0).sample(range(9, len(whole)), 20), len(whole) - 1]:
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            next(iter_weights(str(folder), config))


def test_damaged_headers_never_crash(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = bytearray(file.read_bytes())
    end = 8 + struct.unpack_from("<Q", whole)[0]
    config = load_config(str(folder))
    rng = random.Random(1)
    messages = []
    for _ in range(150):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            broken[rng.randrange(end)] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            for _ in iter_weights(str(folder), config):
                pass
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert all(str(folder) in message for message in messages)


def shards(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.save(tiny.model(tiny.config("Llama")), tmp_path / "model", max_shard_size="40KB")


def rewrite(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = shards(folder)
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    name = shards(sharded)["weight_map"][Q]
    (sharded / name).unlink()
    with pytest.raises(ValueError, match=name):
        read(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    home = shards(sharded)["weight_map"][Q]
    other = next(file for file in sorted(sharded.glob("*.safetensors")) if file.name != home)
    save_file({**load_file(other), Q: torch.zeros(64, 64)}, other)
    with pytest.raises(ValueError, match=f"disagree about tensor {Q}"):
        read(sharded)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin", 3, ""])
def test_an_index_reaches_no_other_file(file: Any, sharded: Path) -> None:
    rewrite(sharded, lambda weight_map: weight_map.update({Q: file}))
    with pytest.raises(ValueError, match=f"tensor {Q} is not in a safetensors file of this directory"):
        read(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_a_broken_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index"):
        read(sharded)


def test_pickles_are_never_opened(folder: Path) -> None:
    config = load_config(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model.bin\)"):
        next(iter_weights(str(folder), config))


def test_a_folder_without_weights_or_config(folder: Path) -> None:
    config = load_config(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no safetensors weights"):
        next(iter_weights(str(folder), config))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(str(folder))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        load_config(str(tmp_path / "nowhere"))


def test_models_the_decoder_cannot_run_are_not_read(tmp_path: Path) -> None:
    folder = tiny.save(tiny.model(tiny.config("Llama", hidden_act="gelu")), tmp_path)
    with pytest.raises(ValueError, match="gelu"):
        next(iter_weights(str(folder), load_config(str(folder))))
