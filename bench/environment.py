"""An environment of its own for a peer: whatever it pins never meets what we run on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

POLITE = ("nice", "-n", "19")


class Environment:
    """A virtual environment of this Python under `folder`/`name`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.root = folder / name
        self.name = name

    @property
    def python(self) -> Path:
        """Its interpreter. Raises FileNotFoundError with what to do when it is not there."""
        program = self.root / "bin" / "python"
        if not program.exists():
            raise FileNotFoundError(
                f"no {self.name} under {self.root.parent}: run `python -m bench.peers install {self.name}` first"
            )
        return program

    def create(self) -> None:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        if not (self.root / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", str(self.root)], check=True)

    def pip(self, *arguments: str) -> None:
        """One pip command, on the index that this machine is configured with. Raises CalledProcessError."""
        self.run([str(self.python), "-m", "pip", "--disable-pip-version-check", *arguments])

    def run(self, command: Sequence[str], log: Path | None = None) -> None:
        """With its programs first on the path, one compiler at a time, and out of everybody's way; what it says to `log`."""
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"
        variables = os.environ | {"PATH": path, "CMAKE_BUILD_PARALLEL_LEVEL": "1"}
        with log.open("ab") if log else nullcontext() as output:
            subprocess.run([*POLITE, *command], env=variables, stdout=output, stderr=output and subprocess.STDOUT, check=True)
