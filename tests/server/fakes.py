"""An engine client without an engine: it says what a script tells it to, in steps of any size."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import islice, takewhile

from engine.messages import EngineInfo, EngineStats, SequenceUsage, TokenDelta, TokenLogprobs
from engine.request import Request
from engine.sequence import Sequence
from server.client import EngineDead

Script = Callable[[Request, int], list[int]]  # (request, sample index) -> the tokens the model would go on with


def info(vocab_size: int = 49152, max_model_len: int = 512) -> EngineInfo:
    return EngineInfo(
        model="fake",
        architecture="Fake",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        dtype="float32",
        device="cpu",
        backend="fake",
        drafters=["prediction", "ngram"],
        verifier="match",
        lossless=True,
        policy="goodput",
        budget=8,
        max_budget=32,
        verifiers=["match", "coin"],
        prediction_drafters=["prediction"],
        weight_bytes=0,
        kv_bytes=0,
        num_blocks=64,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        load_seconds=0.0,
    )


class FakeEngineClient:
    """`tokens_per_step` is what speculation changes, and all that it may change: the outcome must never depend on it.

    `gate`: when set, each step waits for one release. `die_after`: steps until EngineDead. `fail_after`: steps until an
    error delta for sample 0. Sequences end as in the engine: EOS, stop ids, max_tokens.
    """

    def __init__(self, script: Script, eos_ids: frozenset[int] = frozenset(), tokens_per_step: int = 1) -> None:
        self.script = script
        self.eos_ids = eos_ids
        self.tokens_per_step = tokens_per_step
        self.engines = [self]
        self.info: EngineInfo | None = info()
        self.stats = EngineStats()
        self.on_stats: Callable[[EngineStats], None] | None = None
        self.ready = True
        self.live = True
        self.restarts = 0
        self.gate: asyncio.Semaphore | None = None
        self.die_after: int | None = None
        self.fail_after: int | None = None
        self.fails_invalid = False  # by the request's own fault
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.running: set[str] = set()
        self.steps: Counter[str] = Counter()
        self.usage: dict[tuple[str, int], SequenceUsage] = {}
        self.changed = asyncio.Event()  # set whenever a request starts, steps or ends

    async def wait_ready(self) -> EngineInfo:
        assert self.info is not None
        return self.info

    @property
    def num_inflight(self) -> int:
        return len(self.running)

    async def submit(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        if not self.ready:
            raise EngineDead("the engine is starting")
        self.requests.append(request)
        self.running.add(request.request_id)
        self.changed.set()
        try:
            async for delta in self._deltas(request):
                yield delta
        finally:
            self.abort(request.request_id)  # only if it is still running
            self.changed.set()

    def abort(self, request_id: str) -> None:
        if request_id in self.running:
            self.running.discard(request_id)
            self.aborted.append(request_id)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for something to become true of this client."""
        async with asyncio.timeout(20):
            while not true():
                self.changed.clear()
                await self.changed.wait()

    async def _deltas(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        seqs = [Sequence(i, request, i, self.eos_ids) for i in range(request.n)]
        scripts = [iter(self.script(request, i)) for i in range(request.n)]
        for step in range(100_000):
            if self.gate is not None:
                await self.gate.acquire()
            else:
                await asyncio.sleep(0)
            if self.die_after is not None and step >= self.die_after:
                raise EngineDead("the engine died")
            self.steps[request.request_id] += 1
            self.changed.set()
            deltas = [self._turn(seq, script, step) for seq, script in zip(seqs, scripts, strict=True) if not seq.finished]
            if all(seq.finished for seq in seqs):
                self.running.discard(request.request_id)  # known before the client reads the last delta
            for delta in deltas:
                yield delta
            if all(seq.finished for seq in seqs):
                return

    def _turn(self, seq: Sequence, script: Iterator[int], step: int) -> TokenDelta:
        request = seq.request
        if request.request_id not in self.running:
            seq.finish_reason = "abort"
            return TokenDelta(request_id=request.request_id, index=seq.sample_index, finish_reason="abort")
        if self.fail_after is not None and step >= self.fail_after and seq.sample_index == 0:
            seq.finish_reason = "error"
            error = "no token is left" if self.fails_invalid else "the logits held NaN"
            return TokenDelta(request_id=request.request_id, finish_reason="error", error=error, invalid=self.fails_invalid)
        return self._step(seq, list(islice(script, self.tokens_per_step)))

    def _step(self, seq: Sequence, tokens: list[int]) -> TokenDelta:
        request, first = seq.request, seq.num_output == 0
        start = seq.num_tokens
        kept = seq.commit(tokens)
        if not tokens:
            seq.finish_reason = "length"  # the script is over
        delta = TokenDelta(request_id=request.request_id, index=seq.sample_index, token_ids=tokens[:kept])
        if (k := request.params.logprobs) is not None:
            delta.logprobs = [logprobs(token, start + i, k) for i, token in enumerate(tokens[:kept])]
        if first and (k := request.params.prompt_logprobs) is not None:
            ids = request.prompt_ids
            delta.prompt_logprobs = [None, *(logprobs(token, i, k) for i, token in enumerate(ids[1:], start=1))]
        if seq.finished:
            delta.finish_reason, delta.stop_token_id = seq.finish_reason, seq.stop_token_id
        usage = self._count(seq, kept)
        if seq.finished or request.report_usage:
            delta.usage = usage
        return delta

    def _count(self, seq: Sequence, kept: int) -> SequenceUsage:
        """A step drafted one node more than stood. A prediction counts as accepted as far as the answer has followed it."""
        output, guess = seq.tokens[seq.num_prompt :], seq.request.prediction_ids
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(output, guess, strict=False))))
        usage = self.usage.setdefault((seq.request.request_id, seq.sample_index), SequenceUsage())
        usage.cached_tokens = 16 * seq.sample_index if seq.sample_index else 2
        usage.accepted_prediction_tokens = same
        usage.rejected_prediction_tokens = min(1, len(guess) - same)
        usage.first_scheduled_time = seq.request.arrival_time
        usage.steps += 1
        usage.budget_reasons = {"cost": usage.steps}
        if not seq.request.speculation.off:
            stood = max(kept - 1, 0)
            usage.drafted_tokens += stood + 1
            usage.accepted_tokens += stood
            positions = [*usage.accepted_per_position, *[0] * (stood - len(usage.accepted_per_position))]
            usage.accepted_per_position = [count + (depth < stood) for depth, count in enumerate(positions)]
            usage.drafted_by, usage.accepted_by = {"ngram": usage.drafted_tokens}, {"ngram": usage.accepted_tokens}
            usage.seconds_saved += 0.25 * stood
        return usage


def logprobs(token: int, position: int, top: int) -> TokenLogprobs:
    """Any numbers will do, as long as they depend on nothing but the arguments."""
    logprob = -math.log(2 + token % 7 + position % 3)
    likely = [(token, logprob), *(((token + i) % 1000, logprob - i) for i in range(1, 30))]
    return TokenLogprobs(logprob, 1, likely[:top])
