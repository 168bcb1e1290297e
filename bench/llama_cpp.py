"""llama.cpp's server as a peer: built from the sources inside the llama-cpp-python sdist, outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.gguf_bf16 import convert

SDIST = "llama-cpp-python==0.3.36"
SLOT = 1280  # context of one slot in tokens: the longest prompt of ours and its answer
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # this machine's own instructions, AVX-512-BF16 included
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",  # would be downloaded
    "LLAMA_OPENSSL": "OFF",
}


def server(folder: Path) -> Path:
    """Where `install` puts the program. Raises FileNotFoundError with what to do when it is not there."""
    found = sorted(folder.glob("llama_cpp_python-*/vendor/llama.cpp/build/bin/llama-server"))
    if not found:
        raise FileNotFoundError(f"no llama-server under {folder}: run `python -m bench.peers install llama.cpp` first")
    return found[-1]


def install(folder: Path, jobs: int) -> Path:
    """Download the sources with pip and build the server; four minutes on two cores. Needs cmake, make and a C++17 compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("llama_cpp_python-*.tar.gz")):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder)]
        subprocess.run([*pip, SDIST], check=True)
    archive = sorted(folder.glob("llama_cpp_python-*.tar.gz"))[-1]
    sources = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    if not sources.is_dir():
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    build = sources / "build"
    flags = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    polite = ["nice", "-n", "10", "cmake"]
    subprocess.run([*polite, "-S", str(sources), "-B", str(build), *flags], check=True)
    subprocess.run([*polite, "--build", str(build), "--target", "llama-server", "--parallel", str(jobs)], check=True)
    return server(folder)


def weights(model: Path, folder: Path) -> Path:
    """The bf16 copy of `model`, made once: every peer then runs on the same numbers."""
    target = folder / f"{model.stem}.bf16.gguf"
    if not target.exists() or target.stat().st_mtime < model.stat().st_mtime:
        convert(model, target)
    return target


def command(program: Path, model: Path, port: int, slots: int) -> list[str]:
    """Prompt caching as it comes, that is on."""
    threads = str(len(os.sched_getaffinity(0)))
    return [
        *(str(program), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-ui"),
        *("-t", threads, "-tb", threads, "--parallel", str(slots), "-c", str(slots * SLOT)),
    ]
