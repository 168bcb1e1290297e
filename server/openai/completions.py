"""POST /v1/completions: the same as chat without a template, for one prompt or many, with echo."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.frontend import Frontend, frontend
from server.openai import body, chunks, prompts
from server.openai.answer import Answer
from server.openai.choice import Fragment, Token
from server.openai.generation import Generation
from server.openai.limits import check_logprob_volume
from server.openai.logprobs import CompletionLogprobs
from server.openai.respond import respond
from server.openai.sampling import bad_word_ids, or_else
from server.openai.schema import COMPLETION_TOKENS, CompletionRequest
from server.openai.speculation import to_speculation

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    arrival = time.monotonic()
    front = frontend(request)
    fields = await body.read(request, CompletionRequest, front.config.max_body_bytes)
    fields.check_together()
    front.check_model(fields.model)
    front.check_ready()
    with ExitStack() as slot:
        slot.enter_context(front.admission.slot(len(fields.prompts)))
        answer = await prepare(front, fields, arrival)
        return await respond(request, front, answer, bool(fields.stream), slot)


async def prepare(front: Frontend, fields: CompletionRequest, arrival: float) -> CompletionAnswer:
    """Raises ApiError 400 for what only the tokenizer or the vocabulary can refuse."""
    speculation = to_speculation(fields.speculation, front.info)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    all_ids = await _encode(front, fields)
    rooms = [prompts.answer_room(front, len(ids), fields.max_tokens, COMPLETION_TOKENS, "max_tokens") for ids in all_ids]
    n, prompt_tokens = fields.n or 1, sum(map(len, all_ids))
    check_logprob_volume(n, sum(rooms), fields.logprobs, "logprobs")
    check_logprob_volume(n, prompt_tokens, fields.logprobs if fields.echo else None, "logprobs")
    check_logprob_volume(n, prompt_tokens, fields.prompt_logprobs, "prompt_logprobs")
    bad_words = bad_word_ids(fields.bad_words or [], front.tokenizer)
    prediction_ids = await prompts.encode_prediction(front, fields.prediction, max(rooms))
    requests = []
    for position, (ids, room) in enumerate(zip(all_ids, rooms, strict=True)):
        params = fields.to_params(room, fields.logprobs, front.vocab_size(), bad_words, front.draw_seed())
        requests.append(fields.to_request(f"{answer_id}-{position}", ids, params, prediction_ids, speculation, arrival))
    rules = fields.text_rules(each_token=fields.logprobs is not None, silent=fields.max_tokens == 0)
    return CompletionAnswer(front, fields, Generation(front, requests, rules), answer_id)


async def _encode(front: Frontend, fields: CompletionRequest) -> list[list[int]]:
    texts = [prompt for prompt in fields.prompts if isinstance(prompt, str)]
    for text in texts:
        prompts.check_chars(front, len(text), "prompt")
    given = [prompt for prompt in fields.prompts if not isinstance(prompt, str)]
    all_ids = given or await prompts.encode(front, texts, or_else(fields.add_special_tokens, True), "prompt")
    for ids in all_ids:
        prompts.check_prompt(front, ids, "prompt")
    return all_ids


class CompletionAnswer(Answer):
    def __init__(self, front: Frontend, fields: CompletionRequest, generation: Generation, answer_id: str) -> None:
        super().__init__(front, fields, generation, answer_id, "text_completion")
        self.prompts = fields.prompts
        self.echo = bool(fields.echo)
        self.skip_special_tokens = or_else(fields.skip_special_tokens, True)
        self.lists: list[CompletionLogprobs] | None = None
        if fields.logprobs is not None:
            top, skip = fields.logprobs, self.skip_special_tokens
            self.lists = [CompletionLogprobs(front.tokenizer, top, skip) for _ in generation.choices]

    def choice(self, index: int, text: str, tokens: list[Token]) -> dict[str, Any]:
        return {
            "index": index,
            "text": self._prompt_text(index) + text if self.echo else text,
            "logprobs": self._logprobs(index, tokens, echoed=self.echo),
            "finish_reason": self.generation.choices[index].finish_reason,
            **self.token_extras(tokens),
            **self.prompt_extras(self._position(index)),
        }

    def opening(self, index: int) -> bytes | None:
        extras = self.prompt_extras(self._position(index))
        if not (self.echo or extras):
            return None
        text = self._prompt_text(index) if self.echo else ""
        shown = self._logprobs(index, [], echoed=True) if self.echo else None
        return chunks.choice(index, chunks.completion_text(text), shown, None, extras)

    def chunk_choice(self, fragment: Fragment) -> bytes:
        index, text, tokens, finish_reason = fragment
        shown = self._logprobs(index, tokens) if tokens else None
        return chunks.choice(index, chunks.completion_text(text), shown, finish_reason, self.token_extras(tokens))

    def _position(self, index: int) -> int:
        """Which prompt a choice continues."""
        return index // self.generation.n

    def _prompt_text(self, index: int) -> str:
        prompt = self.prompts[self._position(index)]
        return prompt if isinstance(prompt, str) else self.front.tokenizer.decode(prompt, self.skip_special_tokens)

    def _prompt_tokens(self, index: int) -> list[Token]:
        position = self._position(index)
        entries = self.generation.prompt_logprobs.get(position, [])
        return list(map(Token, self.generation.requests[position].prompt_ids, entries))

    def _logprobs(self, index: int, tokens: list[Token], echoed: bool = False) -> dict[str, Any] | None:
        """Of these tokens of the answer, behind those of the prompt if it is echoed with them."""
        if self.lists is None:
            return None
        lists = self.lists[index]
        if not echoed:
            return lists.lists(tokens)
        prompt = self.prompts[self._position(index)]
        of_prompt = lists.lists(self._prompt_tokens(index), prompt if isinstance(prompt, str) else "")
        return {name: values + more for (name, values), more in zip(of_prompt.items(), lists.lists(tokens).values(), strict=True)}
