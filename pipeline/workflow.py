"""What the jobs do: training, evaluation and registration put together.

What imports MLflow is imported where it is needed: it takes seconds, and a training does not wait for it before its
first step.
"""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline import store
from pipeline.config import Config, validate
from pipeline.data.dataset import Dataset, read_manifest
from pipeline.errors import PipelineError, Stopped
from pipeline.evaluation.embedded import Embeddings
from pipeline.evaluation.evaluate import EpisodicProtocol, evaluate
from pipeline.evaluation.model import Model
from pipeline.evaluation.protocols import EvaluateConfig, compare, figures, measure, print_episodic
from pipeline.evaluation.seen import SPLIT, refuse_seen
from pipeline.evaluation.spread import EmbeddedSplits, surveyed
from pipeline.files import to_json
from pipeline.inference.calibration import Calibration
from pipeline.pages.record import record
from pipeline.pages.strangers import calibrate_run, doubts
from pipeline.registry.masking import mask_argument
from pipeline.registry.tracker import Tracker
from pipeline.registry.tracking_config import check_tracking, registering, say_undelivered
from pipeline.training.alone import alone
from pipeline.training.checkpoint import load_checkpoint
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.config import TrainConfig
from pipeline.training.launch import begin, launch
from pipeline.training.models import model_for, model_of_run
from pipeline.training.preemption import stopping_on_sigterm
from pipeline.training.prepare import prepare
from pipeline.training.runs import CALIBRATION, EVALUATION, REPORT, Run, best_checkpoint, find_run, step_of

CHALLENGER = "challenger"


def train(raw: Config) -> dict[str, Any]:
    """Train a run (or go on with one), evaluate its chosen checkpoint, publish and register it."""
    config, _, run = prepare(raw)
    check_tracking(config.tracking, None if raw.get("resume") else config.register_as)  # a run ends under its old name
    run = begin(config, run, resumed=bool(raw.get("resume")))
    with alone(run.uri, f"run {run.name}"):
        return _train(config, run)


