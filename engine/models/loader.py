"""Opening a model on disk: its config, and its weights one tensor at a time. Never a pickle: only safetensors and GGUF.

Every name, shape and type is checked against the config before a tensor is handed out, so that a truncated, foreign or
damaged file is a ValueError that names the file and the tensor, before the server says it is ready.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.gguf_file import GGUFFile
from engine.models.config import ModelConfig, is_native
from engine.models.gguf import gguf_config, iter_gguf, iter_gguf_blocks
from engine.models.quantization import Quantization
from engine.models.quantized import Blocks, blocks_of
from engine.models.sharding import Sharding
from engine.models.stored import Stored, assemble, stored_name, stored_tensors
from kernels.quant_weight import QuantWeight

logger = logging.getLogger(__name__)

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
LEAST_FLOAT8 = (8, 9)  # compute capability
# A mapped file's touched pages count as resident until it is unmapped, so it is opened anew after this many bytes.
_MAPPED_BYTES = 64 << 20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_config(path: str) -> ModelConfig:
    """The config of a Hugging Face directory or a .gguf file. Raises ValueError when there is none or it is invalid.

    A head that is not the embedding that config.json says it is makes the config one of a model with a head of its own.
    """
    place = Path(path)
    if place.is_dir():
        generation = place / "generation_config.json"
        config = read_json(place / "config.json")
        if not is_native(config):
            from engine.models.foreign import standard_config  # imports transformers: most of a second

            config = standard_config(place)
        made = ModelConfig.from_hf(config, read_json(generation) if generation.exists() else None)
        if made.tie_word_embeddings and is_native(config) and _has_own_head(place):
            logger.warning("%s: config.json says that %s is the embedding; it is another matrix, and is used", place, _HEAD)
            made = msgspec.structs.replace(made, tie_word_embeddings=False)
        return made
    with _open_gguf(place) as file:
        return gguf_config(file)


def iter_weights(
    path: str, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, part: Sharding | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight, or a rank's part of it, as (Hugging Face name, tensor that owns its memory), one tensor at a time.

    safetensors come in their stored type, and no more of them is read than the part; what is quantized, there or in GGUF, is
    dequantized into `dtype`, then cut.
    `config` is the whole model's, which the file is checked against. A tied `lm_head.weight` is left out. Raises
    ValueError for a config the native decoder cannot run and for a missing, unexpected or duplicate tensor, one of the
    wrong shape or type, and a truncated or foreign file.
    """
    _check_supported(path, config)
    place = Path(path)
    if place.is_dir():
        for name, weight in _iter_directory(place, config, dtype, part):
            yield name, _cut(part, name, weight.dequantize(dtype)) if isinstance(weight, QuantWeight) else weight
    else:
        with _open_gguf(place) as file:
            for name, tensor in iter_gguf(file, config, dtype):
                yield name, _cut(part, name, tensor)


def iter_blocks(path: str, config: ModelConfig) -> Iterator[tuple[str, Tensor | Blocks]]:
    """As `iter_weights` in bfloat16, but matrices in the block types that kernels multiply with stay as they are: a GGUF file's,
    and those of a quantized checkpoint that are worth as much in such blocks."""
    _check_supported(path, config)
    place = Path(path)
    if not place.is_dir():
        with _open_gguf(place) as file:
            yield from iter_gguf_blocks(file, config)
        return
    count = _Unpacked(torch.bfloat16)
    for name, weight in _iter_directory(place, config, torch.bfloat16, None):
        if not isinstance(weight, QuantWeight):
            yield name, count.plain(name, weight, config)
        elif (blocks := blocks_of(weight)) is None:
            yield name, count.plain(name, weight.dequantize(torch.bfloat16), config)
        else:
            yield name, blocks
    count.say()


