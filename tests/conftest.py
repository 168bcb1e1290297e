"""What every test shares: one thread, no network, the models. Imports no torch: the front end's tests run without it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import models

# Before anything can import torch. One thread: at two threads on two busy cores torch is many times slower than at one.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
# Where a test does take two: waiting threads sleep instead of spinning against each other.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)

LOOPBACK = ("127.", "::1", "localhost")


def _guarded(real: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOOPBACK):
            raise ConnectionRefusedError(f"tests touch no network, and this one asked for {address}")
        return real(self, address)

    return connect


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Any:
    """Tests talk to this machine only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", _guarded(socket.socket.connect_ex))
        yield


# Minutes each, on the one worker that has the file: they come first, so that everything else lies beside them (xdist itself would
# begin with the files of many tests, and end with one worker in one of these: hence --no-loadscope-reorder).
LONG_FILES = ("test_against_transformers.py", "test_invisible.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_FILES)  # a stable sort: the rest keeps its order


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, the 4-bit GGUF file that `outrider serve` serves by default."""
    return models.smollm2_gguf()


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The same model as a Hugging Face directory (safetensors, bfloat16)."""
    return models.built(models.SMOLLM2)


@pytest.fixture(scope="session")
def tiny_llama_dir() -> Path:
    """Two random layers behind a SentencePiece-style tokenizer, as a Hugging Face directory: fast, and it makes no sense."""
    return models.built(models.TINY_LLAMA)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real workloads that lie beside the repository: read in place, never committed."""
    path = Path(os.environ.get("OUTRIDER_SHARED_DATA") or models.ROOT.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (OUTRIDER_SHARED_DATA)")
    return path
