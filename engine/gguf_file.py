"""Reading GGUF files: typed metadata and the places of the tensors, nothing else. Not a dequantizer and not a model.

Both processes read GGUF (the front end for tokenizer and chat template, the engine for weights), so this leaf needs no
torch, and numpy only once tensors are read. The `gguf` package's reader takes 1.8 s and 170 MB for a file with a
vocabulary of 49,152; this one 60 ms, because it makes no numpy view per string. A file is foreign input: every count,
length and offset is checked against its size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}

# ggml tensor types: id -> (name, elements per block, bytes per block)
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

CONTROL = 3  # a value of tokenizer.ggml.token_type
# Metadata have room for three ids, and converters fill in one, where generation_config.json lists several. By these names
# llama.cpp finds the others.
_END_NAMES = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"),
    *("<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>"),
}


class GGUFTensor(NamedTuple):
    """Where one tensor lies. `shape` is row-major as in numpy and torch (GGUF itself stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: int  # key of TENSOR_TYPES; equals gguf.GGMLQuantizationType
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0]


class GGUFFile:
    """One open, memory-mapped GGUF file.

    `fields` maps a metadata key to bool, int, float, str or a list of one of these; `tensors` lists the tensors in file
    order. Raises OSError when the file cannot be opened and ValueError when it is not a whole, valid GGUF file.
    """

    fields: dict[str, Any]
    tensors: list[GGUFTensor]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ValueError(f"{self.path.name} is not a GGUF file: it is shorter than a header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            scan = _Scanner(self._map, self.path.name)
            self.fields, self.tensors = scan.header()
        except BaseException:
            self._map.close()
            raise

    def data(self, tensor: GGUFTensor) -> NDArray[np.uint8]:
        """The raw bytes of one tensor, uint8 [nbytes]: a read-only view of the mapping, valid while the file is open."""
        import numpy as np  # 12 MB that the front end does without

        return np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)

    def field(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """One metadata value. Raises ValueError when it is absent and has no default, or is of another Python type."""
        value = self.fields.get(key, default)
        if value is None:
            raise ValueError(f"{self.path.name} lacks the metadata key {key}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ValueError(f"{self.path.name}: metadata key {key} has an unexpected type ({type(value).__name__})")
        return value

    def close(self) -> None:
        """Unmap the file. Views handed out by `data` keep the mapping alive until they are gone."""
        with contextlib.suppress(BufferError):  # a view is still in use; the mapping goes with the last one
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def end_token_ids(file: GGUFFile) -> list[int]:
    """The ids that end an answer: those that the metadata name, then the control tokens that are called so.

    Raises ValueError when one of the keys has an unexpected type.
    """
    named = [int(file.field(f"tokenizer.ggml.{role}_token_id", int, -1)) for role in ("eos", "eot", "eom")]
    tokens = file.field("tokenizer.ggml.tokens", list, [])
    kinds = file.field("tokenizer.ggml.token_type", list, [])
    called = [i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)) if kind == CONTROL and token in _END_NAMES]
    found = {i: tokens[i] if 0 <= i < len(tokens) else "" for i in [*named, *called] if i >= 0}
    # In the harmony format <|end|> ends a message, and an answer has several.
    harmony = {"<|return|>", "<|call|>"} <= set(found.values())
    return [i for i, text in found.items() if not (harmony and text == "<|end|>")]


