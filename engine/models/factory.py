"""From a path to a model that can run: the native decoder where the architecture allows, transformers' own code elsewhere."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.loader import iter_weights
from engine.models.runner import Model


def load_model(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> Model:
    """Raises ValueError naming the reason when the checkpoint is damaged or the architecture cannot be served."""
    reason = model.unsupported
    if config.load_format == "transformers" or (config.load_format == "auto" and reason is not None):
        from engine.models.fallback import FallbackModel  # imports transformers: seconds, and only where it is needed

        return FallbackModel(config.model, model, dtype, device)
    if reason is not None:
        raise ValueError(f"load_format: the native decoder does not serve this model: {reason}")
    return Decoder(model, iter_weights(config.model, model), dtype, device)
