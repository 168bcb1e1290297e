"""What a client asked for, as the engine sees it: token ids and numbers, no text. Immutable; crosses the process border."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the target law is shaped and when a sequence ends. Every field is range-checked before it gets here.

    `seed` is always set: the front end draws one when the client gave none, so that a sequence is a pure function of
    (model, prompt, parameters, seed) and survives preemption or a change of batch unchanged.
    """

    max_tokens: int
    seed: int = 0  # unsigned 64 bit
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] | None = None
    bad_words: list[list[int]] = []  # token sequences that must never be completed
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logprobs: int | None = None  # None = none, 0 = the chosen token, k = also the k likeliest
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """No noise: the best token wins. Below this temperature noise could not be told from rounding."""
        return self.temperature < 1e-5


class Speculation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a request asks of speculation, within what the server is configured for. None leaves the choice to the policy."""

    off: bool = False  # plain decoding
    drafters: list[str] | None = None  # only these, each one of the configured drafters
    max_nodes: int | None = None  # most draft nodes per step
    verifier: str | None = None  # one of those the configuration allows (EngineInfo.verifiers)


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One client request. A request with n = 4 becomes four `Sequence`s with sample indices 0..3."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    n: int = 1
    prediction_ids: list[int] = []  # OpenAI `prediction`: used as a draft, never as a constraint
    priority: int = 0  # lower runs first (vLLM's convention); ties by arrival
    cache_salt: str = ""  # prefix cache and shared drafter state are never shared across salts
    speculation: Speculation = Speculation()
    report_usage: bool = False  # every delta carries the usage so far: the front end may end the request itself (stop strings)
    arrival_time: float = 0.0  # time.monotonic() of the front end, seconds (CLOCK_MONOTONIC: one clock for all processes)
