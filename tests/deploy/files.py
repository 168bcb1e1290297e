"""What is read from deploy/: rules, the dashboard's queries, and the metrics that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tests import models

DEPLOY = models.ROOT / "deploy"
CHART = DEPLOY / "helm" / "outrider"
ALERTS = CHART / "files" / "alerts.yml"
DASHBOARD = CHART / "files" / "dashboard.json"
ALERT_TESTS = Path(__file__).with_name("alerts_test.yml")

METRIC = re.compile(r"\b(?:outrider:|process_)[a-z0-9_]+")
# What Grafana puts in for its variables.
VARIABLES = {"$job": ".*", "$model_name": ".*", "$instance": ".*"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for group in load(ALERTS)["groups"] for rule in group["rules"]}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries(rate_interval: str = "1m") -> dict[str, str]:
    """Every query of the dashboard, ready for Prometheus, by panel and letter."""
    found = {}
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", rate_interval)
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            found[f"{panel['title']} ({panel['id']}) {target['refId']}"] = expression
    return found


def metrics(expression: str) -> set[str]:
    return set(METRIC.findall(expression))
