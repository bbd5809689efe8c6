"""From a checked configuration to a finished run under Ray Train."""

import copy
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import store
from pipeline.commands import command, data_root, from_anywhere
from pipeline.config import CONF, Config, as_argument, compose, flat, given_keys, validate
from pipeline.data.dataset import class_table, read_manifest
from pipeline.data.episodes import EpisodeSpec, bounds, check_spec
from pipeline.data.manifest import FEATURES, MANIFEST_NAME, Manifest
from pipeline.environment import bfloat16_instructions
from pipeline.errors import PipelineError, Stopped
from pipeline.evaluation.seen import SPLIT, TRAINED, refuse_seen, seen_classes, trained_classes
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess
from pipeline.nets import Backbone
from pipeline.nets.wrapped import Wrapped
from pipeline.ray_start import in_submitted_job
from pipeline.training import runs
from pipeline.training.checkpoint import STATE
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.config import TrainConfig
from pipeline.training.diagnosis import cause_of
from pipeline.training.loop import make_planner, rounds_since_best, should_stop
from pipeline.training.models import load_teacher
from pipeline.training.optim import build_schedule, check_optimizer
from pipeline.training.preemption import stopping_on_sigterm
from pipeline.training.runs import Run, find_run
from pipeline.training.telemetry import Display, Entry, Restarts, Telemetry, start_monitor
from pipeline.training.trial import try_step
from pipeline.training.worker import train_worker
from pipeline.weights import HUB, described, own_sources, read, recipe, settle