class _Scanner:
    """A cursor over the header. Every read checks what is left of the file first."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.size = len(data)
        self.name = name
        self.at = 0

    def fail(self, why: str) -> ValueError:
        return ValueError(f"{self.name} is not a valid GGUF file: {why}")

    def header(self) -> tuple[dict[str, Any], list[GGUFTensor]]:
        if self.take(4) != b"GGUF":
            raise self.fail("it does not start with the magic bytes GGUF")
        version = self.scalar("I")
        if version not in (2, 3):
            endian = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
            raise self.fail(f"version {version} is not supported, only 2 and 3{endian}")
        num_tensors, num_fields = self.scalar("Q"), self.scalar("Q")
        self.check_count(num_fields, 13, "metadata entries")
        fields = self.read_fields(num_fields)
        if fields.get("split.count", 0) not in (0, 1):
            raise self.fail("it is one part of a split model; merge the parts first")
        self.check_count(num_tensors, 32, "tensors")
        return fields, self.read_tensors(num_tensors, fields)

    def read_fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):
            key = self.string()
            if key in fields:
                raise self.fail(f"metadata key {key} appears twice")
            fields[key] = self.value(self.scalar("I"), key)
        return fields

    def read_tensors(self, count: int, fields: dict[str, Any]) -> list[GGUFTensor]:
        found = [self.tensor_info() for _ in range(count)]
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise self.fail(f"general.alignment is {alignment!r}")
        base = -(-self.at // alignment) * alignment
        tensors = [t._replace(offset=base + t.offset) for t in found]
        if len({t.name for t in tensors}) != count:
            raise self.fail("a tensor name appears twice")
        end = base
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset % alignment or tensor.offset < end:
                raise self.fail(f"tensor {tensor.name} is misaligned or overlaps another")
            end = tensor.offset + tensor.nbytes
            if end > self.size:
                raise self.fail(f"truncated: tensor {tensor.name} ends at byte {end} of {self.size}")
        return tensors

    def tensor_info(self) -> GGUFTensor:
        name, num_dims = self.string(), self.scalar("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.fail(f"tensor {name} has {num_dims} dimensions")
        dims = [self.scalar("Q") for _ in range(num_dims)]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in TENSOR_TYPES:
            raise self.fail(f"tensor {name} has the unknown type {kind}")
        _, block, block_bytes = TENSOR_TYPES[kind]
        elements = 1
        for dim in dims:
            elements *= dim
        if elements == 0 or dims[0] % block:
            raise self.fail(f"tensor {name} has the impossible shape {dims} for its type")
        return GGUFTensor(name, tuple(reversed(dims)), kind, offset, elements // block * block_bytes)

    def value(self, kind: int, key: str) -> Any:
        if kind == _ARRAY:
            return self.array(key)
        if kind == _STRING:
            return self.string()
        if kind == _BOOL:
            return self.boolean(self.take(1), key)[0]
        if kind not in _SCALARS:
            raise self.fail(f"metadata key {key} has the unknown type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            self.check_count(count, 8, f"entries of {key}")
            return self.strings(count)
        if kind == _BOOL:
            return self.boolean(self.take(count), key)
        if kind not in _SCALARS:  # nested arrays exist in the format, but in no model
            raise self.fail(f"metadata key {key} is an array of the unsupported type {kind}")
        code = _SCALARS[kind]
        raw = self.take(count * struct.calcsize("<" + code))  # which checks the count, before it is used as a format
        return list(struct.unpack(f"<{count}{code}", raw))

    def boolean(self, raw: bytes, key: str) -> list[bool]:
        if any(byte > 1 for byte in raw):
            raise self.fail(f"metadata key {key} holds a boolean that is neither 0 nor 1")
        return [byte == 1 for byte in raw]

    def strings(self, count: int) -> list[str]:
        """`string` in a loop with the overheads taken out: vocabularies have a quarter of a million of them."""
        data, size, at = self.data, self.size, self.at
        unpack = struct.Struct("<Q").unpack_from
        out: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                if at > size:
                    raise self.fail("truncated inside a string")
                out.append(data[start:at].decode())
        except struct.error:
            raise self.fail("truncated inside a list of strings") from None
        except UnicodeDecodeError:
            raise self.fail("a string is not UTF-8") from None
        self.at = at
        return out

    def string(self) -> str:
        return self.strings(1)[0]

    def scalar(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        return layout.unpack(self.take(layout.size))[0]

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise self.fail("truncated inside its metadata")
        self.at += count
        return self.data[self.at - count : self.at]

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count that could not fit in what is left of the file before looping over it."""
        if count * least > self.size - self.at:
            raise self.fail(f"truncated, or an impossible number of {what}: {count}")
