"""Optimizers and learning-rate schedules. The rate is a function of the step: a schedule has no state."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.options import check_options

Schedule = Callable[[int], float]  # step -> factor of the learning rate

BACKBONE_LR = "backbone_lr"
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


def build_optimizer(method: Method, config: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of a config ``{"name": ..., "lr": ..., options of the torch class}`` for a method's groups.

    With ``backbone_lr`` the backbone's parameters have a learning rate of their own, in groups after the others'.
    """
    return _build(_kind(config), method, config)


def check_optimizer(method: Method, config: dict[str, Any]) -> None:
    """Refuse what :func:`build_optimizer` would, without taking parameters in, at which PyTorch imports its compiler:
    that takes a second."""
    kind = _kind(config)
    _build(type(kind.__name__, (kind,), {"add_param_group": lambda self, group: None}), method, config)


def _kind(config: dict[str, Any]) -> type[torch.optim.Optimizer]:
    name = config["name"]
    if name not in OPTIMIZERS:
        raise PipelineError(f"optimizer.name={name!r}: choose one of {', '.join(OPTIMIZERS)}")
    known = set(inspect.signature(OPTIMIZERS[name]).parameters) - {"params"}
    for key in config:
        if key not in known | {"name", BACKBONE_LR}:
            raise PipelineError(f"unknown key 'optimizer.{key}': {name} takes {', '.join(sorted(known))}")
    if "lr" not in config:
        raise PipelineError("key 'optimizer.lr' is missing")
    check_options("optimizer", OPTIMIZERS[name], {key: config[key] for key in config.keys() & known})
    return OPTIMIZERS[name]


def _build(kind: type[torch.optim.Optimizer], method: Method, config: dict[str, Any]) -> torch.optim.Optimizer:
    options = {key: value for key, value in config.items() if key not in ("name", BACKBONE_LR)}
    rate, groups = config.get(BACKBONE_LR), []
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf):
        raise PipelineError(f"optimizer.{BACKBONE_LR}={rate!r}: give a learning rate, or null for that of the rest")
    own = set() if rate is None else {id(parameter) for parameter in method.backbone.parameters()}
    for group in method.parameter_groups():
        group = dict(group)
        scale, parameters = group.pop("lr_scale", 1.0), list(group.pop("params"))
        for lr, ours in ((options["lr"], False), (rate, True)):
            mine = [parameter for parameter in parameters if (id(parameter) in own) == ours]
            if mine or (not ours and not parameters):
                groups.append({**group, "params": mine, "lr": lr * scale, "base_lr": lr * scale})
    try:
        return kind(groups, **options)
    except (ValueError, TypeError) as error:
        raise PipelineError(f"optimizer={config['name']}: {error}") from error


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def build_schedule(config: dict[str, Any], steps: int) -> Schedule:
    """The schedule of a config ``{"name": ..., options}``: one of the functions below."""
    options = dict(config)
    name = options.pop("name")
    if name not in SCHEDULES:
        raise PipelineError(f"schedule.name={name!r}: choose one of {', '.join(SCHEDULES)}")
    check_options("schedule", SCHEDULES[name], options)
    try:
        schedule = SCHEDULES[name](steps=steps, **options)
        if not all(math.isfinite(schedule(step)) for step in (0, steps)):
            raise PipelineError(f"schedule={name}: its factor is not finite with {options}")
        return schedule
    except (TypeError, ArithmeticError) as error:
        known = ", ".join(key for key in inspect.signature(SCHEDULES[name]).parameters if key != "steps")
        raise PipelineError(f"schedule={name}: {error}; it takes {known or 'no options'}") from error


def constant(steps: int) -> Schedule:
    return lambda step: 1.0


def step_decay(steps: int, every: int, factor: float) -> Schedule:
    """Multiplied by ``factor`` after every ``every`` steps (prototypical networks: halved every 2,000 episodes)."""
    if every < 1:
        raise PipelineError(f"schedule.every={every}: there is at least one step between two changes")
    return lambda step: factor ** (step // every)


def piecewise(steps: int, milestones: list[int], factors: list[float]) -> Schedule:
    """``factors[i]`` from step ``milestones[i]`` on, 1 before the first."""
    if len(milestones) != len(factors) or sorted(milestones) != list(milestones):
        raise PipelineError("schedule.milestones must ascend and be as many as schedule.factors")

    def factor(step: int) -> float:
        passed = sum(step >= milestone for milestone in milestones)
        return float(factors[passed - 1]) if passed else 1.0

    return factor


def cosine(steps: int, final: float = 0.0, warmup: int = 0) -> Schedule:
    """Half a cosine from 1 to ``final`` after a linear warm-up."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def linear(steps: int, final: float = 0.0) -> Schedule:
    """A line from 1 to ``final`` over the run."""
    return lambda step: 1.0 + (final - 1.0) * min(1.0, step / max(1, steps))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "step": step_decay,
    "piecewise": piecewise,
    "cosine": cosine,
    "linear": linear,
}