GROUPS = ("data", "method", "backbone", "optimizer", "schedule", "tracking")  # whose keys depend on the choice made
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def model_spec(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What ``build_model`` takes, for this configuration on this dataset."""
    return {
        "method": dict(config.method),
        "backbone": described(config.backbone),
        "input": described_input(config.backbone, config.input.scaling, manifest),
        "way": config.train.way if isinstance(config.train.way, int) else None,
        "shot": bounds(config.train.shot)[1],
        "classes": len(class_table(manifest, config.train.split)),
    }


def described_input(backbone: dict[str, Any], scaling: str, manifest: Manifest) -> dict[str, Any]:
    """ "input" of a model's description, for a dataset."""
    if manifest.encoding == FEATURES:
        return {"shape": list(manifest.shape), "scaling": FEATURES}
    own = recipe(backbone, manifest.shape[0]) if scaling == "backbone" else None
    known = {"mean": manifest.mean, "std": manifest.std} if own is None else own
    return {"shape": list(manifest.shape), "scaling": scaling, **known}


def prepare(raw: Config) -> tuple[TrainConfig, Config, Run]:
    """Check everything that can be checked without workers, and name the run."""
    if raw.get("resume"):
        return _resumed(raw)
    raw = _with_precision(_absolute(raw))
    config = validate(TrainConfig, raw)
    manifest = _manifest(config)
    config = config.model_copy(update={"backbone": settle(config.backbone)})
    if config.initial is not None and config.evaluation is not None and config.evaluation.untrained:
        raise PipelineError(
            f"evaluation.untrained: this run begins with the weights of initial={config.initial}; measure them with "
            "steps=0"
        )
    method = check(config, manifest, model_spec(config, manifest))
    begins = {**_handed_down(config), **_first_weights(config, method)}
    config = config.model_copy(update={"backbone": {**config.backbone, **begins}})
    raw, spec = {**raw, "backbone": config.backbone}, model_spec(config, manifest)
    name = config.name or f"{config.method['name']}-{config.data['name']}-{time.strftime('%Y%m%d-%H%M%S')}"
    if not _NAME.fullmatch(name):
        raise PipelineError(f"name={name!r}: a run's name is made of letters, digits, '.', '_' and '-'")
    uri = store.join(config.storage, name)
    if config.name is not None and store.exists(store.join(uri, runs.RUN_FILE)):
        raise PipelineError(f"name={name}: a run in {config.storage} has this name; go on with it: resume={uri}")
    store.check_folder(config.storage, "storage")
    before = list(manifest.source.get(TRAINED, []))  # of features: by their network
    for checkpoint in (config.initial, config.method.get("teacher")):  # a pupil knows what its teacher saw
        if checkpoint is not None:
            before += runs.read_state(checkpoint)["dataset"].get(TRAINED, [])
    dataset = {
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "uri": config.dataset_uri,
        TRAINED: trained_classes(manifest, config.train.split, before),
        SPLIT: config.train.split,
    }
    _check_seen(config, manifest, dataset)
    run = Run(name, uri, {**raw, "name": name}, spec, dataset, _arguments())
    return config, run.config, run


def _check_seen(config: TrainConfig, manifest: Manifest, dataset: Config) -> None:
    """Refuse to test on what the first weights, or the features' network, were trained on; of validation it is said."""
    begins = "what this run begins with" + (" or is taught by" if config.method.get("teacher") else "")
    if config.evaluation is not None:
        instead = "measure nothing with evaluation=null"
        refuse_seen(begins, dataset, manifest, config.evaluation.split, instead)
    split = config.validation.split
    if seen := seen_classes(dataset, manifest, split):
        print(
            f"note: {begins} was trained on {len(seen):,} classes of split {split!r} of dataset {manifest.name!r}, "
            "and validation is by them: its accuracies are those of classes that were seen",
            flush=True,
        )


def _manifest(config: TrainConfig) -> Manifest:
    uri = config.dataset_uri
    if config.backbone["name"] == FEATURES and not store.exists(store.join(uri, MANIFEST_NAME)):
        made = command("embed", "data=NAME", "run=NAME", f"name={config.data['name']}", *data_root(config.data["root"]))
        raise PipelineError(f"no features at {uri}; make them with: {made}")
    return read_manifest(uri)


def _handed_down(config: TrainConfig) -> dict[str, Any]:
    """Of a run that begins with another's weights, and with none of a library: what that one's were trained on."""
    if config.initial is None or config.backbone.get("weights") is not None:
        return {}
    before = runs.read_state(config.initial)["spec"]["backbone"]
    if before.get("name") != config.backbone["name"] or not before.get("weights_sha256"):
        return {}
    return {key: before.get(key) for key in ("weights_sha256", "trained_on")}


def _with_precision(raw: Config) -> Config:
    """``precision=auto`` decided, once for the run: it keeps it wherever it goes on.

    On a cluster of CPUs the machine that asks speaks for the others.
    """
    if raw.get("precision") != "auto":
        return raw
    instructions = bfloat16_instructions()
    if dict(raw.get("cluster") or {}).get("gpus_per_worker"):
        chosen, why = "bfloat16", "the run is on GPUs"
    elif instructions:
        chosen, why = "bfloat16", f"this processor has {instructions}"
    else:
        chosen, why = "float32", "this processor has no instructions for bfloat16"
    print(f"precision=auto: {chosen} ({why})", flush=True)
    return {**raw, "precision": chosen}


def _first_weights(config: TrainConfig, method: Method) -> dict[str, str]:
    """The SHA-256 of the weights that the backbone begins with, where it has any, by its key."""
    options = config.backbone
    if not isinstance(method.backbone, Wrapped) or options["weights"] is None:
        return {}
    if config.evaluation is not None and config.evaluation.untrained:
        raise PipelineError(
            "evaluation.untrained: this network begins with weights from elsewhere; measure them with steps=0"
        )
    found = read(method.backbone, options)
    unused = f"; not used: {', '.join(found.left)}" if found.left else ""
    print(
        f"backbone.weights={options['weights']}: {len(found.tensors):,} tensors, SHA-256 {found.sha256[:12]}, trained "
        f"on {options['trained_on']}, whose classes may be among those of the test{unused}",
        flush=True,
    )
    if config.input.scaling != "backbone":
        print("the weights were made with another input, perhaps: see input.scaling=backbone", flush=True)
    return {"weights_sha256": found.sha256}


def check(config: TrainConfig, manifest: Manifest, spec: dict[str, Any]) -> Method:
    """The method, after refusing, with the key and the limit, what the dataset or the method cannot serve."""
    if manifest.encoding == FEATURES:
        _check_features(config, manifest)
    method = build_model(spec)
    if manifest.encoding == FEATURES and (not method.embeds_once or any(method.candidates)):
        raise PipelineError(
            f"method={config.method['name']} needs images, to adapt the network or look at more than its features: "
            f"give data=NAME of images, and not {manifest.name!r}, which holds features"
        )
    if config.steps and not any(parameter.requires_grad for parameter in method.parameters()):
        raise PipelineError(
            f"method={config.method['name']} has nothing to train on backbone={config.backbone['name']}: set steps=0, "
            "which measures and registers it as it is"
        )
    preprocess = build_preprocess(spec)
    if spec["method"].get("teacher") is not None:
        method.imitate(load_teacher(spec, manifest.fingerprint, config.train.split))
    check_optimizer(method, config.optimizer)
    build_schedule(config.schedule, config.steps)
    _check_batches(config, method)
    make_planner(config, manifest, method)
    if config.evaluation is not None:
        table = class_table(manifest, config.evaluation.split)
        if method.fixed_way is not None and config.evaluation.way != [method.fixed_way]:
            raise PipelineError(
                f"evaluation.way={config.evaluation.way}: {config.method['name']} trained with {method.fixed_way} ways "
                f"answers for {method.fixed_way} classes only: set evaluation.way=[{method.fixed_way}]"
            )
        for way in config.evaluation.way:
            for shot in config.evaluation.shot:
                check_spec(table, EpisodeSpec(way, shot, config.evaluation.query), "evaluation")
    check_spec(class_table(manifest, config.validation.split), config.validation.spec(), "validation")
    if method.fixed_way is not None and config.validation.way != method.fixed_way:
        raise PipelineError(
            f"validation.way={config.validation.way}: {config.method['name']} trained with {method.fixed_way} ways "
            f"answers for {method.fixed_way} classes only"
        )
    if manifest.shape[1] != manifest.shape[2] and len(manifest.rotations) > 1:
        raise PipelineError(f"dataset {manifest.name!r} has rotated classes but images that are not square")
    foreign = not isinstance(method.backbone, Backbone) or isinstance(method.backbone, Wrapped)
    if foreign and config.steps:
        try_step(config, manifest, copy.deepcopy(method), preprocess)
    return method


def _check_batches(config: TrainConfig, method: Method) -> None:
    config.check_workers(method.regime)
    if config.steps:
        method.check_batches(config.cluster.workers, config.train.grouping)


def _check_features(config: TrainConfig, manifest: Manifest) -> None:
    """Refuse what only images can go through."""
    holds = f"dataset {manifest.name!r} holds features"
    if config.backbone["name"] != FEATURES:
        raise PipelineError(f"backbone={config.backbone['name']} takes images, and {holds}: set backbone={FEATURES}")
    if config.augmentation.build().active:
        raise PipelineError(f"augmentation is of images, and {holds}: leave it out; views=5 of jobs.embed makes views")
    if config.input.scaling != "unit":
        raise PipelineError(f"input.scaling={config.input.scaling} is of images, and {holds}: leave it out")


def begin(config: TrainConfig, run: Run) -> Run:
    """Claim the folder of a new run, as soon as Ray is there and can serve it: who is refused before leaves none.

    Of jobs that begin at once, no two train in one folder.
    """
    start_ray(config.cluster)
    check_resources(config.cluster, decoding=config.materialize == "cluster")
    return runs.claim_run(run, named=config.name is not None)


def launch(config: TrainConfig, run: Run, on_log: Callable[[Entry], None] | None = None, monitor: Any = None) -> Run:
    """Train to the end under Ray Train; workers that die are replaced and go on from the last checkpoint.

    Called again for a run that was interrupted, it goes on with it. ``monitor``: one of the caller's own, which may
    ask the workers to leave.
    """
    start_ray(config.cluster)
    check_resources(config.cluster, decoding=config.materialize == "cluster")
    runs.write_run(run)
    monitor = monitor or start_monitor()
    done = runs.steps_done(run.uri)
    telemetry = Telemetry(run.name, str(config.method["name"]), str(run.dataset["name"]), config.steps, done)
    needs = {"CPU": config.cluster.cpus_per_worker, "GPU": config.cluster.gpus_per_worker}
    needs = {kind: share for kind, share in needs.items() if share}  # of a worker
    hooks: list[Any] = [Restarts(monitor)]
    fs, path = store.open_store(config.storage, patient=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"run": run, "code": own_sources(run.spec), "monitor": monitor},
        torch_config=TorchConfig(backend="nccl" if config.cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=config.cluster.gpus_per_worker > 0,
            resources_per_worker=needs,
        ),
        run_config=RunConfig(
            name=run.name,
            failure_config=FailureConfig(max_failures=config.cluster.restarts),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.checkpoint.keep, checkpoint_score_attribute="val/accuracy"
            ),
            callbacks=hooks,
            storage_path=path,
            storage_filesystem=fs,
        ),
    )
    all_need = {kind: share * config.cluster.workers for kind, share in needs.items()}
    display = Display(monitor, config.steps, run.name, telemetry.beside(on_log), all_need)
    waited = f"run {run.name}: stopped while it waited for its workers, as asked; go on with it: {run.resume}"
    with telemetry, display, stopping_on_sigterm(waited, lambda: ask_to_leave(monitor, display.begun, run)):
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.ActorDiedError) as error:
            raise cause_of(error, run) from error
    stopped, asked = ray.get(monitor.ended.remote())
    if stopped and asked:
        raise Stopped(f"run {run.name}: {stopped}; go on with it: {run.resume}")
    if stopped:
        raise PipelineError(f"run {run.name}: {stopped}")
    return run


