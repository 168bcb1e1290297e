"""What must hold for any request that reaches the engine, whoever sent it.

The front end checks the same and more, with better words; this is the second lock. A token id outside the vocabulary or
a NaN among the parameters would otherwise reach the kernels that the whole batch shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

from engine.messages import EngineInfo
from engine.request import Request, SamplingParams, Speculation

MAX_SAMPLES = 128
MAX_LOGPROBS = 1024


def check_request(request: Request, info: EngineInfo) -> None:
    """Raises ValueError("field: why")."""
    params = request.params
    _require(request.prompt_ids, "prompt", "must not be empty")
    _check_ids("prompt", request.prompt_ids, info.vocab_size)
    _check_ids("prediction", request.prediction_ids, info.vocab_size)
    _require(1 <= request.n <= MAX_SAMPLES, "n", f"must be between 1 and {MAX_SAMPLES}")
    _require(params.max_tokens >= 1, "max_tokens", "must be at least 1")
    length = len(request.prompt_ids) + params.max_tokens
    _require(
        length <= info.max_model_len,
        "max_tokens",
        f"{len(request.prompt_ids)} prompt tokens and {params.max_tokens} more are {length}, "
        f"but the context length is {info.max_model_len}",
    )
    _check_numbers(params)
    _check_token_lists(params, info.vocab_size)
    _check_logprobs(params, info.vocab_size)
    _check_speculation(request.speculation, info)


def _require(condition: object, name: str, why: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {why}")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    ids = ids if isinstance(ids, list) else list(ids)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise ValueError(f"{name}: token ids must be between 0 and {vocab_size - 1}")


def _check_numbers(params: SamplingParams) -> None:
    # Written so that NaN fails every one of them.
    _require(0 <= params.seed < 2**64, "seed", "must be an unsigned 64-bit integer")
    _require(params.temperature >= 0 and isfinite(params.temperature), "temperature", "must be 0 or more, and finite")
    _require(0 < params.top_p <= 1, "top_p", "must be above 0 and at most 1")
    _require(params.top_k >= 0, "top_k", "must be 0 (all) or more")
    _require(0 <= params.min_p <= 1, "min_p", "must be between 0 and 1")
    _require(
        params.repetition_penalty > 0 and isfinite(params.repetition_penalty), "repetition_penalty", "must be above 0, and finite"
    )
    _require(-2 <= params.presence_penalty <= 2, "presence_penalty", "must be between -2 and 2")
    _require(-2 <= params.frequency_penalty <= 2, "frequency_penalty", "must be between -2 and 2")
    _require(0 <= params.min_tokens <= params.max_tokens, "min_tokens", "must be between 0 and max_tokens")


def _check_token_lists(params: SamplingParams, vocab_size: int) -> None:
    _check_ids("logit_bias", params.logit_bias, vocab_size)
    _require(all(map(isfinite, params.logit_bias.values())), "logit_bias", "biases must be finite")
    if params.allowed_token_ids is not None:
        _require(params.allowed_token_ids, "allowed_token_ids", "must not be empty")
        _check_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
    _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    for word in params.bad_words:
        _require(word, "bad_words", "must not contain an empty word")
        _check_ids("bad_words", word, vocab_size)


def _check_logprobs(params: SamplingParams, vocab_size: int) -> None:
    most = min(MAX_LOGPROBS, vocab_size)
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        _require(value is None or 0 <= value <= most, name, f"must be between 0 and {most}")


def _check_speculation(wanted: Speculation, info: EngineInfo) -> None:
    for name in wanted.drafters or ():
        _require(name in info.drafters, "speculation.drafter", f"{name!r} is not configured; there is {_names(info.drafters)}")
    _require(wanted.max_nodes is None or wanted.max_nodes >= 0, "speculation.max_nodes", "must be 0 or more")
    known = info.verifiers or [info.verifier]
    _require(
        wanted.verifier is None or wanted.verifier in known,
        "speculation.verifier",
        f"{wanted.verifier!r} cannot be chosen; there is {_names(known)}",
    )


def _names(names: list[str]) -> str:
    return ", ".join(names) or "none"
