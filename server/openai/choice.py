"""One choice of an answer in the making: tokens from the engine in, text that may be shown out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.messages import FinishReason, SequenceUsage, TokenDelta, TokenLogprobs
from server.detokenizer import Detokenizer, Piece

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How tokens become the text of an answer."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    each_token: bool = False  # fragments name their tokens: asked for by logprobs and return_token_ids
    silent: bool = False  # max_tokens = 0: the engine's one token is not shown and not counted


class Token(NamedTuple):
    id: int
    logprobs: TokenLogprobs | None


class Fragment(NamedTuple):
    """What one engine step added to one choice. `tokens` are those whose text is complete with this fragment."""

    choice: int
    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None


NO_TOKENS: list[Token] = []


class Choice:
    __slots__ = ("finish_reason", "index", "num_tokens", "usage", "_detokenizer", "_pending", "_rules")

    def __init__(self, index: int, tokenizer: Tokenizer, rules: TextRules) -> None:
        self.index = index
        self.num_tokens = 0  # up to and including the one that ended the answer
        self.finish_reason: FinishReason | None = None
        self.usage: SequenceUsage | None = None
        self._rules = rules
        self._pending: list[Token] = []  # tokens none of whose text has been shown
        self._detokenizer = Detokenizer(
            tokenizer, rules.stop, rules.include_stop, rules.skip_special_tokens, min_tokens=rules.min_tokens
        )

    def push(self, delta: TokenDelta) -> Fragment:
        """Take the tokens of one step. How the engine grouped tokens into steps never shows in text, tokens or counts."""
        if self._rules.silent:
            self.finish_reason = "length"
            return Fragment(self.index, "", NO_TOKENS, "length")
        piece, tokens = self._take_each(delta) if self._rules.each_token else self._take(delta)
        self.num_tokens += piece.num_tokens
        self.finish_reason = "stop" if piece.stopped is not None else delta.finish_reason
        return Fragment(self.index, piece.text, tokens, self.finish_reason)

    def _visible(self, delta: TokenDelta) -> int:
        """How many of the tokens have text: the one that ended the sequence has none, unless it was asked for."""
        return len(delta.token_ids) - (delta.stop_token_id is not None and not self._rules.include_stop)

    def _take(self, delta: TokenDelta) -> tuple[Piece, list[Token]]:
        ids = delta.token_ids
        piece = self._detokenizer.push(ids[: self._visible(delta)], delta.finish_reason is not None)
        return (piece if piece.stopped is not None else piece._replace(num_tokens=len(ids))), NO_TOKENS

    def _take_each(self, delta: TokenDelta) -> tuple[Piece, list[Token]]:
        """Token by token, so that each fragment names exactly the tokens whose text it shows."""
        ids, visible = delta.token_ids, self._visible(delta)
        final = delta.finish_reason is not None
        text, shown, stopped, count = "", [], None, 0
        for count, token in enumerate(ids, start=1):
            last = final and count == len(ids)
            piece = self._detokenizer.push([token] if count <= visible else [], last)
            self._pending.append(Token(token, delta.logprobs[count - 1] if delta.logprobs else None))
            stopped = piece.stopped
            if piece.text or last or stopped is not None:
                text += piece.text
                shown += self._pending
                self._pending = []
            if stopped is not None:
                break
        if final and not ids:
            text, shown = self._detokenizer.push([], True).text, self._pending
        return Piece(text, count, stopped), shown
