"""Limits on what one answer may cost in memory, where every single field is within its own bounds."""

from __future__ import annotations

from server.openai.errors import invalid

MAX_LOGPROB_ENTRIES = 2_000_000  # about 200 MB of JSON
# What /tokenize and /detokenize take, however short the context is: about a second of work, some 200 MB while it lasts.
TOKENIZER_CHARS = 1 << 20
TOKENIZER_IDS = 1 << 18


def check_logprob_volume(sequences: int, tokens: int, top: int | None, param: str) -> None:
    """Raises ApiError 400 when sequences x tokens x (top + 1) logprobs are more than a body should hold."""
    if top is not None and sequences * tokens * (top + 1) > MAX_LOGPROB_ENTRIES:
        message = (
            f"'{param}' asks for {sequences} x {tokens} tokens with {top + 1} logprobs each; "
            f"at most {MAX_LOGPROB_ENTRIES} are given. Set a smaller 'max_tokens', 'n' or '{param}'."
        )
        raise invalid(message, param)


def check_tokenizer_volume(size: int, least: int, max_model_len: int, param: str) -> None:
    """Raises ApiError 400 for more characters or ids than `least` and than several contexts could hold."""
    most = max(least, 8 * max_model_len)
    if size > most:
        raise invalid(f"Invalid '{param}': {size} are more than the {most} that are taken at once.", param)
