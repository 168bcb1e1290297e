"""`outrider serve --check`: the plan, or one line that names what is wrong; nothing is started, loaded or downloaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from server import cli
from server.check import parse, size
from server.config import ConfigError
from tests import models

HUB = models.ROOT / "tests" / "hub"
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
PRESET = str(models.ROOT / "configs" / "llama-3.1-8b.yaml")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OUTRIDER_") and name != "OUTRIDER_TEST_MODELS":
            monkeypatch.delenv(name)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one model's config.json in it, as a download leaves it."""
    place = tmp_path / f"models--{LLAMA.replace('/', '--')}"
    snapshot = place / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")
    shutil.copy(HUB / LLAMA / "config.json", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def complaint(capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["serve", "--check", *argv]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("outrider: error: ") and err.count("\n") == 1
    return err


def test_the_plan_of_a_preset_whose_model_lies_in_the_hubs_cache(capfd: pytest.CaptureFixture[str], hub_cache: Path) -> None:
    assert cli.main(["serve", "--check", "--device-memory", "80GiB", "--config", PRESET]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "llama, 32 layers of 4,096, 32 heads, 8 KV heads, inner size 14,336, heads of 128, vocabulary 128,256, bfloat16" in out
    assert "80.00 GiB of the GPU" in out and "14.96 GiB  weights" in out
    assert "16,384 tokens of the model's 131,072" in out and "131,072 bytes" in out
    assert "prediction, suffix, ngram; verifier match" in out


def test_what_does_not_fit_is_the_operators_to_mend(capfd: pytest.CaptureFixture[str], hub_cache: Path) -> None:
    said = complaint(capfd, "--device-memory", "16GiB", "--config", PRESET)
    assert "gpu_memory_utilization: a share of 0.9 leaves" in said and "weights 16,061 MB" in said


def test_nothing_is_downloaded(capfd: pytest.CaptureFixture[str], hub_cache: Path) -> None:
    said = complaint(capfd, "someone/some-model")
    assert "a check downloads nothing: someone/some-model" in said
    assert complaint(capfd, LLAMA, "--draft-model", "someone/small").count("someone/small") == 1


def test_what_a_server_would_refuse_here_is_refused(
    capfd: pytest.CaptureFixture[str], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = str(tiny_llama_dir)
    native = ("--cpu-kernels", "native", "--dtype", "float32", "--device", "cpu")
    assert "cpu_kernels: the native kernels cannot run this model here" in complaint(capfd, model, *native)
    if importlib.util.find_spec("flashinfer") is None:
        assert "attention_backend: flashinfer is not installed" in complaint(capfd, model, "--attention-backend", "flashinfer")
    nowhere = str(tmp_path / "nowhere")
    assert f"datastore {nowhere}: No such file" in complaint(capfd, model, "--datastore", nowhere)
    assert "a drafter is named twice" in complaint(capfd, model, "--drafters", "suffix,suffix")
    assert "--watchdog-timeout: Input should be greater than or equal to 2" in complaint(capfd, model, "--watchdog-timeout", "1")
    assert "MODEL is empty" in complaint(capfd, "")


def test_an_unknown_field_of_a_preset_is_named(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("max_num_seq: 4\n")
    assert "unknown setting max_num_seq; did you mean max_num_seqs?" in complaint(capfd, "--config", str(tmp_path / "x.yaml"))


def test_memory_is_described_with_a_unit() -> None:
    assert [size(text) for text in ("80GiB", "24 gb", "1.5TB", "1024", None)] == [
        80 << 30,
        24 * 10**9,
        1_500_000_000_000,
        1024,
        None,
    ]
    for text in ("80G", "much", "", "0GiB", "-1GiB", "1e3GB"):
        with pytest.raises(ConfigError, match=r"^--device-memory: expected a size such as 80GiB"):
            size(text)
    with pytest.raises(ConfigError, match=r"^--device-memory: it describes a machine for --check"):
        parse(["--device-memory", "80GiB"])
    assert parse([])[1] is None
