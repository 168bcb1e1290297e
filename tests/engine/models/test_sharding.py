"""A model in parts: which rank holds what, that the parts make the whole, and that together they compute what it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.factory import load_model
from engine.models.loader import iter_weights, load_config
from engine.models.shapes import expected_shapes
from engine.models.sharding import Sharding, check_split, vocab_parts
from engine.parallel import Group
from tests.engine.models import tiny
from tests.engine.models.dense import Context, Rows, step

CPU = torch.device("cpu")
PROMPT = [5, 11, 80, 3, 33, 95, 0, 40, 41]


class Threads(Group):
    """Ranks as threads of one process: what they say to each other is left on a table."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: dict[int, Any]) -> None:
        super().__init__(rank, size)
        self._barrier, self._table = barrier, table

    def _all(self, mine: Tensor) -> list[Tensor]:
        self._table[self.rank] = mine
        self._barrier.wait(20)
        found = [self._table[rank] for rank in range(self.size)]
        self._barrier.wait(20)
        return found

    def reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(0)

    def gather(self, x: Tensor, widths: list[int]) -> Tensor:
        assert x.shape[1] == widths[self.rank]
        parts = self._all(x)
        return torch.cat(parts, 1) if self.rank == 0 else x


def on_ranks(size: int, run: Callable[[Group], Any]) -> list[Any]:
    barrier, table = threading.Barrier(size), {}
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: run(Threads(rank, size, barrier, table)), range(size)))


def shape(**changes: Any) -> ModelConfig:
    config = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **tiny.SHAPE})
    return msgspec.structs.replace(config, **changes)


VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "halves": ("Llama", {}, 2),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}, 2),
    "tied": ("Llama", {"tie_word_embeddings": True}, 2),
    "fewer key-value heads than ranks": ("Llama", {}, 4),
    "one key-value head": ("Llama", {"num_key_value_heads": 1}, 4),
    "unequal parts, as SmolLM2's": (
        "Llama",
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 97, "intermediate_size": 160},
        2,
    ),
    "window": ("Mistral", {"sliding_window": 7}, 2),
    "biases of queries, keys and values": ("Qwen2", {}, 2),
    "norms of queries and keys": ("Qwen3", {}, 2),
}


@pytest.fixture(params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, Any]:
    family, changes, size = VARIANTS[request.param]
    made = tiny.model(tiny.config(family, **changes))
    return tiny.save(made, tmp_path / "model"), size, made


def logits(path: Path, group: Group | None = None) -> Tensor:
    """Of a prompt in two chunks, and of a small tree behind it."""
    config = load_config(str(path))
    made = load_model(EngineConfig(model=str(path)), config, torch.float32, CPU, group or Group())
    assert isinstance(made, Decoder)
    context, out = Context(), []
    for rows in (Rows.chain(PROMPT[:6]), Rows.chain(PROMPT[6:]), Rows.tree([7, 8, 9, 10], [-1, 0, 0, 1])):
        hidden, _ = step(made, [context], [rows], window=config.sliding_window)
        out.append(made.logits(hidden).clone())
    return torch.cat(out)


def test_the_parts_compute_what_the_whole_does(saved: tuple[Path, int, Any]) -> None:
    path, size, _ = saved
    whole = logits(path)
    found = on_ranks(size, lambda group: logits(path, group))
    assert torch.allclose(found[0], whole, rtol=0, atol=2e-5 * float(whole.abs().max()))
    assert [part.shape[1] for part in found[1:]] == vocab_parts(load_config(str(path)), size)[1:]


def test_the_parts_make_the_whole(saved: tuple[Path, int, Any]) -> None:
    """Every number lies on a rank; those that lie on several are replicated key-value heads, norms, and biases counted once."""
    path, size, made = saved
    config, wanted = load_config(str(path)), made.state_dict()
    parts = [Sharding.of(config, rank, size) for rank in range(size)]
    for part in parts:
        read = dict(iter_weights(str(path), config, part=part))
        assert read.keys() == expected_shapes(config).keys()
        for name, tensor in read.items():
            index = part.index(name)
            own = wanted[name] if index is None else wanted[name][index]
            once = part.rank > 0 and name.endswith(("o_proj.bias", "down_proj.bias"))
            assert torch.equal(tensor, torch.zeros_like(own) if once else own), name
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    for name, tensor in wanted.items():
        if name not in expected_shapes(config) or parts[0].index(name) is None:
            continue
        covered = torch.zeros_like(tensor, dtype=torch.bool)
        for part in parts:
            index = part.index(name)
            assert index is not None
            covered[index] = True
        assert covered.all(), name


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf_files_are_cut_once_they_are_dequantized(kind: str, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", intermediate_size=128))
    path = tiny.write_gguf(made, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    config = load_config(str(path))
    whole = dict(iter_weights(str(path), config, torch.float32))
    for rank in range(2):
        part = Sharding.of(config, rank, 2)
        for name, tensor in iter_weights(str(path), config, torch.float32, part):
            index = part.index(name)
            assert torch.equal(tensor, whole[name] if index is None else whole[name][index]), name


def test_bfloat16_ties_across_ranks_are_settled(tmp_path: Path) -> None:
    """The best tokens of a bf16 product coincide now and then; on ranks, too, what decides is computed in float32."""
    made = tiny.model(tiny.config("Llama", tie_word_embeddings=True)).to(torch.bfloat16)
    path = tiny.save(made, tmp_path / "model")
    config = load_config(str(path))
    hidden = torch.randn(24, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def best(group: Group) -> Tensor:
        model = load_model(EngineConfig(model=str(path), cpu_kernels="torch"), config, torch.bfloat16, CPU, group)
        assert isinstance(model, Decoder)
        return model.head(hidden).argmax(-1)

    exact = hidden.float() @ made.state_dict()["model.embed_tokens.weight"].float().T
    assert torch.equal(on_ranks(2, best)[0], exact.argmax(-1))


def test_uneven_heads() -> None:
    smollm2 = shape(num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, vocab_size=49152)
    parts = [Sharding.of(smollm2, rank, 2).config for rank in range(2)]
    assert [(part.num_heads, part.num_kv_heads, part.intermediate_size) for part in parts] == [(6, 2, 768), (3, 1, 768)]
    assert all(part.vocab_size == 49152 and part.hidden_size == 576 for part in parts)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "wrong"),
    [(32, 8, 8, False), (32, 8, 16, False), (64, 8, 64, False), (32, 8, 12, True), (32, 8, 24, True), (9, 3, 4, True)],
)
def test_what_cannot_be_split_is_refused(heads: int, kv_heads: int, size: int, wrong: bool) -> None:
    config = shape(num_heads=heads, num_kv_heads=kv_heads)
    if not wrong:
        check_split(config, size)
        return
    with pytest.raises(ValueError, match=f"tensor_parallel_size: {size} ranks cannot share {heads} attention heads"):
        check_split(config, size)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"load_format": "transformers"}, "load_format is transformers"), ({"cpu_kernels": "native"}, "cpu_kernels native")],
)
def test_what_runs_no_parts_is_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tiny.save(tiny.model(tiny.config("Llama")), tmp_path / "model")
    with pytest.raises(ValueError, match=f"tensor_parallel_size: .*{words}"):
        load_model(EngineConfig(model=str(path), **options), load_config(str(path)), torch.bfloat16, CPU, Group(0, 2))
