"""The container images, without building them: rules, pins, and the script that they carry."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.infra.test_packaging import PINS

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ["infra/Dockerfile", "infra/mlflow/Dockerfile"]
SCRIPT = ROOT / "infra" / "image" / "begin-or-resume"


@pytest.mark.parametrize("file", DOCKERFILES)
def test_hadolint_has_nothing_to_say(file: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([hadolint, "--no-color", str(ROOT / file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_is_pinned_and_its_user_has_a_number_and_no_privileges(file: str) -> None:
    lines = (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    assert "FROM python:${PYTHON}-slim-bookworm${DIGEST:+@${DIGEST}}" in lines
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users == ["1000:1000"], "Kubernetes knows a user without privileges by its number"
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("--constraint constraints.txt" in line for line in installs)
    ignored = (ROOT / f"{file}.dockerignore").read_text().splitlines()
    given = {line[1:] for line in ignored if line.startswith("!")}
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = [name for names in copies for name in names if not name.startswith("--")]
    assert all((ROOT / name).exists() for name in copied)
    assert all(any(name == one or name.startswith(f"{one}/") for one in given) for name in copied), (copied, given)


def test_torchvision_comes_from_where_torch_is_from() -> None:
    """Of another index it is of another build, and none of the libraries of pretrained networks can be imported."""
    lines = (ROOT / "infra" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    [first] = [line for line in lines if "TORCH_INDEX:+" in line]
    assert first.split()[-2:] == ["torch", "${EXTRAS:+torchvision}"]
    assert lines.index('ARG EXTRAS=""') < lines.index(first)


def test_both_images_have_the_same_python() -> None:
    found = {re.search(r"^ARG PYTHON=(\S+)", (ROOT / file).read_text(), flags=re.M)[1] for file in DOCKERFILES}
    assert len(found) == 1


def test_the_servers_requirements_are_pinned() -> None:
    for line in (ROOT / "infra" / "mlflow" / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name = re.match(r"[\w-]+", line)[0]
            assert "==" in line or canonicalize_name(name) in PINS, line


def run_script(tmp_path: Path, *arguments: str, status: int = 0, **env: str) -> tuple[int, list[str], str]:
    """Exit status, the arguments of the job that the script started, and what it said. The job is a stand-in that ends
    with ``status``: what a begun and a resumed run do is tested with them."""
    bin_ = tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    said = tmp_path / "said.json"
    said.unlink(missing_ok=True)
    write_command(
        bin_ / "python",
        f"if sys.argv[1] == '-m':\n    json.dump(sys.argv[2:], open({str(said)!r}, 'w'))\n    sys.exit({status})\n"
        f"sys.exit(subprocess.call([{sys.executable!r}, *sys.argv[1:]], cwd={str(ROOT)!r}))\n",
    )
    write_command(bin_ / "ray", f"open({str(tmp_path / 'ray')!r}, 'w').write(' '.join(sys.argv[1:]))\n")
    write_command(bin_ / "sleep", "")
    env = {**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}", **env}
    done = subprocess.run(["sh", str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(said.read_text()) if said.exists() else [], done.stderr


def write_command(file: Path, code: str) -> None:
    file.write_text(f"#!{sys.executable}\nimport json, subprocess, sys\n{code}")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("status", "submitted", "stopped"),
    [(2, True, True), (2, False, False), (6, True, True), (1, True, False), (75, True, False), (143, True, False)],
)
def test_a_job_that_would_end_alike_again_is_stopped_and_not_failed(
    tmp_path: Path, status: int, submitted: bool, stopped: bool
) -> None:
    """KubeRay gives a failed job another cluster, and ends with a stopped one."""
    config = json.dumps({"metadata": {"job_submission_id": "train-abc"}}) if submitted else ""
    train = ["train", "a-run", f"storage={tmp_path}/runs"]
    code, started, said = run_script(tmp_path, *train, status=status, RAY_JOB_CONFIG_JSON_ENV_VAR=config)
    assert code == status and started[0] == "jobs.train"
    asked = (tmp_path / "ray").read_text() if (tmp_path / "ray").exists() else ""
    assert asked == ("job stop --no-wait train-abc" if stopped else "")
    assert ("mend its command" in said) is stopped


def test_a_job_that_is_repeated_goes_on(tmp_path: Path) -> None:
    storage = f"storage={tmp_path}/runs"
    train = ["train", "a-run", "data=glyphs", storage, "cluster=gpu", "cluster.workers=4", "tracking=server", "x=[1,2]"]
    assert run_script(tmp_path, *train) == (0, ["jobs.train", "name=a-run", *train[2:]], "")
    (tmp_path / "runs" / "a-run").mkdir(parents=True)
    (tmp_path / "runs" / "a-run" / "run.json").write_text("{}")
    again = ["jobs.train", "resume=a-run", storage, "cluster=gpu", "cluster.workers=4", "tracking=server"]
    assert run_script(tmp_path, *train) == (0, again, "")
    tune = ["tune", "a-run", "campaign=metric_scale", "base.data=omniglot", storage, "concurrent=2"]
    assert run_script(tmp_path, *tune) == (0, ["jobs.tune", "name=a-run", *tune[2:]], "")
    (tmp_path / "runs" / "a-run" / "campaign.json").write_text("{}")
    assert run_script(tmp_path, *tune) == (0, ["jobs.tune", "resume=a-run", storage, "concurrent=2"], "")


def test_wrong_calls_are_refused_in_a_line(tmp_path: Path) -> None:
    for arguments, says in ((["train"], "usage"), (["dance", "x", "storage=y"], "dance"), (["train", "x"], "storage")):
        code, started, said = run_script(tmp_path, *arguments)
        assert (code, started) == (2, []) and says in said and said.count("\n") == 1
