"""`outrider verify-lossless` as a user runs it: a real engine in its own process, a tiny real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ["--dtype", "float32", "--num-threads", "1", "--num", "3", "--max-tokens", "20", "--temperature", "1.0", "--json"]
# The exit code is the command's only if its process has not loaded torch.
RUN = "import sys; from server import cli; code = cli.main(sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else code)"


def verify(model: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-c", RUN, "verify-lossless", str(model), *FLAGS, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_default_verifier_changes_nothing(tiny_llama_dir: Path) -> None:
    code, report = verify(tiny_llama_dir, "--concurrency", "3")
    assert (code, report["verdict"], report["lossless"], report["policy"]) == (0, "PASS", True, "fixed")
    assert {case["outcome"] for case in report["cases"]} == {"equal"}
    assert {case["temperature"] for case in report["cases"]} == {0.0, 1.0}
    assert report["num_accepted_tokens"] > 0


def test_a_lossy_verifier_is_caught(tiny_llama_dir: Path) -> None:
    code, report = verify(tiny_llama_dir, "--verifier", "typical", "--lossy")
    assert (code, report["verdict"], report["lossless"]) == (1, "DIFFERENT", False)
    found = [run["difference"] for case in report["cases"] for run in case["runs"].values() if run["difference"]]
    assert found
    assert all(difference["plain_id"] != difference["other_id"] for difference in found)
