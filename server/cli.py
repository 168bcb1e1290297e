"""The command `outrider`. Exit codes: 0 fine, 1 the engine failed, 2 the operator's to mend (one line on stderr)."""

from __future__ import annotations

import difflib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from server import init

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.resolve import ResolvedModel

USAGE = """\
usage: outrider serve [MODEL] [flags]     serve a model over the OpenAI API (outrider serve --help)
       outrider serve --check [--device-memory 80GiB] [MODEL] [flags]
                                         check the settings and the memory they take, and start nothing
       outrider datastore build FILES... --model MODEL --out FILE
                                         a text for drafter rest to look up (outrider datastore --help)
       outrider verify-lossless [MODEL]  compare answers with and without speculation (outrider verify-lossless --help)
       outrider profile [MODEL] [--png FILE] [flags]
                                         measure what a step costs here (outrider profile --help)
       outrider --version
"""


def serve(argv: Sequence[str]) -> int:
    from server import check
    from server.config import ConfigError

    try:
        config, dry = check.parse(argv)
        config, model = located(config, download=dry is None)
        if dry is not None:
            return check.run(config, model, dry)
    except ValueError as error:
        return fail(str(error), "see outrider serve --help" if isinstance(error, ConfigError) else "")
    setup_logging(config.log_level)
    from server.serve import run

    try:
        return run(config, model, announce=lambda line: print(line, flush=True))
    except (ValueError, OSError) as error:
        return fail(str(error))


def datastore(argv: Sequence[str]) -> int:
    from server.datastore import run

    try:
        for line in run(argv):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        return fail(str(error))
    return 0


def verify_lossless(argv: Sequence[str]) -> int:
    from server.client import EngineDead
    from server.config import ConfigError
    from server.lossless.command import PROG, parse, run
    from server.supervisor import EngineGoneError

    try:
        command = parse(argv)
        config, model = located(command.config)
    except (ValueError, OSError) as error:
        return fail(str(error), f"see {PROG} --help" if isinstance(error, ConfigError) else "")
    setup_logging(config.log_level)
    try:
        return run(replace(command, config=config), model, say=lambda line: print(line, flush=True))
    except (ValueError, OSError, EngineGoneError, EngineDead) as error:
        return fail(str(error))


def located(config: ServerConfig, *, download: bool = True) -> tuple[ServerConfig, ResolvedModel]:
    """The settings with local paths for their models. Raises ValueError when there is no such model."""
    from server.resolve import resolve

    model = resolve(config.model, download=download)
    if config.draft_model is not None:
        config = config.model_copy(update={"draft_model": resolve(config.draft_model, download=download).path})
    return config, model


def profile(argv: Sequence[str]) -> int:
    from server.profile import run

    try:
        return run(argv)
    except (ValueError, OSError) as error:
        return fail(str(error))


def version(argv: Sequence[str]) -> int:
    from server.version import VERSION

    print(f"outrider {VERSION}")
    return 0


def usage(argv: Sequence[str]) -> int:
    print(USAGE, end="")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "datastore": datastore,
    "verify-lossless": verify_lossless,
    "profile": profile,
    "--version": version,
    "--help": usage,
    "-h": usage,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else list(argv)
    if not args:
        sys.stderr.write(USAGE)
        return 2
    command = COMMANDS.get(args[0])
    if command is None:
        close = difflib.get_close_matches(args[0], COMMANDS, n=1)
        return fail(f"unknown command {args[0]}", f"did you mean {close[0]}?" if close else "see outrider --help")
    return init.run(lambda: _interruptible(command, args[1:]))


def _interruptible(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """Ctrl-C while a command has no handler of its own, as during its imports, ends it without a traceback."""
    try:
        return command(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def fail(message: str, hint: str = "") -> int:
    line = " ".join(message.split()) + (f"; {hint}" if hint and "did you mean" not in message else "")
    sys.stderr.write(f"outrider: error: {line}\n")
    return 2


def setup_logging(level: str) -> None:
    layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stderr, level=level.upper(), format=layout)
    for name in ("uvicorn", "asyncio"):  # their news is that all is well
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


if __name__ == "__main__":
    sys.exit(main())
