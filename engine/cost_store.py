"""Where cost tables lie between two lives of an engine: one JSON file for each machine, model, layout and version.

A file that cannot be read, or says it is about something else, is left out with a warning: costs are then measured again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path

import msgspec

from engine import whole_file
from engine.config import EngineConfig
from engine.cost import CostModel, CostTables
from engine.profile import Sample

logger = logging.getLogger("outrider.engine.cost")

FORMAT = 1
HEAD_BYTES = 1 << 20  # of a weights file, for its fingerprint
TAIL_BYTES = 1 << 16


class CostFile(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    key: dict[str, str]
    tables: CostTables
    samples: list[Sample] = []
    complete: bool = False  # nothing is left to measure


def folder(config: EngineConfig) -> Path:
    """`cache_dir`, or the user's cache directory (XDG_CACHE_HOME, ~/.cache)."""
    base = config.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "outrider")
    return Path(base).expanduser() / "cost"


def path(config: EngineConfig, key: dict[str, str]) -> Path:
    digest = hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:16]
    return folder(config) / f"{_file_name(config)}-{digest}.json"


def _file_name(config: EngineConfig) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name)[:64]


def successors_path(config: EngineConfig, dtype: str) -> Path:
    """Where the target's bigrams (engine/successors.py) are kept: they depend on its weights alone."""
    digest = hashlib.sha256(f"{fingerprint(config.model)} {dtype} {config.load_format}".encode()).hexdigest()[:16]
    return folder(config).parent / "successors" / f"{_file_name(config)}-{digest}.npy"


def fingerprint(model: str) -> str:
    """Of a model directory or file: names, sizes and the beginnings and ends of its weights. Not their every byte."""
    root = Path(model)
    files = [root] if root.is_file() else sorted(p for p in root.glob("*") if p.suffix in (".safetensors", ".gguf", ".json"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(HEAD_BYTES))
            data.seek(max(size - TAIL_BYTES, 0))
            digest.update(data.read())
    return digest.hexdigest()[:32]


def load(file: Path, key: dict[str, str]) -> CostFile | None:
    """None when there is no such file, or none that can be used."""
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=CostFile)
        if kept.format != FORMAT or kept.key != key:
            raise ValueError("it is about something else")
        CostModel(kept.tables)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        logger.warning("the cost table %s is not used: %s", file, error)
        return None
    return kept


def save(file: Path, kept: CostFile) -> None:
    """In one piece or not at all. A disk that is full or read-only costs a warning."""
    try:
        whole_file.write(file, msgspec.json.format(msgspec.json.encode(kept), indent=1))
    except OSError as error:
        logger.warning("the cost table cannot be kept: %s", error)
