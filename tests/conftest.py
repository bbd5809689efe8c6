"""Fixtures: one Ray cluster a session, real data where it is, a small dataset of glyphs."""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    OMP_NUM_THREADS="1",
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",  # eight processes fewer in every MLflow server, as infra/mlflow has it
)

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = ROOT / "tests" / "torchvision_ops"  # lets torchvision be imported: here, and in what the tests start
os.environ["PYTHONPATH"] = os.pathsep.join([str(OPERATORS), *filter(None, [os.environ.get("PYTHONPATH")])])
runpy.run_path(str(OPERATORS / "sitecustomize.py"))
PATH = tuple(sys.path)


@pytest.fixture(autouse=True)
def modules_are_found_where_they_were():
    """MLflow puts the code of a model that is loaded on the path, for good: its light ``pipeline`` is not ours."""
    sys.path[:] = PATH
    yield
    sys.path[:] = PATH


@pytest.fixture(scope="session")
def ray_session(moto_bucket):
    """The session's one Ray cluster, on this machine; its workers know the S3 server."""
    import ray

    from pipeline.training.cluster import WITHOUT_DASHBOARD

    with pytest.MonkeyPatch.context() as environment:
        for key, value in WITHOUT_DASHBOARD.items():
            environment.setenv(key, value)
        options = {"num_cpus": 4, "object_store_memory": 400 * 2**20, "include_dashboard": False}
        ray.init(address="local", log_to_driver=True, **options)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with Omniglot, CIFAR-100 and the splits; the test is skipped, and says so, where there is none."""
    folder = Path(os.environ.get("PIPELINE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set PIPELINE_DATA to a folder with omniglot/, cifar100/ and splits/")
    return folder


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory) -> str:
    """A small dataset of glyphs: 60 classes for training, 40 for validation and 40 for testing, 20 drawings each."""
    import numpy as np

    from pipeline.data.sources.glyphs import draw_glyphs
    from pipeline.data.write import write_dataset

    uri = str(tmp_path_factory.mktemp("datasets") / "glyphs")
    names = [f"glyph{number:04d}" for number in range(140)]
    drawings = draw_glyphs(np.arange(140))
    splits = {"train": names[:60], "val": names[60:100], "test": names[100:]}
    write_dataset(uri, "glyphs", zip(names, drawings, strict=True), splits)
    return uri


@pytest.fixture(scope="session")
def moto_bucket():
    """The URI of a bucket of an S3 server in a process of its own: other tests reset moto in this one."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    boto3.client("s3").create_bucket(Bucket="pipeline-tests")
    yield "s3://pipeline-tests"
    for key, value in before.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    server.terminate()
    server.wait()
