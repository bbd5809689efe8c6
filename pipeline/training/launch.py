"""A prepared run under Ray Train, to its end."""

from collections.abc import Callable
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import store
from pipeline.errors import PipelineError, Stopped
from pipeline.training import runs
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.config import TrainConfig
from pipeline.training.diagnosis import cause_of
from pipeline.training.preemption import stopping_on_sigterm
from pipeline.training.runs import Run
from pipeline.training.telemetry import Display, Entry, Restarts, Telemetry, start_monitor
from pipeline.training.worker import train_worker
from pipeline.weights import own_sources


def begin(config: TrainConfig, run: Run, resumed: bool) -> Run:
    """Claim the folder of a new run, as soon as Ray is there and can serve it: who is refused before leaves none.

    Of jobs that begin at once, no two train in one folder. One that is ``resumed`` has its folder.
    """
    start_ray(config.cluster)
    check_resources(config.cluster, decoding=config.materialize == "cluster")
    return run if resumed else runs.claim_run(run, named=config.name is not None)


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
