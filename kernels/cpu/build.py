"""Compiles the C kernels once per machine and source, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("team.h", "vector.h", "blocks.h", "linear.h", "attention.h", "top.h", "decoder.c")
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma", "bmi2"}
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mavx2", "-mbmi2"),
    # Rounding must not depend on what the compiler finds worth contracting.
    "-ffp-contract=off",
)


class Unavailable(RuntimeError):
    """Why there are no native kernels here."""


def compiler() -> str | None:
    """$CC, or the first C compiler on the path."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


@cache
def digest() -> str:
    """Of the sources and how they are compiled: other kernels, other speeds."""
    made = hashlib.sha256(" ".join(FLAGS).encode())
    for name in SOURCES:
        made.update((HERE / name).read_bytes())
    return made.hexdigest()[:16]


@cache
def library(folder: Path | None = None) -> ctypes.CDLL:
    """The kernels, from `folder` (default: ~/.cache/outrider/kernels) or compiled into it: about 3 seconds, once.

    Without `folder` those that lie beside their sources come first: see `ship`.
    Raises Unavailable, with the reason, when this machine cannot run or build them.
    """
    missing = sorted(NEEDED - _processor_flags())
    if missing:
        raise Unavailable(f"the processor lacks {', '.join(missing)}")
    target = _shipped()
    if folder is not None or not target.exists():
        folder = folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider" / "kernels"
        target = folder / target.name
    if not target.exists():
        _compile(target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"{target} cannot be loaded: {error}") from None


def ship() -> None:
    """Compile them beside their sources, for an image that has no compiler: `python -m kernels.cpu.build`.

    The processor here need not be able to run them. Raises Unavailable when they cannot be built.
    """
    if platform.machine() == "x86_64":
        _compile(_shipped())


def _shipped() -> Path:
    return HERE / f"decoder-{digest()}.so"


def _compile(target: Path) -> None:
    program = compiler()
    if program is None:
        raise Unavailable("there is no C compiler (cc, gcc or clang) on the path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its place and moved there: another process may be doing the same.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / target.name
            command = [program, *FLAGS, "-o", str(built), str(HERE / "decoder.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise Unavailable(f"{program} failed: {done.stderr.strip()[-500:]}")
            built.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the kernels could not be compiled: {error}") from None


def _processor_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


if __name__ == "__main__":
    ship()
