"""The comparison of arms: what is paired with what, and what is said of answers that differ."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from bench.arms import Arm, arms, running
from bench.comparison import Round, report
from bench.gguf_bf16 import convert
from bench.summary import Numbers
from bench.workloads import WORKLOADS


def numbers(decode: float, total: float, errors: int = 0) -> Numbers:
    return {"decode_rate": decode, "total_rate": total, "errors": errors, "client_cpu_share": 0.01}


def one(decode: float, total: float, texts: dict[str, str] | None = None, errors: int = 0) -> Round:
    return Round(2.0, 500.0, {"open": numbers(decode, 0.0), "4 streams": numbers(0.0, total, errors)}, texts or {})


def cells(text: str, row: str) -> list[list[str]]:
    """The cells of every table row that begins with `row`."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [line[1:] for line in lines if line[0] == row]


def test_ratios_are_paired_within_a_round() -> None:
    # The machine was half as fast in round 2: each ratio stays 2, while the medians drift.
    rounds = {"ours": [one(100, 300), one(50, 150), one(110, 330)], "peer": [one(50, 100), one(25, 50), one(55, 110)]}
    text = report(rounds, "ours")
    values, ratios = cells(text, "peer")
    assert values[:2] == ["50.0", "100.0"]
    assert ratios == ["2.00", "3.00"]
    assert cells(text, "ours")[1] == ["1.00", "1.00"]


def test_a_workload_with_errors_has_no_figure() -> None:
    text = report({"ours": [one(100, 300, errors=1)]}, "ours")
    assert cells(text, "ours")[0][:2] == ["100.0", "-"]


def test_answers_that_differ_are_counted() -> None:
    rounds = {"ours": [one(1, 1, {"a": "x", "b": "y"})], "peer": [one(1, 1, {"a": "x", "b": "z", "c": "only here"})]}
    assert "peer: 1 of 2 answers equal those of ours" in report(rounds, "ours")


def test_scores() -> None:
    assert math.isnan(one(1, 1).score("math"))
    assert one(7, 9).score("4 streams") == 9
    extra = Round(1.0, 1.0, {"8 in a batch": numbers(5, 6)})
    assert extra.score("8 in a batch") == 6


def test_workloads_have_prompts_of_their_category() -> None:
    for workload in WORKLOADS:
        prompts = workload.prompts()
        assert len(prompts) == workload.requests >= workload.concurrency
        if workload.category:
            assert {prompt.category for prompt in prompts} == {workload.category}
        else:
            assert len({prompt.category for prompt in prompts}) == 7


def test_every_arm_asks_known_workloads(tmp_path: Path) -> None:
    known = {workload.name for workload in WORKLOADS}
    found = arms(tmp_path / "model.gguf", tmp_path, slots=2)
    assert all(set(arm.workloads) <= known for arm in found)
    assert len({arm.name for arm in found}) == len(found)
    with pytest.raises(FileNotFoundError, match="install"):
        next(arm for arm in found if arm.name == "llama.cpp").command(1)


def test_a_server_is_waited_for_and_ended(tmp_path: Path) -> None:
    server = (
        "import http.server, sys\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Health).serve_forever()\n"
    )
    arm = Arm("toy", lambda port: [sys.executable, "-c", server, str(port)])
    with running(arm, tmp_path / "log") as up:
        assert up.start_seconds > 0
        assert Path(f"/proc/{up.pid}").exists()
    assert not Path(f"/proc/{up.pid}").exists()


def test_a_server_that_dies_is_reported_with_its_log(tmp_path: Path) -> None:
    arm = Arm("toy", lambda port: [sys.executable, "-c", "raise SystemExit('no such model')"])
    with pytest.raises(RuntimeError, match=r"toy did not get ready: see .*log"), running(arm, tmp_path / "log"):
        pytest.fail("it never was ready")
    assert "no such model" in (tmp_path / "log").read_text()


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
