"""A bf16 copy of a quantised GGUF file, so that every peer runs on the very same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

_DERIVED = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type"}


def convert(source: Path, target: Path) -> None:
    """Write `target` with the metadata of `source`, its matrices in bf16 and its vectors (norms) in float32.

    Rounding is to nearest even, as torch's float32 -> bfloat16 is.
    """
    reader = gguf.GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, _contents(reader, "general.architecture"))
    for name, field in reader.fields.items():
        if name not in _DERIVED and not name.startswith("general.quantized_by"):
            item = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=item)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = gguf.GGMLQuantizationType.BF16 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(target)


def _contents(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.fields.get(name)
    if field is None:
        raise ValueError(f"the file has no {name}")
    return field.contents()
