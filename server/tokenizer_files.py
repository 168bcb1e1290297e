"""The tokenizer files of a model: what a Hugging Face directory or a GGUF file says, brought into one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, processors

from engine.gguf_file import GGUFFile, end_token_ids
from server import gguf_tokenizer

_BOS_BY_CONFIG = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")  # classes that obey add_bos_token
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Parts(NamedTuple):
    """What a tokenizer is made of. `special` names special tokens by role (bos_token, eos_token, ...)."""

    tokenizer: Tokenizer
    chat_template: str | None
    special: dict[str, str]
    eos_ids: list[int]


def read(path: Path) -> Parts:
    """Raises OSError when the files cannot be read and ValueError, with the file's name, when they cannot be used."""
    return _from_directory(path) if path.is_dir() else _from_gguf(path)


def _from_gguf(path: Path) -> Parts:
    with GGUFFile(path) as file:
        tokenizer = gguf_tokenizer.build(file)
        tokens: list[str] = file.field("tokenizer.ggml.tokens", list)

        def name(role: str) -> int:
            return int(file.field(f"tokenizer.ggml.{role}_token_id", int, -1))

        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        special = {role: tokens[name(key)] for role, key in roles.items() if 0 <= name(key) < len(tokens)}
        template = file.field("tokenizer.chat_template", str, "")
        return Parts(tokenizer, template or None, special, end_token_ids(file))


def _from_directory(path: Path) -> Parts:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path.name} has no tokenizer.json (slow tokenizers must be converted first)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(f"{path.name}/tokenizer.json is broken: {error}") from None
    config = _read_json(path / "tokenizer_config.json")
    special = {role: text for role in _ROLES if (text := _token_text(config.get(role)))}
    _add_missing(tokenizer, config.get("added_tokens_decoder"))
    _obey_add_bos(tokenizer, config, special.get("bos_token"))
    return Parts(tokenizer, _read_template(path, config), special, _eos_ids(path, tokenizer, special))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file. Raises ValueError when it is something else."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.parent.name}/{path.name} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.parent.name}/{path.name} is not a JSON object")
    return data


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is its text or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _read_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several named ones
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _eos_ids(path: Path, tokenizer: Tokenizer, special: Mapping[str, str]) -> list[int]:
    """generation_config.json's ids, else config.json's; the tokenizer's own eos token always."""
    ids = _read_json(path / "generation_config.json").get("eos_token_id")
    if ids is None:
        ids = _read_json(path / "config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    own = tokenizer.token_to_id(special.get("eos_token", ""))
    return [i for i in [*ids, own] if isinstance(i, int)]


def _add_missing(tokenizer: Tokenizer, declared: Any) -> None:
    """Tokens that only tokenizer_config.json declares. Raises ValueError when they cannot have the ids it gives them."""
    if not isinstance(declared, dict):
        return
    for key, value in sorted(declared.items(), key=lambda item: int(item[0])):
        text = _token_text(value)
        if text is None or tokenizer.token_to_id(text) is not None:
            continue
        options = {k: bool(value.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        tokenizer.add_tokens([AddedToken(text, **options)])
        if tokenizer.token_to_id(text) != int(key):
            raise ValueError(
                f"tokenizer_config.json gives the added token {text!r} the id {key}, tokenizer.json has no room there"
            )


def _obey_add_bos(tokenizer: Tokenizer, config: Mapping[str, Any], bos: str | None) -> None:
    """Llama-like tokenizers take BOS from `add_bos_token`, whatever tokenizer.json says."""
    wanted = config.get("add_bos_token")
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    bos_id = tokenizer.token_to_id(bos) if bos else None
    if not isinstance(wanted, bool) or name not in _BOS_BY_CONFIG or bos_id is None:
        return
    has = tokenizer.encode("").ids[:1] == [bos_id]
    if wanted and not has:
        tokenizer.post_processor = processors.TemplateProcessing(single=[f"{bos}:0", "$A:0"], special_tokens=[(bos, bos_id)])
    elif has and not wanted:
        tokenizer.post_processor = processors.TemplateProcessing(single=["$A:0"], special_tokens=[])
