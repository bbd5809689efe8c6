"""Work that is spread over the cluster."""

from __future__ import annotations

import time

import ray

from pipeline.evaluation import spread


def test_what_stays_the_same_is_told_more_and_more_seldom(ray_session, monkeypatch):
    monkeypatch.setattr(spread, "PROGRESS_S", 0.1)

    @ray.remote(num_cpus=0)
    def sleep(seconds: float) -> None:
        time.sleep(seconds)

    told = [len(done) for done in spread.awaited([sleep.remote(0), sleep.remote(4)])]
    assert told and told == sorted(told) and told.count(1) <= 6  # after 0.1, 0.2, 0.4, ... seconds
