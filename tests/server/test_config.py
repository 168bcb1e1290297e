"""ServerConfig: where settings come from, and what is said about wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from server.config import ConfigError, ServerConfig, flag, parse


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("OUTRIDER_"):
            monkeypatch.delenv(name)


def complaint(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_beat_the_environment_beats_yaml_beats_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("port: 1\nmax-num-seqs: 1\nmax_model_len: 1\ndrafters: [ngram]\n")
    monkeypatch.setenv("OUTRIDER_PORT", "2")
    monkeypatch.setenv("OUTRIDER_MAX_NUM_SEQS", "2")
    config = parse(["some/model", "--config", str(file), "--port", "3"])
    assert (config.port, config.max_num_seqs, config.max_model_len, config.block_size) == (3, 2, 1, 16)
    assert config.drafters == ["ngram"]
    assert config.model == "some/model"


def test_the_yaml_file_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("budget: 3\n")
    monkeypatch.setenv("OUTRIDER_CONFIG", str(tmp_path / "x.yaml"))
    assert parse([]).budget == 3


def test_lists_come_as_commas_as_repeated_flags_and_as_yaml_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert parse(["--drafters", "ngram, prediction"]).drafters == ["ngram", "prediction"]
    assert parse(["--api-key", "a", "--api-key", "b"]).api_key == ["a", "b"]
    monkeypatch.setenv("OUTRIDER_API_KEY", "c d")
    assert parse([]).api_key == ["c", "d"]
    (tmp_path / "x.yaml").write_text("cors_allow_origins: [https://a, https://b]\n")
    assert parse(["--config", str(tmp_path / "x.yaml")]).cors_allow_origins == ["https://a", "https://b"]


def test_defaults_are_the_engines_own() -> None:
    config = parse([])
    assert config.engine_config("m") == EngineConfig(model="m")
    assert config.host == "127.0.0.1"
    assert config.model is None


@pytest.mark.parametrize("name", [f for f in EngineConfig.__struct_fields__ if f not in ("model", "check_integrity")])
def test_every_setting_of_the_engine_has_a_flag_that_reaches_it(name: str) -> None:
    value: Any = getattr(EngineConfig(model=""), name)
    argv = {
        "dtype": ["--dtype", "float32"],
        "device": ["--device", "cuda:1"],
        "gpu_memory_utilization": ["--gpu-memory-utilization", "0.5"],
        "enable_prefix_caching": ["--no-enable-prefix-caching"],
        "drafters": ["--drafters", "none"],
        "verifier": ["--verifier", "other"],
        "policy": ["--policy", "off"],
        "profile": ["--no-profile"],
        "lossy": ["--lossy"],
        "deterministic": ["--deterministic"],
        "enforce_eager": ["--enforce-eager"],
        "distributed_executor_backend": ["--distributed-executor-backend", "ray"],
        "load_format": ["--load-format", "native"],
        "cpu_kernels": ["--cpu-kernels", "torch"],
        "cpu_weights": ["--cpu-weights", "bfloat16"],
        "attention_backend": ["--attention-backend", "triton"],
    }.get(name, [flag(name), "7"])
    assert getattr(parse(argv).engine_config("m"), name) != value


def test_an_empty_list_of_drafters_means_none() -> None:
    assert parse(["--drafters", ""]).drafters == ["none"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-model-length", "5"], ["--max-model-length", "did you mean --max-model-len?"]),
        (["--prot=5"], ["--prot", "did you mean --port?"]),
        (["a", "b"], ["unknown argument b"]),
        (["--port"], ["--port"]),
        (["--port", "http"], ["--port", "integer", "'http'"]),
        (["--port", "65536"], ["--port", "65535"]),
        (["--max-num-seqs", "0"], ["--max-num-seqs", "greater than or equal to 1"]),
        (["--gpu-memory-utilization", "1.5"], ["--gpu-memory-utilization"]),
        (["--gpu-memory-utilization", "nan"], ["--gpu-memory-utilization"]),
        (["--policy", "greedy"], ["--policy", "'goodput', 'fixed' or 'off'"]),
        (["--max-itl-ms", "0"], ["--max-itl-ms"]),
        (["--max-budget", "-1"], ["--max-budget"]),
        (["--device", "tpu"], ["--device"]),
        (["--seed", "-1"], ["--seed"]),
        (["--config", "/does/not/exist.yaml"], ["--config /does/not/exist.yaml", "No such file"]),
    ],
)
def test_a_wrong_flag_is_named(argv: list[str], words: list[str]) -> None:
    message = complaint(*argv)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 5\n", ["unknown setting prot", "did you mean port?"]),
        ("- a\n", ["expected a mapping"]),
        ("port: [\n", ["--config"]),
        ("port: x\n", ["--port", "integer"]),
        ("config: y.yaml\n", ["unknown setting config"]),
        ("model: !!python/object/apply:os.getcwd []\n", ["--config"]),
    ],
)
def test_a_wrong_yaml_file_is_an_error(tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "x.yaml").write_text(text)
    message = complaint("--config", str(tmp_path / "x.yaml"))
    for word in words:
        assert word in message


def test_an_empty_yaml_file_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert parse(["--config", str(tmp_path / "x.yaml")]).port == 8000


def test_a_misspelt_variable_is_pointed_out_and_a_foreign_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_MAX_NUM_SEQ", "5")
    monkeypatch.setenv("OUTRIDER_TEST_MODELS", "x")
    parse([])
    assert capsys.readouterr().err.strip() == (
        "outrider: the environment variable OUTRIDER_MAX_NUM_SEQ is no setting; did you mean OUTRIDER_MAX_NUM_SEQS?"
    )


def test_the_port_variable_of_a_kubernetes_service_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_PORT", "tcp://10.0.0.1:80")
    assert parse([]).port == 8000


def test_a_key_is_never_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of a key must not open the door."""
    assert parse(["--api-key", "sk-a,b"]).api_key == ["sk-a,b"]
    monkeypatch.setenv("OUTRIDER_API_KEY", "sk-a,b")
    assert parse([]).api_key == ["sk-a,b"]
    (tmp_path / "x.yaml").write_text("api_key: [sk-c, 'd,e']\n")
    monkeypatch.delenv("OUTRIDER_API_KEY")
    assert parse(["--config", str(tmp_path / "x.yaml")]).api_key == ["sk-c", "d,e"]


def test_an_empty_key_is_not_no_key(tmp_path: Path) -> None:
    """`--api-key "$UNSET"` must not open the server."""
    for argv in (["--api-key", ""], ["--api-key", " "], ["--api-key", "a", "--api-key", ""], ["--api-key", "a b"]):
        with pytest.raises(ConfigError, match="--api-key"):
            parse(argv)
    (tmp_path / "x.yaml").write_text("api_key: ''\n")
    with pytest.raises(ConfigError, match="--api-key"):
        parse(["--config", str(tmp_path / "x.yaml")])


def test_keys_are_never_shown() -> None:
    assert "hush" not in repr(parse(["--api-key", "hush"]))
    with pytest.raises(ValueError) as caught:
        ServerConfig(api_key=5)
    assert "5" not in complaint_of(caught.value)


def complaint_of(error: Any) -> str:
    from server.config import first_complaint

    return first_complaint(error)


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in ServerConfig.model_fields.items():
        assert (flag(name) if name != "model" else "MODEL") in text
        assert field.description
