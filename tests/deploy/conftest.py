"""Tools that may be missing, and the API over a scripted engine to scrape."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.server.conftest import make_api, tokenizer

__all__ = ["make_api", "tokenizer", "tool"]


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    """tool("promtool") is its path; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        path = shutil.which(name, path=places)
        if path is None:
            pytest.skip(f"{name} is not installed (make test-deploy says what is missing and where it comes from)")
        return path

    return find
