"""What chat and completions have in common: an answer as one body or as a stream, from the same fragments."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from server.openai.choice import Fragment, Token
from server.openai.chunks import Chunks
from server.openai.generation import Generation
from server.openai.logprobs import for_prompt
from server.openai.report import speculation_report
from server.openai.sampling import SamplingFields
from server.openai.speculation import is_lossless
from server.openai.sse import DONE

if TYPE_CHECKING:
    from server.frontend import Frontend

INLINE_TOKENS = 256  # with names or logprobs: at twenty alternatives each, about 5 ms of work


class Answer(ABC):
    def __init__(self, front: Frontend, fields: SamplingFields, generation: Generation, answer_id: str, kind: str) -> None:
        self.front = front
        self.fields = fields
        self.generation = generation
        self.speculation = generation.requests[0].speculation  # of all its prompts
        self.lossless = is_lossless(self.speculation, front.info)
        self.head = {
            "id": answer_id,
            "object": kind,
            "created": int(time.time()),
            "model": front.model,
            "system_fingerprint": front.fingerprint(self.lossless),
        }

    @abstractmethod
    def choice(self, index: int, text: str, tokens: list[Token]) -> dict[str, Any]:
        """A finished choice of a body."""

    @abstractmethod
    def opening(self, index: int) -> bytes | None:
        """What a stream says of a choice before its text, as the choice of a chunk."""

    @abstractmethod
    def chunk_choice(self, fragment: Fragment) -> bytes:
        """A fragment as the choice of a chunk."""

    def beside_choices(self) -> dict[str, Any]:
        """Further fields of a body, and of a stream's first chunk."""
        return {}

    async def whole(self) -> bytes:
        """The body. One with many logprobs is put together beside the event loop: a million of them take seconds."""
        texts: list[list[str]] = [[] for _ in self.generation.choices]
        tokens: list[list[Token]] = [[] for _ in self.generation.choices]
        async with aclosing(self.generation.fragments()) as fragments:
            async for fragment in fragments:
                texts[fragment.choice].append(fragment.text)
                tokens[fragment.choice] += fragment.tokens
        if sum(map(len, tokens)) + sum(map(len, self.generation.prompt_logprobs.values())) > INLINE_TOKENS:
            return await asyncio.to_thread(self._body, texts, tokens)
        return self._body(texts, tokens)

    def _body(self, texts: list[list[str]], tokens: list[list[Token]]) -> bytes:
        choices = [self.choice(i, "".join(text), own) for i, (text, own) in enumerate(zip(texts, tokens, strict=True))]
        body = self.head | {"choices": choices, "usage": self.generation.usage()} | self.beside_choices() | self.metrics()
        return msgspec.json.encode(body)

    async def events(self) -> AsyncGenerator[bytes]:
        options = self.fields.stream_options
        final_usage = bool(options and options.include_usage)
        running_usage = bool(options and options.continuous_usage_stats)
        writer = Chunks(self.head, final_usage)
        opened: set[int] = set()
        async with aclosing(self.generation.fragments()) as fragments:
            async for fragment in fragments:
                usage = self.generation.usage() if running_usage else None
                if fragment.choice not in opened:
                    if opening := self.opening(fragment.choice):
                        yield writer.chunk(opening, usage, None if opened else self.beside_choices())
                    opened.add(fragment.choice)
                if fragment.text or fragment.tokens or fragment.finish_reason:
                    last = not final_usage and self.generation.finished
                    yield writer.chunk(self.chunk_choice(fragment), usage, self.metrics() if last else None)
        if final_usage:
            yield writer.last(self.generation.usage(), self.metrics())
        yield DONE

    def metrics(self) -> dict[str, Any]:
        """What speculation did, for those who asked. An answer that may not be the model's own says so unasked."""
        if self.fields.include_speculation:
            report = self._speculation()
        elif not self.front.info.lossless:
            report = {"lossless": self.lossless}
        else:
            return {}
        return {"metrics": {"speculative_decoding": report}}

    def headers(self) -> dict[str, str]:
        """On a server whose verifier is lossy, every answer says whether it may differ from the model's own."""
        return {} if self.front.info.lossless else {"X-Outrider-Lossless": "true" if self.lossless else "false"}

    def _speculation(self) -> dict[str, Any]:
        info, chosen = self.front.info, self.speculation
        usages = [choice.usage for choice in self.generation.choices if choice.usage is not None]
        limit = 0 if chosen.off else min(chosen.max_nodes or info.max_budget, info.max_budget)
        verifier = chosen.verifier or info.verifier
        return speculation_report(usages, num_spec_tokens=limit, verifier=verifier, lossless=self.lossless)

    def token_extras(self, tokens: list[Token]) -> dict[str, Any]:
        """vLLM's fields of a choice, for those who asked."""
        return {"token_ids": [token.id for token in tokens]} if self.fields.return_token_ids else {}

    def prompt_extras(self, position: int) -> dict[str, Any]:
        """vLLM's fields about the prompt at `position`, for those who asked."""
        extras: dict[str, Any] = {}
        prompt_ids, top = self.generation.requests[position].prompt_ids, self.fields.prompt_logprobs
        if self.fields.return_token_ids:
            extras["prompt_token_ids"] = prompt_ids
        if top is not None:
            entries = self.generation.prompt_logprobs.get(position, [])
            extras["prompt_logprobs"] = for_prompt(self.front.tokenizer, prompt_ids, entries, top)
        return extras
