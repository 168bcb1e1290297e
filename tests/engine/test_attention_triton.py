"""The Triton attention backend, interpreted: against the definition, and a whole engine on top of it."""

from __future__ import annotations

import inspect
import logging
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention import choose
from engine.attention.reference import ReferenceAttention
from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.worker import Worker
from tests.engine.real import OracleDrafter, answers, load_worker, make_engine, request
from tests.engine.test_attention import BLOCK, HEADS, KV_HEADS, SIZE, build, definition

pytest.importorskip("triton")

from engine.attention.triton import TritonAttention

SHAPES: list[list[tuple[int, int, list[int] | None]]] = [
    [(5, 1, None)],
    [(9, 1, [0, 0, 1]), (0, 7, None), (30, 4, [0, 0, 2, 1, 0])],
    [(3, 1, []), (140, 1, [0, 1, 2])],  # chains only: nothing branches
    [(2, 3, [0] * 40), (17, 1, [0, 0])],  # more nodes than a word has bits
]


def attend(attention: Any, batch: ForwardBatch, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    kv = torch.randn(num_blocks, 2, KV_HEADS, BLOCK, SIZE)
    rows = len(batch.slots)
    q, new = torch.randn(rows, HEADS, SIZE), torch.randn(rows, 2, KV_HEADS, SIZE)
    attention.plan(batch)
    return attention.run(kv, q, new, SIZE**-0.5), kv


@pytest.mark.parametrize("fixed_split", [0, 128])
@pytest.mark.parametrize("shapes", SHAPES)
def test_every_batch_equals_the_definition(shapes: list[tuple[int, int, list[int] | None]], fixed_split: int) -> None:
    batch, _, num_blocks = build(shapes, np.random.default_rng(0))
    out, kv = attend(TritonAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, None, fixed_split), batch, num_blocks)
    torch.manual_seed(0)
    pool = torch.randn_like(kv)
    q, new = torch.randn(batch.num_tokens, HEADS, SIZE), torch.randn(batch.num_tokens, 2, KV_HEADS, SIZE)
    expected = definition(batch, pool, q, new)
    assert torch.equal(kv, pool)  # the rows are stored
    torch.testing.assert_close(out.view_as(expected), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fixed_split", [0, 128])
def test_a_sliding_window_is_the_reference_backends(fixed_split: int) -> None:
    batch, _, num_blocks = build([(30, 5, None), (33, 1, [0, 1, 0, 2])], np.random.default_rng(1))
    shape = (HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, 8)
    (found, _), (expected, _) = (
        attend(attention, batch, num_blocks) for attention in (TritonAttention(*shape, fixed_split), ReferenceAttention(*shape))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_padding_rows_come_back_as_zeros() -> None:
    batch, _, num_blocks = build([(9, 1, [0, 0, 1])], np.random.default_rng(2))
    for name in ("token_ids", "positions", "slots"):
        setattr(batch, name, torch.cat((getattr(batch, name), torch.zeros(3, dtype=torch.int64))))
    batch.slots[-3:] = (num_blocks - 1) * BLOCK
    out, _ = attend(TritonAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, None), batch, num_blocks)
    assert out.shape == (7, HEADS * SIZE)
    assert not out[4:].any() and out[:4].all()


def test_a_trunk_that_everybody_sees_is_a_chunk() -> None:
    """Rows 0-2 lie one below the other; 3 and 4 are children of 2."""
    batch, _, _ = build([(6, 1, [0, 1, 2, 2])], np.random.default_rng(3))
    attention = TritonAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, None, 128)
    attention.plan(batch)
    plan = attention._plan
    assert plan is not None and plan.ancestors is not None and plan.paths is not None
    assert plan.roots.tolist() == [3]
    assert plan.ancestors[3:, 0].tolist() == [0b01, 0b10]
    assert plan.paths[3:].tolist() == [[0], [1]]


def choice(name: str, device: str = "cpu", size: int = SIZE) -> str:
    return choose.make_attention(name, torch.device(device), HEADS, KV_HEADS, size, BLOCK, torch.float32, None).name


def test_a_cpu_is_served_by_the_reference_unless_triton_is_asked_for() -> None:
    assert choice("auto") == "reference" and choice("reference") == "reference"
    assert choice("triton") == "triton"


