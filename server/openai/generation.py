"""The way of one answer: requests to the engine, deltas back, fragments of text out. Streaming or not, it is the same way."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from engine.messages import TokenDelta, TokenLogprobs
from engine.request import Request
from server.client import EngineDead
from server.openai.choice import Choice, Fragment, TextRules
from server.openai.errors import ApiError, internal, invalid, unavailable
from server.openai.merge import merge
from server.openai.timing import Timing

if TYPE_CHECKING:
    from server.frontend import Frontend


class Generation:
    """`requests` hold one prompt each; sample i of prompt p is choice p * n + i."""

    def __init__(self, front: Frontend, requests: list[Request], rules: TextRules) -> None:
        self.front = front
        self.requests = requests
        self.n = requests[0].n
        self.rules = rules
        self.choices = [Choice(i, front.tokenizer, rules) for i in range(len(requests) * self.n)]
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by position in `requests`
        self.timings = [Timing(front.metrics, requests[0].arrival_time) for _ in self.choices]

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    async def fragments(self) -> AsyncGenerator[Fragment]:
        """Every choice's text in order, choices interleaved. Raises ApiError 500 or 503 when the engine fails, 400 where
        the request leaves nothing to say."""
        reason = "abort"
        self._count_start()
        try:
            async with aclosing(merge(self.front.client, self.requests)) as deltas:
                async for position, delta in deltas:
                    fragment = self._take(position, delta)
                    if fragment is not None:
                        yield fragment
                        if fragment.finish_reason and self.finished:
                            break
            self._check_complete()
        except EngineDead as error:
            reason = "error"
            raise unavailable(str(error) or "The engine died while it worked on this request.") from None
        except ApiError:
            reason = "error"
            raise
        finally:
            self._count_end(reason)

    def _take(self, position: int, delta: TokenDelta) -> Fragment | None:
        choice = self.choices[position * self.n + delta.index]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[position] = delta.prompt_logprobs
        if choice.finish_reason is not None:
            return None  # a stop string ended it; the engine goes on until the request's other samples have ended
        if delta.finish_reason in ("error", "abort"):
            raise _failure(delta)
        if delta.usage is not None:
            choice.usage = delta.usage
        before = choice.num_tokens
        fragment = choice.push(delta)
        now = time.monotonic()
        timing = self.timings[choice.index]
        timing.tokens(choice.num_tokens - before, now)
        if fragment.finish_reason is not None:
            timing.finish(choice.num_tokens, choice.usage, now)
            self._end_early(position, delta)
        return fragment

    def _end_early(self, position: int, delta: TokenDelta) -> None:
        """When stop strings have ended all samples of one of several prompts, the engine need not finish it."""
        samples = self.choices[position * self.n : (position + 1) * self.n]
        if len(self.requests) > 1 and delta.finish_reason is None and all(choice.finish_reason for choice in samples):
            self.front.client.abort(self.requests[position].request_id)

    def _check_complete(self) -> None:
        if not self.finished:
            raise internal("The engine ended the request without finishing it.", "engine_error")

    def _count_start(self) -> None:
        observe = self.front.metrics.observe
        for request in self.requests:
            observe("request_prompt_tokens", len(request.prompt_ids))
            observe("request_params_n", request.n)
            observe("request_params_max_tokens", 0 if self.rules.silent else request.params.max_tokens)

    def _count_end(self, reason: str) -> None:
        metrics = self.front.metrics
        for choice in self.choices:
            metrics.finished[choice.finish_reason or reason] += 1
        metrics.observe("request_max_num_generation_tokens", max(choice.num_tokens for choice in self.choices))

    def usage(self) -> dict[str, object]:
        """OpenAI's usage of the answer so far. A prompt counts once, however many samples it has."""
        prompt = sum(len(request.prompt_ids) for request in self.requests)
        completion = sum(choice.num_tokens for choice in self.choices)
        used = [(choice.usage, choice.num_tokens) for choice in self.choices if choice.usage is not None]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(map(self._cached, range(len(self.requests))))},
            "completion_tokens_details": {
                # A stop string may lie before the last tokens that a step had accepted.
                "accepted_prediction_tokens": sum(min(usage.accepted_prediction_tokens, shown) for usage, shown in used),
                "rejected_prediction_tokens": sum(usage.rejected_prediction_tokens for usage, _ in used),
            },
        }

    def _cached(self, position: int) -> int:
        """Prompt tokens nobody computed for this request: later samples find what the first has left in the cache."""
        samples = self.choices[position * self.n : (position + 1) * self.n]
        return min((choice.usage.cached_tokens for choice in samples if choice.usage is not None), default=0)


def _failure(delta: TokenDelta) -> ApiError:
    if delta.finish_reason == "abort":
        return unavailable("The engine gave up the request; send it again.", "request_aborted")
    if delta.invalid:
        return invalid(delta.error or "The request contradicts itself.", None)
    return internal(delta.error or "The engine failed on this request.", "engine_error")
