"""The files of deploy/, and the API over a scripted engine to scrape."""

from __future__ import annotations

import shutil

import pytest

from tests.server.conftest import make_api, tokenizer

__all__ = ["make_api", "tokenizer", "tool"]


@pytest.fixture(scope="session")
def tool() -> object:
    """tool("promtool") is its path; the test is skipped where it is not installed."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"{name} is not installed (make test-deploy says what is missing and where it comes from)")
        return path

    return find
