"""The process behind `outrider serve --check`: `python -m engine.check_cli`. It prints the plan, or why there is none."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import msgspec

from engine.config import EngineConfig
from engine.process import cannot_start, set_threads

if TYPE_CHECKING:
    from engine.dry_run import DryRun
    from engine.models.config import ModelConfig
    from engine.models.sharding import Sharding


class CheckConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line writes to the standard input of this process, as MessagePack."""

    engine: EngineConfig
    device_memory: int | None = None  # bytes of each GPU, or of the machine; None: of those that are here
    engines: int = 1


def report(found: DryRun) -> list[str]:
    """Lines for the person who asked."""
    model, memory, ranks = found.model, found.memory, len(found.shards)
    head = (
        f"model    {model.architecture}, {model.num_layers} layers of {model.hidden_size:,}, {_shape(model)}, heads of "
        f"{model.head_dim}, vocabulary {model.vocab_size:,}, {str(found.dtype).removeprefix('torch.')}"
    )
    if model.quantization is not None:
        head += f", {model.quantization.label}"
    lines = [head]
    if ranks > 1:
        lines.append(f"ranks    {'; '.join(_ranks(found.shards))}")
    lines.append(f"drafts   {', '.join(found.drafters)}; verifier {found.verifier}")
    kind = "each GPU, one for each rank" if found.device.type == "cuda" and ranks > 1 else "the GPU"
    own = f"the machine, which {found.sharers} ranks share; each of them has" if found.sharers > 1 else "the machine"
    lines.append(f"memory {_gib(found.total_bytes)} of {kind if found.device.type == 'cuda' else own}")
    parts = found.parts | {"left alone": found.left_bytes}
    lines += [f"       {_gib(size)}  {name}" for name, size in parts.items()]
    if found.records:
        lines.append(
            "         recorded steps take some of the KV cache's part: how much is measured at start (--enforce-eager: none)"
        )
    tokens = found.parts["KV cache"] // found.token_bytes
    own_limit = (
        "" if memory.max_model_len == model.max_position_embeddings else f" of the model's {model.max_position_embeddings:,}"
    )
    lines.append(
        f"context  {memory.max_model_len:,} tokens{own_limit}; the cache holds {tokens:,} of {found.token_bytes:,} bytes: "
        f"{tokens / memory.max_model_len:.1f} sequences of full length"
    )
    return lines


def _shape(part: ModelConfig) -> str:
    return f"{part.num_heads} heads, {part.num_kv_heads} KV heads, inner size {part.intermediate_size:,}"


def _ranks(shards: list[Sharding]) -> list[str]:
    """Ranks of equal parts counted together."""
    kinds: dict[str, int] = {}
    for shard in shards:
        kind = f"{_shape(shard.config)}, vocabulary {shard.vocab[1] - shard.vocab[0]:,}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return [f"{count} with {kind}" for kind, count in kinds.items()]


def _gib(size: int) -> str:
    return f"{size / 2**30:10.2f} GiB"


def main() -> int:
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=CheckConfig)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    set_threads(1)
    try:
        from engine.dry_run import dry_run  # imports torch: after set_threads

        lines = report(dry_run(config.engine, config.device_memory, config.engines))
    except Exception as error:
        fatal = cannot_start(error)
        sys.stderr.write(f"outrider: error: {fatal.message}\n")
        return fatal.exit_code
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
