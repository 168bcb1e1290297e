"""From a path to a model that can run: a decoder of ours where the architecture allows, transformers' own code elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from engine.config import EngineConfig
from engine.device_rules import has_kernels
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder, Weight
from engine.models.loader import iter_blocks, iter_packed, iter_weights
from engine.models.native import NativeDecoder, unavailable
from engine.models.runner import Model, PagedModel
from engine.models.sharding import Sharding
from engine.parallel import ALONE, Group

logger = logging.getLogger(__name__)


def load_model(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group = ALONE
) -> Model | PagedModel:
    """The model, or of a group of several ranks this rank's part of it (engine/models/sharding.py).

    Raises ValueError naming the reason when the checkpoint is damaged or the architecture cannot be served.
    """
    reason = model.unsupported
    if group.size > 1:
        return _load_part(config, model, dtype, device, group)
    if config.load_format == "transformers" or (config.load_format == "auto" and reason is not None):
        from engine.models.fallback import FallbackModel  # imports transformers: seconds, and only where it is needed

        return FallbackModel(config.model, model, dtype, device)
    if reason is not None:
        raise ValueError(f"load_format: the native decoder does not serve this model: {reason}")
    if config.cpu_kernels != "torch":
        why = unavailable(model, dtype, device)
        if why is None:
            read = iter_weights if config.cpu_weights == "bfloat16" else iter_blocks
            return NativeDecoder(model, read(config.model, model), config.block_size)
        if config.cpu_kernels == "native":
            raise ValueError(f"cpu_kernels: the native kernels cannot run this model here: {why}")
        if device.type == "cpu" and dtype == torch.bfloat16:
            logger.warning("the native CPU kernels are not used, the model will be slower: %s", why)
    return tuned(Decoder(model, _weights(config, model, dtype, device), dtype, device), config)


def tuned(model: Decoder, config: EngineConfig) -> Decoder:
    """With Triton's kernels between its products, where there are any. In deterministic mode see Decoder.fix_order instead."""
    if has_kernels(model.device) and not config.deterministic:
        model.fuse()
    return model


def _load_part(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, group: Group) -> Decoder:
    """Raises ValueError for what cannot be split: transformers' own code, and the native CPU kernels, which take whole layers."""
    reason = "load_format is transformers" if config.load_format == "transformers" else model.unsupported
    if reason is not None:
        raise ValueError(f"tensor_parallel_size: the native decoder can be split, but it does not serve this model: {reason}")
    if config.cpu_kernels == "native":
        raise ValueError("tensor_parallel_size: cpu_kernels native cannot be split over ranks; torch's kernels can")
    part = Sharding.of(model, group.rank, group.size)
    weights = _weights(config, model, dtype, device, part)
    return tuned(Decoder(part.config, weights, dtype, device, part, group), config)


def _weights(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, part: Sharding | None = None
) -> Iterator[tuple[str, Weight]]:
    """For `Decoder`: what is quantized stays so where there are kernels for it."""
    if has_kernels(device):
        return iter_packed(config.model, model, dtype, device, part)
    if model.quantization is None:
        return iter_weights(config.model, model, dtype, part)
    other = device.type == "cpu" and dtype != torch.bfloat16
    advice = ": the native kernels, for bfloat16, multiply with four and eight bits" if other else ""
    name = str(dtype).removeprefix("torch.")
    logger.warning("the quantized weights (%s) are unpacked to %s%s", model.quantization.label, name, advice)
    return iter_weights(config.model, model, dtype, part)


def held(config: ModelConfig, model: Model | PagedModel) -> str:
    """How a model's quantized weights are held, in words; empty for one that never was quantized."""
    if isinstance(model, NativeDecoder):
        kinds = model.kinds - {"BF16"}
    elif isinstance(model, Decoder):
        kinds = {f"{linear.quantized.bits} bits" for linear in model.linears if linear.quantized is not None}
    else:
        kinds = set()
    if config.quantization is not None:
        return config.quantization.label if kinds else f"{config.quantization.label}, unpacked"
    return " and ".join(sorted(kinds))
