"""What a run still owes to MLflow, delivered: ``jobs.register``."""

from typing import Any

from pipeline.config import Config, Section, validate
from pipeline.registry.publish import publish
from pipeline.registry.tracking_config import TrackingConfig, check_model_name, registering
from pipeline.registry.versions import register_run, set_alias
from pipeline.training.runs import find_run


class RegisterConfig(Section):
    """Keys of ``conf/register.yaml``."""

    run: str
    storage: str
    register_as: str | None
    alias: str | None
    tracking: TrackingConfig


def deliver(raw: Config) -> dict[str, Any]:
    """Publish a run and register its model, completing what is there already; a run that was to be registered nowhere
    (``register_as=null``) only where a name is given now."""
    config = validate(RegisterConfig, raw)
    tracking = config.tracking.model_dump()
    run = find_run(config.run, config.storage)
    check_model_name(config.register_as or run.config.get("register_as"))
    published = publish(run.uri, tracking, ended=False)
    print(
        f"run {run.name}: {published.metrics_added} figures added to MLflow run {published.run_id} in {published.uri}"
    )
    summary = {
        "run": run.name,
        "mlflow_run": published.run_id,
        "tracking": published.uri,
        "metrics_added": published.metrics_added,
    }
    if config.register_as is None and run.config.get("register_as", "") is None:
        print(f"no model is registered, as the run asked; to do so: {registering(run.uri, tracking)} register_as=NAME")
        return summary
    version = register_run(run.uri, tracking, config.register_as)
    if config.alias:
        set_alias(tracking, version.name, config.alias, version.version)
    alias = f", also @{config.alias}" if config.alias else ""
    print(f"model {version.uri} ({'made' if version.created else 'was there'}{alias})")
    return {
        **summary,
        "model": version.uri,
        "name": version.name,
        "version": version.version,
        "created": version.created,
    }
