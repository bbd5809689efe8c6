"""A new run has a folder of its own, however many begin at once; who is refused leaves nothing behind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import store, workflow
from pipeline.data.dataset import read_manifest
from pipeline.data.images import MAX_PIXELS
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.errors import PipelineError
from pipeline.training import launch as launch_module
from pipeline.training import prepare as prepare_module
from pipeline.training.paths import absolute
from pipeline.training.prepare import prepare
from pipeline.training.runs import claim_run, find_run, read_run, write_run


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list:
    """The runs that ``workflow.train`` would have launched, in a second that does not pass."""
    runs: list = []

    def launch(config, run, log):
        runs.append(run)
        raise PipelineError("far enough")

    monkeypatch.setattr(workflow, "launch", launch)
    monkeypatch.setattr(prepare_module.time, "strftime", lambda form: "20250101-000000")
    for name in ("start_ray", "check_resources"):
        monkeypatch.setattr(launch_module, name, lambda *args, **options: None)
    return runs


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(small_run, begun: list) -> None:
    for seed in (1, 2, 3):
        with pytest.raises(PipelineError, match="far enough"):
            workflow.train(small_run("prototypical", f"seed={seed}"))
    first = begun[0].name
    assert [run.name for run in begun] == [first, f"{first}-2", f"{first}-3"]
    stored = [read_run(run.uri) for run in begun]
    assert [run.config["seed"] for run in stored] == [1, 2, 3]
    assert [(run.name, run.config["name"]) for run in stored] == [(Path(run.uri).name,) * 2 for run in begun]


def test_a_model_knows_how_large_the_images_of_its_dataset_may_be(small_run, glyphs: str, tmp_path: Path) -> None:
    manifest = read_manifest(glyphs)
    large = replace(manifest, name="large", source={**manifest.source, "max_pixels": 2 * MAX_PIXELS})
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / MANIFEST_NAME).write_text(large.to_json())
    run = prepare(small_run("prototypical", f"data.root={tmp_path}", "data.name=large"))[2]
    assert run.dataset["max_pixels"] == 2 * MAX_PIXELS
    assert "max_pixels" not in prepare(small_run("prototypical"))[2].dataset


def test_a_name_that_is_given_is_had_by_one(small_run, begun: list) -> None:
    raw = small_run("prototypical", "name=mine")
    config, _, run = prepare(raw)  # as does the other job, a moment earlier
    with pytest.raises(PipelineError, match="far enough"):
        workflow.train(raw)
    with pytest.raises(PipelineError, match="name=mine: another job just began a run of this name in .*; give"):
        launch_module.begin(config, run, resumed=False)
    with pytest.raises(PipelineError, match="name=mine: a run in .* has this name; go on with it: resume="):
        workflow.train(raw)
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("clustering", ["train.grouping=null"], r"set train.grouping=\[2,2\]"),
        ("clustering", ["train.grouping=[1,4]"], r"set train.grouping=\[2,2\]"),
        ("reptile", ["method.consensus=0.1", "method.consensus_order=sequential", "cluster.workers=2"], "one worker"),
    ],
)
def test_batches_that_a_method_cannot_be_trained_by_are_refused(small_run, method, overrides, message) -> None:
    with pytest.raises(PipelineError, match=message):
        prepare(small_run(method, *overrides))


def test_a_place_may_be_written_as_a_file_s_address(small_run) -> None:
    _, _, run = prepare(small_run("prototypical", "name=mine"))
    write_run(run)
    assert find_run(f"file://{run.uri}", "none").uri == run.uri
    assert absolute("storage", "file:///tmp/runs") == "/tmp/runs"
    assert absolute("storage", "s3://bucket/runs") == "s3://bucket/runs"


def test_who_is_refused_leaves_nothing_behind(small_run, begun: list, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = small_run("prototypical", "name=mine")

    def refuses(*args, **options):
        raise PipelineError("too few CPUs")

    with monkeypatch.context() as patch:
        patch.setattr(launch_module, "check_resources", refuses)
        with pytest.raises(PipelineError, match="too few"):
            workflow.train(raw)
    assert store.list_names(raw["storage"]) == []
    with pytest.raises(PipelineError, match="far enough"):
        workflow.train(raw)


@pytest.mark.parametrize("kind", ["folder", "folder without links", "bucket"])
def test_of_many_who_claim_at_once_each_has_another_folder(
    small_run, kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"{request.getfixturevalue('moto_bucket')}/claims" if kind == "bucket" else str(tmp_path / "claims")
    if kind == "folder without links":

        def refuses(*paths):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuses)
    run = prepare(small_run("prototypical", "name=one"))[2]
    runs = [replace(run, uri=f"{where}/one", config={**run.config, "seed": seed}) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        claimed = list(threads.map(lambda run: claim_run(run, named=False), runs))
    assert sorted(run.name for run in claimed) == ["one", *(f"one-{number}" for number in range(2, 9))]
    assert [read_run(run.uri).config["seed"] for run in claimed] == list(range(8))
    assert all(store.list_names(run.uri) == ["run.json"] for run in claimed)


def test_a_claim_whose_answer_was_lost_is_known_again(moto_bucket) -> None:
    path = f"{moto_bucket.removeprefix('s3://')}/lost/run.json"
    assert store._put_new(path, b"{}", "mine") and store._put_new(path, b"{}", "mine")
    assert not store._put_new(path, b"{}", "yours")
    with pytest.raises(PipelineError, match="the object store refuses"):
        store.create_bytes("s3://no-such-bucket/run.json", b"{}")
