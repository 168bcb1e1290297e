"""`outrider serve --check`: what the settings would do, without a port, a weight or a GPU.

The checking is a process of the engine's, as this one has no torch. It reads the models' config.json and prints the memory of
each rank, or the setting that cannot be used and why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from server.config import ConfigError, ServerConfig, serve_parser, settings
from server.resolve import ResolvedModel
from server.supervisor import ROOT

# -P: the current directory, which may hold an `engine` of its own, does not come first on the module path.
COMMAND = (sys.executable, "-P", "-m", "engine.check_cli")
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


class Check(NamedTuple):
    """What was asked for beside the settings. memory: bytes of each GPU, or of the machine; None: of those that are here."""

    memory: int | None = None


def parse(argv: Sequence[str]) -> tuple[ServerConfig, Check | None]:
    """The settings, and what to check instead of serving. Raises ConfigError; --help prints and exits."""
    parser = serve_parser()
    parser.add_argument("--check", action="store_true", help="check the settings and the memory they take, and start nothing")
    parser.add_argument("--device-memory", metavar="SIZE", help="with --check: of each GPU, or of the machine (80GiB, 24GB)")
    config, own = settings(parser, argv)
    if own["device_memory"] is not None and not own["check"]:
        raise ConfigError("--device-memory: it describes a machine for --check, and says nothing to a server")
    return config, Check(size(own["device_memory"])) if own["check"] else None


def size(text: str | None) -> int | None:
    """Bytes of `80GiB`, `24 GB` or a plain number. Raises ConfigError."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not float(found[1]) > 0:
        raise ConfigError(f"--device-memory: expected a size such as 80GiB or 24GB (got {text!r})")
    return int(float(found[1]) * unit)


def run(config: ServerConfig, model: ResolvedModel, check: Check) -> int:
    """Returns the exit code: 0 with the plan on standard output, 2 with one line on standard error."""
    message: dict[str, Any] = {
        "engine": config.engine_config(model.path),
        "device_memory": check.memory,
        "engines": config.data_parallel_size,
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.run(COMMAND, input=msgspec.msgpack.encode(message), env=env, check=False).returncode
