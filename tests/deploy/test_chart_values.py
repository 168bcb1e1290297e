"""The chart's values: what it ships is valid, what cannot work is refused by name, and settings are the server's own."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server.config import parse
from tests import models
from tests.deploy.files import CHART, load

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))


@pytest.mark.parametrize("path", [CHART / "values.yaml", *EXAMPLES], ids=lambda path: path.stem)
def test_what_is_shipped_is_valid(path: Path, tmp_path: Path) -> None:
    values = load(path)
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(values, SCHEMA)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values.get("settings", {})))
    settings = parse(["--config", str(config)])
    assert values.get("settings", {}).keys() <= {name.replace("_", "-") for name in type(settings).model_fields}


def test_every_value_has_a_default_and_every_default_a_schema() -> None:
    def keys(schema: dict[str, Any], values: dict[str, Any], path: str) -> list[str]:
        own = schema.get("properties")
        if own is None:
            return []
        odd = [f"{path}.{name}" for name in own.keys() ^ values.keys() if name != "global"]
        return odd + [at for name in own.keys() & values.keys() for at in keys(own[name], values[name], f"{path}.{name}")]

    assert keys(SCHEMA, load(CHART / "values.yaml"), "") == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 3}, "replica"),
        ({"replicas": "three"}, "replicas"),
        ({"settings": {"api-key": "sk-secret"}}, "settings"),  # a ConfigMap is no place for it
        ({"settings": {"port": 9000}}, "settings"),
        ({"multiNode": {"size": 1}}, "multiNode"),
        ({"autoscaling": {"type": "cpu"}}, "autoscaling"),
        ({"image": {"repository": ""}}, "image"),
        ({"service": {"port": 0}}, "service"),
        ({"cache": {"size": "much"}}, "cache"),
        ({"probes": {"startup": {"failureThreshold": 0}}}, "probes"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    errors = list(jsonschema.Draft7Validator(SCHEMA).iter_errors(values))
    assert errors
    assert any(named in error.message or named in error.absolute_path for error in errors)


def test_the_chart_has_the_version_of_the_package() -> None:
    version = tomllib.loads((models.ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (load(CHART / "Chart.yaml")["version"], load(CHART / "Chart.yaml")["appVersion"]) == (version, version)
