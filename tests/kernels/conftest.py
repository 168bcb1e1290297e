"""Triton kernels run under Triton's interpreter where there is no CUDA device. Decided here, before a kernel is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """The interpreter computes with numpy, which warns of infinities and NaN that a kernel means."""
    with np.errstate(all="ignore"):
        yield
