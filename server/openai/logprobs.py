"""Logprobs in the three shapes clients know: chat's, completions', and vLLM's prompt_logprobs."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from engine.messages import TokenLogprobs
from server.openai.choice import Token

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

LEAST = -9999.0  # OpenAI's word for "next to impossible"; JSON has no -inf


def finite(logprob: float) -> float:
    return logprob if logprob > LEAST else LEAST  # NaN is not greater either


def for_chat(tokenizer: Tokenizer, tokens: Iterable[Token], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion; one entry per token of the answer, the one that ended it included."""
    return {"content": [_chat_entry(tokenizer, token, top) for token in tokens], "refusal": None}


def _chat_entry(tokenizer: Tokenizer, token: Token, top: int) -> dict[str, Any]:
    assert token.logprobs is not None
    entry = _named(tokenizer, token.id, token.logprobs.logprob)
    entry["top_logprobs"] = [_named(tokenizer, i, logprob) for i, logprob in token.logprobs.top[:top]]
    return entry


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    name, raw = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    return {"token": name, "logprob": finite(logprob), "bytes": list(raw)}


class CompletionLogprobs:
    """`choices[].logprobs` of /v1/completions: parallel lists. Keeps the text offset from one chunk to the next.

    A prompt's first token follows nothing, so the model gives it no probability: it is listed as certain (0.0, no
    alternatives), because OpenAI's types allow no null in these lists.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, skip_special_tokens: bool) -> None:
        self.tokenizer = tokenizer
        self.top = top
        self.offset = 0  # characters of the text so far; a token's offset is where its first whole character begins
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def lists(self, tokens: Iterable[Token], written: str = "") -> dict[str, list[Any]]:
        """`written`: the prompt as its client wrote it, where these are its tokens; special ones that stand there are shown."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            name = self.tokenizer.token_text(token.id)
            lists["tokens"].append(name)
            lists["text_offset"].append(self.offset)
            lists["token_logprobs"].append(finite(token.logprobs.logprob) if token.logprobs else 0.0)
            lists["top_logprobs"].append(self._top(name, token.logprobs) if token.logprobs else {})
            if token.id not in self._hidden or (written and written.startswith(name, self.offset)):
                self.offset += len(self._decoder.decode(self.tokenizer.token_bytes(token.id)))
        return lists

    def _top(self, name: str, logprobs: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the one that was emitted. Of tokens with the same text the likeliest counts."""
        top: dict[str, float] = {}
        for i, logprob in logprobs.top[: self.top]:
            top.setdefault(self.tokenizer.token_text(i), finite(logprob))
        top.setdefault(name, finite(logprobs.logprob))
        return top


def for_prompt(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], top: int
) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs: per prompt token the likeliest ids and its own, by id; null for the first."""
    return [None if entry is None else _by_id(tokenizer, i, entry, top) for i, entry in zip(prompt_ids, logprobs, strict=True)]


def _by_id(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, top: int) -> dict[str, Any]:
    ranked = [(i, logprob, rank) for rank, (i, logprob) in enumerate(logprobs.top[:top], start=1)]
    if all(i != token_id for i, _, _ in ranked):
        ranked.append((token_id, logprobs.logprob, logprobs.rank))
    return {
        str(i): {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(i)}
        for i, logprob, rank in ranked
    }
