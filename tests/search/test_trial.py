"""What a trial tells Ray Tune."""

from __future__ import annotations

from typing import Any

import pytest
from ray import tune

from pipeline.search.trial import ACCURACY, FINISHED, STEP, reporting

STEPS = (1, 2, 3, 4)


@pytest.mark.timeout(300)
def test_reports_arrive_in_order_however_soon_the_trial_ends(ray_session, tmp_path):
    """Ray's own callback hangs here: its last report is fetched when the end has been told already."""
    seen: dict[str, list[Any]] = {}

    class Seen(tune.Callback):
        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            seen.setdefault(trial.trial_id, []).append("end" if FINISHED in result else result[STEP])

    def trial(config: dict) -> None:
        with reporting() as forward:
            for step in STEPS:
                forward.after_report(None, [{STEP: step, ACCURACY: step / 10}], None)
            forward.after_report(None, [{STEP: 5, ACCURACY: -1.0}], None)  # a checkpoint that was not validated
        tune.report({FINISHED: True})

    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.5}),
        tune_config=tune.TuneConfig(num_samples=3),
        run_config=tune.RunConfig(storage_path=str(tmp_path), callbacks=[Seen()], verbose=0),
    ).fit()
    assert list(seen.values()) == [[*STEPS, "end"]] * 3
