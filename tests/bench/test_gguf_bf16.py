"""The bf16 copy of a quantised file that lets peers run on the same weights."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

from bench.gguf_bf16 import convert


def test_bf16_copy_of_a_quantised_file(tmp_path: Path) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "model.bf16.gguf"
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((4, 64), dtype=np.float32)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(3)
    writer.add_token_list(["a", "é", "<s>"])
    writer.add_quantization_version(2)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", matrix[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    convert(source, target)

    before, after = gguf.GGUFReader(source), gguf.GGUFReader(target)
    assert after.fields["llama.block_count"].contents() == 3
    assert after.fields["tokenizer.ggml.tokens"].contents() == ["a", "é", "<s>"]
    assert after.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    quantised, copied = before.tensors[0], after.tensors[0]
    assert copied.tensor_type == gguf.GGMLQuantizationType.BF16
    assert copied.shape.tolist() == quantised.shape.tolist()
    np.testing.assert_allclose(
        dequantize(copied.data, copied.tensor_type), dequantize(quantised.data, quantised.tensor_type), rtol=2**-8
    )
    np.testing.assert_array_equal(after.tensors[1].data, matrix[0])
    assert not list(tmp_path.glob("*.partial"))