def _train(config: TrainConfig, run: Run) -> dict[str, Any]:
    print(f"run {run.name}: {config.method['name']} on {run.dataset['name']}, {config.steps:,} steps", flush=True)
    tracker = Tracker(run.name, config.tracking, run.config, run.dataset)
    status: str | None = "FAILED"
    try:
        launch(config, run, lambda entry: tracker.log(int(entry["step"]), {k: entry[k] for k in entry if k != "step"}))
        summary: dict[str, Any] = {"run": run.name, "folder": run.uri, "checkpoint": best_checkpoint(run.uri)}
        asked = f"run {run.name}: stopped after its training as asked; measure and register it with: {run.resume}"
        with stopping_on_sigterm(asked):
            model = model_of_run(run)
            if config.evaluation is not None:
                summary["evaluation"] = _evaluate_run(config, run, model)
        status = None  # publishing ends it
    except (Stopped, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        delivery = tracker.close(status=status)
    if delivery.message:
        print(delivery.message, flush=True)
    with stopping_on_sigterm(f"run {run.name}: stopped while it was registered, as asked; again: {run.resume}"):
        summary.update(register(run.uri, config))
    _say_made(summary)
    return summary


def register(run_uri: str, config: TrainConfig) -> dict[str, Any]:
    """Publish a run and register its model; where the store is away, say how to do it later."""
    if config.tracking.get("uri") is None:
        return {}
    from pipeline.registry.publish import publish
    from pipeline.registry.versions import register_run, set_alias

    try:
        published = publish(run_uri, config.tracking)
        made = {"mlflow_run": published.run_id, "tracking": published.uri}
        if config.register_as is None:
            return made
        version = register_run(run_uri, config.tracking, config.register_as)
        set_alias(config.tracking, version.name, CHALLENGER, version.version)
        return {**made, "model": version.uri, "name": version.name, "version": version.version}
    except PipelineError as error:  # the run itself is whole: only what others see of it is missing
        return say_undelivered(error)


def evaluate_job(raw: Config) -> dict[str, Any]:
    """Measure a run or a registered model; compare it with another on the same episodes."""
    config = validate(EvaluateConfig, raw)
    if config.publish and (config.run is None or config.protocol != "episodic" or config.dataset is not None):
        raise PipelineError("publish=true adds episodic figures on a run's own dataset: give run=NAME, no dataset")
    if (config.run is None) == (config.model is None):
        raise PipelineError("give one of run=NAME and model=models:/NAME@ALIAS; see: python -m jobs.evaluate --help")
    if config.protocol == "generalized" and (config.compare or config.untrained):
        raise PipelineError("protocol=generalized measures one run: leave out compare and untrained")
    if config.compare and config.protocol == "episodic" and config.episodes < 2:
        raise PipelineError("compare needs at least 2 episodes: one alone has no interval; give episodes=1000")
    if config.record and config.run is None:
        raise PipelineError("record needs run=NAME, whose configuration it keeps")
    for key, file in (("output", config.output), ("record", config.record)):
        if file:
            store.check_output(file, key)
    model, run = _subject(config.run or config.model or "", config)
    models = [model]
    if config.untrained:
        models.append(_untrained(model, run))
    if config.compare:
        other, of = _subject(config.compare, config, config.dataset or model.dataset)
        taken = other.label in [known.label for known in models]  # by a run of another folder
        models.append(replace(other, label=of.uri) if taken and of is not None else other)
    surveys = config.untrained and model.build()[0].summarises
    if surveys and run is None:
        raise PipelineError(f"untrained: {model.label} keeps figures of its training images; give its run=NAME instead")
    if config.protocol != "one_shot_runs" or surveys:  # which is of 800 images, computed here
        start_ray(config.cluster)
        check_resources(config.cluster)
    if surveys and run is not None:
        models[1] = _surveyed(models[1], run, config.cluster.gpus_per_worker)
    dataset = config.dataset or model.dataset
    if dataset is not None and config.protocol != "one_shot_runs":
        models = [model_for(one, dataset) for one in models]
    once = EmbeddedSplits(models[0], config.cluster.gpus_per_worker) if config.protocol == "episodic" else None
    measured = measure(config, models, dataset, None if run is None else run.config, once)
    summary: dict[str, Any] = {"results": figures(measured)}
    if config.compare:
        summary["comparison"] = compare(measured)
    if config.output:
        store.write_bytes(config.output, to_json(summary, indent=1).encode())
        print(f"written to {config.output}")
    own = summary["results"][: len(measured[0][1])]  # the model's; another may have its name
    if config.record:
        assert run is not None
        others = _in_short(summary["results"][len(own) :])
        results = [*({**result, "model": "trained"} for result in _in_short(own)), *others]
        checkpoint = load_checkpoint(best_checkpoint(run.uri))
        record(config.record, run, checkpoint, results, config, summary.get("comparison"))
        print(f"recorded in {config.record}")
    if config.publish and run is not None and once is not None:
        untrained = summary["results"][len(own) : 2 * len(own)] if config.untrained else []
        _publish_evaluation(config, model, run, own, untrained, once)
    return summary


def _subject(name: str, config: EvaluateConfig, dataset: str | None = None) -> tuple[Model, Run | None]:
    """A model by the name of its run, or from the registry; refused where it has seen what it is measured on.

    Args:
        dataset: that it is measured on; None: the configuration's, or its own.
    """
    run = None
    if name.startswith("models:"):
        from pipeline.registry.versions import pull

        classifier = pull(name, config.tracking)
        trained = classifier.origin.get("dataset") or {}
        model = Model(classifier.spec, dict(classifier.method.state_dict()), name, trained.get("uri"))
    else:
        run = find_run(name, config.storage)
        trained = {SPLIT: run.config["train"]["split"], **run.dataset}
        model = model_of_run(run)
    measured = dataset or config.dataset or model.dataset
    if measured is not None and config.protocol != "one_shot_runs" and not config.seen:
        refuse_seen(model.label, trained, read_manifest(measured), config.split)
    return model, run


def _untrained(model: Model, run: Run | None) -> Model:
    """The model with the weights that its run drew before its first step.

    Raises:
        PipelineError: the run began with weights from elsewhere.
    """
    if run is None:
        print(
            f"note: {model.label} does not tell the seed of its run, nor whether that began with other weights: "
            "'untrained' is drawn by seed 0; the run's own first weights: run=NAME",
            flush=True,
        )
        return model.untrained()
    if run.config.get("initial") is not None:
        raise PipelineError(
            f"untrained: {run.name} began with the weights of initial={run.config['initial']}; measure them with a "
            "run of steps=0"
        )
    return model.untrained(run.config["seed"])


def _surveyed(model: Model, run: Run, gpus: float) -> Model:
    """An untrained model with what its method keeps of the training images, as every checkpoint of its run has it."""
    how = run.config["train"]
    return surveyed(model, str(model.dataset), how["split"], how["holdout"], gpus)


def _evaluate_run(config: TrainConfig, run: Run, model: Model) -> list[dict[str, Any]]:
    """Test accuracy, the calibration of 'unknown' and pictures: into the run's ``report`` folder."""
    from pipeline.pages.card import MOST_IMAGES
    from pipeline.pages.pictures import draw_pictures  # matplotlib, which no training waits for before its first step

    how = config.evaluation
    assert how is not None
    protocols = [
        EpisodicProtocol(config.dataset_uri, how.split, way, shot, how.query, how.episodes, how.seed, how.tasks)
        for way in how.way
        for shot in how.shot
    ]
    gpus = config.cluster.gpus_per_worker
    once = EmbeddedSplits(model, gpus)
    measured = [(model, evaluate(model, protocols, gpus, once=once))]
    if how.untrained and config.initial is None:  # a run of earlier code may have both
        before = _surveyed(_untrained(model, run), run, gpus)
        measured.append((before, evaluate(before, protocols, gpus)))
    print_episodic(measured)
    results = [{"model": m.label, **r.summary()} for m, rs in measured for r in rs]
    trained, first = results[: len(protocols)], results[len(protocols) :]
    _write_evaluation(run, trained)
    dataset = Dataset(config.dataset_uri, verify=False)
    print(f"calibrating 'unknown' on split {config.validation.split!r}", flush=True)
    calibration = _write_calibration(run, model, dataset, once)
    print("drawing pictures and the model card", flush=True)
    embeddings = once.of(config.dataset_uri, how.split, MOST_IMAGES)
    _write_report(run, draw_pictures(*model.build(), dataset, how.split, trained, embeddings))
    _write_card(run, model, dataset, protocols[0], measured[0][1][0].accuracies, calibration, first, embeddings)
    return results


def _publish_evaluation(
    config: EvaluateConfig,
    model: Model,
    run: Run,
    mine: list[dict[str, Any]],
    untrained: list[dict[str, Any]],
    once: EmbeddedSplits,
) -> None:
    """Figures, calibration and model card into the run's report, beside or instead of what is there, and published.

    Args:
        mine: results of the model.
        untrained: of the same network with its first weights, where they were asked for.
    """
    from pipeline.pages.card import MOST_IMAGES
    from pipeline.registry.publish import evaluation_of, publish

    known = {(e["split"], e["way"], e["shot"]): e for e in [*evaluation_of(run), *_in_short(mine)]}
    _write_evaluation(run, list(known.values()))
    protocol = EpisodicProtocol(
        str(model.dataset), config.split, config.way[0], config.shot[0], config.query, config.episodes, config.seed
    )
    dataset, accuracies = Dataset(str(model.dataset), verify=False), np.asarray(mine[0]["accuracies"])
    calibration = _write_calibration(run, model, dataset, once)
    embeddings = once.of(dataset.uri, config.split, MOST_IMAGES)
    _write_card(run, model, dataset, protocol, accuracies, calibration, _in_short(untrained), embeddings)
    published = publish(run.uri, config.tracking, ended=False)
    later = registering(run.uri, config.tracking)
    print(f"published in MLflow run {published.run_id}; for its model's tags: {later}")


def _write_evaluation(run: Run, results: list[dict[str, Any]]) -> None:
    """With the step of the checkpoint: the run may go on, and they are not those of its later ones."""
    step = step_of(best_checkpoint(run.uri))
    _write_report(run, {EVALUATION: json.dumps([{**result, "step": step} for result in results], indent=1).encode()})


def _write_calibration(run: Run, model: Model, dataset: Dataset, once: EmbeddedSplits) -> Calibration | None:
    calibration = calibrate_run(*model.build(), dataset, run.config, once)
    if calibration is not None:
        content = {**calibration.to_dict(), "step": step_of(best_checkpoint(run.uri))}
        _write_report(run, {CALIBRATION: json.dumps(content, indent=1).encode()})
        for note in doubts(calibration, dataset, run.config):
            print(f"note: {note}", flush=True)
    return calibration


def _write_card(
    run: Run,
    model: Model,
    dataset: Dataset,
    protocol: EpisodicProtocol,
    accuracies: np.ndarray,
    calibration: Calibration | None,
    untrained: list[dict[str, Any]],
    embeddings: Embeddings | None,
) -> None:
    from pipeline.pages.card import draw_card

    origin: dict[str, Any] = {"run": run.name, "step": load_checkpoint(best_checkpoint(run.uri)).step}
    origin["untrained"] = untrained  # results of the same network with its first weights, where they were asked for
    origin["arguments"] = [mask_argument(argument) for argument in run.arguments]
    temperature = 1.0 if calibration is None else calibration.nearest(protocol.way, protocol.shot).temperature
    drawn = draw_card(*model.build(), dataset, protocol, accuracies, origin, temperature, embeddings)
    _write_report(run, drawn)


def _write_report(run: Run, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        store.write_bytes(store.join(run.uri, REPORT, name), content)


def _in_short(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the accuracy of every episode."""
    return [{key: value for key, value in entry.items() if key != "accuracies"} for entry in results]


def _say_made(summary: dict[str, Any]) -> None:
    print(f"\nrun        {summary['folder']}")
    print(f"checkpoint {summary['checkpoint'].rsplit('/', 1)[-1]}")
    if "model" in summary:
        print(f"model      {summary['model']} (also @{CHALLENGER}) in {summary['tracking']}")
