"""The bodies of the two generating routes. An unknown field is 400 naming it; so is one we know and cannot honour."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from server.openai.errors import invalid
from server.openai.messages import Messages
from server.openai.prediction import Prediction
from server.openai.sampling import INT32, MAX_TOP_LOGPROBS, SamplingFields
from server.openai.strict import Pairs
from server.openai.token_ids import all_integers
from server.openai.unsupported import only

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MAX_PROMPTS = 256
MAX_CHOICES = 1024  # prompts x n

TokenCount = Annotated[int, Field(lt=INT32)]


class ChatRequest(SamplingFields):
    messages: Messages
    max_tokens: Annotated[TokenCount, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[TokenCount, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    prediction: Prediction | None = None
    # as in vLLM
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # OpenAI's, and without effect on the answer
    metadata: Pairs | None = None
    store: bool | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: Pairs | None = None
    # OpenAI's, and not implemented
    service_tier: Annotated[str | None, only("auto", "default")] = None
    response_format: Annotated[Pairs | None, only({"type": "text"})] = None
    tools: Annotated[list[None] | None, only([])] = None
    tool_choice: Annotated[str | None, only("none", "auto")] = None
    functions: Annotated[list[None] | None, only([])] = None
    function_call: Annotated[str | None, only("none", "auto")] = None
    modalities: Annotated[list[str] | None, only(["text"])] = None
    audio: Annotated[None, only()] = None
    reasoning_effort: Annotated[str | None, only("none")] = None
    verbosity: Annotated[str | None, only("medium")] = None
    web_search_options: Annotated[None, only()] = None
    moderation: Annotated[None, only()] = None

    def check_together(self) -> None:
        super().check_together()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise invalid("'max_tokens' and 'max_completion_tokens' contradict each other.", "max_tokens")

    @property
    def token_limit(self) -> int | None:
        """The most tokens the answer may have; None: as many as the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def token_limit_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A text, a list of texts, token ids or a list of them -> a list of prompts of one kind."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        kinds = set(map(type, value))
        if kinds == {str}:
            return value
        if kinds == {int}:
            return [value]
        if kinds == {list} and all(map(all_integers, value)):
            return value
    raise PydanticCustomError("prompt_type", "expected a text, a list of texts, token ids or a list of lists of token ids")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
PROMPT_SCHEMA = {"anyOf": [_TEXT, _IDS, *({"type": "array", "items": one, "minItems": 1} for one in (_TEXT, _IDS))]}


class CompletionRequest(SamplingFields):
    prompt: Annotated[Any, AfterValidator(_prompts), Field(max_length=MAX_PROMPTS), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[TokenCount, Field(ge=0)] | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    prediction: Prediction | None = None
    add_special_tokens: bool | None = None
    # OpenAI's, and not implemented
    suffix: Annotated[str | None, only("")] = None
    best_of: int | None = None

    def check_together(self) -> None:
        super().check_together()
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise invalid(f"The number of prompts times 'n' may be at most {MAX_CHOICES}.", "n")
        if self.best_of not in (None, self.n or 1):
            raise invalid("'best_of' is not supported unless it equals 'n'.", "best_of", "unsupported_parameter")

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Echo shows the prompt's tokens beside the answer's."""
        if not self.echo or self.logprobs is None:
            return self.prompt_logprobs
        return max(self.logprobs, self.prompt_logprobs or 0)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return self.prompt
