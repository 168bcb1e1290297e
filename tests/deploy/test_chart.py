"""The chart, rendered by helm: valid for Kubernetes, and its parts fit each other and the server."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.auth import OPEN_PATHS
from tests.deploy.files import ALERTS, CHART, DASHBOARD, load, metrics
from tests.deploy.test_chart_values import EXAMPLES

Manifests = dict[tuple[str, str], dict[str, Any]]  # by kind and name
Render = Callable[..., Manifests]

VERSIONS = ["1.30", "1.34", "1.37"]
FOREIGN = {"LeaderWorkerSet", "ScaledObject", "ServiceMonitor", "PrometheusRule"}  # of controllers that are not Kubernetes' own
LABELS = {"app.kubernetes.io/name": "outrider", "app.kubernetes.io/instance": "rel"}


@pytest.fixture
def render(tool: Callable[[str], str]) -> Render:
    helm = tool("helm")

    def rendered(*flags: str) -> Manifests:
        command = [helm, "template", "rel", CHART, "--namespace", "llm", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(done.stdout) if one}

    return rendered


def example(name: str) -> list[str]:
    return ["-f", str(CHART / "ci" / f"{name}.yaml")]


def pod(manifests: Manifests, part: str = "leaderTemplate") -> dict[str, Any]:
    """The pods' template, of a StatefulSet or of a LeaderWorkerSet's leader or workers."""
    for (kind, _), one in manifests.items():
        if kind == "StatefulSet":
            return one["spec"]["template"]
        if kind == "LeaderWorkerSet":
            return one["spec"]["leaderWorkerTemplate"][part]
    raise AssertionError("nothing runs")


def kinds(manifests: Manifests, kind: str) -> list[dict[str, Any]]:
    return [one for (own, _), one in manifests.items() if own == kind]


@pytest.mark.parametrize("path", [CHART / "values.yaml", *EXAMPLES], ids=lambda path: path.stem)
def test_helm_and_kubernetes_take_it(path: Path, render: Render, tool: Callable[[str], str]) -> None:
    done = subprocess.run([tool("helm"), "lint", "--strict", CHART, "-f", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for (kind, _), manifest in render("-f", str(path)).items():
        if kind not in FOREIGN:
            for version in VERSIONS:
                validate(manifest, version, strict=True)


@pytest.mark.parametrize("flags", [[], example("multi-node")], ids=["one node", "several nodes"])
def test_probes_ask_what_answers_without_a_key_and_the_way_out_fits_the_grace_period(render: Render, flags: list[str]) -> None:
    template = pod(render(*flags))
    (container,) = template["spec"]["containers"]
    asked = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/live"}
    assert set(asked.values()) <= OPEN_PATHS
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 1800
    (port,) = container["ports"]
    assert {container[name]["httpGet"]["port"] for name in asked} == {port["name"]}
    assert f"--port={port['containerPort']}" in container["args"]
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    (drain,) = [arg.partition("=")[2] for arg in container["args"] if arg.startswith("--shutdown-timeout=")]
    assert sleep == "sleep"
    assert template["spec"]["terminationGracePeriodSeconds"] >= int(seconds) + int(drain) + 10


@pytest.mark.parametrize(
    ("flags", "part"),
    [([], ""), (example("multi-node"), "leaderTemplate"), (example("multi-node"), "workerTemplate")],
    ids=["one node", "leader", "worker"],
)
def test_pods_run_locked_down_with_room_to_write_where_they_must(render: Render, flags: list[str], part: str) -> None:
    spec = pod(render(*flags), part)["spec"]
    (container,) = spec["containers"]
    own = spec["securityContext"]
    assert (own["runAsUser"], own["runAsGroup"], own["fsGroup"], own["runAsNonRoot"]) == (10001, 0, 0, True)
    assert own["seccompProfile"] == {"type": "RuntimeDefault"}
    inner = container["securityContext"]
    assert (inner["readOnlyRootFilesystem"], inner["allowPrivilegeEscalation"]) == (True, False)
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/cache"} <= mounted.keys()
    memory = {volume["name"] for volume in spec["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory"}
    assert {mounted["/tmp"], mounted["/dev/shm"]} <= memory


def test_every_volume_that_is_mounted_is_there(render: Render) -> None:
    for path in (CHART / "values.yaml", *EXAMPLES):
        manifests = render("-f", str(path))
        for part in ("leaderTemplate", "workerTemplate"):
            spec = pod(manifests, part)["spec"]
            claims = [one["metadata"]["name"] for sets in kinds(manifests, "StatefulSet") for one in _claims(sets)]
            names = [volume["name"] for volume in spec["volumes"]] + claims
            assert sorted({mount["name"] for mount in spec["containers"][0]["volumeMounts"]}) == sorted(names)


def _claims(stateful_set: dict[str, Any]) -> list[dict[str, Any]]:
    return stateful_set["spec"].get("volumeClaimTemplates", [])


def test_what_selects_pods_finds_them(render: Render) -> None:
    for path in (CHART / "values.yaml", *EXAMPLES):
        manifests = render("-f", str(path))
        labels = pod(manifests)["metadata"]["labels"].items()
        index = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}  # the controller's own label
        assert all(label in labels for label in LABELS.items())
        selectors = [one["spec"]["selector"] for one in kinds(manifests, "Service")]
        selectors += [
            one["spec"]["selector"]["matchLabels"]
            for kind in ("StatefulSet", "PodDisruptionBudget")
            for one in kinds(manifests, kind)
        ]
        selectors += [one["spec"]["podSelector"]["matchLabels"] for one in kinds(manifests, "NetworkPolicy")]
        for selector in selectors:
            assert selector.items() <= labels | index.items()
        for target in (one["spec"]["serviceName"] for one in kinds(manifests, "StatefulSet")):
            assert manifests["Service", target]["spec"]["clusterIP"] == "None"
    leaders = render(*example("multi-node"))["Service", "rel-outrider"]["spec"]["selector"]
    assert leaders.items() >= index.items()  # workers answer no requests


def test_the_network_lets_in_one_port_and_out_only_names_and_downloads(render: Render) -> None:
    (policy,) = kinds(render(), "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    assert [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]] == [53, 53, 443]
    (policy,) = kinds(render("--set", "networkPolicy.downloads=false"), "NetworkPolicy")
    assert [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]] == [53, 53]
    (policy,) = kinds(render(*example("gpu-keda")), "NetworkPolicy")
    assert len(policy["spec"]["ingress"][0]["from"]) == 2
    (policy,) = kinds(render(*example("multi-node")), "NetworkPolicy")
    (within,) = policy["spec"]["ingress"][1]["from"]
    assert within["podSelector"]["matchLabels"] == LABELS  # ranks find each other, and nobody else finds them


@pytest.mark.parametrize(("name", "kind"), [("gpu-keda", "ScaledObject"), ("multi-node", "HorizontalPodAutoscaler")])
def test_replicas_follow_seconds_of_queued_work(render: Render, name: str, kind: str) -> None:
    manifests = render(*example(name))
    (scaler,) = kinds(manifests, kind)
    target = scaler["spec"]["scaleTargetRef"]
    assert "replicas" not in manifests[target["kind"], target["name"]]["spec"]  # the autoscaler's alone
    assert manifests[target["kind"], target["name"]]["apiVersion"] == target["apiVersion"]
    if kind == "ScaledObject":
        queries = [trigger["metadata"]["query"] for trigger in scaler["spec"]["triggers"]]
        assert [metrics(query) for query in queries] == [{"outrider:queued_work_seconds"}, {"outrider:num_requests_running"}]
        assert 'namespace="llm", pod=~"rel-outrider-.*"' in queries[0]
    else:
        names = [one["pods"]["metric"]["name"] for one in scaler["spec"]["metrics"]]
        assert names == ["outrider_queued_work_seconds", "outrider_num_requests_running"]
        rules = load(CHART.parents[1] / "prometheus" / "adapter-rules.yaml")["rules"]["custom"]
        assert [rule["name"]["as"] for rule in rules] == names


def test_prometheus_is_sent_to_one_service_with_the_key_and_the_alerts(render: Render) -> None:
    manifests = render(*example("gpu-keda"))
    (monitor,) = kinds(manifests, "ServiceMonitor")
    chosen = monitor["spec"]["selector"]["matchLabels"].items()
    services = [one for one in kinds(manifests, "Service") if chosen <= one["metadata"]["labels"].items()]
    assert [one["metadata"]["name"] for one in services] == ["rel-outrider"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in services[0]["spec"]["ports"]]
    assert endpoint["authorization"]["credentials"] == {"name": "keys", "key": "api-key"}
    assert services[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "outrider"  # alerts look for that job
    (rule,) = kinds(manifests, "PrometheusRule")
    assert rule["spec"] == load(ALERTS)
    assert manifests["ConfigMap", "rel-outrider-dashboard"]["data"]["outrider.json"].strip() == DASHBOARD.read_text().strip()


def test_settings_reach_the_server_and_change_the_pods(render: Render) -> None:
    manifests = render(*example("gpu-keda"))
    config = yaml.safe_load(manifests["ConfigMap", "rel-outrider"]["data"]["config.yaml"])
    assert config == load(CHART / "ci" / "gpu-keda.yaml")["settings"]
    (container,) = pod(manifests)["spec"]["containers"]
    assert container["args"][:2] == ["meta-llama/Llama-3.1-8B-Instruct", "--config=/etc/outrider-settings/config.yaml"]
    assert {one["name"] for one in container["env"]} == {"OUTRIDER_API_KEY", "HF_TOKEN"}
    assert "/etc/outrider-settings" in [mount["mountPath"] for mount in container["volumeMounts"]]
    other = render(*example("gpu-keda"), "--set", "settings.max-model-len=8192")
    assert pod(other)["metadata"]["annotations"] != pod(manifests)["metadata"]["annotations"]  # so that they start anew


def test_several_nodes_need_to_know_how_many_ranks_there_are(tool: Callable[[str], str], render: Render) -> None:
    command = [tool("helm"), "template", "rel", CHART, "--set", "multiNode.enabled=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "tensor-parallel-size" in done.stderr
    config = yaml.safe_load(render(*example("multi-node"))["ConfigMap", "rel-outrider"]["data"]["config.yaml"])
    assert config["distributed-executor-backend"] == "ray"


RAY = """#!/bin/sh
# Not there at first, then there until the file `up` goes, then never again.
echo "$@" >> calls
if [ "$(wc -l < calls)" -lt 3 ]; then exit 1; fi
read _ < up
exit 1
"""


def test_a_worker_waits_for_its_leader_and_leaves_after_it(render: Render, tmp_path: Path) -> None:
    """The very command of the workers' pods, over a `ray` that does what Ray does."""
    (container,) = pod(render(*example("multi-node")), "workerTemplate")["spec"]["containers"]
    for name, text in (("ray", RAY), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    os.mkfifo(tmp_path / "up")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LWS_LEADER_ADDRESS": "leader"}
    worker = subprocess.Popen(container["command"], cwd=tmp_path, env=env)
    try:
        with (tmp_path / "up").open("w"):  # opened: it has joined at the third attempt
            worker.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                worker.wait(0.5)  # the leader still drains
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3
    assert calls[0].startswith("start --address=leader:6379 ") and calls[0].endswith("--block")
