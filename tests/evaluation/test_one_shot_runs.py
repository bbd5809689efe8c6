from __future__ import annotations

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import workflow
from pipeline.config import compose
from pipeline.data.sources.files import decode
from pipeline.data.sources.omniglot import Omniglot
from pipeline.errors import PipelineError
from pipeline.evaluation.model import Model
from pipeline.evaluation.one_shot_runs import evaluate_one_shot_runs, read_runs
from pipeline.model import build_model

PIXELS = {"name": "mlp", "widths": []}  # the image itself is the embedding: nearest neighbours of pixels


def spec(shape=(1, 28, 28), method="prototypical", backbone=PIXELS) -> dict:
    return {
        "method": {"name": method},
        "backbone": backbone,
        "input": {"shape": list(shape), "scaling": "unit"},
        "way": 5,
    }


def png(drawing: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(drawing).convert("1").save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Runs in which every query is a copy of its class's drawing; which class it is stands in the labels."""
    random = np.random.default_rng(0)
    content = {}
    for run in range(1, 21):
        blocks = random.integers(0, 2, (20, 15, 15), dtype=np.uint8).repeat(7, axis=1).repeat(7, axis=2) * 255
        order = random.permutation(20)
        for n in range(20):
            content[f"run{run:02}/training/class{n + 1:02}.png"] = png(blocks[n])
            content[f"run{run:02}/test/item{n + 1:02}.png"] = png(blocks[order[n]])
        lines = [
            f"run{run:02}/test/item{n + 1:02}.png run{run:02}/training/class{order[n] + 1:02}.png" for n in range(20)
        ]
        content[f"run{run:02}/class_labels.txt"] = "\n".join([*lines, ""]).encode()
    return content


def pack(path, content: dict[str, bytes], prefix: str = "") -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(prefix + name, data)
    return str(path)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 105, 105), (3, 32, 32)])
def test_copies_are_found_and_images_are_the_datasets(files, tmp_path, shape):
    path = pack(
        tmp_path / "runs.zip", {**files, "readme.txt": b"", "__MACOSX/run01/class_labels.txt": b"?"}, "all_runs/"
    )
    runs = read_runs(path, shape)
    assert runs.support.shape == runs.query.shape == (20, 20, *shape) and runs.support.dtype == torch.uint8
    picked = runs.support.gather(1, runs.labels.view(20, 20, 1, 1, 1).expand_as(runs.support))
    assert torch.equal(picked, runs.query)
    if shape == (1, 28, 28):
        expected, _ = decode(files["run07/test/item03.png"], Omniglot.rule)
        np.testing.assert_array_equal(runs.query[6, 2].numpy(), expected)
    if shape == (1, 105, 105):  # ink is bright
        drawing = np.asarray(Image.open(io.BytesIO(files["run07/test/item03.png"])).convert("L"))
        np.testing.assert_array_equal(runs.query[6, 2, 0].numpy(), 255 - drawing)
    result = evaluate_one_shot_runs(Model(spec(shape), None), path)
    assert result.accuracies.tolist() == [1.0] * 20
    found = result.summary()
    assert found["accuracy"] == 1 and found["interval"] == 0 and found["error"] == 0 and found["episodes"] == 20
    assert found["archive_sha256"] == hashlib.sha256((tmp_path / "runs.zip").read_bytes()).hexdigest()


def test_wrong_answers_count_by_run(files, tmp_path):
    """Labels of two queries exchanged in every run, of all in the first."""
    wrong = dict(files)
    for run in range(1, 21):
        lines = files[f"run{run:02}/class_labels.txt"].decode().split("\n")[:20]
        answers = [line.split()[1] for line in lines]
        moved = answers[1:] + answers[:1] if run == 1 else [answers[1], answers[0], *answers[2:]]
        text = "\n".join(f"{line.split()[0]} {answer}" for line, answer in zip(lines, moved, strict=True))
        wrong[f"run{run:02}/class_labels.txt"] = text.encode()
    result = evaluate_one_shot_runs(Model(spec(), None), pack(tmp_path / "runs.zip", wrong))
    np.testing.assert_allclose(result.accuracies, [0.0] + [0.9] * 19)
    assert result.summary()["accuracy"] == pytest.approx(0.855) and result.summary()["error"] == pytest.approx(0.145)
    assert result.estimate.interval == pytest.approx(1.96 * np.std(result.accuracies, ddof=1) / 20**0.5)


