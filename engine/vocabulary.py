"""Do two models mean the same by a token id? A draft of another vocabulary would be noise, so it is refused at start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.gguf_file import GGUFFile
from engine.models.loader import read_json

GGUF_UNUSED = 5  # token type: a row without a token, there to round the matrix up


def check_same_vocabulary(target: str, target_rows: int, draft: str, draft_rows: int) -> None:
    """Raises ValueError when the models at these paths differ in a token, naming the first one.

    Rows of the embedding behind the last token are padding and may differ in number (Qwen2.5: 151,936 to 152,064).
    Without tokenizer files there is nothing to compare but the number of rows.
    """
    ours, theirs = read_tokens(Path(target)), read_tokens(Path(draft))
    if ours is None or theirs is None:
        if target_rows != draft_rows:
            raise ValueError(f"draft_model: {draft} has a vocabulary of {draft_rows} tokens, the model has {target_rows}")
        return
    both = ours.keys() & theirs.keys()
    odd = sorted(i for i in both if ours[i] != theirs[i])
    if odd:
        first = odd[0]
        raise ValueError(
            f"draft_model: {draft} has another vocabulary: token {first} is {theirs[first]!r} there and {ours[first]!r} in the "
            f"model ({len(odd)} tokens differ)"
        )
    extra = max(len(ours), len(theirs)) - len(both)
    if extra > max(len(both) // 100, 8):  # a fine-tuned model may have gained a few special tokens
        raise ValueError(
            f"draft_model: {draft} has a vocabulary of {len(theirs)} tokens, the model has {len(ours)}: they share {len(both)}"
        )


def read_tokens(path: Path) -> dict[int, str] | None:
    """Id -> token of a Hugging Face directory (tokenizer.json) or a GGUF file; None where there is no such list."""
    if path.is_dir():
        file = path / "tokenizer.json"
        return _from_json(read_json(file)) if file.is_file() else None
    with GGUFFile(path) as gguf:
        tokens = gguf.fields.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            return None
        kinds = gguf.field("tokenizer.ggml.token_type", list, [])
        return {i: token for i, token in enumerate(tokens) if i >= len(kinds) or kinds[i] != GGUF_UNUSED}


def _from_json(data: dict[str, Any]) -> dict[int, str]:
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        found = {i: token for token, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: [token, score] in the order of the ids
        found = {i: entry[0] for i, entry in enumerate(vocab)}
    else:
        found = {}
    for added in data.get("added_tokens") or []:
        found[added["id"]] = added["content"]
    return found
