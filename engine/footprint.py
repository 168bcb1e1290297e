"""What a model takes of memory, from its shape alone: for `outrider serve --check`, where no device may be at hand.

Not the memory plan of a running server, which measures what a step takes (engine/memory.py); what cannot be counted is estimated
here, and says so.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.device_rules import has_kernels
from engine.gguf_file import GGUFFile
from engine.models.config import ModelConfig
from engine.models.gguf import hf_name
from engine.models.native import unavailable
from engine.models.quantized import BLOCK_TYPES
from engine.models.shapes import expected_shapes
from engine.models.sharding import Sharding
from engine.models.stored import stored_tensors

SCORES_BYTES = 12  # of a judged row and token: logits, the target law's scores, and what the rules keep (engine/workspace.py)


def weight_bytes(
    config: EngineConfig, path: str, model: ModelConfig, dtype: torch.dtype, device: torch.device, part: Sharding | None = None
) -> int:
    """Of a model, or of a rank's part of it: counted from the shape, or from the files where that does not say.

    Raises ValueError naming the model when neither says it.
    """
    place = Path(path)
    if model.unsupported is not None and model.unsupported.startswith("quantization_config"):
        raise ValueError(f"model: {path}: {model.unsupported}")
    if config.load_format != "transformers" and model.supported:
        kernels = "gpu" if has_kernels(device) else "cpu" if _on_native(config, model, dtype, device, part) else ""
        if kernels and place.is_file():
            return _gguf_bytes(place, dtype, part)
        stored_tensors(model)  # raises for groups that do not fit the shape
        return _counted(model, dtype, part, kernels)
    stored = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    if not stored:
        why = model.unsupported or "it runs through transformers' own code"
        raise ValueError(f"model: {path}: what its weights take cannot be told from config.json ({why}), and they are not there")
    return stored * dtype.itemsize // {"float32": 4}.get(model.dtype, 2)


def step_bytes(config: EngineConfig, shape: ModelConfig, dtype: torch.dtype) -> int:
    """About what the largest step holds beside weights and cache: its logits, or the widest layer. `shape`: of a rank's part."""
    rows = config.max_num_batched_tokens
    nodes = 1 + max(config.budget, config.max_budget)
    judged = min(rows, config.max_num_seqs * nodes)
    layer = rows * dtype.itemsize * (6 * shape.hidden_size + 3 * shape.intermediate_size)
    return max(layer, judged * shape.vocab_size * SCORES_BYTES) + rows * shape.hidden_size * dtype.itemsize


def rotary_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Of the tables with an angle for every position."""
    return 2 * model.max_position_embeddings * model.head_dim * dtype.itemsize


def _on_native(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, part: Sharding | None) -> bool:
    """Whether weights stay packed for the native CPU kernels."""
    wanted = part is None and config.cpu_weights == "auto" and config.cpu_kernels != "torch"
    return wanted and unavailable(model, dtype, device) is None


def _counted(model: ModelConfig, dtype: torch.dtype, part: Sharding | None, kernels: str) -> int:
    """From the shape. kernels: those that multiply with quantized weights as they are, if any."""
    total = 0
    for name, shape in expected_shapes(model).items():
        module, _, kind = name.rpartition(".")
        quantization, size = model.quantization, float(dtype.itemsize)
        if kernels and quantization is not None and kind == "weight" and quantization.covers(module):
            size = quantization.packed_bytes(shape[1], kernels == "cpu") or size
        total += int(_elements(name, shape, part) * size)
    return total


def _elements(name: str, shape: tuple[int, ...], part: Sharding | None) -> int:
    index = part.index(name) if part is not None else None
    own = [len(range(*cut.indices(size))) for cut, size in zip(index or (), shape, strict=False)]
    return prod([*own, *shape[len(own) :]])


def _gguf_bytes(path: Path, dtype: torch.dtype, part: Sharding | None) -> int:
    """What is multiplied as it is stays as it is; everything else becomes `dtype`."""
    total = 0
    with GGUFFile(path) as file:
        for tensor in file.tensors:
            each = tensor.nbytes / prod(tensor.shape) if tensor.type_name in BLOCK_TYPES else dtype.itemsize
            total += int(_elements(hf_name(tensor.name) or "", tensor.shape, part) * each)
    return total
