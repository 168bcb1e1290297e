"""The models the tests run on, built once from files that are already installed. `python -m tests.models` builds them.

`.models/` beside this package is a cache that git ignores. OUTRIDER_TEST_MODELS names another folder with the same
layout; nothing is built into it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from server.resolve import resolve

ROOT = Path(__file__).resolve().parent.parent
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = "smollm2-135m-instruct"
STORIES = "stories15m"


def models_dir() -> Path:
    return Path(os.environ.get("OUTRIDER_TEST_MODELS") or ROOT / ".models")


def smollm2_gguf() -> Path:
    """The GGUF file: in the models folder, or else the default model of `outrider serve`."""
    path = models_dir() / GGUF_NAME
    return path if path.is_file() else Path(resolve(None).path)


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16."""
    path = models_dir() / SMOLLM2
    if not (path / "config.json").is_file():
        build_smollm2(path)
    return path


def build_smollm2(path: Path) -> None:
    """Dequantize the GGUF file into `path`. Written beside it and renamed, so that a half-written folder is never seen."""
    from tests.hf_export import write_hf

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as work:
        built = Path(work) / "built"
        built.mkdir()
        write_hf(smollm2_gguf(), built)
        shutil.rmtree(path, ignore_errors=True)
        built.rename(path)


def main() -> int:
    print(smollm2_dir())
    return 0


if __name__ == "__main__":
    sys.exit(main())
