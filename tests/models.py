"""The models the tests run on, built from files that are already installed. `python -m tests.models` builds them anew.

They are kept in `.models/` beside this package, which git ignores, or in the folder that OUTRIDER_TEST_MODELS names.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from server.resolve import resolve

ROOT = Path(__file__).resolve().parent.parent
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = "smollm2-135m-instruct"
TINY_LLAMA = "tiny-llama"
TINY_CONTEXT = 256


def models_dir() -> Path:
    return Path(os.environ.get("OUTRIDER_TEST_MODELS") or ROOT / ".models")


def smollm2_gguf() -> Path:
    """The GGUF file: in the models folder, or else the default model of `outrider serve`."""
    path = models_dir() / GGUF_NAME
    return path if path.is_file() else Path(resolve(None).path)


def built(name: str) -> Path:
    """A model's folder, built if it is not there."""
    path = models_dir() / name
    if not (path / "config.json").is_file():
        build(name)
    return path


def build(name: str) -> None:
    """Written beside its place and renamed, so that a half-written folder is never seen."""
    path = models_dir() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as work:
        made = Path(work) / name
        made.mkdir()
        BUILDERS[name](made)
        shutil.rmtree(path, ignore_errors=True)
        made.rename(path)


def _smollm2(folder: Path) -> None:
    from tests.hf_export import write_hf

    write_hf(smollm2_gguf(), folder)


def _tiny_llama(folder: Path) -> None:
    """Two random layers behind a SentencePiece-style tokenizer, for what needs no sense in the answers."""
    import torch

    from tests import sentencepiece
    from tests.engine.models import tiny

    vocab_size = sentencepiece.write(folder, TINY_CONTEXT)
    config = tiny.config("Llama", vocab_size=vocab_size, max_position_embeddings=TINY_CONTEXT, tie_word_embeddings=True)
    tiny.save(tiny.model(config).to(torch.bfloat16), folder)


BUILDERS: dict[str, Callable[[Path], None]] = {SMOLLM2: _smollm2, TINY_LLAMA: _tiny_llama}


def main() -> int:
    for name in BUILDERS:
        build(name)
        print(models_dir() / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
