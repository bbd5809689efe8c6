"""What is scraped, drawn and alarmed about is what Ray exports, under the same names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.training.telemetry import CHECKPOINT_SECONDS, RESTARTS, TAGS, Telemetry
from tests.infra.kustomize import build, one
from tests.metrics import exported, wait_for

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "meta-training.json").read_text())
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]]
WANTED = {"ray_pipeline_episodes_per_second", "ray_pipeline_data_wait_share", "ray_pipeline_step_seconds",
          "ray_pipeline_loss", "ray_pipeline_validation_accuracy", "ray_pipeline_checkpoint_seconds",
          "ray_pipeline_restarts"}  # fmt: skip


def queries() -> list[str]:
    drawn = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    chosen = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"]
    return drawn + chosen + [rule["expr"] for rule in RULES]


def names(text: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", text))


def test_every_metric_that_is_queried_is_exported_under_this_name(ray_session: Any) -> None:
    told = Telemetry("dashboard", "prototypical", "glyphs", 100)
    told(
        {"step": 10, "train/steps_per_s": 2.0, "train/episodes_per_s": 8.0, "train/wait_share": 0.0, "train/loss": 1.0}
    )
    told({"step": 10, "val/accuracy": 0.5, "val/interval": 0.1})
    told({"step": 10, CHECKPOINT_SECONDS: 0.5})
    told({"step": 10, RESTARTS: 1})
    queried = set().union(*map(names, queries()))
    assert queried >= WANTED
    wait_for(lambda: queried <= set(exported(run="dashboard")), 60)
    found = exported(run="dashboard", method="prototypical", dataset="glyphs")
    assert found["ray_pipeline_step_seconds"] == [0.5] and found["ray_pipeline_steps"] == [100.0]


def test_the_dashboard_is_whole() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24 and panel["targets"] and panel["title"]
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) <= variables
    labels = {label for query in queries() for group in re.findall(r"by \((.*?)\)|\{(.*?)\}", query)
              for label in re.findall(r"\w+(?==)|^\w+$", "".join(group))}  # fmt: skip
    assert labels <= set(TAGS), labels


def test_the_scraped_places_are_those_that_ray_listens_at() -> None:
    scraped = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scraped["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert "--volume=/tmp/ray:/tmp/ray" in cluster["docker"]["head_run_options"]
    assert cluster["initialization_commands"][0] == "mkdir -p /tmp/ray", "or Docker makes it, for root alone"
    for role in ("head", "worker"):
        assert any("--metrics-export-port=8080" in command for command in cluster[f"{role}_start_ray_commands"])
    monitor = one("production/cluster", "PodMonitor")["spec"]
    ports = {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]}
    head = one("production/cluster", "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert ports <= {port["name"] for port in head["ports"]}


def test_the_servers_listen_on_loopback_unless_told_otherwise() -> None:
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    assert "--web.listen-address=${MONITORING_BIND:-127.0.0.1}:9090" in compose["prometheus"]["command"]
    grafana = compose["grafana"]["environment"]
    assert grafana["GF_SERVER_HTTP_ADDR"] == "${MONITORING_BIND:-127.0.0.1}"
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in grafana, "the password comes from a mounted file"
    for service in compose.values():
        assert "ports" not in service and re.search(r":v?\d+\.\d+\.\d+$", service["image"])


def test_kubernetes_has_the_alarms_of_compose_and_sends_them_as_compose_does() -> None:
    rule = one("production/cluster", "PrometheusRule")
    namespace = rule["metadata"]["namespace"]
    groups = {group["name"]: group["rules"] for group in rule["spec"]["groups"]}
    own = [{**alarm, "labels": {**alarm["labels"], "namespace": namespace}} for alarm in RULES]
    assert groups.pop("meta-training") == own
    for alarm in [alarm for rules in groups.values() for alarm in rules]:
        assert alarm["labels"]["namespace"] == namespace, "or Alertmanager does not find the namespace's receiver"
        assert namespace in alarm["expr"] and {"summary", "description"} == set(alarm["annotations"])
        assert not names(alarm["expr"]), "what Ray exports is alarmed about in both"
    described = [m["metadata"]["name"] for m in build("production/mlflow") if m["kind"] in ("CronJob", "Deployment")]
    expressions = " ".join(alarm["expr"] for rules in groups.values() for alarm in rules)
    named = re.findall(r'(?:cronjob|deployment)="([^"]+)"', expressions)
    assert set(named) == set(described)


def test_alarms_go_to_one_receiver_whose_address_is_a_secret() -> None:
    alertmanager = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
    there = one("production/cluster", "AlertmanagerConfig")["spec"]
    routes = (alertmanager["route"], there["route"])
    assert [route["receiver"] for route in routes] == ["operators"] * 2 and not any(
        "routes" in route for route in routes
    )
    for spelled, meant in (("group_by", "groupBy"), ("group_wait", "groupWait"), ("group_interval", "groupInterval"),
                           ("repeat_interval", "repeatInterval")):  # fmt: skip
        assert alertmanager["route"][spelled] == there["route"][meant]
    [[here]], [[far]] = ([receiver[key] for receiver in config["receivers"]]
                         for config, key in ((alertmanager, "slack_configs"), (there, "slackConfigs")))  # fmt: skip
    assert (here["title"], here["text"]) == (far["title"], far["text"])
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())
    assert here["api_url_file"] == f"/run/secrets/{compose['services']['alertmanager']['secrets'][0]}"
    assert far["apiURL"] == {"name": "alert-webhook", "key": "url"}
    assert "hooks.slack.com" not in "".join(file.read_text() for file in MONITORING.glob("*.y*ml"))
    runbook = (ROOT / "infra" / "RUNBOOK.md").read_text()
    assert "> ~/.meta-training/alert_webhook" in runbook
    assert "create secret generic alert-webhook --from-file=url=" in runbook


def test_prometheus_sends_where_alertmanager_listens() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    [manager] = config["alerting"]["alertmanagers"]
    compose = yaml.safe_load((MONITORING / "compose.yaml").read_text())["services"]
    [address] = manager["static_configs"][0]["targets"]
    assert f"--web.listen-address={address}" in compose["alertmanager"]["command"] and address.startswith("127.0.0.1:")


def test_prometheus_accepts_its_files(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of the package prometheus")
    config = (
        (MONITORING / "prometheus.yml").read_text().replace("/etc/prometheus/rules.yml", str(MONITORING / "rules.yml"))
    )
    (tmp_path / "prometheus.yml").write_text(config)
    (tmp_path / "kubernetes.yml").write_text(yaml.safe_dump(one("production/cluster", "PrometheusRule")["spec"]))
    for command in (
        ["check", "config", str(tmp_path / "prometheus.yml")],
        ["check", "rules", str(tmp_path / "kubernetes.yml")],
        ["test", "rules", "rules_test.yml"],
    ):
        done = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alertmanager_accepts_its_file() -> None:
    amtool = shutil.which("amtool")
    if amtool is None:
        pytest.skip("needs amtool, of the package prometheus-alertmanager")
    command = [amtool, "check-config", str(MONITORING / "alertmanager.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
