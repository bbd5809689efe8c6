"""What a run's dataset and method can serve, checked before any worker starts."""

import copy
from typing import Any

from pipeline.data.dataset import class_table
from pipeline.data.episodes import EpisodeSpec, bounds, check_spec
from pipeline.data.manifest import FEATURES, Manifest
from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess
from pipeline.nets import Backbone
from pipeline.nets.wrapped import Wrapped
from pipeline.training.config import TrainConfig
from pipeline.training.loop import make_planner
from pipeline.training.models import load_teacher
from pipeline.training.optim import build_schedule, check_optimizer
from pipeline.training.trial import try_step
from pipeline.weights import described, recipe


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
    check_batches(config, method)
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


def check_batches(config: TrainConfig, method: Method) -> None:
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