def ask_to_leave(monitor: Any, begun: bool, run: Run) -> bool:
    """Ask the workers, where they have begun, to save and to end; whether they have. How to go on is said at once: who
    asks the job to end may not wait until they have saved."""
    if begun:
        monitor.say.remote(f"asked to end, after this step; should it be killed before, go on with it: {run.resume}")
        monitor.leave.remote()
    return begun


def _resumed(raw: Config) -> tuple[TrainConfig, Config, Run]:
    """The stored configuration of a run, with what was given of where it and its dataset are now (cluster, tracking,
    data.root), and of how long it is to be."""
    given = given_keys("train", raw)
    for key in given:
        if key.split(".")[0] not in ("resume", "storage", "cluster", "tracking") and key not in ("data.root", "steps"):
            raise PipelineError(f"{key}: a resumed run keeps its stored configuration; leave it out or begin a new run")
    name, storage = str(raw["resume"]), str(raw["storage"])
    if not (store.is_remote(name) or os.path.isabs(name)):
        storage = absolute("storage", storage)
    run = find_run(name, storage)
    if run.uri.rpartition("/")[2] != run.name:  # Ray Train and MLflow know a run by its name
        raise PipelineError(
            f"resume={run.uri}: this is a copy of run {run.name}, or it was renamed: call its folder {run.name}, in "
            "another folder of runs where that one has a run of this name"
        )
    stored = _completed(run.config)
    if "steps" in given:
        _lengthen(run, stored, raw["steps"])
        kept = [argument for argument in run.arguments if not argument.startswith("steps=")]
        run = replace(run, arguments=(*kept, f"steps={raw['steps']}"))
    if "data.root" in given:
        stored["data"]["root"] = absolute("data.root", str(raw["data"]["root"]))
    before, run = flat(run.config), replace(run, config=stored)
    stored = copy.deepcopy(stored)
    for part in ("cluster", "tracking"):
        named = {key.partition(".")[2]: raw[part][key.partition(".")[2]] for key in given if key.startswith(f"{part}.")}
        stored[part] |= from_anywhere(named) if part == "tracking" and not in_submitted_job() else named
    now = flat(stored)
    again = [
        key for key in given if key.startswith(("cluster.", "tracking.", "data.root")) and now[key] != before.get(key)
    ]
    run = replace(run, again=tuple(as_argument(key, now[key]) for key in again))
    stored["storage"] = run.uri.removesuffix(f"/{run.name}")  # the folder of runs may have moved
    config = validate(TrainConfig, stored)
    if config.cluster.workers != run.config["cluster"]["workers"]:
        _check_batches(config, build_model(run.spec))
        print(
            f"run {run.name}: {config.cluster.workers} workers from here on, {run.config['cluster']['workers']} at its "
            "beginning: every step has the same episodes, and their sums differ in the last bits; batch-norm's "
            "statistics and augmentation's draws are each worker's own, and so are others where a run has them",
            flush=True,
        )
    found = read_manifest(config.dataset_uri).fingerprint
    if found != run.dataset["fingerprint"]:
        raise PipelineError(f"resume={run.name}: the dataset at {config.dataset_uri} has changed since the run began")
    return config, stored, run


