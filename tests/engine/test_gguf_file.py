"""GGUFFile on good and on hostile files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gguf_file import TENSOR_TYPES, GGUFFile, end_token_ids
from tests.gguf_writer import gguf, string, value

F32, Q8_0 = 0, 8
FIELDS: dict[str, Any] = {
    "a.text": "héllo",
    "a.flag": True,
    "a.number": -3,
    "a.ratio": 0.5,
    "a.list": ["x", "", "yz"],
    "a.ints": [1, 2],
}
GOOD = gguf(FIELDS, [("w", (4, 2), F32, 0), ("q", (32,), Q8_0, 32)], bytes(range(66)))


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def complaint(tmp_path: Path, data: bytes) -> str:
    with pytest.raises(ValueError, match=r"^model\.gguf") as caught:
        GGUFFile(write(tmp_path, data))
    return str(caught.value)


def test_fields_and_tensors_come_back(tmp_path: Path) -> None:
    with GGUFFile(write(tmp_path, GOOD)) as file:
        assert file.fields == FIELDS
        weights, quants = file.tensors
        assert (weights.name, weights.shape, weights.type_name, weights.nbytes) == ("w", (2, 4), "F32", 32)
        assert (quants.shape, quants.type_name, quants.nbytes) == ((32,), "Q8_0", 34)
        assert bytes(file.data(weights)) == bytes(range(32))
        assert bytes(file.data(quants)) == bytes(range(32, 66))


def test_data_stays_readable_after_closing(tmp_path: Path) -> None:
    file = GGUFFile(write(tmp_path, GOOD))
    data = file.data(file.tensors[0])
    file.close()
    assert data[31] == 31


def test_fields_are_checked_when_they_are_asked_for(tmp_path: Path) -> None:
    with GGUFFile(write(tmp_path, GOOD)) as file:
        assert file.field("a.number", int) == -3
        assert file.field("a.missing", int, 7) == 7
        with pytest.raises(ValueError, match=r"lacks the metadata key a\.missing"):
            file.field("a.missing", int)
        with pytest.raises(ValueError, match=r"a\.text has an unexpected type"):
            file.field("a.text", int)
        with pytest.raises(ValueError, match=r"a\.flag has an unexpected type"):
            file.field("a.flag", int)


@pytest.mark.parametrize("cut", [0, 3, 10, 24, 30, 60, len(GOOD) // 2, len(GOOD) - 66, len(GOOD) - 1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    complaint(tmp_path, GOOD[:cut])


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(GOOD) - 67), st.integers(0, 255))
def test_a_changed_byte_never_does_worse_than_a_value_error(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    path = write(tmp_path_factory.getbasetemp(), GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
    try:
        file = GGUFFile(path)
    except ValueError:
        return
    for tensor in file.tensors:
        assert len(file.data(tensor)) == tensor.nbytes


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGML" + GOOD[4:], "magic"),
        (b"PK\3\4" + bytes(100), "magic"),
        (gguf({}, version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (string("k") + value(1)), "appears twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IB", 7, 2), "neither 0 nor 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IQ", 99, 0), "unknown type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 1 << 61), "entries of k"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 5, 1 << 61), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1), "unsupported type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"\xff" + value(1), "UTF-8"),
        (gguf({"general.alignment": 12}), "general.alignment"),
        (gguf({"split.count": 3}), "split"),
        (gguf({}, [("w", (4,), F32, 0), ("w", (4,), F32, 32)], bytes(64)), "tensor name appears twice"),
        (gguf({}, [("w", (4,), 99, 0)], bytes(64)), "unknown type 99"),
        (gguf({}, [("w", (1, 1, 1, 1, 1), F32, 0)], bytes(64)), "5 dimensions"),
        (gguf({}, [("w", (), F32, 0)], bytes(64)), "0 dimensions"),
        (gguf({}, [("w", (0,), F32, 0)], bytes(64)), "impossible shape"),
        (gguf({}, [("w", (33,), Q8_0, 0)], bytes(64)), "impossible shape"),
        (gguf({}, [("w", (1 << 63, 1 << 63), F32, 0)], bytes(64)), "truncated: tensor w"),
        (gguf({}, [("w", (17,), F32, 0)], bytes(64)), "truncated: tensor w"),
        (gguf({}, [("w", (4,), F32, 8)], bytes(64)), "misaligned"),
        (gguf({}, [("v", (16,), F32, 0), ("w", (4,), F32, 32)], bytes(64)), "overlaps"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in complaint(tmp_path, data)


def test_a_missing_file_and_a_folder_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(IsADirectoryError):
        GGUFFile(tmp_path)


def test_the_tokens_that_end_an_answer(tmp_path: Path) -> None:
    """Those that the keys name, whatever they are called, and control tokens by their names, whatever the keys say."""
    names = ["x", "<|im_end|>", "<|endoftext|>", "</s>", "<EOT>", "<|end|>", "<|return|>", "<|im_start|>", "<|call|>"]
    kinds = [1, 3, 3, 3, 1, 3, 3, 3, 4]

    def ends(kinds: list[int], **keys: int) -> list[int]:
        ids = {f"tokenizer.ggml.{key}_token_id": token for key, token in keys.items()}
        data = gguf({"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": kinds} | ids)
        with GGUFFile(write(tmp_path, data)) as file:
            return end_token_ids(file)

    assert ends(kinds, eos=1) == [1, 2, 5, 6]  # <EOT> is no control token here, and neither is <|call|>
    assert ends(kinds, eos=3, eot=1, eom=0) == [3, 1, 0, 2, 5, 6]
    assert ends(kinds, bos=2) == [1, 2, 5, 6]  # that an answer may begin with it does not matter
    assert ends([1] * 9, eos=1, eot=1, eom=-1) == [1]
    assert ends([3], eos=77) == [77]  # whether the model has such a token its config knows
    # With <|return|> and <|call|>, <|end|> is where one of several messages ends.
    assert ends([*kinds[:8], 3], eos=6) == [6, 1, 2, 8]


def test_it_agrees_with_the_gguf_package(smollm2_gguf: Path) -> None:
    from gguf import GGUFReader
    from gguf.constants import GGML_QUANT_SIZES

    for kind, (block, size) in GGML_QUANT_SIZES.items():
        if int(kind) in TENSOR_TYPES:
            assert TENSOR_TYPES[int(kind)] == (kind.name, block, size)
    theirs = GGUFReader(str(smollm2_gguf))
    with GGUFFile(smollm2_gguf) as ours:
        assert ours.fields == {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
            assert (mine.name, mine.type, mine.nbytes) == (other.name, int(other.tensor_type), other.n_bytes)
            assert mine.shape == tuple(reversed([int(n) for n in other.shape]))
        assert np.array_equal(ours.data(ours.tensors[1]), theirs.tensors[1].data.view(np.uint8).reshape(-1))
