"""A row's hidden state is bit for bit the same alone, in a chunk and in a batch: bfloat16 and float32, one thread or two.

That is what makes speculation invisible in the default dtype too, not only where rounding is too fine to matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.models.batch import ForwardBatch
from engine.plan import Row
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.worker import Worker
from tests.engine.real import load_worker, request

CPU = torch.device("cpu")
TOKENS = [1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198, 198, 1604, 3044, 24, 81, 28, 278] * 9


@pytest.fixture(scope="module", params=["bfloat16", "bfloat16 on torch", "float32"])
def worker(request: pytest.FixtureRequest, smollm2_dir: Path) -> Worker:
    dtype, _, kernels = request.param.partition(" on ")
    return load_worker(smollm2_dir, dtype, cpu_kernels=kernels or "auto")


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def sequence(number: int, tokens: list[int], blocks: int = 16) -> Sequence:
    seq = Sequence(number, request(str(number), tokens, max_tokens=4))
    seq.block_ids = list(range(number * blocks, number * blocks + blocks))
    return seq


@torch.inference_mode()
def hidden(worker: Worker, parts: list[tuple[Sequence, int, int]], forest: DraftForest | None = None) -> torch.Tensor:
    """Feed rows [computed, computed + new) of each sequence, and the forest below the first one if there is one."""
    rows = [Row(seq.seq_id, computed, new, 0, [], False) for seq, computed, new in parts]
    trees = [-1] * len(parts)
    if forest is not None:
        trees[0] = 0
    batch = ForwardBatch.build([seq for seq, _, _ in parts], rows, forest or DraftForest.roots([]), trees, 16, CPU)
    return worker.runner.forward(batch)[0].clone()


@pytest.fixture(scope="module")
def expected(worker: Worker) -> torch.Tensor:
    """The last 40 rows, one at a time, computed by one thread."""
    seq = sequence(0, TOKENS)
    hidden(worker, [(seq, 0, 140)])
    return torch.cat([hidden(worker, [(seq, 140 + i, 1)]) for i in range(40)])


@pytest.mark.parametrize("size", [2, 3, 5, 11, 40])
def test_in_a_chunk(size: int, worker: Worker, expected: torch.Tensor) -> None:
    seq = sequence(0, TOKENS)
    for first in range(0, 40 - size + 1, size):
        assert torch.equal(hidden(worker, [(seq, 140 + first, size)]), expected[first : first + size])


@pytest.mark.parametrize("size", [33, 64, 97, 180])
def test_whatever_chunks_the_prompt_came_in(size: int, worker: Worker, expected: torch.Tensor) -> None:
    """Other chunks, other query blocks and another order of work: the same keys and values, the same rows."""
    seq = sequence(1, TOKENS)
    found = torch.cat([hidden(worker, [(seq, first, min(size, 180 - first))]) for first in range(0, 180, size)])
    assert torch.equal(found[140:], expected)


def test_in_a_batch(worker: Worker, expected: torch.Tensor) -> None:
    seqs = [sequence(i, TOKENS[i:]) for i in range(1, 12)]
    own = sequence(0, TOKENS)
    for i, seq in enumerate(seqs):
        hidden(worker, [(seq, 0, 10 * i + 5)])
    for first, size in ((0, 1), (1, 1), (2, 3), (5, 35)):
        parts = [(own, 140 + first, size), *((seq, 10 * i + 5, 1 + i % 4) for i, seq in enumerate(seqs))]
        assert torch.equal(hidden(worker, parts)[:size], expected[first : first + size])
        parts = [*parts[1:], parts[0]]
        assert torch.equal(hidden(worker, parts)[-size:], expected[first : first + size])


def test_in_a_tree(worker: Worker, expected: torch.Tensor) -> None:
    """The true path in a branched tree, wrong siblings before it: its rows are those of plain decoding."""
    own = sequence(0, TOKENS[:141])
    forest = DraftForest.from_parents([([TOKENS[140], 7, TOKENS[141], 9, TOKENS[142], 11, TOKENS[143]], [-1, 0, 0, 1, 2, 2, 4])])
    found = hidden(worker, [(own, 140, 1)], forest)
    assert torch.equal(found[0], expected[0])
    if worker.info.backend == "native":
        assert torch.equal(found[[2, 4, 6]], expected[1:4])
        return
    # On torch, keys are summed in node order, and in path order in plain decoding.
    torch.testing.assert_close(found[[2, 4, 6]].float(), expected[1:4].float(), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("context", [310, pytest.param(1005, marks=pytest.mark.long)])
def test_in_long_contexts(context: int, worker: Worker) -> None:
    """Where sums over keys are taken in blocks."""
    tokens = TOKENS * 6
    own, other, third = (sequence(i, tokens, blocks=70) for i in range(3))
    hidden(worker, [(own, 0, context)])
    one_by_one = torch.cat([hidden(worker, [(own, context + i, 1)]) for i in range(30)])
    assert torch.equal(hidden(worker, [(own, context, 30)]), one_by_one)
    in_chunks = [hidden(worker, [(other, first, min(300, context + 30 - first))]) for first in range(0, context + 30, 300)]
    assert torch.equal(torch.cat(in_chunks)[context:], one_by_one)
    hidden(worker, [(third, 0, 1030)])
    batched = hidden(worker, [(own, context, 2), (third, 1030, 3), (other, 200, 1)])
    assert torch.equal(batched[:2], one_by_one[:2])
