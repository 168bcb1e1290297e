"""The target's own bigrams: read out of the model while nobody is served, kept on disk, drafted from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import EngineConfig
from engine.drafters.token_recycling import TokenRecyclingDrafter
from engine.engine import Engine
from engine.executors.local import LocalExecutor
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.successors import TOP, Successors
from tests.engine.models import tiny

VOCAB = 300


def table(rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, (rows, TOP)).astype(np.int32)


def test_what_was_read_is_there_again_and_reading_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "somewhere" / "rows.npy"
    first = Successors(VOCAB, file)
    assert first.unknown(3) == [0, 1, 2] and first.of(0) is None
    first.learn(table(10))
    first.save()
    second = Successors(VOCAB, file)
    assert second.known == 10 and second.of(9) == table(10)[9].tolist() and second.of(10) is None
    assert second.unknown(4) == [10, 11, 12, 13] and not second.complete
    second.learn(table(VOCAB)[10:])
    assert second.complete and second.unknown(5) == []
    assert Successors(VOCAB, file).complete  # a complete table keeps itself


def test_a_file_about_something_else_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, wrong in enumerate([table(4)[:, :3], table(4).astype(np.int64), table(VOCAB + 1), table(4) + VOCAB]):
        np.save(tmp_path / f"{number}.npy", wrong)
        assert Successors(VOCAB, tmp_path / f"{number}.npy").known == 0
    (tmp_path / "torn.npy").write_bytes((tmp_path / "0.npy").read_bytes()[:-9])
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("torn", "empty"):
        assert Successors(VOCAB, tmp_path / f"{name}.npy").known == 0
    assert len(caplog.records) == 6
    assert Successors(VOCAB, tmp_path / "none.npy").known == 0 and len(caplog.records) == 6


def test_a_disk_that_is_full_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = Successors(VOCAB, tmp_path / "file" / "rows.npy")
    caplog.clear()  # there is nothing to read, either
    kept.learn(table(VOCAB))
    assert kept.complete and "cannot be kept" in caplog.text


def test_a_row_known_from_the_model_alone_is_drafted_until_the_token_was_judged() -> None:
    successors = Successors(VOCAB)
    successors.learn(table(8))
    drafter = TokenRecyclingDrafter(successors=successors)
    seq = Sequence(0, Request(request_id="r", prompt_ids=[1, 5], params=SamplingParams(max_tokens=9)), 0)
    forest = drafter.draft([seq], [1])
    assert forest.token.tolist() == [5, table(8)[5, 0]]
    seq.tokens.append(200)  # not known yet
    assert drafter.draft([seq], [4]).num_drafts == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.model(tiny.config("Llama", vocab_size=VOCAB)), tmp_path_factory.mktemp("study"))


def config(folder: Path, cache: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype="float32", drafters=["token_recycling"], policy="fixed", cache_dir=str(cache), num_threads=1
    )


def answers(engine: Engine, prompt: list[int]) -> list[int]:
    engine.add(Request(request_id="r", prompt_ids=prompt, params=SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work():
        assert not engine.study()  # whoever is served comes first
        for delta in engine.step():
            tokens += delta.token_ids
    return tokens


def test_an_idle_engine_reads_the_whole_table_and_hurts_nobody(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, tmp_path)
    executor = LocalExecutor(settings)
    worker = executor._worker
    engine = Engine(settings, executor)
    plain = answers(engine, [7, 8, 9, 10] * 9)
    cached = worker.kv.kv[:, : worker.kv.num_blocks].clone()
    assert worker.successors is not None and not worker.successors.complete
    while engine.study():
        pass
    assert worker.successors.complete
    assert torch.equal(worker.kv.kv[:, : worker.kv.num_blocks], cached)
    assert answers(engine, [7, 8, 9, 10] * 9) == plain  # begins with cached blocks
    engine.close()
    files = list((tmp_path / "successors").iterdir())
    assert len(files) == 1
    again = LocalExecutor(settings)._worker.successors
    assert again is not None and again.complete and (again.ids == worker.successors.ids).all()


def test_a_row_is_what_the_model_says_behind_the_first_token(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = config(folder, tmp_path)
    worker = LocalExecutor(settings)._worker
    while worker.study():
        pass
    assert worker.successors is not None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shape = worker.model_config
    matches = []
    for first in {shape.bos_token_id, *shape.eos_token_ids, 0} - {None}:
        pairs = torch.tensor([[first, token] for token in range(VOCAB)])
        with torch.no_grad():
            best = model(pairs).logits[:, -1].topk(TOP).indices.numpy()
        matches.append((best == worker.successors.ids).mean())
    assert max(matches) > 0.99  # one of the first tokens it may have chosen
