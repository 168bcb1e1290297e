"""Opening a model on disk: its config, and its weights one tensor at a time. Never a pickle: only safetensors and GGUF.

Every name, shape and type is checked against the config before a tensor is handed out, so that a truncated, foreign or
damaged file is a ValueError that names the file and the tensor, before the server says it is ready.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.gguf_file import GGUFFile
from engine.models.config import ModelConfig, is_native
from engine.models.gguf import gguf_config, iter_gguf, iter_gguf_blocks
from engine.models.quantized import Blocks
from engine.models.shapes import expected_shapes
from engine.models.sharding import Sharding

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("BF16", "F16", "F32")
# A mapped file's touched pages count as resident until it is unmapped, so it is opened anew after this many bytes.
_MAPPED_BYTES = 64 << 20


def load_config(path: str) -> ModelConfig:
    """The config of a Hugging Face directory or a .gguf file. Raises ValueError when there is none or it is invalid."""
    place = Path(path)
    if place.is_dir():
        generation = place / "generation_config.json"
        config = read_json(place / "config.json")
        if not is_native(config):
            from engine.models.foreign import standard_config  # imports transformers: most of a second

            config = standard_config(place)
        return ModelConfig.from_hf(config, read_json(generation) if generation.exists() else None)
    with _open_gguf(place) as file:
        return gguf_config(file)


def iter_weights(
    path: str, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, part: Sharding | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight, or a rank's part of it, as (Hugging Face name, tensor that owns its memory), one tensor at a time.

    safetensors come in their stored type, and no more of them is read than the part; GGUF is dequantized into `dtype`, then cut.
    `config` is the whole model's, which the file is checked against. A tied `lm_head.weight` is left out. Raises
    ValueError for a config the native decoder cannot run and for a missing, unexpected or duplicate tensor, one of the
    wrong shape or type, and a truncated or foreign file.
    """
    if config.unsupported:
        raise ValueError(f"{path}: {config.unsupported}")
    place = Path(path)
    if place.is_dir():
        yield from _iter_directory(place, config, part)
    else:
        with _open_gguf(place) as file:
            for name, weight in iter_gguf(file, config, dtype):
                yield name, weight if part is None else part.cut(name, weight)


def iter_blocks(path: str, config: ModelConfig) -> Iterator[tuple[str, Tensor | Blocks]]:
    """As `iter_weights`, but a GGUF file's matrices in the block types that kernels multiply with stay as they are."""
    place = Path(path)
    if config.unsupported or place.is_dir():
        yield from iter_weights(path, config)
    else:
        with _open_gguf(place) as file:
            yield from iter_gguf_blocks(file, config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def _open_gguf(path: Path) -> GGUFFile:
    try:
        return GGUFFile(path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None


def _iter_directory(folder: Path, config: ModelConfig, part: Sharding | None) -> Iterator[tuple[str, Tensor]]:
    shapes = expected_shapes(config)
    files = _shards(folder)
    for file in files:  # all headers before the first tensor
        _check_header(file, shapes, config)
    missing = shapes.keys() - {name for file in files for name in file.wanted}
    if missing:
        raise ValueError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all)")
    for file in files:
        yield from file.read(part)


class _Shard:
    """One safetensors file. `listed` is what the index says it holds (None without an index)."""

    def __init__(self, path: Path, listed: set[str] | None = None) -> None:
        self.path, self.listed = path, listed
        self.wanted: list[str] = []

    def open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} is not a whole safetensors file: {error}") from None

    def read(self, part: Sharding | None) -> Iterator[tuple[str, Tensor]]:
        left = list(reversed(self.wanted))
        while left:
            with self.open() as file:
                mapped = 0
                while left and mapped < _MAPPED_BYTES:
                    name = left.pop()
                    index = part.index(name) if part is not None else None
                    view = file.get_tensor(name) if index is None else file.get_slice(name)[index]
                    tensor = view.clone(memory_format=torch.contiguous_format)
                    mapped += tensor.nbytes
                    yield name, tensor if part is None else part.settle(name, tensor)


def _check_header(shard: _Shard, shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    with shard.open() as file:
        names = list(file.offset_keys())
        if shard.listed is not None and shard.listed != set(names):
            odd = min(shard.listed ^ set(names))
            raise ValueError(f"{shard.path}: the index and the file disagree about tensor {odd}")
        for name in names:
            if _ignored(name, config):
                continue
            if name not in shapes:
                raise ValueError(f"{shard.path}: unexpected tensor {name}")
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if shape != shapes[name]:
                raise ValueError(f"{shard.path}: tensor {name} has shape {shape}, the config says {shapes[name]}")
            if dtype not in _DTYPES:
                raise ValueError(f"{shard.path}: tensor {name} has type {dtype}; only {', '.join(_DTYPES)} are read")
            shard.wanted.append(name)


def _ignored(name: str, config: ModelConfig) -> bool:
    """What some checkpoints carry besides weights: a copy of the tied embedding, the rotary tables of old transformers."""
    return (name == "lm_head.weight" and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")


def _shards(folder: Path) -> list[_Shard]:
    if (folder / _SINGLE).exists():
        return [_Shard(folder / _SINGLE)]
    if (folder / _INDEX).exists():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return [_Shard(files[0])]
    if files:
        raise ValueError(f"{folder} holds {len(files)} safetensors files but no {_INDEX}")
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        raise ValueError(f"{folder} holds only pickled weights ({pickled[0]}), which can run code; convert them to safetensors")
    raise ValueError(f"{folder} holds no safetensors weights")


def _indexed(folder: Path) -> list[_Shard]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} holds no weight_map")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / _INDEX}: tensor {name} is not in a safetensors file of this directory: {file!r}")
        listed.setdefault(file, set()).add(name)
    return [_Shard(folder / file, names) for file, names in sorted(listed.items())]
