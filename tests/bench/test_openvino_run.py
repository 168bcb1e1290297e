"""The loop around OpenVINO's pipeline, with a pipeline that says one or two tokens a step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.openvino_run import Pipeline
from bench.prompts import Prompt
from bench.summary import summarise
from bench.workloads import Workload


class Handle:
    """An answer of `length` tokens, two in every second step."""

    def __init__(self, length: int) -> None:
        self.left, self.ready, self.steps = length, 0, 0

    def step(self) -> None:
        self.steps += 1
        self.ready = min(1 + self.steps % 2, self.left)
        self.left -= self.ready

    def can_read(self) -> bool:
        return self.ready > 0

    def read(self) -> dict[int, Any]:
        ids, self.ready = [7] * self.ready, 0
        reason = "NONE" if self.left else "LENGTH"
        return {0: SimpleNamespace(generated_ids=ids, finish_reason=SimpleNamespace(name=reason))}


class Tokenizer:
    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        return "".join(message["content"] for message in messages)

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=SimpleNamespace(shape=(1, len(text))))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Fake:
    """What the module offers, as far as it is used."""

    def __init__(self, model: str, scheduler: Any, device: str, properties: dict[str, Any]) -> None:
        self.scheduler, self.properties, self.handles, self.most = scheduler, properties, [], 0

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    def get_config(self) -> Any:
        return SimpleNamespace()

    def add_request(self, number: int, ids: Any, config: Any) -> Handle:
        self.handles.append(Handle(config.max_new_tokens))
        return self.handles[-1]

    def step(self) -> None:
        active = [handle for handle in self.handles if handle.left]
        self.most = max(self.most, len(active))
        for handle in active:
            handle.step()


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(SchedulerConfig=SimpleNamespace, ContinuousBatchingPipeline=Fake)
    monkeypatch.setitem(sys.modules, "openvino_genai", fake)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), "open", [{"role": "user", "content": "hello"}]) for i in range(count)]


@pytest.mark.parametrize("streams", [1, 3])
def test_every_prompt_is_answered_and_no_more_than_asked_at_a_time(streams: int) -> None:
    pipeline = Pipeline(Path("model"), slots=8, lookup=0)
    run = pipeline.ask(prompts(7), Workload("x", streams, 7, 10, "total_rate", ignore_eos=True))
    assert pipeline.pipeline.most == streams
    assert sorted(answer.prompt_id for answer in run.answers) == list("0123456")
    for answer in run.answers:
        assert (answer.tokens, answer.prompt_tokens, answer.text) == (10, 5, " ".join("7" * 10))
        assert answer.start <= answer.times[0] < answer.end == answer.times[-1]
    numbers = summarise(run)
    assert numbers["errors"] == 0
    assert numbers["total_rate"] == pytest.approx(70 / run.wall)


def test_prompt_lookup_is_asked_for() -> None:
    workload = Workload("x", 1, 1, 10, "total_rate")
    plain, lookup = Pipeline(Path("model"), 8, 0), Pipeline(Path("model"), 8, 5)
    assert plain.pipeline.properties == {}
    assert lookup.pipeline.properties == {"prompt_lookup": True}
    assert lookup.config(workload).num_assistant_tokens == 5
    assert plain.pipeline.scheduler.max_num_seqs == 8
    assert plain.pipeline.scheduler.enable_prefix_caching
