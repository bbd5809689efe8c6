"""A model is not measured by mistake on classes that it was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import store
from pipeline.config import compose
from pipeline.data.dataset import read_manifest
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, check
from pipeline.evaluation.model import Model
from pipeline.evaluation.protocols import EvaluateConfig
from pipeline.evaluation.seen import refuse_seen, seen_classes, trained_classes, with_turns
from pipeline.training.checkpoint import Checkpoint, save_checkpoint
from pipeline.training.prepare import prepare
from pipeline.training.runs import Run, write_run
from pipeline.workflow import _subject


def split_anew(manifest: Manifest) -> Manifest:
    """The same classes with the last of the training split in the test split."""
    content = json.loads(manifest.to_json())
    content.pop("fingerprint")
    content["splits"]["test"].append(content["splits"]["train"].pop())
    return Manifest(**{**content, "shape": manifest.shape, "shards": manifest.shards})


def test_classes_that_moved_between_the_splits_are_refused_by_name(glyphs: str) -> None:
    manifest = read_manifest(glyphs)
    moved = split_anew(manifest)
    trained = {"name": "glyphs", "fingerprint": manifest.fingerprint, "trained": trained_classes(manifest, "train")}
    with pytest.raises(PipelineError, match=r"one was trained on 1 classes of split 'test'.*'glyph0059'.*seen=true"):
        refuse_seen("one", trained, moved, "test")
    refuse_seen("one", trained, moved, "val")
    refuse_seen("one", trained, manifest, "train")  # of its own dataset: whoever asks for it means it


def test_what_the_first_weights_were_trained_on_counts_too(glyphs: str) -> None:
    manifest = read_manifest(glyphs)
    both = trained_classes(manifest, "val", trained_classes(manifest, "train"))
    assert both == trained_classes(manifest, "train+val") and len(both) == 100


def test_they_are_refused_in_the_splits_of_the_same_dataset_but_the_run_s_own(glyphs: str) -> None:
    manifest = read_manifest(glyphs)
    digests = trained_classes(manifest, "train", [trained_classes(manifest, "val")[0]])
    for split, seen in {"train": 1, "train+val": 0}.items():
        trained = {"fingerprint": manifest.fingerprint, "trained": digests, "split": split}
        assert len(seen_classes(trained, manifest, "val")) == seen
        assert not seen_classes(trained, manifest, "train") and not seen_classes(trained, manifest, "test")
    trained.pop("split")
    assert not seen_classes(trained, manifest, "val"), "a run of earlier code"


def finished(run: Run) -> str:
    """The run with a checkpoint."""
    write_run(run)
    save_checkpoint(f"{run.uri}/step_00000000", Checkpoint(0, run.spec, run.config, run.dataset, {}, [], {}))
    return run.uri


def test_a_run_that_begins_with_weights_that_saw_its_test_classes_is_refused(
    glyphs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They come with weights of another dataset, whose classes are split otherwise."""
    other = tmp_path / "other"
    store.write_bytes(f"{other}/manifest.json", split_anew(read_manifest(glyphs)).to_json().encode())

    def prepared(dataset: str, name: str, *more: str) -> Run:
        root, data = dataset.rsplit("/", 1)
        place = ["tracking=none", f"data.root={root}", f"data.name={data}", f"storage={tmp_path}/runs", f"name={name}"]
        return prepare(compose("train", [*place, *more]))[2]

    first = finished(prepared(glyphs, "one"))
    with pytest.raises(PipelineError, match="begins with was trained on 1 classes of split 'test'.*evaluation=null$"):
        prepared(str(other), "two", f"initial={first}")
    finished(prepared(str(other), "two", f"initial={first}", "evaluation=null"))
    asked = ["run=two", f"storage={tmp_path}/runs"]
    with pytest.raises(PipelineError, match="two was trained on 1 classes of split 'test'.*'glyph0059'.*seen=true"):
        _subject("two", EvaluateConfig(**compose("evaluate", asked)))
    _subject("two", EvaluateConfig(**compose("evaluate", [*asked, "seen=true"])))
    prepared(glyphs, "again", f"initial={first}")  # the same dataset, split alike
    assert "note: what this run begins with" not in capsys.readouterr().out
    both = finished(prepared(glyphs, "both", "train.split=train+val"))
    prepared(glyphs, "fast", "train.split=train+val", f"initial={both}")
    assert "note: what this run begins with" not in capsys.readouterr().out
    prepared(glyphs, "less", f"initial={both}")
    assert "was trained on 40 classes of split 'val' of dataset 'glyphs', and" in capsys.readouterr().out


def test_a_class_that_was_seen_was_seen_turned(glyphs: str) -> None:
    manifest = replace(read_manifest(glyphs), rotations=[0, 90])
    trained = trained_classes(manifest, "train")
    found = with_turns([*trained, "of elsewhere"], manifest)
    features = replace(manifest, class_names=[f"{name} 90°" for name in manifest.class_names])
    assert len(found) == 121 and set(trained_classes(features, "train")) < set(found)


def test_a_model_of_earlier_code_cannot_tell_and_that_is_said(glyphs: str, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(glyphs)
    refuse_seen("old", {"name": "glyphs", "fingerprint": manifest.fingerprint}, split_anew(manifest), "test")
    assert "old does not tell its training classes" in capsys.readouterr().out
    refuse_seen("old", {"name": "others", "fingerprint": "f"}, manifest, "test")
    assert capsys.readouterr().out == ""


def test_a_run_notes_its_classes_and_the_job_asks_for_them(glyphs: str, tmp_path: Path) -> None:
    root, name = glyphs.rsplit("/", 1)
    given = ["evaluation=null", "tracking=none", f"data.root={root}", f"data.name={name}", f"storage={tmp_path}/runs"]
    run = prepare(compose("train", [*given, "name=one"]))[2]
    assert "source" not in run.config["data"], "what the run did not use is not recorded"
    write_run(run)
    other = tmp_path / "other"
    store.write_bytes(f"{other}/manifest.json", split_anew(read_manifest(glyphs)).to_json().encode())
    save_checkpoint(f"{run.uri}/step_00000000", Checkpoint(0, run.spec, run.config, run.dataset, {}, [], {}))
    asked = ["run=one", f"storage={tmp_path}/runs", f"dataset={other}"]
    with pytest.raises(PipelineError, match="one was trained on 1 classes of split 'test'"):
        _subject("one", EvaluateConfig(**compose("evaluate", asked)))
    model, _ = _subject("one", EvaluateConfig(**compose("evaluate", [*asked, "seen=true"])))
    assert model.label == "one" and model.fingerprint == read_manifest(glyphs).fingerprint


def test_images_of_another_shape_are_refused(glyphs: str) -> None:
    other = {"method": {"name": "prototypical"}, "backbone": {"name": "conv4"}, "input": {"shape": [3, 84, 84]}}
    with pytest.raises(PipelineError, match=r"'glyphs' has images of 1 x 28 x 28 .*, model takes 3 x 84 x 84"):
        check(Model(other, None), EpisodicProtocol(glyphs, "test", 5, 1, 5))
