"""The fields both generating routes share: types and bounds, and how they become the engine's SamplingParams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from engine.request import Request, SamplingParams, Speculation
from server.openai.choice import TextRules
from server.openai.errors import invalid
from server.openai.speculation import Choice
from server.openai.strict import Strict
from server.openai.token_ids import check_ids
from server.openai.unsupported import only

if TYPE_CHECKING:
    from server.tokenizer import Tokenizer

MAX_N = 128
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_STOP_IDS = 256
INT64 = 1 << 63
INT32 = 1 << 31

Value = TypeVar("Value")

GREEDY_BELOW = 1e-5  # logits divided by less would overflow; at this temperature the law is one-hot anyway
TOP_P_FLOOR = 1e-6  # below any likeliest token's probability (1 / vocabulary), so it keeps exactly that token, as 0 does


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _biases(value: object) -> object:
    """JSON's keys are strings: only the plain decimal form of a token id is one."""
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        return value  # the declared type refuses it
    if not all(key.isascii() and key.isdigit() and len(key) <= 9 and str(int(key)) == key for key in value):
        raise PydanticCustomError("token_id", "every key must be a token id")
    return {int(key): bias for key, bias in value.items()}


def _unpadded(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("blank", "it must hold more than white space")
    return value


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)]
TokenId = Annotated[int, Field(ge=0, lt=INT32)]  # below the vocabulary too; that is checked when the vocabulary is known
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS), AfterValidator(_unpadded)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far in every chunk
    include_obfuscation: Annotated[bool | None, only(False)] = None


class SamplingFields(Strict):
    model: str
    n: int | None = Field(None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[Stops | None, BeforeValidator(_as_list, json_schema_input_type=Stop | Stops | None)] = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Biases | None, BeforeValidator(_biases)] = None
    user: str | None = None
    # beyond OpenAI, as in vLLM
    top_k: int | None = Field(None, ge=-1, lt=INT32)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    min_tokens: int | None = Field(None, ge=0, lt=INT32)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, fail_fast=True)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = Field(None, ge=-INT32, lt=INT32)
    cache_salt: str | None = Field(None, min_length=1, max_length=128)
    # ours
    speculation: Choice = None
    include_speculation: bool | None = None

    def check_together(self) -> None:
        """What no field can say alone. Raises ApiError 400."""
        if self.stream_options is not None and not self.stream:
            raise invalid("'stream_options' is only allowed when 'stream' is true.", "stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid("'prompt_logprobs' is not available when 'stream' is true.", "prompt_logprobs")

    @property
    def num_prompt_logprobs(self) -> int | None:
        """What the engine is asked for."""
        return self.prompt_logprobs

    def to_params(
        self, max_tokens: int, logprobs: int | None, vocab_size: int, bad_words: list[list[int]], drawn_seed: int
    ) -> SamplingParams:
        """Raises ApiError 400 for a token id outside the vocabulary and for min_tokens above max_tokens.

        `drawn_seed` is for a request without one: from here on the answer is a pure function of the request.
        """
        if (self.min_tokens or 0) > max_tokens:
            message = f"'min_tokens' ({self.min_tokens}) is larger than the most tokens the answer may have ({max_tokens})."
            raise invalid(message, "min_tokens")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            check_ids(getattr(self, name) or (), vocab_size, name)
        for word in bad_words:
            check_ids(word, vocab_size, "bad_words")
        temperature = or_else(self.temperature, 1.0)
        top_k = or_else(self.top_k, 0)
        return SamplingParams(
            max_tokens=max_tokens,
            seed=drawn_seed if self.seed is None else self.seed % (1 << 64),
            temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
            top_p=max(or_else(self.top_p, 1.0), TOP_P_FLOOR),
            top_k=top_k if 0 < top_k < vocab_size else 0,
            min_p=or_else(self.min_p, 0.0),
            repetition_penalty=or_else(self.repetition_penalty, 1.0),
            presence_penalty=or_else(self.presence_penalty, 0.0),
            frequency_penalty=or_else(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            allowed_token_ids=None if self.allowed_token_ids is None else sorted(set(self.allowed_token_ids)),
            bad_words=bad_words,
            min_tokens=self.min_tokens or 0,
            stop_token_ids=sorted(set(self.stop_token_ids or ())),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
        )

    def to_request(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        prediction_ids: list[int],
        speculation: Speculation,
        arrival: float,
    ) -> Request:
        return Request(
            request_id=request_id,
            prompt_ids=prompt_ids,
            params=params,
            n=self.n or 1,
            prediction_ids=prediction_ids,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            speculation=speculation,
            report_usage=bool(self.stop),
            arrival_time=arrival,
        )

    def text_rules(self, *, each_token: bool, silent: bool = False) -> TextRules:
        return TextRules(
            stop=tuple(self.stop or ()),
            include_stop=bool(self.include_stop_str_in_output),
            skip_special_tokens=or_else(self.skip_special_tokens, True),
            min_tokens=self.min_tokens or 0,
            each_token=each_token or bool(self.return_token_ids),
            silent=silent,
        )


def or_else(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def bad_word_ids(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """A word is banned at the start of a line and after a space, which are different tokens in most vocabularies."""
    found = []
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in found:
                found.append(ids)
    return found
