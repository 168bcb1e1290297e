"""Alerts and dashboard: they name metrics that exist, Prometheus takes them, and every alert fires when it should."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import EngineStats
from tests.deploy.files import ALERT_TESTS, ALERTS, DASHBOARD, DEPLOY, alerts, load, metrics, panels, queries
from tests.server.conftest import ApiFactory

Tool = Callable[[str], str]

# What issue D asks the dashboard to show, and the metric that shows it.
SHOWN = {
    "TTFT": "outrider:time_to_first_token_seconds_bucket",
    "ITL": "outrider:inter_token_latency_seconds_bucket",
    "goodput": "outrider:generation_tokens_total",
    "queue": "outrider:num_requests_waiting",
    "seconds of queued work": "outrider:queued_work_seconds",
    "KV": "outrider:kv_cache_usage_perc",
    "prefix hits": "outrider:prefix_cache_hits_total",
    "acceptance by position": "outrider:spec_decode_num_accepted_tokens_per_pos_total",
    "chosen budget": "outrider:spec_decode_draft_nodes_bucket",
    "draft seconds": "outrider:spec_decode_draft_seconds_total",
    "verify seconds": "outrider:spec_decode_verify_seconds_total",
    "predicted goodput": "outrider:spec_decode_predicted_tokens_total",
    "realised goodput": "outrider:spec_decode_decided_tokens_total",
}


@pytest.fixture
async def scraped(make_api: ApiFactory) -> set[str]:
    """The names of all samples of a server that has worked."""
    api = make_api()
    tables = {
        field: {"ngram": 1}
        for field in ("draft_tokens_by_drafter", "accepted_tokens_by_drafter", "drafts_by_drafter", "seconds_draft_by_drafter")
    }
    api.engine.stats = EngineStats(steps=1, num_accepted_tokens_per_pos=[1], drafter_fallbacks={"raised": 1}, **tables)  # type: ignore[arg-type]
    await api.chat()
    families = text_string_to_metric_families((await api.http.get("/metrics")).text)
    return {sample.name for family in families for sample in family.samples}


def test_every_metric_that_an_alert_or_a_panel_names_exists(scraped: set[str]) -> None:
    named = {name: metrics(rule["expr"]) for name, rule in alerts().items()} | {
        title: metrics(query) for title, query in queries().items()
    }
    named["dashboard variables"] = metrics(json.dumps(json.loads(DASHBOARD.read_text())["templating"]))
    assert {name: missing for name, wanted in named.items() if (missing := wanted - scraped)} == {}
    assert all(metrics(query) for query in queries().values())


def test_the_dashboard_shows_what_was_asked_for() -> None:
    shown = set().union(*map(metrics, queries().values()))
    assert {what: metric for what, metric in SHOWN.items() if metric not in shown} == {}


def test_panels_do_not_overlap_and_are_told_apart() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        own = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not own & cells, panel["title"]
        cells |= own
    every = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in panels() for target in panel["targets"])


def test_every_alert_has_a_case_where_it_fires_and_is_quiet_on_healthy_and_idle_servers() -> None:
    cases = [(test["name"], case) for test in load(ALERT_TESTS)["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for _, case in cases if case["exp_alerts"]}
    quiet = {(name, case["alertname"]) for name, case in cases if not case["exp_alerts"]}
    for alert, rule in alerts().items():
        assert alert in fires
        assert {(alert, alert), ("healthy", alert), ("idle", alert)} <= quiet
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_promtool_sees_every_alert_fire(tool: Tool) -> None:
    done = subprocess.run([tool("promtool"), "test", "rules", ALERT_TESTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_rules_and_queries(tool: Tool, tmp_path: Path) -> None:
    """The dashboard's queries as recording rules: that is how promtool can read them."""
    rules = [{"record": "dashboard:query", "labels": {"panel": title}, "expr": query} for title, query in queries().items()]
    dashboard = tmp_path / "dashboard.yml"
    dashboard.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([tool("promtool"), "check", "rules", ALERTS, dashboard], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_configuration(tool: Tool, tmp_path: Path) -> None:
    key, path = tmp_path / "key", tmp_path / "prometheus.yml"
    key.write_text("sk-1")
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    text = text.replace("/etc/prometheus/rules/alerts.yml", str(ALERTS)).replace("/etc/prometheus/api_key", str(key))
    with_key = text.replace("    # authorization:", "    authorization:").replace("    #   credentials", "      credentials")
    assert yaml.safe_load(with_key)["scrape_configs"][0]["authorization"] == {"credentials_file": str(key)}
    for config in (text, with_key):
        path.write_text(config)
        done = subprocess.run([tool("promtool"), "check", "config", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_promtool_finds_nothing_odd_in_the_metrics(make_api: ApiFactory, tool: Tool) -> None:
    api = make_api(vllm_metrics=True)
    await api.chat()
    text = (await api.http.get("/metrics")).text
    command = [tool("promtool"), "check", "metrics"]
    done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True)
    # Names are vLLM's: promtool would rather have no colons, and no histogram called iteration_tokens_total.
    known = ("metric names should not contain ':'", 'should not have "_total" suffix')
    assert [line for line in done.stderr.splitlines() if not line.endswith(known)] == []