@pytest.mark.parametrize("name", ["matching", "siamese", "triplet", "nca"])
def test_with_given_weights(files, tmp_path, name):
    """The stored weights answer, not those that building draws."""
    path = pack(tmp_path / "runs.zip", files)
    description = spec(method=name, backbone={"name": "mlp", "widths": [32]})
    torch.manual_seed(3)
    weights = {k: v.clone() for k, v in build_model(description).state_dict().items()}
    first = evaluate_one_shot_runs(Model(description, weights), path, seed=1).accuracies
    again = evaluate_one_shot_runs(Model(description, weights), path, seed=2).accuracies
    np.testing.assert_array_equal(first, again)


def test_the_job(files, tmp_path, monkeypatch, capsys):
    """Without Ray, and without a dataset; the untrained network and people beside it."""
    monkeypatch.setattr(workflow, "_subject", lambda name, config, dataset=None: (Model(spec(), None, "mine"), None))
    path = pack(tmp_path / "runs.zip", files)
    overrides = ["model=models:/m/1", "protocol=one_shot_runs", "untrained=true", "compare=other"]
    summary = workflow.evaluate_job(compose("evaluate", [*overrides, f"runs={path}", f"output={tmp_path}/out.json"]))
    shown = capsys.readouterr().out
    assert "mine" in shown and "untrained" in shown and "95.50" in shown
    assert [r["accuracy"] for r in summary["results"]] == [1.0] * 3 and summary["comparison"][0]["difference"] == 0
    assert json.loads((tmp_path / "out.json").read_text()) == summary
    with pytest.raises(PipelineError, match="needs runs=PATH"):
        workflow.evaluate_job(compose("evaluate", overrides))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run20/test/item20.png": None}, r"has no run20/test/item20.png \(1 files of 20 runs"),
        ({"run01/class_labels.txt": None}, "has no run01/class_labels.txt"),
        ({"run02/class_labels.txt": b"run02/test/item01.png run03/training/class01.png"}, "names no trial"),
        ({"run02/class_labels.txt": b"run02/test/item01.png run02/training/class21.png"}, "names no trial"),
        ({"run02/class_labels.txt": b"\xff\n"}, "names no trial"),
        ({"run02/class_labels.txt": b"run02/test/item01.png run02/training/class01.png"}, "names 1 of 20 trials"),
        ({"run03/test/item01.png": b"no image"}, "is no drawing of Omniglot"),
        ({"run03/test/item01.png": png(np.zeros((28, 28), np.uint8))}, "is 28x28, not 105x105"),
        ({"../run01/test/item01.png": b""}, "leads out of its folder"),
    ],
)
def test_archives_that_are_refused(files, tmp_path, change, message):
    content = {name: data for name, data in {**files, **change}.items() if data is not None}
    with pytest.raises(PipelineError, match=message) as caught:
        read_runs(pack(tmp_path / "runs.zip", content), (1, 28, 28))
    assert "\n" not in str(caught.value)


def test_damaged_or_missing_archives(files, tmp_path):
    path = tmp_path / "runs.zip"
    with pytest.raises(PipelineError, match="there is no archive"):
        read_runs(str(path), (1, 28, 28))
    pack(path, files)
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(PipelineError, match="is damaged|not a readable"):
        read_runs(str(path), (1, 28, 28))
    path.write_bytes(b"PK")
    with pytest.raises(PipelineError, match="not a readable zip archive"):
        read_runs(str(path), (1, 28, 28))


def test_models_that_cannot_answer(files, tmp_path):
    path = pack(tmp_path / "runs.zip", files)
    with pytest.raises(PipelineError, match="built for 5 classes and cannot answer for 20"):
        evaluate_one_shot_runs(Model(spec(method="maml", backbone={"name": "mlp"}), None), path)
    with pytest.raises(PipelineError, match="have 2 channels"):
        evaluate_one_shot_runs(Model(spec(shape=(2, 28, 28)), None), path)


@pytest.fixture(scope="module")
def lakes(real_data):
    path = real_data / "omniglot" / "one_shot_runs.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return path


def test_nearest_pixels_do_as_badly_on_lakes_archive_as_was_published(lakes):
    """By cosine: 87 of 400 trials, the 21.7 % of Koch et al. 2015, table 2."""
    assert torch.equal(read_runs(str(lakes), (1, 28, 28)).labels.sort(1).values, torch.arange(20).expand(20, -1))
    description = spec((1, 105, 105)) | {"method": {"name": "prototypical", "distance": "cosine"}}
    assert evaluate_one_shot_runs(Model(description, None), str(lakes)).summary()["accuracy"] * 400 == pytest.approx(87)


@pytest.mark.slow
def test_lakes_drawings_are_drawings_of_the_evaluation_alphabets(lakes):
    pixels = []
    for path in (lakes, lakes.parent / "images_evaluation.zip"):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".png")]
            pixels.append({Image.open(io.BytesIO(archive.read(name))).tobytes() for name in names})
    assert len(pixels[0]) > 700 and pixels[0] <= pixels[1]
