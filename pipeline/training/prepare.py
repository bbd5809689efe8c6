"""From a composed configuration to a run that can be launched: checked, and with all that it is to remember."""

import os
import re
import sys
import time
from typing import Any

from pipeline import store
from pipeline.commands import command, data_root
from pipeline.config import Config, validate
from pipeline.data.dataset import read_manifest
from pipeline.data.manifest import FEATURES, MANIFEST_NAME, Manifest
from pipeline.environment import bfloat16_instructions
from pipeline.errors import PipelineError
from pipeline.evaluation.seen import SPLIT, TRAINED, refuse_seen, seen_classes, trained_classes
from pipeline.methods.base import Method
from pipeline.nets.wrapped import Wrapped
from pipeline.training import runs
from pipeline.training.check import check, model_spec
from pipeline.training.config import TrainConfig
from pipeline.training.paths import with_absolute_paths
from pipeline.training.resume import resumed
from pipeline.training.runs import Run
from pipeline.weights import read, settle

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def prepare(raw: Config) -> tuple[TrainConfig, Config, Run]:
    """Check everything that can be checked without workers, and name the run."""
    if raw.get("resume"):
        return resumed(raw)
    raw = _with_precision(with_absolute_paths(raw))
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
    if "max_pixels" in manifest.source:  # the model takes as large images as it was trained on
        dataset["max_pixels"] = manifest.source["max_pixels"]
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


def _arguments() -> tuple[str, ...]:
    """Of the job that this process is; none where it is called from a program."""
    return tuple(sys.argv[1:]) if os.path.basename(sys.argv[0]) == "train.py" else ()
