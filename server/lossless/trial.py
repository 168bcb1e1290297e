"""Asks one engine everything twice and more: without speculation, with it, and with it where drafting is easiest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.messages import EngineInfo
from engine.request import Request, SamplingParams, Speculation
from server.lossless.comparison import Answer, Difference, compare

if TYPE_CHECKING:
    from server.client import EngineClient

TOP = 20  # logprobs asked for at each position: a seeded answer's token is rarely outside
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Settings:
    max_tokens: int = 64
    temperature: float = 0.7  # of the seeded answers
    tie: float = 0.01
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt asked in one way. `runs`: the answers with speculation by name, each with its first difference from `plain`."""

    prompt: int
    temperature: float
    seed: int
    plain: Answer
    runs: dict[str, tuple[Answer, Difference | None]]
    control: Difference | None = None  # of plain decoding from itself; looked at only when some run differs

    @property
    def kind(self) -> str:
        kinds = {difference.kind for _, difference in self.runs.values() if difference is not None}
        return "different" if "different" in kinds else "tie" if kinds else "equal"


def seeded_too(info: EngineInfo) -> bool:
    """Whether seeded answers have to be the same token for token.

    The default verifier ties every draw to the seed. Other lossless ones keep the law of the answer, not the draw; a lossy
    one promises nothing, and is to be caught.
    """
    return not info.lossless or info.verifier == EngineConfig(model="").verifier


class Trial:
    """`done` hears of every case as it ends. Raises ValueError when the engine refuses a prompt, EngineDead when it dies."""

    def __init__(self, client: EngineClient, info: EngineInfo, settings: Settings, done: Callable[[Case], None]) -> None:
        self.client = client
        self.info = info
        self.settings = settings
        self.done = done
        self._count = 0

    async def run(self, prompts: Sequence[list[int]]) -> list[Case]:
        """Every prompt greedily and, where that must give the same tokens, seeded."""
        temperatures = [0.0, self.settings.temperature] if seeded_too(self.info) else [0.0]
        slots = asyncio.Semaphore(self.settings.concurrency)

        async def one(prompt: int, temperature: float) -> Case:
            async with slots:
                case = await self._case(prompt, prompts[prompt], temperature)
            self.done(case)
            return case

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(i, t)) for i in range(len(prompts)) for t in temperatures]
        return [task.result() for task in tasks]

    async def _case(self, prompt: int, ids: list[int], temperature: float) -> Case:
        """Plain and speculative answers share nothing: neither a prefix nor what drafters learned. The latter share all."""
        seed = prompt + 1
        salt = f"{prompt}/{temperature:g}"
        plain = await self._ask(ids, temperature, seed, f"{salt}/plain", Speculation(off=True))
        answers = {"first": await self._ask(ids, temperature, seed, salt, Speculation())}
        answers["again"] = await self._ask(ids, temperature, seed, salt, Speculation())
        if self.info.prediction_drafters:  # the whole answer known beforehand: the deepest drafts there can be
            answers["predicted"] = await self._ask(ids, temperature, seed, salt, Speculation(), plain.ids)
        runs = {name: (answer, self._compare(plain, answer, temperature)) for name, answer in answers.items()}
        control = None
        if any(difference for _, difference in runs.values()):
            twice = await self._ask(ids, temperature, seed, f"{salt}/plain", Speculation(off=True))
            control = self._compare(plain, twice, temperature)
        return Case(prompt, temperature, seed, plain, runs, control)

    def _compare(self, plain: Answer, other: Answer, temperature: float) -> Difference | None:
        return compare(plain, other, temperature, self.settings.tie)

    async def _ask(
        self, ids: list[int], temperature: float, seed: int, salt: str, speculation: Speculation, prediction: Sequence[int] = ()
    ) -> Answer:
        self._count += 1
        room = self.info.max_model_len - len(ids)
        params = SamplingParams(max_tokens=min(self.settings.max_tokens, room), temperature=temperature, seed=seed, logprobs=TOP)
        request = Request(
            request_id=f"verify-{self._count}",
            prompt_ids=ids,
            params=params,
            prediction_ids=list(prediction),
            cache_salt=salt,
            speculation=speculation,
        )
        answer = Answer()
        async with aclosing(self.client.submit(request)) as deltas:
            async for delta in deltas:
                if delta.finish_reason in ("error", "abort"):
                    raise ValueError(delta.error or "the engine gave a request up")
                answer.ids += delta.token_ids
                answer.logprobs += delta.logprobs or []
                answer.finish_reason = delta.finish_reason or ""
                answer.usage = delta.usage or answer.usage
        return answer