def _lengthen(run: Run, stored: Config, steps: Any) -> None:
    """Another number of steps for a run that is resumed: what has been trained stays, the schedule is the new one's."""
    done = runs.steps_done(run.uri)
    if not isinstance(steps, int) or steps < done:
        raise PipelineError(f"steps={steps}: run {run.name} has {done:,} steps already; give as many or more")
    schedule = stored["schedule"]["name"]
    print(
        f"run {run.name}: {steps:,} steps instead of {stored['steps']:,}; from here on its learning rate is that of "
        f"schedule {schedule} over {steps:,} steps",
        flush=True,
    )
    stored["steps"] = steps
    patience = stored["validation"]["patience"]
    if patience is None or steps == done:
        return
    history = runs.read_state(runs.checkpoints(run.uri)[-1])["history"] if done else []
    if should_stop(history, patience):  # more steps are asked for: rounds that ended it count no more
        behind = rounds_since_best(history)
        stored["validation"]["patience"] = patience + behind
        print(
            f"run {run.name}: validation.patience={patience} had ended it; {patience} more rounds without a better "
            f"accuracy end it again (validation.patience={patience + behind} with the {behind} that are behind it)",
            flush=True,
        )


def _completed(stored: Config) -> Config:
    """A stored configuration with the keys that came after it was stored, as they are where nothing is said."""
    whole = copy.deepcopy(stored)
    for section, value in compose("train").items():
        known = whole.setdefault(section, value)
        if isinstance(value, dict) and isinstance(known, dict) and section not in GROUPS:
            whole[section] = {**value, **known}
    return whole


