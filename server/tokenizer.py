"""Text <-> token ids, and messages -> prompt, for a Hugging Face directory or a GGUF file. Not streaming: see detokenizer.py.

Built on `tokenizers` and jinja2 alone: transformers' AutoTokenizer imports torch (measured: 2.9 s and 350 MB, against
0.1 s and 50 MB here).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from server import tokenizer_files
from server.chat_template import ChatTemplate

# Batches are of one here: threads of its own would only cost memory.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()


class Tokenizer:
    """A model's tokenizer and chat template. Safe to use from several threads."""

    vocab_size: int  # one more than the largest token id
    eos_ids: frozenset[int]
    special_ids: frozenset[int]
    max_chars_per_token: int  # no token stands for more characters of a prompt

    def __init__(
        self,
        tokenizer: HFTokenizer,
        *,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        """`special` names the special tokens by role (bos_token, eos_token, ...) for the chat template."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = dict(special or {})
        self._chat = ChatTemplate(chat_template, self._special) if chat_template else None
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.special_ids = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.eos_ids = frozenset(i for i in eos_ids if 0 <= i < self.vocab_size)
        self.max_chars_per_token = max(map(len, vocab)) * (4 if _composes(tokenizer) else 1)
        self._byte_level = "ByteLevel(" in repr(tokenizer.decoder)
        self._byte_fallback = "ByteFallback(" in repr(tokenizer.decoder)
        self._bytes: dict[int, bytes] = {}
        self.strips_leading_space = self._strips_leading_space()
        self._guard_lock = threading.Lock()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Raises OSError when the files cannot be read and ValueError, with the file's name, when they cannot be used."""
        parts = tokenizer_files.read(Path(path))
        return cls(parts.tokenizer, chat_template=parts.chat_template, special=parts.special, eos_ids=parts.eos_ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written in `text` are special tokens. Raises ValueError for lone surrogates."""
        return _encode(self._tokenizer, text, add_special_tokens)

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The prompt text of a conversation. Raises ValueError, fit for the client."""
        if self._chat is None:
            raise ValueError("this model has no chat template; use /v1/completions")
        return self._chat.render(messages, add_generation_prompt, continue_final_message)

    def render_chat_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> list[int]:
        """The prompt ids of a conversation: the template's special tokens are special, those in the messages are text.

        A special token inside a message is broken by a secret mark before rendering, so that trimming, splitting and
        comparing in the template work on it as on any text. What is whole after rendering is the template's own; it
        gets a secret name, the marks go, and a tokenizer that knows only the secret names encodes the text.
        """
        broken = _map_text(messages, self._break_specials)
        if broken == messages:
            return self.encode(self.render_chat(messages, add_generation_prompt, continue_final_message), False)
        guard, names = self._guard
        text = self.render_chat(broken, add_generation_prompt, continue_final_message)
        text = self._special_pattern.sub(lambda found: names[found[0]], text)
        return _encode(guard, text.replace(self._mark, ""), False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of whole ids, as transformers decodes it: broken UTF-8 becomes U+FFFD."""
        skip = self.special_ids if skip_special_tokens else frozenset()
        raw = b"".join(self.token_bytes(i) for i in ids if i not in skip)
        if self.strips_leading_space and raw.startswith(b" "):
            raw = raw[1:]
        return raw.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """One token's text as it stands inside a longer text (a word's leading space included)."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, possibly part of a character. Empty for ids that name no token."""
        raw = self._bytes.get(token_id)
        if raw is None:
            raw = self._bytes[token_id] = self._token_bytes(token_id)
        return raw

    def fingerprint(self, size: int) -> bytes:
        """SHA-256 of what the first `size` ids stand for; equal for one vocabulary, whatever file it was read from."""
        digest = hashlib.sha256()
        for token_id in range(size):
            raw = self._token_bytes(token_id)
            digest.update(len(raw).to_bytes(4, "little") + raw)
        return digest.digest()

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return b""
        if self._byte_level:
            try:
                return bytes([_ALPHABET[char] for char in piece])
            except KeyError:
                return piece.encode()
        if self._byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return self._decode_after(piece).encode()

    def _decode_after(self, piece: str) -> str:
        """What a piece adds to a text that already has one: how a decoder that is not byte-level shows it."""
        decoder = self._tokenizer.decoder
        shown = decoder.decode(["a", piece]) if decoder is not None else f"a {piece}"
        return shown.removeprefix("a")

    def _strips_leading_space(self) -> bool:
        """Whether the decoder drops the space before the first word (SentencePiece's dummy prefix)."""
        if self._byte_level:
            return False
        decoder = self._tokenizer.decoder
        for piece in ("\u2581a", "a"):
            first = decoder.decode([piece]) if decoder is not None else piece
            if self._decode_after(piece) == " a" and first == "a":
                return True
        return False

    @cached_property
    def _mark(self) -> str:
        return f"\ue000{secrets.token_hex(8)}\ue001"  # private use, and no client can foresee it

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted((self._added[i] for i in self.special_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def _break_specials(self, text: str) -> str:
        pattern = self._special_pattern
        while pattern.search(text):
            text = pattern.sub(lambda found: found[0][:1] + self._mark + found[0][1:], text)
        return text

    @property
    def guarded(self) -> bool:
        """Whether the tokenizer for messages that hold special tokens is there: the first such message takes 0.3 s longer."""
        return "_guard_built" in self.__dict__

    def holds_specials(self, messages: list[dict[str, Any]]) -> bool:
        """Whether any text in there names a special token."""
        return _map_text(messages, self._break_specials) != messages

    @property
    def _guard(self) -> tuple[HFTokenizer, dict[str, str]]:
        with self._guard_lock:  # built on first need: 0.3 s, and few clients ever write special tokens
            return self._guard_built

    @cached_property
    def _guard_built(self) -> tuple[HFTokenizer, dict[str, str]]:
        """A copy of the tokenizer that knows the special tokens only under secret names, and those names."""
        secret = secrets.token_hex(8)
        names = {self._added[i]: f"\ue000{secret}.{i}\ue001" for i in self.special_ids}
        data = json.loads(self._tokenizer.to_str())
        data["post_processor"] = None  # may name the old names; nothing is added to a rendered chat
        for token in data["added_tokens"]:
            if token["special"]:
                token.update(content=names[token["content"]], normalized=False)
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # Unigram: [piece, score] pairs
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return HFTokenizer.from_str(json.dumps(data)), names


def _encode(tokenizer: HFTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """A batch of one: unlike `encode` it lets other threads run meanwhile (600 kB of text take 0.3 s) and counts no offsets."""
    try:
        return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except TypeError:
        if not isinstance(text, str):
            raise
        raise ValueError("the text holds a lone surrogate, which is not valid Unicode") from None


def _map_text(value: Any, change: Any) -> Any:
    """The same lists and dicts with every string (keys apart) changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_text(part, change) for part in value]
    if isinstance(value, dict):
        return {key: _map_text(part, change) for key, part in value.items()}
    return value


def _composes(tokenizer: HFTokenizer) -> bool:
    """Whether the normalizer may turn several characters into one (NFC and its like), so that tokens cover more text."""
    shown = repr(tokenizer.normalizer)
    return tokenizer.normalizer is not None and any(kind in shown for kind in ("NF", "Strip", "Precompiled", "Bert", "Regex"))
