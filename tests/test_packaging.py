"""The files a newcomer meets first hold what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from engine.protocols import Observed
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import Verdict
from server.config import ServerConfig, flag, parse
from tests import models

PROJECT = tomllib.loads((models.ROOT / "pyproject.toml").read_text())["project"]
PINS = [line for line in (models.ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned() -> None:
    pinned = {canonical(line.partition("==")[0]) for line in PINS}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["test"], *extras["plots"], *extras["dev"]]
    names = {canonical(re.split(r"[\[<>=!~; ]", line)[0]) for line in wanted} - {PROJECT["name"]}
    assert names <= pinned


def test_pins_are_plain_public_versions() -> None:
    assert [line for line in PINS if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


def test_the_readme_lists_every_flag() -> None:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for name, field in ServerConfig.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, list) else field.default
        shown = "" if default in (None, "") else f"`{default}`"
        rows.append(f"| `{'MODEL' if name == 'model' else flag(name)}` | {shown} | {field.description} |")
    assert "\n".join(rows) in (models.ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted((models.ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_is_a_valid_config(path: Path) -> None:
    assert parse(["--config", str(path)]).engine_config("m").model == "m"


def test_transformers_models_import_beside_our_kernels() -> None:
    """transformers takes a top-level package `kernels` of a certain version for its own; ours must not be mistaken for it."""
    modules = ", ".join(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3"))
    code = f"import kernels, {modules}; print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=models.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(models.ROOT / "kernels" / "__init__.py")


def test_the_drafter_in_contributing_drafts() -> None:
    text = (models.ROOT / "CONTRIBUTING.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope: dict[str, object] = {"__name__": "contributing"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), scope)
    drafter = scope["BigramDrafter"]()  # type: ignore[operator]  # it was just defined by the text
    seq = Sequence(7, Request(request_id="r", prompt_ids=[5, 1], params=SamplingParams(max_tokens=9)))
    bare = drafter.draft([seq], [4])
    assert bare.token.tolist() == [1]
    drafter.observe([seq], bare, Verdict(nodes=[[]], tokens=[[2, 3, 1]]), Observed())
    assert drafter.draft([seq], [4]).token.tolist() == [1, 2, 3, 1, 2]
    assert drafter.draft([seq], [1]).token.tolist() == [1, 2]
    drafter.forget(7)
    assert drafter.draft([seq], [4]).num_drafts == 0
