"""A program in a root file system of its own, in namespaces of its own: what `docker run` does, as far as a test needs it.

It wants root, and util-linux. It is no sandbox: it keeps what is tested honest, not what is hostile out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
UNSHARE = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child")


@dataclass(frozen=True)
class Spec:
    root: str
    argv: Sequence[str]
    env: Mapping[str, str]
    uid: int = 0
    gid: int = 0
    cwd: str = "/"
    mounts: Sequence[tuple[str, str]] = field(default_factory=list)  # (path on this machine or "tmpfs", path inside)
    read_only: bool = False
    network: bool = True  # the machine's; without it there is a loopback and nothing else
    locked: bool = False  # no capability, no new privileges


def start(spec: Spec, **options: Any) -> subprocess.Popen[Any]:
    """The options are Popen's. The program is process 1 of its namespace, and the only child of the process given back."""
    network = () if spec.network else ("--net",)
    command = [*UNSHARE, *network, sys.executable, "-m", "tests.image.enter", json.dumps(asdict(spec))]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, **options)


def run(spec: Spec, log: Path) -> None:
    """Raises RuntimeError, with the end of what it wrote, unless it ends with 0."""
    with log.open("ab") as out:
        code = start(spec, stdout=out, stderr=subprocess.STDOUT).wait()
    if code:
        raise RuntimeError(f"{list(spec.argv)} ended with {code}:\n{log.read_text(errors='replace')[-3000:]}")
