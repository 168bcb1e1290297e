"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.frontend import Frontend, frontend
from server.openai import body, chunks, logprobs, prompts
from server.openai.answer import Answer
from server.openai.choice import Fragment, Token
from server.openai.generation import Generation
from server.openai.limits import check_logprob_volume
from server.openai.respond import respond
from server.openai.sampling import bad_word_ids
from server.openai.schema import ChatRequest
from server.openai.speculation import to_speculation

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    arrival = time.monotonic()
    front = frontend(request)
    fields = await body.read(request, ChatRequest, front.config.max_body_bytes)
    fields.check_together()
    front.check_model(fields.model)
    front.check_ready()
    with ExitStack() as slot:
        slot.enter_context(front.admission.slot())
        answer = await prepare(front, fields, arrival)
        return await respond(request, front, answer, bool(fields.stream), slot)


async def prepare(front: Frontend, fields: ChatRequest, arrival: float) -> ChatAnswer:
    """Raises ApiError 400 for what only the tokenizer, the template or the vocabulary can refuse."""
    speculation = to_speculation(fields.speculation, front.info)
    messages = [message.for_template() for message in fields.messages]
    options = prompts.template_options(fields.add_generation_prompt, fields.continue_final_message)
    prompts.check_chars(front, prompts.chat_chars(messages), "messages")
    prompt_ids = await prompts.encode_chat(front, messages, options)
    prompts.check_prompt(front, prompt_ids, "messages")
    max_tokens = prompts.answer_room(front, len(prompt_ids), fields.token_limit, None, fields.token_limit_name)
    check_logprob_volume(fields.n or 1, max_tokens, fields.num_logprobs, "top_logprobs")
    check_logprob_volume(1, len(prompt_ids), fields.prompt_logprobs, "prompt_logprobs")
    bad_words = bad_word_ids(fields.bad_words or [], front.tokenizer)
    params = fields.to_params(max_tokens, fields.num_logprobs, front.vocab_size(), bad_words, front.draw_seed())
    prediction_ids = await prompts.encode_prediction(front, fields.prediction, max_tokens)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    generation = Generation(
        front,
        [fields.to_request(answer_id, prompt_ids, params, prediction_ids, speculation, arrival)],
        fields.text_rules(each_token=bool(fields.logprobs)),
    )
    return ChatAnswer(front, fields, generation, answer_id)


class ChatAnswer(Answer):
    def __init__(self, front: Frontend, fields: ChatRequest, generation: Generation, answer_id: str) -> None:
        super().__init__(front, fields, generation, answer_id, "chat.completion.chunk" if fields.stream else "chat.completion")
        self.top = fields.num_logprobs

    def choice(self, index: int, text: str, tokens: list[Token]) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": self.generation.choices[index].finish_reason,
            **self.token_extras(tokens),
        }

    def beside_choices(self) -> dict[str, Any]:
        return self.prompt_extras(0)

    def opening(self, index: int) -> bytes:
        return chunks.choice(index, b'"delta":{"role":"assistant","content":""}', None, None, {})

    def chunk_choice(self, fragment: Fragment) -> bytes:
        index, text, tokens, finish_reason = fragment
        # A chunk without tokens has no logprobs to tell, not an empty list of them.
        shown = self._logprobs(tokens) if tokens else None
        return chunks.choice(index, chunks.delta(text), shown, finish_reason, self.token_extras(tokens))

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        return None if self.top is None else logprobs.for_chat(self.front.tokenizer, tokens, self.top)
