"""compose.yaml agrees with the files it mounts, with the image it builds and with what the server promises."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from server.config import ENV_PREFIX, ServerConfig
from tests import models
from tests.deploy.files import ALERTS, DASHBOARD, DEPLOY, load

COMPOSE = DEPLOY / "compose.yaml"
IMAGE = models.ROOT / "Dockerfile"


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    return load(COMPOSE)["services"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container, what of this machine."""
    return {target: source for source, target, *_ in (volume.split(":") for volume in service["volumes"])}


def test_every_mounted_file_is_there_and_every_volume_declared(services: dict[str, dict[str, Any]]) -> None:
    declared = load(COMPOSE)["volumes"]
    for service in services.values():
        for source in mounts(service).values():
            assert (DEPLOY / source).exists() if source.startswith(".") else source in declared


def test_prometheus_finds_its_rules_and_the_server(services: dict[str, dict[str, Any]]) -> None:
    prometheus = services["prometheus"]
    config = load(DEPLOY / mounts(prometheus)["/etc/prometheus/prometheus.yml"])
    (rules,) = config["rule_files"]
    assert (DEPLOY / mounts(prometheus)[rules]).resolve() == ALERTS
    (scrape,) = config["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["outrider:8000"]}]
    assert "outrider" in services and scrape["job_name"] == "outrider"  # alerts look for that name


def test_grafana_finds_prometheus_and_the_dashboard(services: dict[str, dict[str, Any]]) -> None:
    mounted = mounts(services["grafana"])
    provisioning = DEPLOY / mounted["/etc/grafana/provisioning"]
    (source,) = load(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    assert (source["url"], source["type"], source["isDefault"]) == ("http://prometheus:9090", "prometheus", True)
    assert source["jsonData"]["timeInterval"] == load(DEPLOY / "prometheus" / "prometheus.yml")["global"]["scrape_interval"]
    (provider,) = load(provisioning / "dashboards" / "outrider.yaml")["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.startswith(provider["options"]["path"] + "/")
    assert (DEPLOY / mounted[home]).resolve() == DASHBOARD
    assert json.loads(DASHBOARD.read_text())["uid"] == "outrider"


def test_the_server_runs_locked_down_and_drains_in_time(services: dict[str, dict[str, Any]]) -> None:
    server = services["outrider"]
    assert server["read_only"] and server["tmpfs"] == ["/tmp"] and mounts(server) == {"/cache": "cache"}
    assert server["cap_drop"] == ["ALL"] and server["security_opt"] == ["no-new-privileges:true"]
    assert int(server["stop_grace_period"].removesuffix("s")) >= ServerConfig.model_fields["shutdown_timeout"].default + 10
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])  # not open to the network


def test_its_environment_is_the_servers(services: dict[str, dict[str, Any]]) -> None:
    names = [name for name in services["outrider"]["environment"] if name.startswith(ENV_PREFIX)]
    assert names
    assert {name.removeprefix(ENV_PREFIX).lower() for name in names} <= ServerConfig.model_fields.keys()


def test_the_image_is_built_with_arguments_it_has_and_from_the_base_it_names(services: dict[str, dict[str, Any]]) -> None:
    gpu = load(DEPLOY / "compose.gpu.yaml")["services"]["outrider"]
    text = IMAGE.read_text()
    arguments = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert {*services["outrider"]["build"]["args"], *gpu["build"]["args"]} <= arguments
    assert f"ARG BASE={gpu['build']['args']['BASE']}\n" in text
    assert 'VOLUME ["/cache"]' in text and "EXPOSE 8000" in text
    assert (DEPLOY / services["outrider"]["build"]["context"] / "Dockerfile").resolve() == IMAGE
