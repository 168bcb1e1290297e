"""The head of a datastore file: what it holds and for which tokenizer. Read with `struct` alone: both processes check it.

The file is foreign input: magic, version, every size and the file's own length must agree before anything is mapped.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple, Self

MAGIC = b"OUTRSTOR"
VERSION = 1
HEADER_BYTES = 4096  # one page: what follows is mapped page by page
SEARCH_TOKENS = 32  # suffixes are in order as far as this many tokens; nothing longer is ever looked up
LARGEST = 2**31 - 1  # places are int32

_LAYOUT = struct.Struct("<8sIIIQQQ32sI")


class Header(NamedTuple):
    """vocab_size: ids are below it; num_places: tokens and separators; num_tokens: tokens alone, one suffix each;
    fingerprint: SHA-256 of the tokenizer's vocabulary; checksum: CRC-32 of everything behind the header."""

    vocab_size: int
    num_places: int
    num_tokens: int
    num_documents: int
    fingerprint: bytes
    checksum: int

    @property
    def file_bytes(self) -> int:
        """Header, first suffix of every token id (int32 [V + 1]), the text (uint32), the suffix array (int32)."""
        return HEADER_BYTES + 4 * (self.vocab_size + 1 + self.num_places + self.num_tokens)

    def pack(self) -> bytes:
        sizes = (self.vocab_size, self.num_places, self.num_tokens, self.num_documents)
        packed = _LAYOUT.pack(MAGIC, VERSION, SEARCH_TOKENS, *sizes, self.fingerprint, self.checksum)
        return packed.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises ValueError, one line that names the file, for one that cannot be read, is no datastore of this version or is
        cut short."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
        except OSError as error:
            raise ValueError(f"datastore {path}: {error.strerror}") from None
        if head[: len(MAGIC)] != MAGIC:
            raise ValueError(f"datastore {path}: not a file that `outrider datastore build` wrote")
        if len(head) < HEADER_BYTES:
            raise ValueError(f"datastore {path}: cut short inside its header")
        _, version, depth, vocab_size, places, tokens, documents, fingerprint, checksum = _LAYOUT.unpack_from(head)
        if (version, depth) != (VERSION, SEARCH_TOKENS):
            raise ValueError(f"datastore {path}: format version {version}, this server reads version {VERSION}; build it again")
        header = cls(vocab_size, places, tokens, documents, fingerprint, checksum)
        if not (0 < tokens < places <= LARGEST and 0 < vocab_size <= LARGEST):
            raise ValueError(f"datastore {path}: its header contradicts itself")
        if (size := path.stat().st_size) != header.file_bytes:
            raise ValueError(f"datastore {path}: {size} bytes where its header says {header.file_bytes}; build it again")
        return header