def absolute(key: str, value: str) -> str:
    """A local path made absolute: workers have another working directory."""
    value = value.removeprefix("file://")
    if store.is_remote(value) or os.path.isabs(value):
        return value
    if in_submitted_job():
        raise PipelineError(
            f"{key}={value} is a relative path, which in a submitted job leads into a folder that is thrown away: "
            "give an absolute path that all nodes share, or s3://bucket/prefix"
        )
    return os.path.abspath(value)


def _absolute(raw: Config) -> Config:
    data = {key: value for key, value in raw["data"].items() if key != "source"}  # its manifest tells that
    data["root"] = absolute("data.root", str(data["root"]))
    placed = {**raw, "data": data, "storage": absolute("storage", str(raw["storage"]))}
    if not in_submitted_job():  # there a relative path is refused, by whoever reaches for the store
        placed["tracking"] = from_anywhere(raw["tracking"])
    placed["backbone"] = with_absolute_files(raw["backbone"])
    return with_checkpoints(placed, placed["storage"])


def with_absolute_files(backbone: Config) -> Config:
    """A backbone's configuration with its local files made absolute."""
    placed = dict(backbone)
    if placed.get("weights", HUB) not in (HUB, None):
        placed["weights"] = absolute("backbone.weights", str(placed["weights"]))
    if placed.get("name") == "module" and placed.get("path") is not None:
        path = str(placed["path"]).removeprefix("file://")
        placed["path"] = os.path.abspath(path)  # read here, and sent to the workers
    if os.path.isdir(str(placed.get("model"))):
        placed["model"] = absolute("backbone.model", str(placed["model"]))
    return placed


def with_checkpoints(raw: Config, storage: str) -> Config:
    """``raw`` with the checkpoints that it begins with and is taught by, in place of names of runs in ``storage``."""
    placed = dict(raw)
    if raw.get("initial") is not None:
        placed["initial"] = _checkpoint("initial", str(raw["initial"]), storage)
    if raw["method"].get("teacher") is not None:
        teacher = _checkpoint("method.teacher", str(raw["method"]["teacher"]), storage)
        placed["method"] = {**raw["method"], "teacher": teacher}
    return placed


def _checkpoint(key: str, given: str, storage: str) -> str:
    """The checkpoint folder that ``key`` stands for: itself, or a run's chosen checkpoint."""
    if store.exists(store.join(given, STATE)):
        return absolute(key, given.rstrip("/"))
    for uri in store.places(given, storage):
        if store.exists(store.join(uri, runs.RUN_FILE)):
            return absolute(key, runs.best_checkpoint(uri))
    message = f"{key}={given}: neither a checkpoint's folder, nor a run's, nor the name of a run in {storage}"
    if given in (recipe.stem for recipe in (CONF / "recipe").glob("*.yaml")):  # recipes that begin with another's run
        message += f"; train it first: {command('train', f'recipe={given}', f'name={given}')}"
    raise PipelineError(message)


def _arguments() -> tuple[str, ...]:
    """Of the job that this process is; none where it is called from a program."""
    return tuple(sys.argv[1:]) if os.path.basename(sys.argv[0]) == "train.py" else ()
