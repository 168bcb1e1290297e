"""OpenVINO GenAI as a peer: its own pipeline in an environment of its own (1.6 GB), measured without HTTP (bench.openvino_run).

Its exporter reads the same Hugging Face directory as everybody and writes float16 weights, which the CPU plug-in computes
in bf16 where the processor can; `int8` is its 8-bit export, other weights than the others run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.environment import Environment

NAME = "openvino"
PACKAGES = ("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "torch==2.13.0+cpu")
USELESS = ("torchvision",)  # the index has it for CUDA; it does not load beside a CPU torch and stops transformers
FORMATS = ("fp16", "int8")


def install(folder: Path) -> Path:
    """Two minutes. torch serves the exporter alone; a CPU wheel must be on the configured index or lie on the machine."""
    home = Environment(folder, NAME)
    home.create()
    home.pip("install", *PACKAGES)
    home.pip("uninstall", "--yes", *USELESS)
    return home.python


def exported(model: Path, folder: Path, form: str) -> Path:
    """The model in OpenVINO's format, written once; under a minute."""
    home = Environment(folder, NAME)
    target = folder / f"{model.name}.openvino-{form}"
    if not (target / "openvino_model.bin").exists():
        program = str(home.python.parent / "optimum-cli")
        task = ("--task", "text-generation-with-past", "--weight-format", form)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        home.run([program, "export", "openvino", "--model", str(model), *task, str(partial)], folder / "openvino.log")
        partial.replace(target)
    return target


def command(python: Path, model: Path, slots: int, lookup: int, workloads: Sequence[str], part: float) -> list[str]:
    """A program that measures the named workloads in turn and prints them as one JSON object."""
    names = [word for name in workloads for word in ("--workload", name)]
    options = ("--slots", str(slots), "--lookup", str(lookup), "--part", str(part))
    return [str(python), "-m", "bench.openvino_run", str(model), *options, *names]
