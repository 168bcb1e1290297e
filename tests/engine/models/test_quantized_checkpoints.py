"""Quantized checkpoints are the model that their dequantized weights are: unpacked, in native blocks and in Triton's kernel."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import footprint
from engine.check_cli import report
from engine.config import EngineConfig
from engine.dry_run import dry_run
from engine.models import factory
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.loader import iter_packed, iter_weights, load_config
from engine.models.native import NativeDecoder
from engine.models.quantized import Blocks, blocks_of
from engine.models.sharding import Sharding
from engine.parallel import Group
from engine.request import Request
from kernels.cpu.build import Unavailable, library
from tests.engine.models import quantize, tiny
from tests.engine.models.dense import Context, Rows, step
from tests.engine.models.quantize import FORMATS, checkpoints
from tests.engine.models.test_sharding import on_ranks
from tests.engine.real import answers, load_worker, make_engine, request
from tests.kernels.ordered import in_order

CPU = torch.device("cpu")
PROMPT = [5, 9, 7, 3, 8, 5, 30, 31, 77, 2]
with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no triton here")


def has_native() -> bool:
    try:
        library()
    except Unavailable:
        return False
    return True


with_native = pytest.mark.skipif(not has_native(), reason="no native kernels here")


def weights(path: Path, dtype: torch.dtype = torch.float32, part: Sharding | None = None) -> dict[str, Tensor]:
    return dict(iter_weights(str(path), load_config(str(path)), dtype, part))


def logits(model: Any) -> Tensor:
    """Of a prompt, and of a small tree behind it."""
    context, out = Context(), []
    for rows in (Rows.chain(PROMPT), Rows.tree([7, 8, 9, 10], [-1, 0, 0, 1])):
        hidden, _ = step(model, [context], [rows])
        out.append(model.logits(hidden).clone())
    return torch.cat(out)


def packed(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """With its weights as a GPU keeps them."""
    config = load_config(str(path))
    return Decoder(config, iter_packed(str(path), config, dtype, CPU), dtype, CPU)


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **changes: Any) -> None:
    written = json.loads((folder / "config.json").read_text())
    written["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(written))


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_read_as_what_it_stands_for(name: str, tmp_path: Path) -> None:
    made = checkpoints(name, tmp_path)
    found, wanted = weights(made.quantized), weights(made.plain)
    assert found.keys() == wanted.keys()
    for tensor, weight in wanted.items():
        close(found[tensor], weight, 1e-6 if "float32 scales" in name else 0)


def requests() -> list[Request]:
    sampled: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.7, "top_p": 0.9, "seed": 6},
    ]
    return [request(str(i), PROMPT[i:], max_tokens=16, **params) for i, params in enumerate(sampled)]


def tokens(path: Path, dtype: str = "float32", drafters: tuple[str, ...] = (), **options: Any) -> list[list[int]]:
    worker = load_worker(path, dtype, **options)
    return [answer.tokens for answer in answers(make_engine(worker, drafters), requests()).values()]


@pytest.mark.parametrize("name", ["AWQ 64", "GPTQ", "GPTQ act-order", "packed int4", "int8", "float8 blocks"])
def test_its_tokens_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    made = checkpoints(name, tmp_path)
    plain = tokens(made.plain)
    assert tokens(made.quantized) == plain and tokens(made.quantized, drafters=("ngram",)) == plain


@with_native
@pytest.mark.parametrize("name", FORMATS)
def test_native_kernels_give_the_bits_of_the_dequantized_model(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = checkpoints(name, tmp_path, tie_word_embeddings=name == "AWQ 32")
    worker, plain = (load_worker(path, "bfloat16", deterministic=True) for path in made)
    model, kind = worker.runner.model, FORMATS[name][2]
    assert isinstance(model, NativeDecoder) and model.kinds == {"BF16", *([kind] if kind else [])}
    assert ("are unpacked to bfloat16" in caplog.text) == (kind is None)
    assert (worker.info.quantization.endswith("unpacked")) == (kind is None) and plain.info.quantization == ""
    assert (worker.info.weight_bytes < 0.9 * plain.info.weight_bytes) == (kind is not None)
    asked = [*requests(), request("l", PROMPT, max_tokens=8, logprobs=3)]
    found, wanted = (answers(make_engine(one, ["ngram"]), asked) for one in (worker, plain))
    assert {k: (a.tokens, a.logprobs) for k, a in found.items()} == {k: (a.tokens, a.logprobs) for k, a in wanted.items()}


@with_triton
@pytest.mark.parametrize(
    "name", ["AWQ 64", "GPTQ symmetric", "GPTQ act-order", "packed int4, zeros", "int8", "float8", "float8 blocks"]
)
def test_tritons_kernel_gives_the_logits_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    made = checkpoints(name, tmp_path, attention_bias=True)
    model = packed(made.quantized)
    assert all((linear.quantized is None) == (name == "GPTQ act-order") for layer in model.layers for linear in layer.linears)
    plain = Decoder(load_config(str(made.plain)), iter_weights(str(made.plain), load_config(str(made.plain))), torch.float32, CPU)
    close(logits(model), logits(plain))
    assert (model.weight_bytes < 0.6 * plain.weight_bytes) == (name != "GPTQ act-order")


@with_triton
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_files_stay_packed_in_tritons_kernel(kind: str, tied: bool, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", tie_word_embeddings=tied))
    if tied:
        kept = made.state_dict()
        kept.pop("lm_head.weight")
        made.state_dict = lambda: kept
    path = tiny.write_gguf(made, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType[kind])
    config, model = load_config(str(path)), packed(path)
    assert all(linear.quantized is not None for linear in model.linears)
    close(logits(model), logits(Decoder(config, iter_weights(str(path), config, torch.float32), torch.float32, CPU)))
    assert factory.held(config, model) == f"{8 if kind == 'Q8_0' else 4} bits"


@with_triton
def test_a_rows_bits_do_not_depend_on_its_company_in_a_fixed_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_order(monkeypatch)
    model = packed(checkpoints("AWQ 64", tmp_path).quantized)
    model.fix_order()
    for linear in model.linears:
        if linear.quantized is not None:
            x = torch.randn(40, linear.in_features)
            assert torch.equal(linear(x), torch.cat([linear(part) for part in x.split([1, 1, 3, 17, 18])]))


@with_triton
def test_parts_of_a_quantized_model_compute_what_the_whole_does(tmp_path: Path) -> None:
    """Unpacked on a CPU; where there are kernels for it they are cut as they are."""
    path = checkpoints("AWQ 128", tmp_path).quantized
    config = load_config(str(path))

    def part(group: Group) -> Tensor:
        made = factory.load_model(EngineConfig(model=str(path), cpu_kernels="torch"), config, torch.float32, CPU, group)
        assert isinstance(made, Decoder)
        assert all(linear.quantized is None for linear in made.linears)
        return logits(made)

    close(on_ranks(2, part)[0], part(Group()))
    for shard in (Sharding.of(config, rank, 2) for rank in range(2)):
        own = weights(path, part=shard)
        for name, weight in iter_packed(str(path), config, torch.float32, CPU, shard):
            assert torch.equal(weight if isinstance(weight, Tensor) else weight.dequantize(torch.float32), own[name]), name
            assert not isinstance(weight, Tensor) or not name.endswith("_proj.weight")


@with_triton
def test_it_stays_packed_where_there_are_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints("AWQ 64", tmp_path).quantized
    config, engine = load_config(str(path)), EngineConfig(model=str(path), cpu_kernels="torch")
    for kernels in (False, True):
        monkeypatch.setattr(factory, "has_kernels", lambda device, here=kernels: here)
        model = factory.load_model(engine, config, torch.float32, CPU)
        assert isinstance(model, Decoder) and all((linear.quantized is not None) == kernels for linear in model.layers[0].linears)
        assert factory.held(config, model) == "AWQ, 4 bits, groups of 64" + ("" if kernels else ", unpacked")


SOME: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "AWQ": (
        quantize.awq(32),
        {**quantize.AWQ, "group_size": 32, "modules_to_not_convert": ["layers.1", "o_proj"]},
        ("layers.1", "o_proj"),
    ),
    "GPTQ": (
        quantize.gptq(32),
        {**quantize.GPTQ, "group_size": 32, "modules_in_block_to_quantize": [["mlp.up_proj"]]},
        ("attn", "gate", "down"),
    ),
    "compressed": (
        quantize.int8,
        quantize.compressed("int-quantized", ignore=("re:.*down_proj",), num_bits=8, strategy="channel"),
        ("down_proj",),
    ),
    "float8": (
        quantize.float8("tensor"),
        {**quantize.FLOAT8, "modules_to_not_convert": ["model.layers.0.mlp", "lm_head"]},
        ("layers.0.mlp",),
    ),
}


@pytest.mark.parametrize("name", SOME)
def test_modules_that_are_not_quantized_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    made = quantize.write(tiny.model(quantize.shape(tie_word_embeddings=True)), tmp_path, *SOME[name])
    found, wanted = weights(made.quantized), weights(made.plain)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    made = checkpoints("int8", tmp_path)
    parts, values = quantize.int8(weights(made.plain)["lm_head.weight"])
    edit(made.quantized, lambda t: t.update({f"lm_head.{end}": part for end, part in parts.items()}))
    configure(made.quantized, ignore=[])
    assert torch.equal(weights(made.quantized)["lm_head.weight"], values)


def test_shards_may_cut_through_a_module(tmp_path: Path) -> None:
    folder = checkpoints("AWQ 64", tmp_path).quantized
    wanted, tensors = weights(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = weights(folder)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("AWQ 64", lambda t: t.pop(f"{Q}.qzeros"), f"tensor {Q}.qzeros is missing"),
        ("AWQ 64", lambda t: t.update({f"{Q}.weight": torch.zeros(128, 128)}), f"unexpected tensor {Q}.weight"),
        ("AWQ 64", lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].float()}), f"{Q}.qweight has type F32; only I32"),
        ("AWQ 64", lambda t: t.update({f"{Q}.scales": torch.ones(1, 128)}), rf"{Q}.scales has shape \(1, 128\), .* \(2, 128\)"),
        ("AWQ 64", lambda t: t[f"{Q}.scales"].fill_(torch.nan), f"{Q}: scales holds numbers that are not finite"),
        ("GPTQ", lambda t: t[f"{Q}.g_idx"].fill_(7), f"{Q}: g_idx names group 7 of 2"),
        ("GPTQ", lambda t: t[f"{Q}.g_idx"].fill_(-1), f"{Q}: g_idx names group"),
        ("packed int4", lambda t: t[f"{Q}.weight_shape"].fill_(64), rf"{Q}: weight_shape says \[64, 64\], .*\[128, 128\]"),
        ("packed int4, zeros", lambda t: t.pop(f"{Q}.weight_zero_point"), f"tensor {Q}.weight_zero_point is missing"),
        ("int8", lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].half()}), f"{Q}.weight has type F16; only I8"),
        ("float8", lambda t: t[f"{Q}.weight"].view(torch.uint8)[3].fill_(0x7F), f"{Q}: weight holds numbers that are not finite"),
        ("float8 blocks", lambda t: t.pop(f"{Q}.weight_scale_inv"), f"tensor {Q}.weight_scale is missing"),
    ],
)  # fmt: skip
def test_damage_is_an_error_that_names_its_place(name: str, change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    folder = checkpoints(name, tmp_path).quantized
    edit(folder, change)
    with pytest.raises(ValueError, match=words) as error:
        weights(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("load_format", ["auto", "native"])
def test_what_is_not_supported_names_the_field(load_format: Any, tmp_path: Path) -> None:
    folder = checkpoints("GPTQ", tmp_path).quantized
    configure(folder, bits=3)
    config = load_config(str(folder))
    with pytest.raises(ValueError, match=r"quantization_config\.bits: 3 is not supported \(only 4\)"):
        factory.load_model(EngineConfig(model=str(folder), load_format=load_format), config, torch.float32, CPU)


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = checkpoints("AWQ 64", tmp_path).quantized
    configure(folder, group_size=96)
    with pytest.raises(ValueError, match=f"quantization_config: {Q}'s 128 x 128 weights are not whole groups of 96"):
        weights(folder)


def test_unpacking_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    made = checkpoints("AWQ 64", tmp_path)
    factory.load_model(EngineConfig(model=str(made.quantized)), load_config(str(made.quantized)), torch.float32, CPU)
    assert "(AWQ, 4 bits, groups of 64) are unpacked to float32: the native kernels, for bfloat16" in caplog.text


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_worth_what_the_weight_is(name: str, tmp_path: Path) -> None:
    path = str(checkpoints(name, tmp_path).quantized)
    for _, weight in iter_packed(path, load_config(path), torch.float32, CPU):
        if isinstance(weight, Tensor) or (blocks := blocks_of(weight)) is None:
            continue
        assert isinstance(blocks, Blocks) and blocks.type_name == FORMATS[name][2] and blocks.inputs == weight.in_features
        assert torch.equal(blocks.dequantize(), weight.dequantize(torch.bfloat16))
        assert torch.equal(blocks.weight().dequantize(torch.float32), weight.dequantize(torch.float32))


@pytest.mark.parametrize("name", ["AWQ 64", "packed int4, row", "int8", "float8", "float8 blocks", "GPTQ act-order"])
def test_what_it_will_take_is_counted_before_it_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints(name, tmp_path).quantized
    config, engine = load_config(str(path)), EngineConfig(model=str(path), cpu_kernels="torch")
    assert footprint.weight_bytes(engine, str(path), config, torch.float32, CPU) == sum(w.nbytes for w in weights(path).values())
    if name != "GPTQ act-order":  # which config.json does not tell from others
        monkeypatch.setattr(footprint, "has_kernels", lambda device: True)
        found = sum(weight.nbytes for _, weight in iter_packed(str(path), config, torch.float32, CPU))
        assert footprint.weight_bytes(engine, str(path), config, torch.float32, CPU) == pytest.approx(found, rel=0.01)


def test_gguf_bytes_on_a_gpu_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.write_gguf(tiny.model(tiny.config("Llama")), tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    config = load_config(str(path))
    monkeypatch.setattr(footprint, "has_kernels", lambda device: True)
    for part in (None, Sharding.of(config, 0, 2)):
        found = sum(weight.nbytes for _, weight in iter_packed(str(path), config, torch.bfloat16, CPU, part))
        assert footprint.weight_bytes(EngineConfig(model=str(path)), str(path), config, torch.bfloat16, CPU, part) == found


def test_the_check_refuses_what_the_server_would(tmp_path: Path) -> None:
    folder = checkpoints("GPTQ", tmp_path).quantized
    assert ", GPTQ, 4 bits, groups of 64" in report(dry_run(EngineConfig(model=str(folder))))[0]
    configure(folder, bits=8)
    with pytest.raises(ValueError, match=r"quantization_config\.bits: 8 is not supported"):
        dry_run(EngineConfig(model=str(folder)))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "bitsandbytes"}, "quant_method: 'bitsandbytes' weights are not read"),
    ({**quantize.AWQ, "group_size": 64, "bits": 8}, "bits: 8"),
    ({**quantize.AWQ, "group_size": 64, "zero_point": False}, "zero_point: False"),
    ({**quantize.AWQ, "group_size": 64, "version": "gemv"}, "version: 'gemv'"),
    ({**quantize.AWQ, "group_size": 16}, "group_size: groups of 16"),
    ({**quantize.AWQ, "group_size": True}, "group_size: groups of True"),
    ({**quantize.AWQ, "group_size": 64, "modules_to_not_convert": "lm_head"}, "modules_to_not_convert: 'lm_head' is no list"),
    ({**quantize.GPTQ, "group_size": 64, "checkpoint_format": "marlin"}, "checkpoint_format: 'marlin'"),
    ({**quantize.GPTQ, "group_size": 64, "dynamic": {"-:.*": {}}}, "dynamic: "),
    ({**quantize.FLOAT8, "weight_block_size": [128]}, "weight_block_size: blocks of"),
    ({**quantize.FLOAT8, "scale_fmt": "ue8m0"}, "scale_fmt: 'ue8m0'"),
    ({**quantize.FLOAT8, "activation_scheme": 3}, "activation_scheme: 3"),
    (quantize.compressed("marlin-24", num_bits=4, strategy="channel"), "format: 'marlin-24'"),
    (quantize.compressed("pack-quantized", num_bits=3, strategy="channel"), "config_groups.group_0.weights.num_bits: 3"),
    (quantize.compressed("pack-quantized", num_bits=4, strategy="token"), "weights.strategy: 'token'"),
    (quantize.compressed("pack-quantized", **quantize.INT4, group_size=64, actorder="group"), "weights.actorder: 'group'"),
    (quantize.compressed("pack-quantized", ignore=("re:(",), **quantize.INT4, group_size=64), r"ignore: 're:\(' is no regular"),
    (quantize.compressed("nvfp4-pack-quantized", type="float", num_bits=4), "format: 'nvfp4-pack-quantized'"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups: 0 groups"),
    ({"quant_method": "compressed-tensors"}, "config_groups: None is no object"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24"}}, "sparsity_config: sparse"),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_every_field_that_is_not_supported_is_named(config: dict[str, Any], words: str) -> None:
    read = ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], **tiny.SHAPE, "quantization_config": config})
    assert read.unsupported is not None and re.match(rf"quantization_config\..*{words}", read.unsupported), read.unsupported
