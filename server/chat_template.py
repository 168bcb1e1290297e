"""A model's chat template, rendered as transformers renders it, without transformers (its import costs 1.6 s and 300 MB).

The template is part of the model and trusted as little as the rest of its files: it runs in jinja2's immutable sandbox.
Text of a client is only ever data to it, never template source.
"""

from __future__ import annotations

import copy
import datetime
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training masks: to us it is its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter escapes <, > and &; templates are written for one that does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().astimezone().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _strftime_now
    return env


class ChatTemplate:
    """One compiled template. `special` gives it the model's special tokens by role: bos_token, eos_token, ...

    Raises ValueError when the source is not a template.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        self.special = dict(special)
        try:
            self.template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template is broken: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The prompt text. With `continue_final_message` it ends where the last message's content ends.

        Raises ValueError, fit for the client, when the template refuses the messages or cannot render them.
        """
        if not messages:
            raise ValueError("messages must not be empty")
        if not continue_final_message:
            return self._run(messages, add_generation_prompt)
        if add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message cannot both be true")
        end = f"\ue000{secrets.token_hex(8)}\ue001"  # a mark no client can foresee
        text, mark, _ = self._run(_append_to_last(messages, end), False).rpartition(end)
        if not mark:
            raise ValueError("the model's chat template does not show the final message, so it cannot be continued")
        return text

    def _run(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        values = {"tools": None, "documents": None, **self.special}
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, **values)
        except jinja2.TemplateError as error:  # raise_exception(...) too
            raise ValueError(f"the model's chat template refuses these messages: {error}") from None
        except Exception as error:  # it is code: a missing or null field ends in a TypeError, a KeyError, ...
            raise ValueError(f"the model's chat template cannot render these messages: {error}") from None


def _append_to_last(messages: Sequence[Mapping[str, Any]], mark: str) -> list[Mapping[str, Any]]:
    last = copy.deepcopy(dict(messages[-1]))
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + mark
    elif isinstance(content, list) and content and isinstance(content[-1], dict) and isinstance(content[-1].get("text"), str):
        content[-1]["text"] += mark
    else:
        raise ValueError("continue_final_message needs a final message that ends in text")
    return [*messages[:-1], last]
