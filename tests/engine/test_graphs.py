"""Recorded steps, on a CPU: a recorder that "replays" by running the step again on the memory that it was recorded with.

The kernels' twins stand in for Triton's, which takes too long interpreted; one engine runs on the interpreter all the same.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.local import LocalExecutor
from engine.graphs import CudaRecorder, Graphs, make_buckets, make_graphs, why_not
from engine.memory import GPUMemory
from engine.models.batch import ForwardBatch, padded_rows
from engine.models.decoder import Decoder
from engine.models.runner import Bucket
from engine.plan import Row
from engine.protocols import Signals
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.worker import Worker
from engine.workspace import graph_bytes, record_graphs
from kernels import reference
from tests.engine.real import GarbageDrafter, OracleDrafter, answers, load_worker, make_engine, request

pytest.importorskip("triton")

from engine.attention.triton import TritonAttention

BLOCK, BUDGET = 4, 7
HOW = ("max_rows", "max_keys", "splits", "fixed_split", "paths", "told")


class Again:
    """Runs a step again where a GPU would replay it. `log` has the steps run since they were recorded."""

    def __init__(self) -> None:
        self.recorded, self.replayed, self.over = 0, 0, False

    def record(self, step: Callable[[], None]) -> Callable[[], object]:
        assert not self.over, "recorded while it serves"
        self.recorded += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


@pytest.fixture(scope="module")
def worker(tiny_llama_dir: Path) -> Worker:
    """Its attention is Triton's: its tables can be recorded."""
    return load_worker(
        tiny_llama_dir,
        attention_backend="triton",
        block_size=BLOCK,
        max_num_batched_tokens=48,
        max_num_seqs=6,
        cpu_kernels="torch",
    )


@pytest.fixture(autouse=True)
def as_in_a_step() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' twins, which take what they are told and no hints."""

    def attention(*args: Any, **how: Any) -> torch.Tensor:
        return reference.tree_attention(*args, **{name: value for name, value in how.items() if name not in HOW})

    for module in ("engine.attention.triton", "engine.attention.recorded"):
        monkeypatch.setattr(f"{module}.tree_attention", attention)
        monkeypatch.setattr(f"{module}.write_kv", reference.write_kv)


def settings_of(worker: Worker, **changes: Any) -> EngineConfig:
    return msgspec.structs.replace(worker.config, **{"drafters": ["ngram"], "policy": "fixed", "budget": BUDGET} | changes)


def made(worker: Worker, recorder: Again, layers: tuple[int, ...] = (), **changes: Any) -> Graphs:
    found = make_graphs(settings_of(worker, **changes), worker.model_config, worker.runner, layers, recorder)
    assert found is not None
    found.record()
    recorder.over = True
    return found


@pytest.fixture
def recorder() -> Again:
    return Again()


@pytest.fixture
def graphs(worker: Worker, recorder: Again, twins: None) -> Iterator[Graphs]:
    worker.runner.graphs = graphs = made(worker, recorder, (0,))
    yield graphs
    worker.runner.graphs = None


