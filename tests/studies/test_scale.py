"""Scale on paper: the arithmetic by hand, and a plan that costs the same however large the dataset."""

from __future__ import annotations

import numpy as np
import pytest

from docs.studies.scale import scale
from docs.studies.scale_model import GIB, Machines, Step, all_reduce, demands, first_to_saturate, start
from docs.studies.scale_plan import simulate, table_of
from pipeline.config import compose
from pipeline.data.episodes import EpisodeSpec
from pipeline.errors import PipelineError

MACHINES = Machines(16, 8, 1e9, 1e-5, 1e9, 2e9, 1000 * GIB, 100 * GIB, 8)


def test_an_all_reduce_by_hand():
    assert all_reduce(10**9, 1, 1e9, 1.0) == 0
    assert all_reduce(10**9, 2, 1e9, 0.0) == pytest.approx(1.0)
    assert all_reduce(10**9, 4, 1e9, 0.5) == pytest.approx(1.5 + 2 * 2 * 0.5)
    assert all_reduce(10**9, 512, 1e9, 0.0) == pytest.approx(2 * 511 / 512)


def test_demands_by_hand():
    step = Step(compute=0.1, gradient=10**8, data=10**7, planning=0.008)
    small, large = demands(step, 50 * GIB, MACHINES), demands(step, 200 * GIB, MACHINES)
    assert small["disk"] == 0, "what the memory holds is not read again"
    assert large["disk"] == pytest.approx(8 * 10**7 * 0.5 / 2e9 / 0.1)
    assert small["cpu"] == pytest.approx(0.008 / 8 / 0.1)
    assert small["network"] == pytest.approx((2 * 15 / 16 * 0.1 + 8e-5) / 0.1)
    assert small["capacity"] == pytest.approx(0.05)
    assert first_to_saturate(small) == "all-reduce"
    assert first_to_saturate({**small, "network": 0.5}) == "the GPUs; all-reduce, once they are 2 times as fast"
    assert first_to_saturate({**small, "disk": 3.0}) == "reading"
    assert first_to_saturate(demands(step, 2000 * GIB, MACHINES)) == "disk space"
    assert start(100e9, MACHINES) == pytest.approx(100.0) and start(2000 * GIB, MACHINES) == 0


def test_the_plan_of_a_billion_images_takes_the_memory_of_a_thousand():
    spec = EpisodeSpec(5, 1, 15)
    small = simulate(100, 10_000, spec, 128, 1000, [0.5])
    large = simulate(10**6, 10**9, spec, 128, 3000, [0.5])
    assert large.plan_bytes < 1.1 * small.plan_bytes
    assert large.table_bytes == 24 * 10**6 and large.shards == -(-(10**9) // 3000)
    assert 4.9 < large.shards_an_episode < 6, "an image's class lies in one shard, or two"
    assert 0.4 < large.hits[0.5] < 0.6


def test_the_table_is_that_of_equal_classes():
    table = table_of(4, 40)
    assert table.starts.tolist() == [0, 10, 20, 30] and table.counts.tolist() == [10] * 4
    assert np.array_equal(table.ids, np.arange(4))


def test_a_page_of_everything(tmp_path, capsys):
    small = ["shape=[1,28,28]", "backbones=[conv4_strided]", "tasks=1", "query=2", "repetitions=1", "device=cpu",
             "gpus=[1,8]", "images=[10000]", "simulation.classes=[100,10000]", "simulation.images=[10000,1000000]",
             "simulation.episodes=64", f"output=file://{tmp_path}/scale.md"]  # fmt: skip
    found = scale(compose("scale", small))
    page = (tmp_path / "scale.md").read_text()
    assert page in capsys.readouterr().out
    assert "| conv4_strided | 8 | 10,000 |" in page and "| 10,000 | 1,000,000 |" in page
    parameters = found["steps"]["conv4_strided"]["gradient"] / 4
    assert parameters == int(parameters) and found["steps"]["conv4_strided"]["data"] == 5 * 3 * 784


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulation.classes=[10]"], "must be as many"),
        (["simulation.classes=[2]", "simulation.images=[100]"], "cannot serve"),
        (["method=imprinted", "backbones=[conv4_strided]", "simulation.episodes=1"], "not trained on episodes"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, says):
    with pytest.raises(PipelineError, match=says):
        scale(compose("scale", ["device=cpu", *arguments]))