def iter_packed(
    path: str, config: ModelConfig, dtype: torch.dtype, device: torch.device, part: Sharding | None = None
) -> Iterator[tuple[str, Tensor | QuantWeight]]:
    """As `iter_weights`, but what is quantized stays so, on `device`, for kernels/quant_linear.py; in `dtype` is what that has no
    form for: float8 on GPUs that know none, a part whose inputs are cut within a run of 32."""
    _check_supported(path, config)
    place, count = Path(path), _Unpacked(dtype)
    if place.is_dir():
        float8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= LEAST_FLOAT8
        for name, weight in _iter_directory(place, config, dtype, part, device):
            if isinstance(weight, QuantWeight):
                kept = None if weight.packed.is_floating_point() and not float8 else _part_of(part, name, weight)
                weight = _cut(part, name, weight.dequantize(dtype)) if kept is None else kept
            yield name, count.plain(name, weight, config) if isinstance(weight, Tensor) else weight
    else:
        with _open_gguf(place) as file:
            for name, found in iter_gguf_blocks(file, config, dtype):
                if not isinstance(found, Blocks):
                    yield name, _cut(part, name, found)
                    continue
                whole = found.weight().to(device)
                kept = _part_of(part, name, whole)
                yield name, _cut(part, name, whole.dequantize(dtype)) if kept is None else kept
    count.say()


class _Unpacked:
    """Counts the quantized matrices that are unpacked while a model is loaded."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._count, self._first = str(dtype).removeprefix("torch."), 0, ""

    def plain(self, name: str, weight: Tensor, config: ModelConfig) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind == "weight" and config.quantization is not None and config.quantization.covers(module):
            self._first = self._first or name
            self._count += 1
        return weight

    def say(self) -> None:
        if self._count:
            logger.warning(
                "%d quantized matrices, %s first, are unpacked to %s: no kernel here multiplies with them exactly as they are",
                *(self._count, self._first, self._dtype),
            )


def _has_own_head(folder: Path) -> bool:
    """Whether the files hold a head that is not a copy of the embedding: transformers 5 believes them, not the config.

    Files that are not there or cannot be read say nothing here. They are an error once weights are read.
    """
    held: dict[str, _Shard] = {}
    try:
        for shard in _shards(folder):
            held |= dict.fromkeys({_EMBEDDING, _HEAD} & shard.names(), shard)
        return len(held) == 2 and not _equal(held[_EMBEDDING], held[_HEAD])
    except (ValueError, ArithmeticError, LookupError, SafetensorError):
        return False


def _equal(embedding: _Shard, head: _Shard) -> bool:
    """Compared in pieces: neither matrix is ever whole in memory."""
    with embedding.open() as one, head.open() as other:
        shape = one.get_slice(_EMBEDDING).get_shape()
        if shape != other.get_slice(_HEAD).get_shape():
            return False
    step = max(_MAPPED_BYTES // (4 * prod(shape[1:])), 1)
    for first in range(0, shape[0], step):
        with embedding.open() as one, head.open() as other:
            rows = one.get_slice(_EMBEDDING)[first : first + step]
            if not torch.equal(rows, other.get_slice(_HEAD)[first : first + step].to(rows.dtype)):
                return False
    return True


def _check_supported(path: str, config: ModelConfig) -> None:
    if config.unsupported:
        raise ValueError(f"{path}: {config.unsupported}")


def _cut(part: Sharding | None, name: str, weight: Tensor) -> Tensor:
    return weight if part is None else part.cut(name, weight)


def _part_of(part: Sharding | None, name: str, weight: QuantWeight) -> QuantWeight | None:
    """A rank's part of a whole weight; None where inputs would be cut within a run."""
    index = None if part is None else part.index(name)
    if index is None:
        return weight
    if len(index) == 1:
        return weight.rows(index[0])
    begin, end, _ = index[1].indices(weight.in_features)
    return weight.columns(begin, end)


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


