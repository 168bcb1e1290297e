"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from server.frontend import Frontend, frontend
from server.openai import body
from server.openai.errors import invalid
from server.openai.limits import TOKENIZER_CHARS, TOKENIZER_IDS, check_tokenizer_volume
from server.openai.messages import Messages
from server.openai.prompts import chat_chars, encode, encode_chat, template_options
from server.openai.sampling import or_else
from server.openai.strict import Strict
from server.openai.token_ids import all_integers, check_ids

router = APIRouter()

INLINE_IDS = 4096  # about a millisecond


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None  # for a prompt; a chat template writes its own
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


def _integers(value: list[Any]) -> list[int]:
    if not all_integers(value):
        raise PydanticCustomError("token_ids", "expected token ids")
    return value


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[Any], AfterValidator(_integers), Field()]


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    front = frontend(request)
    fields = await body.read(request, TokenizeRequest, front.config.max_body_bytes)
    _check_model(front, fields.model)
    info = front.check_ready()
    with front.admission.slot():
        ids = await _ids(front, fields)
        return await _reply(len(ids), lambda: _tokens(front, ids, info.max_model_len, bool(fields.return_token_strs)))


def _tokens(front: Frontend, ids: list[int], max_model_len: int, named: bool) -> dict[str, Any]:
    names = [front.tokenizer.token_text(i) for i in ids] if named else None
    return {"count": len(ids), "max_model_len": max_model_len, "tokens": ids, "token_strs": names}


async def _reply(size: int, work: Callable[[], dict[str, Any]]) -> Response:
    """What `work` makes of `size` ids; of many, beside the event loop."""

    def body() -> bytes:
        return msgspec.json.encode(work())

    return Response(body() if size <= INLINE_IDS else await asyncio.to_thread(body), media_type="application/json")


async def _ids(front: Frontend, fields: TokenizeRequest) -> list[int]:
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("Either 'prompt' or 'messages' is needed, not both.", "prompt")
    limit = front.info.max_model_len
    if fields.prompt is not None:
        check_tokenizer_volume(len(fields.prompt), TOKENIZER_CHARS, limit, "prompt")
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(fields, name) is not None:
                raise invalid(f"'{name}' needs 'messages'.", name)
        return (await encode(front, [fields.prompt], or_else(fields.add_special_tokens, True), "prompt"))[0]
    if fields.add_special_tokens:
        raise invalid("'add_special_tokens' needs 'prompt': the chat template writes its own.", "add_special_tokens")
    options = template_options(fields.add_generation_prompt, fields.continue_final_message)
    messages = [message.for_template() for message in fields.messages or []]
    check_tokenizer_volume(chat_chars(messages), TOKENIZER_CHARS, limit, "messages")
    return await encode_chat(front, messages, options)


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    front = frontend(request)
    fields = await body.read(request, DetokenizeRequest, front.config.max_body_bytes)
    _check_model(front, fields.model)
    info = front.check_ready()
    check_tokenizer_volume(len(fields.tokens), TOKENIZER_IDS, info.max_model_len, "tokens")
    check_ids(fields.tokens, front.vocab_size(), "tokens")
    with front.admission.slot():
        decode = front.tokenizer.decode
        return await _reply(len(fields.tokens), lambda: {"prompt": decode(fields.tokens, skip_special_tokens=False)})


def _check_model(front: Frontend, name: str | None) -> None:
    if name is not None:
        front.check_model(name)
