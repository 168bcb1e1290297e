"""Triton kernels run under Triton's interpreter where there is no CUDA device, and only inside this folder's tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import torch

from kernels.interpreter import interpreted


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() or find_spec("triton") is None else interpreted():
        yield