def batch_of(
    worker: Worker, shapes: list[tuple[int, int, list[int] | None]], seed: int = 0
) -> tuple[ForwardBatch, list[Sequence]]:
    """Sequences of (context, uncomputed tokens, parents of the draft nodes, or None for a chunk that is not judged)."""
    rng = np.random.default_rng(seed)
    blocks = rng.permutation(worker.kv.num_blocks).tolist()
    seqs, rows, trees, forest = [], [], [], []
    for i, (context, new, tree) in enumerate(shapes):
        prompt = rng.integers(3, worker.info.vocab_size, context + new + (tree is None)).tolist()
        seq = Sequence(i, Request(request_id=str(i), prompt_ids=prompt, params=SamplingParams(max_tokens=9)))
        seq.block_ids = [blocks.pop() for _ in range(-(-(context + new + len(tree or [])) // BLOCK))]
        seqs.append(seq)
        rows.append(Row(i, context, new, len(tree or []), [], False))
        trees.append(-1 if tree is None else len(forest))
        if tree is not None:
            forest.append(([prompt[-1], *rng.integers(3, worker.info.vocab_size, len(tree)).tolist()], [-1, *tree]))
    device, scratch = worker.device, worker.runner.scratch_slot
    return ForwardBatch.build(seqs, rows, DraftForest.from_parents(forest), trees, BLOCK, device, scratch), seqs


FITTING: list[list[tuple[int, int, list[int] | None]]] = [
    [(0, 1, [])],
    [(17, 1, [0, 0, 1, 1, 3, 0, 2])],
    [(5, 3, [0, 0]), (40, 1, [0, 1, 2, 3]), (8, 1, []), (3, 6, None)],
    [(i, 1, [0] * 6) for i in range(6)],
]


# ---- buckets


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 3000), st.integers(0, 70), st.data())
def test_every_step_of_small_trees_has_a_bucket(most_sequences: int, most_tokens: int, nodes: int, data: st.DataObject) -> None:
    buckets = make_buckets(most_sequences, most_tokens, nodes)
    tiers = sorted({bucket.tokens for bucket in buckets})
    sequences = data.draw(st.integers(1, min(most_sequences, most_tokens, tiers[-1])))
    tokens = data.draw(st.integers(sequences, min(sequences * (1 + nodes), most_tokens, tiers[-1])))
    size = min(bucket.sequences for bucket in buckets if bucket.sequences >= sequences)
    tier = min(bucket.tokens for bucket in buckets if bucket.tokens >= tokens)
    found = [bucket for bucket in buckets if (bucket.sequences, bucket.tokens) == (size, tier)]
    assert len(found) == 1 and found[0].least <= sequences
    assert tier <= max(tokens + 7, 1.25 * tokens)
    assert tiers[-1] <= 512 and buckets[0].tokens == tiers[-1]


def test_how_many_buckets_there_are() -> None:
    assert len(make_buckets(64, 512, 32)) < 80
    assert [(b.sequences, b.tokens) for b in make_buckets(1, 512, 0)] == [(1, 1)]
    assert {(b.sequences, b.tokens) for b in make_buckets(6, 8, 0)} == {(1, 1), (4, 2), (4, 4), (6, 8)}


# ---- a recorded step is the plain one


@pytest.mark.parametrize("shapes", FITTING)
def test_it_gives_the_bits_of_the_plain_step_and_writes_its_rows_and_the_scratch_slot(
    worker: Worker, graphs: Graphs, recorder: Again, shapes: list[tuple[int, int, list[int] | None]]
) -> None:
    batch, _ = batch_of(worker, shapes)
    kv = worker.kv.kv
    torch.manual_seed(0)
    before = kv.normal_().clone()
    worker.runner.graphs = None
    plain, plain_layers = worker.runner.forward(batch, (0,))
    written = kv.clone()
    kv.copy_(before)
    worker.runner.graphs = graphs
    found, layers = worker.runner.forward(batch, (0,))
    assert recorder.replayed == 1
    n, slots = batch.num_tokens, batch.slots[: batch.num_tokens]
    assert torch.equal(found[:n], plain[:n]) and torch.equal(layers[0][:n], plain_layers[0][:n])
    assert torch.equal(worker.runner.node_logits(found, batch), worker.runner.node_logits(plain, batch))
    by_slot = [cache.transpose(2, 4).flatten(1, 2) for cache in (before, written, kv)]  # one row per slot
    untouched = torch.ones(by_slot[0].shape[1], dtype=torch.bool)
    untouched[slots] = False
    assert not torch.equal(by_slot[2][:, slots], by_slot[0][:, slots])
    assert torch.equal(by_slot[2][:, slots], by_slot[1][:, slots])
    untouched[worker.kv.scratch_slot] = False
    assert torch.equal(by_slot[2][:, untouched], by_slot[0][:, untouched])


def test_one_batch_leaves_nothing_behind_for_the_next(worker: Worker, graphs: Graphs) -> None:
    """A large one before a small one in the same bucket, and the same small one alone."""
    small, _ = batch_of(worker, [(9, 1, [0]), (2, 1, [])], seed=1)
    large, _ = batch_of(worker, [(50, 1, []), (60, 1, []), (33, 1, [0])], seed=2)
    assert graphs.bucket_for(small) == graphs.bucket_for(large)
    worker.kv.kv.normal_()
    alone = graphs.forward(small)
    assert alone is not None
    first = alone[0][:3].clone()
    assert graphs.forward(large) is not None
    again = graphs.forward(small)
    assert again is not None and torch.equal(again[0][:3], first)


def test_hidden_states_that_are_kept_are_not_overwritten(worker: Worker, graphs: Graphs) -> None:
    one, _ = batch_of(worker, FITTING[1], seed=3)
    other, _ = batch_of(worker, FITTING[1], seed=4)
    _, layers = worker.runner.forward(one, (0,))
    kept = layers[0].clone()
    worker.runner.forward(other, (0,))
    assert torch.equal(layers[0], kept)


def test_a_fused_model_stores_where_the_recorded_step_says(tiny_llama_dir: Path, recorder: Again, twins: None) -> None:
    """On a GPU keys and values are stored by the kernel that rotates them (engine/models/fused.py), not by the attention."""
    worker = load_worker(tiny_llama_dir, attention_backend="triton", block_size=BLOCK, max_num_seqs=6, cpu_kernels="torch")
    assert isinstance(worker.runner.model, Decoder)
    worker.runner.model.fuse()
    batch, _ = batch_of(worker, FITTING[2])
    plain, _ = worker.runner.forward(batch)
    expected = worker.kv.kv.clone()
    worker.kv.kv.zero_()
    worker.runner.graphs = graphs = make_graphs(settings_of(worker), worker.model_config, worker.runner, (), recorder)
    assert graphs is not None
    graphs.record(bucket for bucket in graphs.buckets if (bucket.sequences, bucket.tokens) == (4, 24))
    found, _ = worker.runner.forward(batch)
    n = batch.num_tokens
    assert recorder.replayed == 1 and torch.equal(found[:n], plain[:n])
    assert torch.equal(worker.kv.kv[:, :-1], expected[:, :-1]) and expected[:, :-1].any()


REQUESTS = [
    request("greedy", [5, 6, 7, 5, 6], max_tokens=12, temperature=0.0),
    request("sampled", list(range(3, 45)), max_tokens=12, temperature=0.9, seed=7),
    request("many", [9, 8, 9], max_tokens=8, temperature=1.1, seed=3, n=3),
]


def test_a_whole_engine_gives_the_same_answers(worker: Worker, graphs: Graphs, recorder: Again) -> None:
    """Greedy and sampled, chains and trees, prompts in chunks beside them, preemptions."""
    worker.runner.graphs = None
    plain = answers(make_engine(worker), REQUESTS)
    worker.runner.graphs = graphs
    known = {key: answer.tokens for key, answer in plain.items()}
    for drafters in ([], [GarbageDrafter(worker.info.vocab_size)], [OracleDrafter(worker.info.vocab_size, known)], ["ngram"]):
        before = recorder.replayed
        found = answers(make_engine(worker, drafters, budget=BUDGET, num_blocks=40), REQUESTS)
        assert {key: answer.tokens for key, answer in found.items()} == known
        assert recorder.replayed >= before + 2


def test_a_step_that_is_fed_again_without_its_drafts_is_recorded_too(
    worker: Worker, graphs: Graphs, recorder: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft makes NaN: the hidden states that the second run overwrites are nobody's any more."""
    one = request("one", [5, 6, 7, 5, 6], max_tokens=6, temperature=0.0, ignore_eos=True)
    known = {("one", 0): answers(make_engine(worker), [one])["one", 0].tokens}
    bad = next(token for token in range(10, 90) if token not in known["one", 0])
    model = worker.runner.model
    assert isinstance(model, Decoder) and isinstance(model.embedding, torch.Tensor)
    embedding = model.embedding.clone()
    embedding[bad] = torch.nan
    monkeypatch.setattr(model, "embedding", embedding)

    class Bad(OracleDrafter):
        def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
            (seq,), (budget,) = seqs, budgets
            chain = [*self.known["one", 0][seq.num_output :][: budget - 1], bad]
            return DraftForest.from_chains([seq.tokens[-1]], [chain], ["oracle"])

    before = recorder.replayed
    engine = make_engine(worker, [Bad(worker.info.vocab_size, known)], budget=3)
    assert answers(engine, [one])["one", 0].tokens == known["one", 0]
    assert engine.stats().drafter_fallbacks == {"not_finite": 1}
    assert recorder.replayed == before + 1 + 6
    assert worker.kv.kv.isfinite().all()


@pytest.mark.parametrize(
    ("window", "fixed_split", "processors", "in_use"),
    [(None, 0, 1, {1}), (None, 0, 6, {1, 3}), (9, 0, 6, {1}), (None, 128, 1, {1, 2, 3})],
)
def test_the_kernels_read_the_same_tables(
    worker: Worker, window: int | None, fixed_split: int, processors: int, in_use: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the interpreter: contexts in as many parts as the device is told of, beside parts, sequences and rows of nobody."""
    monkeypatch.setattr("kernels.tree_attention._processors", lambda device: processors)
    monkeypatch.setattr("kernels.tree_attention.PART_KEYS", 128)
    heads, scale = (6, 2, 8), 8**-0.5
    attention = TritonAttention(*heads, BLOCK, torch.float32, window, fixed_split)
    bucket, device = Bucket(3, 12, 8, 2), torch.device("cpu")
    index = torch.zeros(2, bucket.tokens, dtype=torch.int64)
    tables = attention.room(Bucket(4, 16, 8), 600, device).tables(bucket, *index)
    parts = set()
    for shapes in ([(140, 1, [0, 0, 1, 1]), (3, 4, [])], [(5, 1, []), (9, 1, [0])], [(380, 1, [0, 1, 1])]):
        batch, _ = batch_of(worker, shapes)  # type: ignore[arg-type]
        n = batch.num_tokens
        assert tables.fits(batch)
        torch.manual_seed(0)
        kv = torch.randn(worker.kv.num_blocks + 1, 2, 2, BLOCK, 8)
        q, new = torch.randn(bucket.tokens, 6, 8), torch.randn(bucket.tokens, 2, 2, 8)
        expected_kv = kv.clone()
        attention.plan(batch)
        rows = len(batch.slots)
        expected = attention.run(expected_kv, q[:rows], new[:rows], scale)
        index[0], index[1] = worker.kv.scratch_slot, 0
        index[:, :n] = torch.stack((batch.slots, batch.positions))[:, :n]
        tables.write(batch)
        found = tables.run(kv, q, new, scale)
        torch.testing.assert_close(found[:n], expected[:n], rtol=1e-5, atol=1e-5)
        assert not found[n:].any() and torch.equal(kv[:-1], expected_kv[:-1])
        if fixed_split:
            assert torch.equal(found[:n], expected[:n])
        parts.add(int(tables._told[1]))
    assert parts == in_use


# ---- what fits none takes the plain way


@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 20, None)],  # a prompt chunk
        [(4, 12, [0, 0])],  # a chunk that ends in a tree
        [(i, 1, []) for i in range(7)],
        [(i, 1, [0] * 7) for i in range(7)],
    ],
)
def test_what_fits_no_bucket_takes_the_plain_way(
    worker: Worker, graphs: Graphs, recorder: Again, shapes: list[tuple[int, int, list[int] | None]]
) -> None:
    batch, _ = batch_of(worker, shapes)
    assert graphs.bucket_for(batch) is None
    hidden, _ = worker.runner.forward(batch)
    assert len(hidden) == padded_rows(batch.num_tokens) and recorder.replayed == 0


def test_padding_overwrites_nobody_who_works_in_the_scratch_block(worker: Worker, graphs: Graphs, recorder: Again) -> None:
    batch, _ = batch_of(worker, [(0, 1, [0, 1])])
    assert graphs.bucket_for(batch) is not None
    batch.index[2, :3] = worker.kv.scratch_slot + np.arange(3)
    assert graphs.bucket_for(batch) is None


def test_a_layer_that_was_not_recorded_takes_the_plain_way(worker: Worker, graphs: Graphs, recorder: Again) -> None:
    batch, _ = batch_of(worker, FITTING[1])
    _, layers = worker.runner.forward(batch, (0, 1))
    assert set(layers) == {0, 1} and recorder.replayed == 0


def test_a_context_that_has_too_many_parts_takes_the_plain_way(
    worker: Worker, recorder: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fixed split leaves as many unmerged answers as the longest context has parts; those have a limit."""
    shape = worker.model_config
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    monkeypatch.setattr("engine.attention.recorded.MOST_PARTIAL_BYTES", 48 * shape.num_heads * shape.head_dim * 4 * 2)
    fixed = TritonAttention(*heads, BLOCK, torch.float32, None, 128)
    monkeypatch.setattr(worker.runner, "attention", fixed)
    monkeypatch.setattr("engine.attention.recorded.tree_attention", lambda q, *args, **how: torch.zeros_like(q))
    monkeypatch.setattr("engine.attention.recorded.write_kv", lambda *args: None)
    graphs = make_graphs(
        settings_of(worker), msgspec.structs.replace(shape, max_position_embeddings=4096), worker.runner, (), recorder
    )
    assert graphs is not None
    graphs.record()
    short, _ = batch_of(worker, [(200, 1, [0] * 7)] * 6)
    long, _ = batch_of(worker, [(300, 1, [0] * 7)] + [(9, 1, [0] * 7)] * 5)
    assert graphs.bucket_for(short) == graphs.bucket_for(long)
    assert graphs.forward(short) is not None and graphs.forward(long) is None


def test_the_cost_model_is_told_how_many_rows_run(worker: Worker, graphs: Graphs) -> None:
    tiers = [worker.runner.tier(tokens) for tokens in range(1, 60)]
    assert tiers[:10] == [1, 2, 4, 4, 8, 8, 8, 8, 12, 12] and tiers[40:48] == [48] * 8
    assert tiers[48:] == [padded_rows(tokens) for tokens in range(49, 60)]
    assert tiers == sorted(tiers)
    assert worker.runner.backend == "triton, triton in graphs"
    for shapes in FITTING:
        batch, _ = batch_of(worker, shapes)
        hidden, _ = worker.runner.forward(batch)
        assert len(hidden) == worker.runner.tier(batch.num_tokens)


# ---- whether, when and at what price


def test_where_nothing_is_recorded_it_says_why(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    class OnGPU:
        device, model, attention = torch.device("cuda"), worker.runner.model, worker.runner.attention

    runner: Any = OnGPU
    assert why_not(settings_of(worker), runner) is None
    assert why_not(settings_of(worker, enforce_eager=True), runner) == "--enforce-eager"
    assert "the ranks" in str(why_not(settings_of(worker, tensor_parallel_size=2), runner))
    assert "the device is cpu" in str(why_not(settings_of(worker), worker.runner))
    OnGPU.attention = ReferenceAttention(4, 2, 16, BLOCK, torch.float32, None)
    assert "reference plans every step on the host" in str(why_not(settings_of(worker), runner))
    OnGPU.model = object()
    assert "only the native decoder" in str(why_not(settings_of(worker), runner))
    with caplog.at_level(logging.INFO, "outrider.engine"):
        record_graphs(settings_of(worker), worker.model_config, worker.runner, worker.memory, [])
        assert caplog.text == "" and worker.runner.graphs is None
        record_graphs(settings_of(worker), worker.model_config, runner, worker.memory, [])
    assert "no step is recorded: only the native decoder" in caplog.text


def test_a_recording_that_fails_leaves_the_collector_on(worker: Worker, twins: None) -> None:
    class Failing(Again):
        def record(self, step: Callable[[], None]) -> Callable[[], object]:
            assert not gc.isenabled()  # what is freed while a GPU records breaks the recording
            raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        made(worker, Failing())
    assert gc.isenabled()


def test_a_gpu_is_warmed_up_beside_and_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CudaRecorder asks of torch, in which order: this is as far as a CPU can tell."""
    told: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = f"side of {name}" if isinstance(name, torch.device) else str(name)

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    @contextmanager
    def inside(what: str) -> Iterator[None]:
        told.append(f"into {what}")
        yield
        told.append("out")

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: "pool")
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("main"))
    monkeypatch.setattr("torch.cuda.stream", lambda stream: inside(stream.name))
    monkeypatch.setattr("torch.cuda.graph", lambda graph, pool, stream: inside(f"recording on {stream.name}, {pool}"))
    recorder = CudaRecorder(torch.device("cuda"))
    replays = [recorder.record(lambda: told.append("step")) for _ in range(2)]
    warm = ["side of cuda waits for main", "into side of cuda", "step", "out", "main waits for side of cuda"]
    assert told == [*warm, "into recording on side of cuda, pool", "step", "out"] * 2
    replays[0]()
    assert told[-1] == "replay"


class Told(GPUMemory):
    """A GPU of which each recording takes so much, and the first one more."""

    def __init__(self, recorder: Again, first: int, each: int) -> None:
        super().__init__(torch.device("cpu"))
        self.recorder, self.first, self.each = recorder, first, each

    def taken_by(self, make: Callable[[], object]) -> int:
        before = self.recorder.recorded
        make()
        count = self.recorder.recorded - before
        return count * self.each + (self.first if before == 0 and count else 0)


def test_the_memory_of_all_is_told_from_a_few(
    worker: Worker, recorder: Again, twins: None, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Told(recorder, first=1000, each=10)
    shape, model, drafters = worker.model_config, worker.runner.model, [GarbageDrafter(96)]
    config = settings_of(worker)
    found = graph_bytes(config, [(model, shape, 0)], torch.float32, worker.device, drafters, memory, recorder)
    count = len(make_buckets(6, 48, BUDGET))
    assert found == 1000 + 10 * count and recorder.recorded <= 5 < count
    assert graph_bytes(config, [(model, shape, 0)], torch.float32, worker.device, drafters, memory) == 0  # a CPU records nothing
    both = Told(other := Again(), first=1000, each=10)
    models = [(model, shape, 0), (model, shape, 0)]  # a draft model has graphs of its own
    assert graph_bytes(config, models, torch.float32, worker.device, drafters, both, other) == found + 10 * count
    drafters[0].needs = Signals(hidden_layers=(1,))
    try:
        with caplog.at_level(logging.INFO, "outrider.engine"):
            record_graphs(config, shape, worker.runner, worker.memory, drafters, memory, recorder)
        assert f"graphs: {count} steps of up to 48 tokens recorded" in caplog.text
        batch, _ = batch_of(worker, FITTING[1])
        _, layers = worker.runner.forward(batch, (1,))
        assert recorder.replayed == 1 and set(layers) == {1}
    finally:
        worker.runner.graphs = None


def test_an_engine_records_before_it_is_ready_and_never_later(
    tiny_llama_dir: Path, recorder: Again, twins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would start on a GPU: the cost model is told the tiers, the log and /metrics what attends."""
    config = EngineConfig(
        model=str(tiny_llama_dir), dtype="float32", drafters=["ngram"], policy="fixed", budget=3, attention_backend="triton",
        max_num_seqs=2, max_num_batched_tokens=16, num_threads=1, kv_cache_memory_bytes=1 << 20, cpu_kernels="torch",
    )  # fmt: skip
    plain = answers(Engine(config, LocalExecutor(config)), REQUESTS[:2])
    monkeypatch.setattr("engine.workspace.make_graphs", lambda *args: make_graphs(*args[:4], recorder))
    monkeypatch.setattr("engine.workspace.GPUMemory", lambda device: Told(recorder, first=0, each=1))
    executor = LocalExecutor(config)
    recorder.over = True
    assert executor.info.backend == "triton, triton in graphs"
    assert recorder.recorded == len(make_buckets(2, 16, 3))
    assert [executor.tier(tokens) for tokens in (1, 3, 5, 8, 9, 21)] == [1, 4, 8, 8, padded_rows(9), padded_rows(21)]
    found = answers(Engine(config, executor), REQUESTS[:2])
    assert {key: answer.tokens for key, answer in found.items()} == {key: answer.tokens for key, answer in plain.items()}
    assert recorder.replayed > 5


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_replays_what_it_would_have_run(
    smollm2_dir: Path, deterministic: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Deterministic: logprobs and all. Nothing is recorded, and no kernel compiled, while it serves."""
    options: dict[str, Any] = {"max_model_len": 2048, "policy": "fixed", "budget": 8, "deterministic": deterministic}
    dtype = "bfloat16" if deterministic else "float32"
    asked = [
        request(str(n), list(range(3, 3 + n)), max_tokens=40, temperature=t, seed=n, logprobs=2)
        for n, t in ((5, 0.0), (70, 0.8), (900, 1.0))
    ]
    eager = load_worker(smollm2_dir, dtype, enforce_eager=True, **options)
    assert eager.runner.graphs is None
    plain = answers(make_engine(eager), asked)
    del eager
    gc.collect()
    with caplog.at_level(logging.INFO, "outrider.engine"):
        worker = Worker(msgspec.structs.replace(load_config_of(smollm2_dir, dtype), drafters=["ngram"], **options))
    assert isinstance(worker.runner.graphs, Graphs) and isinstance(worker.runner.model, Decoder)
    assert "recorded in" in caplog.text and worker.memory.graph_bytes > 0
    monkeypatch.setattr("torch.cuda.CUDAGraph", lambda *args, **how: pytest.fail("recorded while it serves"))
    monkeypatch.setattr("triton.runtime.jit.JITFunction._do_compile", lambda *args: pytest.fail("compiled while it serves"))
    known = {key: answer.tokens for key, answer in plain.items()}
    for drafters in ([], [OracleDrafter(worker.info.vocab_size, known)]):
        found = answers(make_engine(worker, drafters, budget=8), asked)
        assert {key: answer.tokens for key, answer in found.items()} == known
        if deterministic:
            assert all(found[key].logprobs == plain[key].logprobs for key in plain)


def load_config_of(path: Path, dtype: str) -> EngineConfig:
    return EngineConfig(model=str(path), dtype=dtype, kv_cache_memory_bytes=1 << 30)  # type: ignore[arg-type]  # a Literal


@pytest.mark.gpu
def test_a_gpus_graphs_take_what_was_planned(smollm2_dir: Path) -> None:
    config = msgspec.structs.replace(load_config_of(smollm2_dir, "bfloat16"), max_model_len=2048, drafters=["ngram"])
    memory = GPUMemory(torch.device("cuda"))
    found: list[Worker] = []
    taken = memory.taken_by(partial(lambda: found.append(Worker(config))))
    plan = found[0].memory
    rest = taken - plan.weight_bytes - plan.kv_bytes
    assert rest < plan.graph_bytes + plan.workspace_bytes + (600 << 20), (rest, plan)
