"""``ray_cluster.yaml`` through Ray's own validation and Ray's own AWS provider, against a simulated AWS."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-west-2"
TOKEN = "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/secrets/ray_token"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def validated(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    assert set(validated(cluster)["available_node_types"]) == {"head", "gpu_spot", "gpu_on_demand"}


@pytest.mark.parametrize(
    "break_it",
    [
        lambda c: c.update(idle_timeout=5),
        lambda c: c["docker"].update(images="x"),
        lambda c: c.update(head_node_type="chief"),
        lambda c: c["available_node_types"]["gpu_spot"]["resources"].update(GPU="1"),
    ],
)
def test_ray_refuses_a_broken_copy(cluster: dict[str, Any], break_it: Any) -> None:
    break_it(cluster)
    with pytest.raises(Exception, match="idle_timeout|images|head_node_type|chief|'1' is not"):
        validated(cluster)


def test_the_head_carries_no_load_and_gpus_start_from_zero(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    workers = {name: node for name, node in types.items() if name != cluster["head_node_type"]}
    assert all(node["min_workers"] == 0 and node["resources"]["GPU"] > 0 for node in workers.values())
    markets = [node["node_config"].get("InstanceMarketOptions") for node in workers.values()]
    assert sorted(markets, key=str) == [None, {"MarketType": "spot"}]


def test_tokens_are_on_everywhere_and_in_no_file(cluster: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        starts = [command for command in cluster[f"{role}_start_ray_commands"] if "ray start" in command]
        assert len(starts) == 1 and f"export {TOKEN};" in starts[0]
    for variable in TOKEN.split():
        assert f"--env={variable}" in cluster["docker"]["run_options"]
    assert "/home/ray/secrets" in cluster["file_mounts"]
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert "RAY_AUTH_TOKEN=" not in text and not re.search(r"\b[0-9a-f]{32,}\b", text)


def test_one_region_everywhere(cluster: dict[str, Any]) -> None:
    assert set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", (ROOT / "ray_cluster.yaml").read_text())) == {REGION}
    assert cluster["provider"]["region"] == REGION and f"--env=AWS_REGION={REGION}" in cluster["docker"]["run_options"]


def test_the_dashboard_listens_inside(cluster: dict[str, Any]) -> None:
    head = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in (ROOT / "ray_cluster.yaml").read_text()


def test_the_image_is_this_version(cluster: dict[str, Any]) -> None:
    import pipeline

    tag = f"meta-training:{pipeline.__version__}-cuda"
    assert cluster["docker"]["image"].endswith(tag)
    assert tag in (ROOT / "infra" / "Dockerfile").read_text()


def test_rays_provider_launches_every_node_type(
    cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roles from infra/aws, then networks, keys and instances as ``ray up`` makes them; AWS is simulated by moto."""
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto")
    for name, value in {
        "HOME": str(tmp_path),  # the launcher writes its key pair under ~/.ssh
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    with moto.mock_aws():
        iam = boto3.client("iam")
        for role in ("head", "worker"):
            make_role(iam, f"meta-training-{role}", ["worker"] + (["head"] if role == "head" else []))
        group = make_security_group(boto3.client("ec2", region_name=REGION))
        for node in cluster["available_node_types"].values():
            assert node["node_config"]["SecurityGroupIds"] == ["SECURITY_GROUP"]
            node["node_config"]["SecurityGroupIds"] = [group]
        config = AWSNodeProvider.bootstrap_config(validated(cluster))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind, node in config["available_node_types"].items():
            tags = {
                TAG_RAY_CLUSTER_NAME: config["cluster_name"],
                TAG_RAY_NODE_KIND: "head" if kind == "head" else "worker",
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: kind,
            }
            provider.create_node(node["node_config"], tags, 1)
        ec2 = boto3.client("ec2", region_name=REGION)
        found = ec2.describe_instances()
        groups = {found["GroupId"]: found for found in ec2.describe_security_groups()["SecurityGroups"]}
    instances = {tag(instance, "Name"): instance for group in found["Reservations"] for instance in group["Instances"]}
    assert set(instances) == {"head", "gpu_spot", "gpu_on_demand"}
    assert instances["gpu_spot"].get("InstanceLifecycle") == "spot"
    assert "InstanceLifecycle" not in instances["gpu_on_demand"]
    for kind, instance in instances.items():
        role = "head" if kind == "head" else "worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f"meta-training-{role}")
        assert tag(instance, "ray-cluster-name") == "meta-training"  # what the head's policy lets it stop
        assert [found["GroupId"] for found in instance["SecurityGroups"]] == [group]
    assert not [found for found in groups.values() if found["GroupName"].startswith("ray-")], "Ray's own is open to all"
    doors = {(rule.get("FromPort"), allowed["CidrIp"]) for rule in groups[group]["IpPermissions"]
             for allowed in rule["IpRanges"]}  # fmt: skip
    assert doors == {(22, "203.0.113.7/32")}, "from outside only the operator, by ssh"


def make_security_group(ec2: Any) -> str:
    """As infra/RUNBOOK.md makes it."""
    group = ec2.create_security_group(GroupName="meta-training", Description="nodes")["GroupId"]
    rules = (ROOT / "infra" / "aws" / "ingress.json").read_text()
    rules = rules.replace("SECURITY_GROUP", group).replace("OPERATOR_CIDR", "203.0.113.7/32")
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=json.loads(rules))
    return str(group)


