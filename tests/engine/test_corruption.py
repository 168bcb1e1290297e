"""A model that makes NaN of one token: who met it in a prompt, in a draft or in somebody else's blocks, and who never did."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path

import msgspec
import pytest
import torch

from engine.corruption import NOT_FINITE, NOTHING_ALLOWED
from engine.engine import Engine
from engine.executors.multiproc import MultiprocExecutor
from engine.request import Request
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.worker import Worker
from tests.engine.models import tiny
from tests.engine.pairs import engine_config
from tests.engine.real import OracleDrafter, answers, load_worker, make_engine, request

NAN = 90  # the token whose embedding is NaN
BLOCK = 8


def write_model(folder: Path) -> Path:
    made = tiny.model(tiny.config("Llama", tie_word_embeddings=False))
    made.model.embed_tokens.weight[NAN] = float("nan")
    return tiny.save(made, folder)


class NaNDrafter(OracleDrafter):
    """The truth, and from the `after`th token of the output on, as the last node of a chain, the token."""

    name = "nan"
    after = 0

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        chains = [self.chain(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        return DraftForest.from_chains([seq.tokens[-1] for seq in seqs], chains, [self.name] * len(seqs))

    def chain(self, seq: Sequence, budget: int) -> list[int]:
        truth = self.known[seq.request.request_id, seq.sample_index][seq.num_output :]
        return [*truth[: budget - 1], NAN if seq.num_output >= self.after else truth[-1]] if budget else []


class BranchingNaNDrafter(NaNDrafter):
    """The token, and beside it the truth."""

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            *path, last = self.chain(seq, budget) or [0]
            nodes = [last, *path][:budget]
            trees.append(([seq.tokens[-1], *nodes], [-1, 0, 0, *range(2, 9)][: 1 + len(nodes)]))
        return DraftForest.from_parents(trees, [self.name] * len(trees))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """Over the reference attention, which reads more keys than it needs."""
    folder = write_model(tmp_path_factory.mktemp("nan"))
    return load_worker(folder, request.param, block_size=BLOCK, cpu_kernels="torch")


@pytest.fixture
def clean(worker: Worker) -> Worker:
    """As it was loaded, whatever a test before has left."""
    worker.drop(list(worker.seqs))
    worker.kv.kv.zero_()
    return worker


def bad(length: int = 25) -> Request:
    return request("bad", [5, 6, NAN, *[3] * (length - 3)], max_tokens=5, temperature=0.0)


def healthy(count: int = 1) -> list[Request]:
    """Greedy and sampled; none is ever answered with the token."""
    params = {"max_tokens": 10, "logit_bias": {NAN: -100.0}, "ignore_eos": True}
    return [request(f"ok{i}", list(range(10 + i, 30)), temperature=0.8 * (i % 2), seed=i, **params) for i in range(count)]


def tokens(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    """Of those that ended well."""
    found = answers(engine, requests)
    return {key: answer.tokens for key, answer in found.items() if answer.finish_reason == "length"}


def is_finite(worker: Worker) -> bool:
    return bool(torch.isfinite(worker.kv.kv).all())


def test_the_first_of_a_batch_ends_alone(clean: Worker) -> None:
    """It has block 0, and the others' contexts are rounded up."""
    expected = tokens(make_engine(clean), healthy(8))
    assert len(expected) == 8
    clean.kv.kv.zero_()
    engine = make_engine(clean)
    assert tokens(engine, [bad(), *healthy(8)]) == expected
    assert engine.stats().corrupted_requests == 1
    assert is_finite(clean)


def test_a_chunk_of_a_prompt_ends_its_request_at_once(clean: Worker) -> None:
    """Nobody judges it, and an abort before the next one would free its blocks as they are."""
    expected = tokens(make_engine(clean), healthy(4))
    engine = make_engine(clean, max_num_batched_tokens=16)
    engine.add(bad(60))
    (delta,) = engine.step()
    assert (delta.finish_reason, delta.error) == ("error", NOT_FINITE)
    assert engine.stats().corrupted_requests == 1
    assert is_finite(clean)
    again = answers(engine, [bad(60)])["bad", 0].usage
    assert again is not None and again.cached_tokens == 0, "nobody starts from what it computed"
    assert tokens(engine, healthy(4)) == expected


