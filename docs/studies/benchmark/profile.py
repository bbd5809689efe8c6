"""A trace of training steps that opens in Perfetto: Python, operators and, where there is one, the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from docs.studies.benchmark import made
from pipeline import store
from pipeline.batch import Batch
from pipeline.config import compose
from pipeline.data.dataset import Dataset
from pipeline.data.stream import Stream
from pipeline.errors import PipelineError
from pipeline.training.cluster import start_ray
from pipeline.training.config import Cluster
from pipeline.training.learner import Learner, make_deterministic
from pipeline.training.loop import Hooks, make_planner, train
from pipeline.training.prepare import prepare

WARM_UP, STEPS = 5, 5


def profile(target: str, overrides: list[str], folder: Path, cluster: Cluster) -> dict[str, Any]:
    """Run the worker's loop in this process, over Ray Data, and write the trace of its last steps to ``target``.

    ``overrides`` are those of ``jobs.train``; without data among them, random images of Omniglot's size are made.
    """
    if store.is_remote(target):
        raise PipelineError(f"profile={target}: a trace is written to a file of this machine; copy it there")
    if not any(override.startswith(("data=", "data.")) for override in overrides):
        uri = Path(made.dataset(folder, made.SMALL))
        overrides = [f"data.root={uri.parent}", f"data.name={uri.name}", *overrides]
    fixed = [f"steps={WARM_UP + STEPS}", "log_every=1000", "name=profile", f"storage={folder}/runs", "evaluation=null"]
    config, _, run = prepare(compose("train", [*overrides, "validation.episodes=1", "validation.every=1000", *fixed]))
    start_ray(cluster)
    device = torch.device("cuda" if cluster.gpus_per_worker else "cpu")
    make_deterministic(config.cluster.threads_per_worker, config.deterministic)
    data = Dataset(config.dataset_uri, verify=False)
    learner = Learner(config, run.spec, device=device)
    planner = make_planner(config, data.manifest, learner.method)
    stream = Stream(data, planner, 0, config.steps, device=device, materialize=config.materialize)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    tracer = torch.profiler.profile(activities=activities, record_shapes=True, with_stack=True)

    def after(step: int) -> None:
        if step == WARM_UP:
            tracer.start()
        elif step == WARM_UP + STEPS:
            tracer.stop()

    with _named(learner):
        train(learner, _waiting(stream), data, planner.per_step, hooks=Hooks(step=after))
    try:
        tracer.export_chrome_trace(target.removeprefix("file://"))
    except OSError as error:
        raise PipelineError(f"profile={target}: {error.strerror}") from error
    by = f"self_{device.type}_time_total"
    print(tracer.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=40))
    print(f"{STEPS} steps of {run.name}: {target}; open it in ui.perfetto.dev")
    return {"profile": target, "steps": STEPS}


def _waiting(stream: Stream) -> Iterator[tuple[int, Batch]]:
    """The stream, with the waits for it named in the trace."""
    batches = iter(stream)
    while True:
        with record_function("wait for data"):
            item = next(batches, None)
        if item is None:
            return
        yield item


@contextmanager
def _named(learner: Learner) -> Iterator[None]:
    """Within: the parts of the learner's step are named in the trace."""
    step, stack = learner.train_step, list[Any]()

    def enter(name: str) -> None:
        stack.append(record_function(name))
        stack[-1].__enter__()

    def leave(*_: object) -> None:
        stack.pop().__exit__(None, None, None)

    def named_step(batch: Batch) -> Any:
        with record_function("training step"):
            return step(batch)

    learner.train_step = named_step  # type: ignore[method-assign]
    hooks = [
        learner.module.register_forward_pre_hook(lambda *_: enter("forward")),
        learner.module.register_forward_hook(leave),
        learner.optimizer.register_step_pre_hook(lambda *_: enter("optimizer")),
        learner.optimizer.register_step_post_hook(leave),
    ]
    try:
        yield
    finally:
        del learner.train_step
        for hook in hooks:
            hook.remove()
