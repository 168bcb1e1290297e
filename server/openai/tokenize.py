"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from server.frontend import Frontend, frontend
from server.openai import body
from server.openai.errors import invalid
from server.openai.messages import Messages
from server.openai.prompts import encode, encode_chat, template_options
from server.openai.sampling import or_else
from server.openai.strict import Strict
from server.openai.token_ids import all_integers, check_ids

router = APIRouter()


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
async def tokenize(request: Request) -> dict[str, Any]:
    front = frontend(request)
    fields = await body.read(request, TokenizeRequest, front.config.max_body_bytes)
    _check_model(front, fields.model)
    info = front.check_ready()
    ids = await _ids(front, fields)
    names = [front.tokenizer.token_text(i) for i in ids] if fields.return_token_strs else None
    return {"count": len(ids), "max_model_len": info.max_model_len, "tokens": ids, "token_strs": names}


async def _ids(front: Frontend, fields: TokenizeRequest) -> list[int]:
    if (fields.prompt is None) == (fields.messages is None):
        raise invalid("Either 'prompt' or 'messages' is needed, not both.", "prompt")
    if fields.prompt is not None:
        for name in ("add_generation_prompt", "continue_final_message"):
            if getattr(fields, name) is not None:
                raise invalid(f"'{name}' needs 'messages'.", name)
        return (await encode(front, [fields.prompt], or_else(fields.add_special_tokens, True), "prompt"))[0]
    if fields.add_special_tokens:
        raise invalid("'add_special_tokens' needs 'prompt': the chat template writes its own.", "add_special_tokens")
    options = template_options(fields.add_generation_prompt, fields.continue_final_message)
    return await encode_chat(front, [message.for_template() for message in fields.messages or []], options)


@router.post("/detokenize")
async def detokenize(request: Request) -> dict[str, str]:
    front = frontend(request)
    fields = await body.read(request, DetokenizeRequest, front.config.max_body_bytes)
    _check_model(front, fields.model)
    front.check_ready()
    check_ids(fields.tokens, front.vocab_size(), "tokens")
    return {"prompt": front.tokenizer.decode(fields.tokens, skip_special_tokens=False)}


def _check_model(front: Frontend, name: str | None) -> None:
    if name is not None:
        front.check_model(name)