def test_prompt_logprobs_of_a_prompt_that_makes_nan(clean: Worker) -> None:
    """Their rows are not finite either, and all ranks compute them before anybody knows."""
    engine = make_engine(clean, max_num_batched_tokens=16)
    one = request("bad", [5, 6, NAN, *[3] * 40], max_tokens=5, prompt_logprobs=2)
    assert answers(engine, [one])["bad", 0].finish_reason == "error"
    assert is_finite(clean)


def test_a_step_of_chunks_only_blames_the_right_one(clean: Worker) -> None:
    engine = make_engine(clean, max_num_batched_tokens=64)
    for one in (request("long", [7] * 40, max_tokens=4, ignore_eos=True), bad(60)):
        engine.add(one)
    (delta,) = [delta for delta in engine.step() if delta.request_id == "bad"]
    assert delta.finish_reason == "error"
    found = answers(engine, [])
    assert found["long", 0].finish_reason == "length"


def test_blocks_of_a_preempted_sequence_are_no_longer_its_own(clean: Worker) -> None:
    """They belong to the one that preempted it, which leaves NaN in them: they are zeroed although they were another's."""
    expected = tokens(make_engine(clean), healthy())
    engine = make_engine(clean, num_blocks=20, enable_prefix_caching=False)
    engine.add(request("low", [3] * 80, max_tokens=40, priority=5, ignore_eos=True))
    for _ in range(2):
        engine.step()
    engine.add(request("bad", [NAN] * 100, max_tokens=20, priority=0))
    deltas = engine.step()
    assert [delta.finish_reason for delta in deltas if delta.request_id == "bad"] == ["error"]
    assert engine.stats().preemptions == 1
    assert is_finite(clean)
    engine.abort("low")
    assert tokens(engine, healthy()) == expected


@pytest.mark.parametrize("kind", [NaNDrafter, BranchingNaNDrafter])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_a_draft_that_makes_nan_changes_no_answer(clean: Worker, kind: type[NaNDrafter], after: int, count: int) -> None:
    """In the step that ends the prompt, and in a later one."""
    expected = tokens(make_engine(clean), healthy(count))
    assert len(expected) == count
    drafter = kind(clean.info.vocab_size, expected)
    drafter.after = after
    engine = make_engine(clean, [drafter], budget=4)
    assert tokens(engine, healthy(count)) == expected
    stats = engine.stats()
    assert stats.corrupted_requests == 0
    assert stats.drafter_fallbacks == {"not_finite": 1}, "whose draft made NaN gets no other"
    assert (stats.num_accepted_tokens > 0) == (after > 0)
    assert is_finite(clean)


def test_the_drafts_of_others_stand(clean: Worker) -> None:
    """One sequence's draft makes NaN, and the others take as few steps as they would without it."""
    expected = tokens(make_engine(clean), healthy(3))

    class OneInThree(NaNDrafter):
        def chain(self, seq: Sequence, budget: int) -> list[int]:
            chain = super().chain(seq, budget)
            return chain if seq.request.request_id == "ok0" else [*chain[:-1], 7]

    engine = make_engine(clean, [OneInThree(clean.info.vocab_size, expected)], budget=4)
    found = answers(engine, healthy(3))
    assert {key: answer.tokens for key, answer in found.items()} == expected
    accepted = {name: answer.usage.accepted_tokens for (name, _), answer in found.items() if answer.usage is not None}
    assert accepted["ok0"] == 0
    assert accepted["ok1"] >= 6 and accepted["ok2"] >= 6


def test_a_prediction_may_name_the_token(clean: Worker) -> None:
    (one,) = healthy()
    (truth,) = tokens(make_engine(clean), [one]).values()
    one = msgspec.structs.replace(one, prediction_ids=[*truth[:2], *[NAN] * 5])
    assert tokens(make_engine(clean, ["prediction"]), [one]) == {("ok0", 0): truth}
    assert is_finite(clean)


