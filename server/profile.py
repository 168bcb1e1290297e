"""`outrider profile`: measures what a step costs here. The measuring is a process of the engine's, as this one has no torch."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from server.config import parse
from server.resolve import resolve
from server.supervisor import MALLOC, ROOT

# -P: the current directory, which may hold an `engine` of its own, does not come first on the module path.
COMMAND = (sys.executable, "-P", "-m", "engine.profile_cli")
SECONDS = 20.0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see outrider profile --help")


def run(argv: Sequence[str]) -> int:
    """Returns the exit code of the measuring. Raises ValueError or OSError, one line fit for the operator."""
    options, rest = _parser().parse_known_args(list(argv))
    config = parse(rest, prog="outrider profile")
    if not options.seconds > 0:
        raise ValueError("--seconds: must be positive")
    if options.png is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--png needs matplotlib, which is not installed: pip install 'outrider[plots]'")
        if not options.png.resolve().parent.is_dir():
            raise ValueError(f"--png {options.png}: there is no such folder")
    engine = config.engine_config(resolve(config.model).path)
    message: dict[str, Any] = {
        "engine": msgspec.structs.replace(engine, profile=True, policy="off"),
        "seconds": options.seconds,
        "png": None if options.png is None else str(options.png.resolve()),
        "fresh": options.fresh,
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"GLIBC_TUNABLES": MALLOC} | os.environ | {"PYTHONPATH": path}
    return subprocess.run(COMMAND, input=msgspec.msgpack.encode(message), env=env, check=False).returncode


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="outrider profile",
        usage="outrider profile [MODEL] [--png FILE] [--seconds S] [--fresh] [flags of outrider serve]",
        description="Measure what steps cost on this machine, print the table, and keep it for `outrider serve`. "
        "Flags that change the costs (--dtype, --device, --num-threads, ...) are those of `outrider serve`.",
        allow_abbrev=False,
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the table, too (needs matplotlib)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"most time to measure (default: {SECONDS:g})")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured and learned before")
    return parser
