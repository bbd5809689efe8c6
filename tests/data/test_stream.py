"""The stream: the same episodes and bytes whatever the number of workers and wherever pixels are gathered."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batch import Episodes, Images
from pipeline.data.batches import local_batches
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec
from pipeline.data.plan_source import PlanSource, decode, encode
from pipeline.data.planners import EpisodePlanner, ImagePlanner
from pipeline.data.stream import MATERIALIZE, Stream


@pytest.fixture(scope="module")
def dataset(glyphs) -> Dataset:
    return Dataset(glyphs)


@pytest.fixture(scope="module")
def planner(dataset) -> EpisodePlanner:
    return EpisodePlanner(class_table(dataset.manifest, "train"), EpisodeSpec(5, 1, 3, tasks=6), seed=4)


def equal(a, b) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("materialize", MATERIALIZE)
def test_stream_equals_local_gather(ray_session, dataset, planner, materialize):
    stream = Stream(dataset, planner, 5, 305, materialize=materialize)  # more than one block, from the middle of a run
    count = 0
    for (step, batch), (expected_step, expected) in zip(stream, local_batches(dataset, planner, 5, 300), strict=True):
        assert step == expected_step and equal(batch, expected)
        count += 1
    assert count == 300 and stream.waited > 0


def test_on_a_full_cluster_the_worker_gathers_what_the_cluster_was_to(ray_session, dataset, planner, capfd):
    """Two runs that leave no CPU between them would wait for each other without end."""
    taken = ray_session.util.placement_group([{"CPU": 4}])
    ray_session.get(taken.ready(), timeout=60)
    stream = Stream(dataset, planner, 5, 10, materialize="cluster")
    try:
        found = [(step, batch.support.clone()) for step, batch in stream]
    finally:
        ray_session.util.remove_placement_group(taken)
    expected = list(local_batches(dataset, planner, 5, 5))
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert all(torch.equal(a, b.support) for (_, a), (_, b) in zip(found, expected, strict=True))
    assert capfd.readouterr().out.count("the workers gather the pixels themselves") == 1


@pytest.mark.parametrize("materialize", ["worker", "device"])
def test_a_stream_planned_in_its_own_process_equals_local_gather(dataset, planner, materialize):
    """Without Ray."""
    stream = Stream(dataset, planner, 5, 25, 1, 2, materialize=materialize, planned_here=True)
    pairs = zip(stream, local_batches(dataset, planner, 5, 20, 1, 2), strict=True)
    assert all(a == b and equal(x, y) for (a, x), (b, y) in pairs)


def test_a_long_run_is_streamed_in_parts(ray_session, dataset, planner, monkeypatch):
    """Ray Data is given a bounded number of blocks at a time, whatever the number of steps."""
    assert PlanSource(planner, 0, 10**8, 0, 1, None).blocks < 1000
    monkeypatch.setattr("pipeline.data.plan_source._BLOCKS", 1)
    assert (part := PlanSource(planner, 5, 600, 0, 1, None)).blocks == 1 and 5 < part.last < 400
    pairs = zip(Stream(dataset, planner, 5, 605), local_batches(dataset, planner, 5, 600), strict=True)
    assert all(a == b and equal(x, y) for (a, x), (b, y) in pairs)


def test_blocks_of_plans_grow(ray_session, planner):
    """The first is small, so that training begins early, and later ones large: each is waited for a little."""
    source = PlanSource(planner, 5, 5005, 0, 1, None)
    sizes = [task.metadata.num_rows for task in source.get_read_tasks(1)]
    assert sizes == [64, 128, 256, 512, 1024, 1024, 1024, 968] and source.blocks == len(sizes)


def test_images_stream(ray_session, dataset):
    planner = ImagePlanner(class_table(dataset.manifest, "train"), 32, seed=1)
    pairs = zip(Stream(dataset, planner, 0, 300), local_batches(dataset, planner, 0, 300), strict=True)
    assert all(a == b and equal(x, y) for (a, x), (b, y) in pairs)


def test_groups_hold_images_of_classes(dataset):
    """Groups of 3 classes with 4 images each: class by class, no image twice, and the same on 1 worker and on 2."""
    table = class_table(dataset.manifest, "train")
    planner = ImagePlanner(table, 48, seed=1, grouping=(3, 4))
    for step in (0, 7):
        plan = planner.plan(step)
        halves = [planner.plan(step, rank, 2) for rank in (0, 1)]
        assert np.array_equal(plan.rows, np.concatenate([half.rows for half in halves]))
        arrays = (array.reshape(4, 3, 4) for array in (plan.rows, plan.labels, plan.classes))
        for rows, labels, ids in zip(*arrays, strict=True):
            assert (labels == labels[:, :1]).all() and len(set(labels[:, 0])) == 3 and len(set(rows.ravel())) == 12
            assert (table.ids[labels] == ids).all()
            assert (rows >= table.starts[labels]).all() and (rows < (table.starts + table.counts)[labels]).all()
    assert not np.array_equal(planner.plan(0).rows, planner.plan(1).rows)


def test_episodes_and_images_stream_together(ray_session, dataset, planner):
    images = ImagePlanner(planner.table, 12, seed=1, grouping=(2, 3))
    both = dataclasses.replace(planner, auxiliary=images)
    pairs = zip(
        Stream(dataset, both, 0, 6, 1, 2),
        local_batches(dataset, both, 0, 6, 1, 2),
        local_batches(dataset, planner, 0, 6, 1, 2),
        local_batches(dataset, images, 0, 6, 1, 2),
        strict=True,
    )
    for (step, batch), (_, local), (_, episodes), (_, beside) in pairs:
        for found in (batch, local):
            assert isinstance(found, Episodes) and isinstance(found.auxiliary, Images)
            assert equal(found.auxiliary, beside) and equal(dataclasses.replace(found, auxiliary=None), episodes), step


def test_workers_share_a_step(ray_session, dataset, planner):
    """1, 2 and 3 workers get the same set of episodes in every step, each its own part in order."""

    def steps(workers: int) -> list[list[tuple[bytes, bytes]]]:
        streams = [iter(Stream(dataset, planner, 2, 8, rank, workers)) for rank in range(workers)]
        out = []
        for _ in range(6):
            step: list[tuple[bytes, bytes]] = []
            for stream in streams:
                _, batch = next(stream)
                assert isinstance(batch, Episodes)
                step += [
                    (s.numpy().tobytes(), q.numpy().tobytes()) for s, q in zip(batch.support, batch.query, strict=True)
                ]
            out.append(step)
        for stream in streams:
            stream.close()
        return out

    assert steps(1) == steps(2) == steps(3)


def test_unequal_shares_are_refused(dataset, planner):
    with pytest.raises(ValueError, match="shared equally"):
        Stream(dataset, planner, 0, 1, 0, 4)


def test_plans_survive_their_journey(planner):
    plan = planner.plan(3)
    back = decode(*encode(plan))
    for name in ("numbers", "rows", "labels", "classes"):
        np.testing.assert_array_equal(getattr(back, name), getattr(plan, name))
    assert back.support == plan.support


def test_an_error_in_the_stream_reaches_the_loop(ray_session, dataset, planner, monkeypatch):
    monkeypatch.setattr(dataset, "gather", lambda *_, **__: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        next(iter(Stream(dataset, planner, 0, 5)))


def test_rotated_classes(tmp_path):
    """Class c * 4 + r is class c turned counter-clockwise r times, against numpy."""
    from pipeline.data.write import write_dataset

    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 4, 1, 8, 8), dtype=np.uint8)
    names = [f"c{n}" for n in range(6)]
    write_dataset(
        str(tmp_path / "d"), "d", zip(names, images, strict=True), {"train": names}, rotations=(0, 90, 180, 270)
    )
    dataset = Dataset(str(tmp_path / "d"))
    classes = class_table(dataset.manifest, "train")
    assert len(classes) == 24
    planner = EpisodePlanner(classes, EpisodeSpec(10, 1, 1, tasks=20), seed=0)
    plan = planner.plan(0)
    _, batch = next(local_batches(dataset, planner, 0, 1))
    for task in range(20):
        for place in range(10):
            kind, turns = divmod(int(plan.classes[task, place]), 4)
            row = int(plan.rows[task, place])
            expected = np.rot90(images[kind, row - 4 * kind, 0], turns)
            np.testing.assert_array_equal(batch.support[task, place, 0].numpy(), expected)


def test_what_plans_starts_without_torch():
    """Tasks of Ray Data import the source of plans: torch would be most of what they do before the first step."""
    code = "import sys, pipeline.data.plan_source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