@pytest.mark.parametrize("images", ["IMAGES", "fs-1.efs.us-west-2.amazonaws.com:/"])
def test_what_the_crontab_reads_is_mounted_before_the_container_starts(
    cluster: dict[str, Any], tmp_path: Path, images: str
) -> None:
    line = (ROOT / "infra" / "schedules" / "crontab").read_text()
    [path] = re.findall(r"data\.source\.path=(/\w+)/\w+", line)
    assert f"--volume={path}:{path}:ro,rslave" in cluster["docker"]["run_options"]
    for name, code in {"sudo": 'echo "$@"', "mountpoint": "false", "mount.nfs4": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    commands = [command.replace("IMAGES", images) for command in cluster["initialization_commands"] if path in command]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = [subprocess.run(["bash", "-ec", command], env=env, capture_output=True, text=True, check=True).stdout
            for command in commands]  # fmt: skip
    mounted = "" if images == "IMAGES" else f"mount -t nfs4 -o ro,hard,noresvport {images} {path}\n"
    assert said == [f"mkdir -p {path}\n", mounted]


def make_role(iam: Any, name: str, policies: list[str]) -> None:
    """A role with its instance profile, as infra/README.md makes them."""
    folder = ROOT / "infra" / "aws"
    iam.create_role(RoleName=name, AssumeRolePolicyDocument=(folder / "trust-policy.json").read_text())
    for policy in policies:
        document = (folder / f"{policy}-policy.json").read_text().replace("BUCKET", "a-bucket")
        iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=document)
    iam.create_instance_profile(InstanceProfileName=name)
    iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def tag(instance: dict[str, Any], key: str) -> str:
    return next(tag["Value"] for tag in instance["Tags"] if tag["Key"] == key)


@pytest.mark.parametrize("node", ["head", "gpu_spot", "gpu_on_demand"])
def test_node_settings_are_known_to_ec2(cluster: dict[str, Any], node: str) -> None:
    """Ray passes ``node_config`` on unseen: check its keys and types against the EC2 model of botocore."""
    session = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    shape = session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    settings = cluster["available_node_types"][node]["node_config"] | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(settings, shape)
    assert not report.has_errors(), report.generate_report()


def test_policies_stop_no_other_clusters_nodes() -> None:
    policy = json.loads((ROOT / "infra" / "aws" / "head-policy.json").read_text())
    stopping = [s for s in policy["Statement"] if "ec2:TerminateInstances" in s["Action"]]
    assert stopping[0]["Condition"] == {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": "meta-training"}}
