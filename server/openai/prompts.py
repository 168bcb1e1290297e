"""From what a client wrote to the token ids of a prompt. Long texts are encoded beside the event loop, hopeless ones never."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from server.openai.errors import context_length, invalid
from server.openai.token_ids import check_ids

if TYPE_CHECKING:
    from server.frontend import Frontend
    from server.openai.prediction import Prediction

Ids = TypeVar("Ids")

INLINE_CHARS = 4096  # encoded at once: about a millisecond, less than a thread costs when the loop is busy


async def encode(front: Frontend, texts: list[str], add_special_tokens: bool, param: str) -> list[list[int]]:
    """Token ids of each text. Raises ApiError 400 for text that is not Unicode."""
    encode_one = front.tokenizer.encode
    return await _run(sum(map(len, texts)), lambda: [encode_one(text, add_special_tokens) for text in texts], param)


async def encode_chat(front: Frontend, messages: list[dict[str, str]], options: dict[str, bool]) -> list[int]:
    """The chat template's prompt. Raises ApiError 400 for what the template refuses."""
    tokenizer = front.tokenizer
    chars = chat_chars(messages)
    if chars <= INLINE_CHARS and not tokenizer.guarded and tokenizer.holds_specials(messages):
        chars = INLINE_CHARS + 1  # the first with a special token in it makes the tokenizer prepare for such
    return await _run(chars, lambda: tokenizer.render_chat_ids(messages, **options), "messages")


def chat_chars(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


def template_options(add_generation_prompt: bool | None, continue_final_message: bool | None) -> dict[str, bool]:
    """vLLM's two switches. Raises ApiError 400 when both are true."""
    if add_generation_prompt and continue_final_message:
        message = "'continue_final_message' and 'add_generation_prompt' cannot both be true."
        raise invalid(message, "continue_final_message")
    goes_on = bool(continue_final_message)
    adds = not goes_on if add_generation_prompt is None else add_generation_prompt
    return {"add_generation_prompt": adds, "continue_final_message": goes_on}


async def _run(chars: int, work: Callable[[], Ids], param: str) -> Ids:
    try:
        return work() if chars <= INLINE_CHARS else await asyncio.to_thread(work)
    except ValueError as error:
        raise invalid(f"Invalid '{param}': {error}.", param) from None


async def encode_prediction(front: Frontend, prediction: Prediction | None, max_tokens: int) -> list[int]:
    """The tokens of a prediction, as many as the answer can have; the text behind them is not even encoded."""
    if prediction is None:
        return []
    text = prediction.text()[: max_tokens * front.tokenizer.max_chars_per_token]
    ids = (await encode(front, [text], False, "prediction"))[0][:max_tokens]
    check_ids(ids, front.vocab_size(), "prediction")
    return ids


def check_chars(front: Frontend, chars: int, param: str) -> None:
    """Raises ApiError 400 when so many characters cannot fit the context, whatever they are."""
    limit = front.info.max_model_len
    least = chars // front.tokenizer.max_chars_per_token
    if least >= limit:
        raise too_long(f"at least {least}", limit, param)


def check_prompt(front: Frontend, ids: list[int], param: str) -> None:
    """Raises ApiError 400 for an empty prompt, one that leaves no room for an answer, and foreign token ids."""
    limit = front.info.max_model_len
    if not ids:
        raise invalid(f"Invalid '{param}': the prompt has no tokens.", param)
    if len(ids) >= limit:
        raise too_long(str(len(ids)), limit, param)
    check_ids(ids, front.vocab_size(), param)


def too_long(tokens: str, limit: int, param: str) -> Exception:
    return context_length(
        f"This model's maximum context length is {limit} tokens. The prompt has {tokens} tokens, "
        "which leaves no room for an answer.",
        param,
    )


def answer_room(front: Frontend, num_prompt: int, wanted: int | None, default: int | None, param: str) -> int:
    """The most tokens the answer may have; `wanted` is what the client asked for, 0 counting as the one we must compute.

    Raises ApiError 400 when prompt and answer together exceed the context. A default is cut to the room instead.
    """
    limit = front.info.max_model_len
    room = limit - num_prompt
    if wanted is None:
        return room if default is None else min(default, room)
    if wanted > room:
        message = (
            f"This model's maximum context length is {limit} tokens. You asked for {num_prompt + wanted}: "
            f"{num_prompt} in the prompt and {wanted} in the answer."
        )
        raise context_length(message, param)
    return max(wanted, 1)
