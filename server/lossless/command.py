"""`outrider verify-lossless MODEL`: does speculation change answers, with this model on this machine?

One engine, started as `outrider serve` starts it, answers real prompts without speculation and with it, greedily and
seeded, and the token ids are compared. It is a test of a whole installation, not of quality: nothing is scored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.client import EngineClient
from server.config import ServerConfig, engine_parser, settings
from server.lossless import prompts
from server.lossless.report import EXIT_CODES, Report
from server.lossless.trial import Case, Settings, Trial

if TYPE_CHECKING:
    from server.resolve import ResolvedModel
    from server.tokenizer import Tokenizer

PROG = "outrider verify-lossless"
DESCRIPTION = (
    "Compare answers with and without speculation, token by token. Exit code 0: equal (numerical ties allowed), 1: different, "
    "2: it could not be told. Unless a policy is named, --policy fixed drafts at every step."
)


@dataclass(frozen=True, slots=True)
class Command:
    config: ServerConfig
    prompts: list[prompts.Messages]
    settings: Settings
    as_json: bool


def parse(argv: Sequence[str]) -> Command:
    """Raises ConfigError or ValueError, one line, for what cannot be used; OSError for a file that cannot be read."""
    parser = engine_parser(PROG, DESCRIPTION)
    _add_flags(parser)
    config, own = settings(parser, argv)
    changes: dict[str, Any] = {"policy": "fixed", "log_level": "warning"}
    config = config.model_copy(update={name: v for name, v in changes.items() if name not in config.model_fields_set})
    asked = prompts.read(own["prompts"]) if own["prompts"] else prompts.own()
    how = Settings(own["max_tokens"], own["temperature"], own["tie_margin"], own["concurrency"])
    return Command(config, asked[: own["num"]], how, own["json"])


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", type=Path, help="JSON lines (messages, turns, prompt or question) or a text per line; default: our own 16")
    add("--num", type=_at_least(int, 1), default=8, help="how many of them (default: 8)")
    add("--max-tokens", type=_at_least(int, 1), default=64, help="longest answer (default: 64)")
    add("--temperature", type=_at_least(float, 0.01), default=0.7, help="of the seeded answers (default: 0.7)")
    add("--tie-margin", type=_at_least(float, 0), default=0.01, help="a smaller logit margin is a numerical tie (default: 0.01)")
    add("--concurrency", type=_at_least(int, 1), default=1, help="prompts asked at once (default: 1)")
    add("--json", action="store_true", help="print one JSON document instead of lines")


def _at_least(kind: type, least: float) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, and finite")
        return value

    return number


def run(command: Command, model: ResolvedModel, say: Callable[[str], None]) -> int:
    """The exit code. Raises ValueError or OSError for a model, a tokenizer or a prompt that cannot be used."""
    return asyncio.run(_run(command, model, say))


async def _run(command: Command, model: ResolvedModel, say: Callable[[str], None]) -> int:
    from server.tokenizer import Tokenizer

    config = command.config
    client = EngineClient(config.engine_config(model.path), watchdog_timeout=config.watchdog_timeout, log_level=config.log_level)
    try:
        await client.start()  # loads the model while we read the tokenizer
        tokenizer = await asyncio.to_thread(Tokenizer.load, model.path)
        return await verify(client, tokenizer, command, say)
    finally:
        await client.close()


async def verify(client: EngineClient, tokenizer: Tokenizer, command: Command, say: Callable[[str], None]) -> int:
    info = await client.wait_ready()
    asked = [encode(tokenizer, messages) for messages in command.prompts]
    for number, ids in enumerate(asked, start=1):
        if not 0 < len(ids) < info.max_model_len:
            raise ValueError(f"prompt {number} has {len(ids)} tokens; the context length is {info.max_model_len}")
    nothing = Report(info, tokenizer, [])

    def done(case: Case) -> None:
        if not command.as_json:
            say(nothing.line(case))

    try:
        cases = await Trial(client, info, command.settings, done).run(asked)
    except ExceptionGroup as group:  # of several that failed together the first says enough
        raise group.exceptions[0] from None
    report = Report(info, tokenizer, cases)
    say(json.dumps(report.document()) if command.as_json else report.text())
    return EXIT_CODES[report.verdict]


def encode(tokenizer: Tokenizer, messages: prompts.Messages) -> list[int]:
    """As a chat where the model has a template that takes it; else the bare text."""
    try:
        return tokenizer.render_chat_ids(messages)
    except ValueError:
        return tokenizer.encode("\n\n".join(message["content"] for message in messages))