def _iter_directory(
    folder: Path, config: ModelConfig, dtype: torch.dtype, part: Sharding | None, device: torch.device | None = None
) -> Iterator[tuple[str, Tensor | QuantWeight]]:
    """Plain tensors, or parts of them, and whole quantized matrices, made on `device`."""
    stored = stored_tensors(config)
    files = _shards(folder)
    for file in files:  # all headers before the first tensor
        _check_header(file, stored, config)
    found = {name for file in files for name in file.wanted}
    missing = {name for name, tensor in stored.items() if not tensor.optional} - found
    if missing:
        raise ValueError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all)")
    modules = _quantized(found, config.quantization)
    pending: dict[str, dict[str, Tensor]] = {}
    for file in files:
        for name, tensor in file.read(part, modules):
            module, _, kind = name.rpartition(".")
            if config.quantization is None or kind not in modules.get(module, ()):
                yield name, tensor
                continue
            parts = pending.setdefault(module, {})
            parts[kind] = tensor if device is None else tensor.to(device)
            if len(parts) == len(modules[module]):
                try:
                    weight = assemble(config.quantization, pending.pop(module), dtype)
                except ValueError as error:
                    raise ValueError(f"{file.path}: {module}: {error}") from None
                name = f"{module}.weight"
                yield name, _cut(part, name, weight) if isinstance(weight, Tensor) else weight


def _quantized(names: set[str], quantization: Quantization | None) -> dict[str, set[str]]:
    """Of each quantized module what its tensors' names end with."""
    found: dict[str, set[str]] = {}
    for name in names if quantization is not None else ():
        module, _, kind = name.rpartition(".")
        if kind != "bias" and quantization is not None and quantization.covers(module):
            found.setdefault(module, set()).add(kind)
    return found


class _Shard:
    """One safetensors file. `listed` is what the index says it holds (None without an index)."""

    def __init__(self, path: Path, listed: set[str] | None = None) -> None:
        self.path, self.listed = path, listed
        self.wanted: dict[str, str] = {}  # `stored_tensors`' name -> the file's

    def open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path} is not a whole safetensors file: {error}") from None

    def names(self) -> set[str]:
        if self.listed is not None:
            return self.listed
        with self.open() as file:
            return set(file.keys())

    def read(self, part: Sharding | None, quantized: Mapping[str, Container[str]]) -> Iterator[tuple[str, Tensor]]:
        """What is quantized comes whole: of these modules the tensors whose names end so."""
        left = list(reversed(self.wanted.items()))
        while left:
            with self.open() as file:
                mapped = 0
                while left and mapped < _MAPPED_BYTES:
                    name, own = left.pop()
                    module, _, kind = name.rpartition(".")
                    index = part.index(name) if part is not None and kind not in quantized.get(module, ()) else None
                    view = file.get_tensor(own) if index is None else file.get_slice(own)[index]
                    tensor = view.clone(memory_format=torch.contiguous_format)
                    mapped += tensor.nbytes
                    yield name, tensor if part is None else part.settle(name, tensor)


def _check_header(shard: _Shard, stored: dict[str, Stored], config: ModelConfig) -> None:
    with shard.open() as file:
        names = list(file.offset_keys())
        if shard.listed is not None and shard.listed != set(names):
            odd = min(shard.listed ^ set(names))
            raise ValueError(f"{shard.path}: the index and the file disagree about tensor {odd}")
        for name in names:
            known = stored_name(name, config.quantization)
            if known is None or _ignored(name, config):
                continue
            if known not in stored or known in shard.wanted:
                raise ValueError(f"{shard.path}: unexpected tensor {name}")
            view, wanted = file.get_slice(name), stored[known]
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if shape not in wanted.shapes:
                raise ValueError(f"{shard.path}: tensor {name} has shape {shape}, the config says {wanted.shapes[0]}")
            if dtype not in wanted.types:
                raise ValueError(f"{shard.path}: tensor {name} has type {dtype}; only {', '.join(wanted.types)} are read")
            shard.wanted[known] = name


def _ignored(name: str, config: ModelConfig) -> bool:
    """What some checkpoints carry besides weights: a copy of the tied embedding, the rotary tables of old transformers."""
    return (name == _HEAD and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")


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
