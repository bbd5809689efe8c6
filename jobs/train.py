"""python -m jobs.train ...: see --help."""

from typing import Any

from jobs._main import run
from pipeline.config import Config


def train(raw: Config) -> dict[str, Any]:
    """The job, whose imports take as long as Ray's start and are done beside it."""
    from pipeline.training.early import started_early

    with started_early(raw):
        from pipeline.training.tracked import train_only

        trained = train_only(raw)
        from pipeline import workflow  # after the training: it imports MLflow

        return workflow.finish(*trained)


if __name__ == "__main__":
    run("train", train)
