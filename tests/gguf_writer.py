"""GGUF files for tests, written field by field, so that any field can be wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

STRING, ARRAY, BOOL, INT32, UINT32, FLOAT32 = 8, 9, 7, 5, 4, 6


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(data: Any) -> bytes:
    """Type and value of one metadata entry."""
    if isinstance(data, bool):
        return struct.pack("<IB", BOOL, data)
    if isinstance(data, int):
        return struct.pack("<Ii", INT32, data)
    if isinstance(data, float):
        return struct.pack("<If", FLOAT32, data)
    if isinstance(data, str):
        return struct.pack("<I", STRING) + string(data)
    kind = {str: STRING, int: INT32, float: FLOAT32, bool: BOOL}[type(data[0])]
    head = struct.pack("<IIQ", ARRAY, kind, len(data))
    if kind == STRING:
        return head + b"".join(map(string, data))
    code = {INT32: "i", FLOAT32: "f", BOOL: "B"}[kind]
    return head + struct.pack(f"<{len(data)}{code}", *data)


def gguf(
    fields: Mapping[str, Any],
    tensors: Sequence[tuple[str, Sequence[int], int, int]] = (),
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    """A whole file. `tensors`: (name, dimensions as GGUF stores them, type, offset)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    out += b"".join(string(key) + value(entry) for key, entry in fields.items())
    for name, dims, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data
