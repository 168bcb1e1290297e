"""One growing list of token ids. `commit` is the only way it grows and the only place that ends it."""

from __future__ import annotations

from engine.messages import FinishReason
from engine.request import Request, SamplingParams


class Sequence:
    """Token ids of one sample of a request, and how far the model has computed them.

    The scheduler and every worker keep one of these per sequence; both apply the same commits, so they never differ.
    """

    __slots__ = (
        "block_ids",
        "eos_ids",
        "finish_reason",
        "num_computed",
        "num_prompt",
        "request",
        "sample_index",
        "seq_id",
        "stop_token_id",
        "tokens",
    )

    def __init__(self, seq_id: int, request: Request, sample_index: int = 0, eos_ids: frozenset[int] = frozenset()) -> None:
        self.seq_id = seq_id
        self.request = request
        self.sample_index = sample_index
        self.eos_ids = eos_ids
        self.tokens: list[int] = list(request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0  # tokens whose KV is in the cache; tokens[num_computed:] still have to be fed
        self.block_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Committed tokens that still have to be fed; 1 (the root) while decoding, never 0 before the end."""
        return len(self.tokens) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def commit(self, token_ids: list[int]) -> int:
        """Append a verdict's tokens in order up to and including the one that ends the sequence.

        Returns how many were kept; the rest of the verdict lies behind the end and is dropped.
        """
        params = self.params
        for kept, token in enumerate(token_ids, start=1):
            self.tokens.append(token)
            # min_tokens masks these ids in the target law, so no second check is needed here.
            if (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids:
                self.finish_reason, self.stop_token_id = "stop", token
                return kept
            if self.num_output >= params.max_tokens:
                self.finish_reason = "length"
                return kept
        return len(token_ids)
