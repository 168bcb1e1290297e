"""Which attention backend serves a model: what was asked for, or the fastest there is for the device.

On a GPU `auto` measures, where there is a choice: once in a process for heads of one shape, before the memory is planned.
Recorded steps (engine/graphs.py) attend through Triton in any case, as the others plan every step on the host.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from engine.attention import flashinfer, measure
from engine.attention.reference import ReferenceAttention
from engine.models.batch import ForwardBatch
from engine.models.runner import AttentionBackend, Bucket, Recordable, Room, WarmsUp

logger = logging.getLogger("outrider.engine")

Shape = tuple[int, int, int, int, torch.dtype, int | None]  # query heads, key heads, head size, block size, type, window


def make_attention(
    name: str,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    fixed_split: int = 0,
) -> AttentionBackend:
    """`name`: auto, triton, flashinfer or reference. On a CPU `auto` is the reference; triton, asked for by name, is interpreted.

    `fixed_split` (engine/deterministic.py) takes triton, whatever the device.

    Raises ValueError, fit for the command line, when a backend was asked for that cannot serve these heads or is not installed.
    """
    shape = (num_heads, num_kv_heads, head_dim, block_size, dtype, window)
    if fixed_split:
        from engine.attention.triton import TritonAttention  # imports triton, which a CPU can do without

        return TritonAttention(*shape, fixed_split)
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return ReferenceAttention(*shape)
    if name != "auto":
        return _make(name, shape, device)
    found, refused = _usable(shape, device)
    if not found:
        logger.warning("attention runs on plain torch, and the model will be slower: %s", "; ".join(refused))
        return ReferenceAttention(*shape)
    if len(found) == 1:
        return next(iter(found.values()))
    picked, recorded = found[_fastest(shape, device)], found.get("triton")
    return picked if picked is recorded or not isinstance(recorded, Recordable) else Mixed(picked, recorded)


class Mixed:
    """One backend for steps as they come, another for recorded ones."""

    def __init__(self, plain: AttentionBackend, recorded: Recordable) -> None:
        self.name = plain.name
        self._plain, self._recorded = plain, recorded

    def plan(self, batch: ForwardBatch) -> None:
        self._plain.plan(batch)

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        return self._plain.run(kv, q, new, scale)

    def warm_up(self, kv: Tensor) -> None:
        """The other one's kernels are compiled as they are recorded."""
        if isinstance(self._plain, WarmsUp):
            self._plain.warm_up(kv)

    def room(self, most: Bucket, longest: int, device: torch.device) -> Room:
        return self._recorded.room(most, longest, device)


def _make(name: str, shape: Shape, device: torch.device) -> AttentionBackend:
    if name == "flashinfer":
        return flashinfer.FlashInferAttention(*shape, device)
    if find_spec("triton") is None:
        raise ValueError("attention_backend: triton is not installed")
    from engine.attention.triton import TritonAttention

    return TritonAttention(*shape)


def _usable(shape: Shape, device: torch.device) -> tuple[dict[str, AttentionBackend], list[str]]:
    """Those that could serve here, the preferred first; and why the others could not."""
    found: dict[str, AttentionBackend] = {}
    refused = []
    for name in ("triton", "flashinfer"):
        try:
            found[name] = _make(name, shape, device)
        except ValueError as error:
            refused.append(str(error).removeprefix("attention_backend: "))
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library that is there and broken
            refused.append(f"{name}: {type(error).__name__}: {error}")
            logger.warning("attention: %s", refused[-1])
    return found, refused


@cache
def _fastest(shape: Shape, device: torch.device) -> str:
    """Name of the backend that is to serve such heads, measured once and told."""
    return pick(shape, device, measure.device_clock(device))


def pick(shape: Shape, device: torch.device, clock: measure.Clock) -> str:
    """Measure all that are usable, say what came out, and name the one to use."""
    num_heads, kv_heads, size, block_size, dtype, _ = shape
    found, _ = _usable(shape, device)
    kv = torch.zeros(measure.blocks_needed(block_size), 2, kv_heads, block_size, size, dtype=dtype, device=device)
    figures = measure.measure(found, (num_heads, kv_heads, size), kv, clock)
    name = measure.fastest(figures)
    logger.info("attention: %s of %s (%s)", name, ", ".join(figures), measure.told(figures))
    return name
