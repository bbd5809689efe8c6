"""``jobs.promote``: challenger and champion on the same episodes, and the rule that lets one replace the other."""

from typing import Any

import numpy as np

from pipeline.config import Config, Section, validate
from pipeline.config_kinds import Cluster, Count, Name, Real, Several, Share
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.evaluation.protocols import Place
from pipeline.evaluation.seen import refuse_seen
from pipeline.evaluation.statistics import estimate, paired
from pipeline.registry.aliases import CHAMPION, Decision, alias_version, roll_back, settle
from pipeline.registry.tracking import connect, reaching
from pipeline.registry.tracking_config import TrackingConfig
from pipeline.registry.versions import pull
from pipeline.tables import percent, text_table
from pipeline.training.cluster import check_resources, start_ray

KEPT = 3  # exit code: the champion stays


class Contest(Section):
    """On which episodes two models meet, and by how much the challenger must be better."""

    split: str
    episodes: Several
    way: Count
    shot: Count
    query: Count
    tasks: Count
    seed: int
    margin: Real
    confidence: Share


class PromoteConfig(Contest):
    """Keys of ``conf/promote.yaml``."""

    name: Name
    challenger: Name
    rollback: bool
    dataset: Place | None
    seen: bool
    cluster: Cluster
    tracking: TrackingConfig


def promote_job(raw: Config) -> dict[str, Any]:
    """Measure, decide and record; or go back to the previous champion."""
    config = validate(PromoteConfig, raw)
    tracking = config.tracking.model_dump()
    if config.rollback:
        decision = roll_back(tracking, config.name)
        print(f"version {decision.challenger} of {config.name} is champion again, after {decision.champion}")
        return {"promoted": True, **_summary(decision)}
    decision = promote(config)
    return {"exit_code": 0 if decision.promoted else KEPT, **_summary(decision)}


def promote(config: PromoteConfig) -> Decision:
    """The challenger replaces the champion if the whole paired interval of its advantage lies above the margin."""
    tracking = config.tracking.model_dump()
    with reaching(tracking, "nothing was decided; try again"):
        client = connect(tracking, make=False).client
        champion = alias_version(client, config.name, CHAMPION)
        version = int(config.challenger) if config.challenger.isdecimal() else None
        challenger = version or alias_version(client, config.name, config.challenger)
    if challenger is None:
        raise PipelineError(f"challenger={config.challenger}: {config.name!r} has no such version or alias")
    if challenger == champion:
        print(f"version {champion} of {config.name} is champion already")
        return Decision(config.name, challenger, champion, True, "is champion already")
    decision = settle(tracking, measure(config, challenger, champion))
    what = "becomes champion" if decision.promoted else "does not become champion"
    print(f"version {decision.challenger} of {decision.name} {what}: {decision.reason}", flush=True)
    return decision


def measure(config: PromoteConfig, challenger: int, champion: int | None) -> Decision:
    """Both versions on the same episodes, and the rule; nothing is recorded or moved."""
    tracking = config.tracking.model_dump()
    first = pull(f"models:/{config.name}/{challenger}", tracking)
    uri = config.dataset or (first.origin.get("dataset") or {}).get("uri")
    if uri is None:
        raise PipelineError("the challenger does not say what it was trained on: give dataset=FOLDER")
    protocol = EpisodicProtocol(
        uri, config.split, config.way, config.shot, config.query, config.episodes, config.seed, config.tasks
    )
    versions = {f"challenger, version {challenger}": first}
    if champion is not None:
        versions[f"champion, version {champion}"] = pull(f"models:/{config.name}/{champion}", tracking)
    if not config.seen:  # whoever trained on the other's test classes wins by that, and the decision stays
        manifest = read_manifest(uri)
        for label, known in versions.items():
            refuse_seen(label, known.origin.get("dataset") or {}, manifest, config.split, contest=True)
    start_ray(config.cluster)
    check_resources(config.cluster)
    models = [Model(known.spec, dict(known.method.state_dict()), label) for label, known in versions.items()]
    measured = [evaluate(model, [protocol], config.cluster.gpus_per_worker)[0].accuracies for model in models]
    found = [estimate(values) for values in measured]
    rows = [[model.label, percent(e.mean, e.interval)] for model, e in zip(models, found, strict=True)]
    print(text_table(["model", "accuracy, %"], rows), flush=True)
    return decide(config, challenger, champion, measured, uri)


def decide(
    config: PromoteConfig, challenger: int, champion: int | None, accuracies: list[np.ndarray], uri: str
) -> Decision:
    """The rule, from the accuracies of every episode: of the challenger and, where there is one, of the champion."""
    shape = ("split", "way", "shot", "query", "episodes", "seed", "margin", "confidence")
    figures: dict[str, Any] = {"dataset": uri, **{key: getattr(config, key) for key in shape}}
    figures["accuracy.challenger"] = estimate(accuracies[0]).mean
    if champion is None:
        return Decision(config.name, challenger, None, True, "there was no champion", figures)
    found = paired(accuracies[1], accuracies[0], config.confidence)
    figures |= {"accuracy.champion": estimate(accuracies[1]).mean, "difference": found.difference}
    figures |= {"low": found.low, "high": found.high}
    promoted = found.better_by(config.margin)
    reason = (
        f"difference {100 * found.difference:+.2f} points, {100 * config.confidence:.0f} % interval "
        f"{100 * found.low:+.2f} … {100 * found.high:+.2f}: {'' if promoted else 'not '}all above the margin of "
        f"{100 * config.margin:.2f}"
    )
    return Decision(config.name, challenger, champion, promoted, reason, figures)


def _summary(decision: Decision) -> dict[str, Any]:
    return {
        "name": decision.name,
        "version": decision.challenger,
        "champion_before": decision.champion,
        "promoted": decision.promoted,
        "reason": decision.reason,
        **decision.figures,
    }
