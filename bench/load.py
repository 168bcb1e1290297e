"""Puts a load on an endpoint: closed loop (n requests in flight) or open loop (Poisson arrivals). Returns what it saw."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.arithmetic import Answer, poisson_arrivals
from bench.client import Endpoint, Exchange, events, read_head
from bench.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Ask:
    """How every prompt is asked."""

    model: str
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None
    ignore_eos: bool = False
    prediction: bool = False  # send the prompt's expected answer along, where it has one
    extra: dict[str, Any] = field(default_factory=dict)  # merged into the body; "{unique}" in a text is fresh per request

    def body(self, prompt: Prompt) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": prompt.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.seed is not None:
            fields["seed"] = self.seed
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.prediction and prompt.prediction:
            fields["prediction"] = {"type": "content", "content": prompt.prediction}
        fields |= {key: _fresh(value) for key, value in self.extra.items()}
        return json.dumps(fields).encode()


def _fresh(value: Any) -> Any:
    return value.replace("{unique}", uuid.uuid4().hex) if isinstance(value, str) else value


@dataclass(slots=True)
class Run:
    """The answers of one run, the seconds from its first request to its last event, and how late requests were sent."""

    answers: list[Answer]
    wall: float
    client_cpu: float
    lag: float = 0.0  # open loop: the worst delay between a due time and the sending; the client was too slow if large


async def run(
    endpoint: Endpoint, ask: Ask, prompts: Sequence[Prompt], *, concurrency: int, rate: float | None, seed: int, limit: float
) -> Run:
    """Ask every prompt once, `concurrency` at a time, or at `rate` per second whatever is in flight."""
    messages = [endpoint.request("POST", "/chat/completions", ask.body(prompt)) for prompt in prompts]
    cpu, start = time.process_time(), time.monotonic()
    lag = 0.0
    if rate is None:
        exchanges = await _closed(endpoint, messages, concurrency, limit)
    else:
        exchanges, lag = await _open(endpoint, messages, poisson_arrivals(rate, len(messages), seed), limit)
    client_cpu = time.process_time() - cpu
    answers = [parse(prompt, exchange) for prompt, exchange in zip(prompts, exchanges, strict=True)]
    end = max((answer.end for answer in answers), default=start)
    return Run(answers, end - start, client_cpu, lag)


async def _closed(endpoint: Endpoint, messages: Sequence[bytes], concurrency: int, limit: float) -> list[Exchange]:
    exchanges: list[Exchange | None] = [None] * len(messages)
    waiting = iter(range(len(messages)))

    async def stream() -> None:
        for i in waiting:  # shared: each stream takes the next prompt nobody has taken
            exchanges[i] = await endpoint.send(messages[i], time.monotonic(), limit)

    await asyncio.gather(*(stream() for _ in range(min(concurrency, len(messages)))))
    return [exchange for exchange in exchanges if exchange is not None]


async def _open(
    endpoint: Endpoint, messages: Sequence[bytes], arrivals: Sequence[float], limit: float
) -> tuple[list[Exchange], float]:
    start = time.monotonic()
    lag = 0.0
    tasks = []
    for message, arrival in zip(messages, arrivals, strict=True):
        due = start + arrival
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        lag = max(lag, time.monotonic() - due)
        tasks.append(asyncio.create_task(endpoint.send(message, due, limit)))
    return list(await asyncio.gather(*tasks)), lag


def parse(prompt: Prompt, exchange: Exchange) -> Answer:
    """What one exchange says; an answer with `error` set when it failed, whatever the reason."""
    answer = Answer(prompt.id, prompt.category, exchange.start, error=exchange.error)
    if answer.error:
        return answer
    try:
        status, headers, body = read_head(exchange.packets)
        if status != 200 or "text/event-stream" not in headers.get("content-type", ""):
            text = b"".join(data for _, data in body)[:300].decode(errors="replace")
            answer.error = f"status {status}: {text}"
            return answer
        for arrived, data in events(body):
            if data != "[DONE]":
                _read_event(answer, arrived, json.loads(data))
    except (ValueError, KeyError, TypeError) as error:
        answer.error = f"not understood: {error!r}"
        return answer
    if answer.finish_reason is None:
        answer.error = answer.error or "the stream ended early"
    elif not answer.tokens:
        answer.tokens, answer.counted = len(answer.times), False
    return answer


def _read_event(answer: Answer, arrived: float, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = str(event["error"])[:300]
        return
    if usage := event.get("usage"):
        answer.tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        details = usage.get("completion_tokens_details") or {}
        answer.accepted_prediction_tokens = details.get("accepted_prediction_tokens") or 0
    if metrics := event.get("metrics"):
        answer.speculation = metrics.get("speculative_decoding") or {}
    for choice in event.get("choices", []):
        delta = choice.get("delta") or {}
        text = (delta.get("content") or "") + (delta.get("reasoning_content") or "")
        if text:
            answer.times.append(arrived)
            answer.text += text
        if choice.get("finish_reason"):
            answer.end, answer.finish_reason = arrived, choice["finish_reason"]
