"""The documents name what there is."""

from __future__ import annotations

import pytest

from engine import registry
from server.cli import COMMANDS, USAGE
from server.openai.report import speculation_report
from server.openai.schema import ChatRequest, CompletionRequest
from server.openai.speculation import SpeculationFields
from tests import models

README = (models.ROOT / "README.md").read_text()
API = (models.ROOT / "docs" / "api.md").read_text()


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_readme_names_every_plug_in(kind: str) -> None:
    assert [name for name in registry.KINDS[kind] if f"`{name}`" not in README] == []


def test_the_api_page_names_every_field_of_ours() -> None:
    report = speculation_report([], num_spec_tokens=0, verifier="", lossless=True)
    assert [name for name in report if f"`{name}`" not in API] == []
    assert [name for name in SpeculationFields.model_fields if f'{{"{name}":' not in API] == []
    assert {"speculation", "include_speculation"} <= ChatRequest.model_fields.keys() & CompletionRequest.model_fields.keys()


def test_every_command_is_in_the_usage() -> None:
    assert [name for name in COMMANDS if name not in ("-h", "--help") and f"outrider {name}" not in USAGE] == []
