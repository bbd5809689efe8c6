"""What the tracking store holds, read for pages. All of it is somebody's text: nothing is run, nothing is believed."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.config import validate
from pipeline.registry.tracking import STORE_ERRORS, all_models, make_client
from pipeline.registry.tracking_config import TrackingConfig, store_uri

CAMPAIGN_TAG, RUN_TAG = "pipeline.campaign", "pipeline.run"
LOCK = ".promotion-lock"  # the end of a registered model's name that is a lock
LARGEST, LARGEST_TEXT = 32 * 2**20, 8 * 2**20  # bytes of a file, of a file that is parsed
PAGE = 200  # entries of one answer of the store
_ACCURACY = re.compile(r"[^/]+/accuracy_\d+way_\d+shot")


@dataclass(frozen=True)
class Version:
    """A version of a registered model, with the run that made it, where there is one."""

    entity: ModelVersion
    run: Run | None

    @property
    def number(self) -> int:
        return int(self.entity.version)


@dataclass(frozen=True)
class Registered:
    entity: RegisteredModel
    versions: list[Version]  # newest first

    @property
    def name(self) -> str:
        return str(self.entity.name)

    @property
    def aliases(self) -> dict[str, int]:
        return {str(alias): int(version) for alias, version in (self.entity.aliases or {}).items()}


@dataclass
class Site:
    """All that pages are made of."""

    files: Files
    models: list[Registered] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # with test accuracies, newest first
    campaigns: list[tuple[Run, list[Run]]] = field(default_factory=list)  # with their trials, newest first


def read_site(tracking: Mapping[str, Any]) -> Site:
    """Read the store that ``tracking`` names. Nothing is made there, not even the store."""
    config = validate(TrackingConfig, dict(tracking))
    if (config.uri or "").startswith("sqlite:///") and not os.path.exists(str(config.uri).removeprefix("sqlite:///")):
        return Site(Files(None))
    client = make_client(store_uri(config, make=False))
    site = Site(Files(client))
    runs: dict[str, Run] = {}
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is not None:
        for run in _all_runs(client, experiment.experiment_id):
            runs[run.info.run_id] = run
    site.runs = [run for run in runs.values() if any(map(_ACCURACY.fullmatch, run.data.metrics))]
    parents = [run for run in runs.values() if _is_campaign(run)]
    for parent in parents:
        mine = [run for run in runs.values() if run.data.tags.get(MLFLOW_PARENT_RUN_ID) == parent.info.run_id]
        site.campaigns.append((parent, mine))
    site.models = [_registered(client, model, runs) for model in all_models(client) if not model.name.endswith(LOCK)]
    return site


def _is_campaign(run: Run) -> bool:
    """Its tag is set at its end: one that runs is known by what it searches."""
    tags, params = run.data.tags, run.data.params
    return MLFLOW_PARENT_RUN_ID not in tags and (
        CAMPAIGN_TAG in tags or ("trials" in params and "search.kind" in params)
    )


def _all_runs(client: MlflowClient, experiment: str) -> list[Run]:
    found: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment], max_results=PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _registered(client: MlflowClient, model: RegisteredModel, runs: dict[str, Run]) -> Registered:
    versions = []
    if "'" not in model.name:  # as jobs.register makes them; the store's search has no way to quote one
        for version in client.search_model_versions(f"name='{model.name}'"):
            versions.append(Version(version, _run_of(client, version.run_id, runs)))
    return Registered(model, sorted(versions, key=lambda version: -version.number))


def _run_of(client: MlflowClient, run_id: str | None, runs: dict[str, Run]) -> Run | None:
    if not run_id:
        return None
    if run_id not in runs:
        try:
            runs[run_id] = client.get_run(run_id)
        except MlflowException:  # it was deleted
            return None
    return runs[run_id]


class Files:
    """Artifacts of runs, by name, within limits. What is missing, too large or damaged is None."""

    def __init__(self, client: MlflowClient | None) -> None:
        self._client = client
        self._sizes: dict[tuple[str, str], dict[str, int]] = {}
        self.problems: list[str] = []  # what is there and could not be read

    def metric(self, run_id: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of a metric over time."""
        if self._client is None:
            return []
        history = {point.step: float(point.value) for point in self._client.get_metric_history(run_id, name)}
        return sorted(history.items())

    def read(self, run_id: str, name: str, limit: int = LARGEST) -> bytes | None:
        """A file; ``name`` is one of this package's constants."""
        if self._client is None:
            return None
        folder = name.rpartition("/")[0]
        try:
            if (run_id, folder) not in self._sizes:
                listed = self._client.list_artifacts(run_id, folder or None)
                self._sizes[run_id, folder] = {i.path: int(i.file_size or 0) for i in listed if not i.is_dir}
            size = self._sizes[run_id, folder].get(name)
            if size is None:
                return None
            if size > limit:
                self.problems.append(f"{name} of run {run_id} is larger than {limit // 2**20} MB")
                return None
            with tempfile.TemporaryDirectory() as target:
                return Path(self._client.download_artifacts(run_id, name, target)).read_bytes()
        except STORE_ERRORS as error:
            self.problems.append(f"{name} of run {run_id} could not be fetched ({type(error).__name__})")
            return None

    def json(self, run_id: str, name: str) -> Any:
        return self._parsed(run_id, name, json.loads)

    def yaml(self, run_id: str, name: str) -> Any:
        return self._parsed(run_id, name, lambda text: yaml.load(text, _Plain))

    def json_lines(self, run_id: str, name: str) -> list[Any]:
        found = self._parsed(run_id, name, lambda text: [json.loads(line) for line in text.splitlines() if line])
        return found or []

    def text(self, run_id: str, name: str) -> str | None:
        content = self.read(run_id, name, LARGEST_TEXT)
        return None if content is None else content.decode("utf-8", "replace")

    def _parsed(self, run_id: str, name: str, parse: Any) -> Any:
        text = self.text(run_id, name)
        if text is None:
            return None
        try:
            return parse(text)
        except (ValueError, RecursionError, yaml.YAMLError):
            self.problems.append(f"{name} of run {run_id} is damaged")
            return None


class _Plain(yaml.SafeLoader):
    """Without aliases, by which a few lines become gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)