def test_the_answer_itself_may_be_the_token(clean: Worker) -> None:
    """The target says it, and then has nothing to say: drafted or not, it is what the client has got before the error."""
    one = request("one", [10, 11], max_tokens=8, temperature=0.0, allowed_token_ids=[NAN])
    plain = answers(make_engine(clean), [one])["one", 0]
    assert (plain.tokens, plain.finish_reason) == ([NAN], "error")
    drafter = NaNDrafter(clean.info.vocab_size, {("one", 0): []})
    drafted = answers(make_engine(clean, [drafter], budget=1), [one])["one", 0]
    assert (drafted.tokens, drafted.finish_reason) == (plain.tokens, plain.finish_reason)
    assert is_finite(clean)


CONTRADICTIONS = {
    "at once": ({"allowed_token_ids": [2], "min_tokens": 3}, 0),
    "later": ({"allowed_token_ids": [7, 8], "bad_words": [[7, 7], [7, 8], [8, 7], [8, 8]]}, 1),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_request_that_allows_no_token_leaves_the_cache_alone(clean: Worker, name: str, temperature: float) -> None:
    params, said = CONTRADICTIONS[name]
    prompt = [5 + i * 7 % 80 for i in range(40)]
    engine = make_engine(clean, ["ngram"])
    ask = request("ask", [*prompt, 50], max_tokens=4, temperature=0.0, ignore_eos=True)
    before = answers(engine, [ask])["ask", 0]
    engine.add(request("odd", [*prompt, 51], max_tokens=6, temperature=temperature, **params))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    assert sum(len(delta.token_ids) for delta in deltas) == said
    assert (deltas[-1].finish_reason, deltas[-1].error, deltas[-1].invalid) == ("error", NOTHING_ALLOWED, True)
    assert engine.stats().corrupted_requests == 0
    after = answers(engine, [ask])["ask", 0]
    assert after.tokens == before.tokens
    assert after.usage is not None and after.usage.cached_tokens == 40


def test_the_cpus_own_kernels(tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", tie_word_embeddings=False, hidden_size=256, intermediate_size=256, head_dim=64))
    made.model.embed_tokens.weight[NAN] = float("nan")
    worker = load_worker(tiny.save(made, tmp_path), "bfloat16", block_size=BLOCK)
    if worker.info.backend != "native":
        pytest.skip("this CPU has none")
    expected = tokens(make_engine(worker), healthy(3))
    drafter = NaNDrafter(worker.info.vocab_size, expected)
    assert tokens(make_engine(worker, [drafter], budget=4), [bad(), *healthy(3)]) == expected
    assert is_finite(worker)


def test_the_gpus_kernels(tmp_path: Path) -> None:
    """Interpreted. Their weights of hidden keys are zeros, too."""
    pytest.importorskip("triton")
    worker = load_worker(write_model(tmp_path), block_size=BLOCK, attention_backend="triton")
    asked = [request("ok0", list(range(10, 18)), max_tokens=3, temperature=0.0, ignore_eos=True)]
    expected = tokens(make_engine(worker), asked)
    engine = make_engine(worker, [NaNDrafter(worker.info.vocab_size, expected)], budget=2)
    assert tokens(engine, asked) == expected
    assert engine.stats().drafter_fallbacks == {"not_finite": 1}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Rank 0 of two."""
    folder = write_model(tmp_path_factory.mktemp("nan"))
    executor = MultiprocExecutor(engine_config(folder, tensor_parallel_size=2))
    yield executor._worker
    executor.close()


def test_two_ranks_agree_on_what_is_corrupted(ranks: Worker) -> None:
    """NaN that the other rank had kept would come back in the first sum over both."""
    expected = tokens(make_engine(ranks), healthy(4))
    engine = make_engine(ranks, [NaNDrafter(ranks.info.vocab_size, expected)], budget=4, max_num_batched_tokens=32)
    for _ in range(3):
        assert tokens(engine, [bad(60), *healthy(4)]) == expected
    assert engine.stats().corrupted_requests == 3
    assert engine.stats().drafter_fallbacks["not_finite"] > 0