def test_a_gpu_is_served_by_triton_where_it_can_be(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert choice("auto", "cuda") == "triton" and choice("reference", "cuda") == "reference"
    with caplog.at_level(logging.WARNING):
        assert choice("auto", "cuda", size=512) == "reference"
    assert "heads of 512" in caplog.text
    with pytest.raises(ValueError, match=r"^attention_backend: .*heads of 512"):
        choice("triton", "cuda", size=512)
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert choice("auto", "cuda") == "reference"
    assert "triton is not installed" in caplog.text
    with pytest.raises(ValueError, match=r"^attention_backend: triton is not installed"):
        choice("triton", "cuda")


@pytest.fixture(scope="module")
def worker(tiny_llama_dir: Path) -> Worker:
    return load_worker(tiny_llama_dir, block_size=4, max_num_batched_tokens=32)


@pytest.mark.parametrize("fixed_split", [0, 128])
def test_a_whole_engine_runs_on_it(worker: Worker, fixed_split: int) -> None:
    """Prompt chunks beside trees, accepted paths packed in the cache: the answers of the reference backend, undrafted."""
    reference, shape = worker.runner.attention, worker.model_config
    requests = [
        request("greedy", [5, 6, 7, 5, 6], max_tokens=6, temperature=0.0),
        request("sampled", list(range(3, 45)), max_tokens=5, temperature=0.9, seed=7),
    ]
    plain = answers(make_engine(worker), requests)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    worker.runner.attention = TritonAttention(*heads, 4, torch.float32, shape.sliding_window, fixed_split)
    try:
        known = {key: answer.tokens for key, answer in plain.items()}
        drafted = answers(make_engine(worker, [OracleDrafter(shape.vocab_size, known)], budget=7), requests)
    finally:
        worker.runner.attention = reference
    assert {key: answer.tokens for key, answer in drafted.items()} == known
    assert sum(answer.usage.accepted_tokens for answer in drafted.values() if answer.usage) > 2


def test_the_flag_reaches_the_engine(tiny_llama_dir: Path, worker: Worker) -> None:
    assert worker.runner.backend == "reference"
    assert load_worker(tiny_llama_dir, attention_backend="triton").info.backend == "triton"


def test_with_fixed_splits_a_draft_changes_no_bit_in_bfloat16(tiny_llama_dir: Path) -> None:
    """Logprobs and all, branched trees included, with and without company. The matrix products are the CPU's."""
    worker = load_worker(tiny_llama_dir, "bfloat16", block_size=4, cpu_kernels="torch")
    shape = worker.model_config
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    worker.runner.attention = TritonAttention(*heads, 4, torch.bfloat16, shape.sliding_window, 128)
    requests = [
        request("greedy", [5, 6, 7, 5, 6], max_tokens=4, temperature=0.0, logprobs=3),
        request("sampled", list(range(3, 45)), max_tokens=4, temperature=0.9, seed=7, logprobs=3),
    ]
    plain = {key: answer for one in requests for key, answer in answers(make_engine(worker), [one]).items()}
    known = {key: answer.tokens for key, answer in plain.items()}
    drafted = answers(make_engine(worker, [OracleDrafter(shape.vocab_size, known)], budget=6), requests)
    assert {key: answer.tokens for key, answer in drafted.items()} == known
    assert all(drafted[key].logprobs == plain[key].logprobs for key in plain)


def compiled_for(kernel: Any, args: tuple, options: dict) -> tuple:
    """What a launch is compiled for; see Triton's own specialization."""
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names}).arguments
    key: list[object] = [kernel.fn.__name__, options.get("num_warps"), options.get("num_stages")]
    for parameter in kernel.params:
        value = bound[parameter.name]
        if isinstance(value, torch.Tensor):
            key.append((value.dtype, parameter.do_not_specialize_on_alignment or value.data_ptr() % 16 == 0))
        elif parameter.is_constexpr:
            key.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            key.append((value == 1, value % 16 == 0))
    return tuple(key)


@pytest.mark.parametrize(("fixed_split", "window"), [(0, None), (0, 8), (128, None)])
def test_after_the_warm_up_no_batch_compiles_anything(
    fixed_split: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    compiled: set[tuple] = set()
    # Nothing is run: what would be compiled is all that is asked. A GPU of so many programs splits contexts, too.
    monkeypatch.setattr("engine.attention.triton.interpreted", nullcontext)
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *args, **options: compiled.add(compiled_for(kernel, args, options)))
    monkeypatch.setattr("kernels.tree_attention._processors", lambda device: 132)
    attention = TritonAttention(HEADS, KV_HEADS, SIZE, BLOCK, torch.float32, window, fixed_split)
    attention.warm_up(torch.zeros(9, 2, KV_HEADS, BLOCK, SIZE))
    known = set(compiled)
    assert len(known) == (3 if fixed_split else 2 + 4 * len({key[1:3] for key in known if key[0] == "_attend"}))
    more: list[list[tuple[int, int, list[int] | None]]] = [
        [(5, 40, None)],
        [(900, 1, [0, 0])],
        [(900, 1, None)] * 3,
        [(7, 300, None)],
    ]
    for shapes in [*SHAPES, *more]:
        batch, _, num_blocks = build(shapes, np.random.default_rng(0))
        qkv = torch.zeros(len(batch.slots), HEADS + 2 * KV_HEADS, SIZE)
        attention.plan(batch)
        new = qkv[:, HEADS:].view(-1, 2, KV_HEADS, SIZE)
        attention.run(torch.zeros(num_blocks, 2, KV_HEADS, BLOCK, SIZE), qkv[:, :HEADS], new, 0.3)
    assert compiled == known


def test_moves_of_every_size_are_made_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(2, 3, KV_HEADS, BLOCK, SIZE, torch.float32, torch.device("cpu"))
    cache.kv.normal_()
    before, sizes = cache.kv.clone(), []
    move = cache.move
    monkeypatch.setattr(cache, "move", lambda source, target: (sizes.append(len(source)), move(source, target)))
    cache.warm_up(300)
    assert sizes == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512] and torch.equal(cache.kv, before)


@pytest.mark.gpu
def test_a_gpu_compiles_nothing_while_it_serves(smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = load_worker(smollm2_dir, "bfloat16", max_model_len=2048)
    plain = [request(str(n), list(range(3, 3 + n)), max_tokens=20, temperature=0.8, seed=n, top_p=0.9) for n in (5, 70, 900)]
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", lambda *args: pytest.fail("compiled while serving"))
    known = {key: answer.tokens for key, answer in answers(make_engine(worker), plain).items()}
    answers(make_engine(worker, [OracleDrafter(worker.info.vocab_size, known)], budget=8), plain)


WITHOUT = """
import sys
sys.modules["triton"] = None  # as where it is not installed
from tests.engine.real import answers, load_worker, make_engine, request
from pathlib import Path
engine = make_engine(load_worker(Path(sys.argv[1])), ["ngram"])
print(answers(engine, [request("a", [5, 6, 7, 5, 6], max_tokens=4, temperature=0.0)]))
"""


def test_an_engine_runs_where_triton_is_missing(tiny_llama_dir: Path) -> None:
    command = [sys.executable, "-c", WITHOUT, str(tiny_llama_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
