"""`outrider profile`: what it prints, draws and keeps, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server import cli


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OUTRIDER_") and name != "OUTRIDER_TEST_MODELS":
            monkeypatch.delenv(name)


def complaint(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["profile", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("outrider: error: ") and err.count("\n") == 1
    return err


def test_it_measures_prints_draws_and_keeps(tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = ["--seconds", "1", "--num-threads", "1", "--cache-dir", str(tmp_path / "cache"), "--png", str(tmp_path / "costs.png")]
    command = [sys.executable, "-m", "server.cli", "profile", str(tiny_llama_dir), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tokens/s if all stand" in done.stdout and "each further sequence" in done.stdout
    (kept,) = (tmp_path / "cache" / "cost").iterdir()
    assert f"kept in {kept}" in done.stdout
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_flag_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--prot" in complaint(capsys, "--prot", "1")
    assert "--seconds: must be positive" in complaint(capsys, "--seconds", "0")
    assert "no such model" in complaint(capsys, str(tmp_path / "x.gguf"))
    assert "there is no such folder" in complaint(capsys, "--png", str(tmp_path / "missing" / "x.png"))


def test_without_matplotlib_it_says_how_to_get_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    message = complaint(capsys, "--png", "costs.png")
    assert "matplotlib" in message and "outrider[plots]" in message


def test_help_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["profile", "--help"])
    assert left.value.code == 0
    assert "--png FILE" in capsys.readouterr().out
