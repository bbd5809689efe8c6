"""The MLflow store that a configuration names, reached by its client."""

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.config import validate
from pipeline.errors import PipelineError, Unavailable
from pipeline.registry.masking import first_line, mask_text
from pipeline.registry.tracking_config import TrackingConfig, store_uri

RUN_TAG = "pipeline.run"
_PAGE, _SHOWN = 200, 10  # models of one answer of the store, and names in a message
STORE_ERRORS = (MlflowException, requests.RequestException, SQLAlchemyError, OSError)


@dataclass(frozen=True)
class Store:
    """A client, and the experiment of the configuration."""

    client: MlflowClient
    uri: str
    experiment_id: str


def connect(tracking: Mapping[str, Any], make: bool = True) -> Store:
    """Reach the store and make the experiment where it is missing.

    Args:
        make: whether the store itself may be made, where it is a file; else it must be there.

    Raises:
        PipelineError: the configuration is wrong, or names no store.
        MlflowException, ...: one of ``STORE_ERRORS``, the store is away.
    """
    config = validate(TrackingConfig, dict(tracking))
    uri = store_uri(config, make)
    client = make_client(uri)
    experiment = client.get_experiment_by_name(config.experiment)
    if experiment is None:
        location = config.artifacts
        if location is not None and "://" not in location:
            location = Path(location).resolve().as_uri()
        try:
            return Store(client, uri, client.create_experiment(config.experiment, artifact_location=location))
        except MlflowException:  # somebody else was faster
            experiment = client.get_experiment_by_name(config.experiment)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise PipelineError(
            f"tracking.experiment={config.experiment}: this experiment was deleted; restore it "
            f"(mlflow experiments restore -x {experiment.experiment_id}) or name another"
        )
    return Store(client, uri, experiment.experiment_id)


def make_client(uri: str) -> MlflowClient:
    """A client that gives up on a silent server after seconds, not minutes. The user's own settings go first."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):  # that a table or a model is made is no news
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def reaching(tracking: Mapping[str, Any], remedy: str) -> Iterator[None]:
    """Turn a store that is away (``Unavailable``, where it is no file) or refuses into one line: what to do."""
    try:
        yield
    except STORE_ERRORS as error:
        uri = str(tracking.get("uri"))
        refuses = isinstance(error, MlflowException) and error.get_http_status_code() < 500
        kind = PipelineError if uri.startswith("sqlite") or refuses else Unavailable
        raise kind(f"MLflow at {mask_text(uri)}: {first_line(error)}; {remedy}") from error


def all_models(client: MlflowClient) -> Iterator[RegisteredModel]:
    """Every registered model, by name."""
    return paged(
        lambda token: client.search_registered_models(max_results=_PAGE, order_by=["name ASC"], page_token=token)
    )


def paged(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Everything that ``search`` finds, a page of it for each token."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def registered_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    """The registered model of a name; None where there is none."""
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def unknown_model(client: MlflowClient, name: str) -> str:
    """That there is no such registered model, with the names that are nearest, for messages."""
    known = [str(model.name) for model in all_models(client)]
    shown = difflib.get_close_matches(name, known, n=_SHOWN) + known
    listed = ", ".join(list(dict.fromkeys(shown))[:_SHOWN])
    more = f" and {len(known) - _SHOWN:,} more" if len(known) > _SHOWN else ""
    return f"there is no registered model {name!r}; there is {listed or 'none'}{more}"


def find_run(store: Store, name: str) -> Run | None:
    """The oldest MLflow run of the pipeline's run ``name``."""
    if "'" in name:
        raise PipelineError(f"name={name!r}: a run's name is made of letters, digits, '.', '_' and '-'")
    wanted, oldest = f"tags.`{RUN_TAG}` = '{name}'", ["attributes.start_time ASC"]
    found = store.client.search_runs([store.experiment_id], wanted, order_by=oldest, max_results=1)
    return found[0] if found else None
