"""The exported folder answers like the model it was made of, without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.inference import Calibration, CalibrationPoint, FewShotClassifier
from pipeline.inference.background import Background
from pipeline.inference.folders import read_images
from pipeline.inference.rates import Rate, Share
from pipeline.inference.scores import SCORES
from pipeline.model import build_model
from pipeline.registry import export as exporting
from pipeline.registry import portable
from pipeline.registry.export import _load, export
from pipeline.weights import described, give, recipe
from tests.data.test_images import png_file, tiff_file

SHAPE = (3, 24, 20)
METHODS = [
    {"name": "prototypical", "scale": 0.3},
    {"name": "prototypical", "distance": "cosine", "scale": 10.0},
    {"name": "simple_shot"},
    {"name": "imprinted", "embedding_dim": 12},
]


def classifier_of(method: dict, seed: int = 0) -> FewShotClassifier:
    """Random weights, with batch-norm statistics of noise and a mean of training features."""
    torch.manual_seed(seed)
    spec = {
        "method": method, "backbone": {"name": "conv4", "width": 8}, "way": 5, "shot": 1, "classes": 7,
        "input": {"shape": list(SHAPE), "scaling": "standard", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]},
    }  # fmt: skip
    model = build_model(spec).train()
    with torch.no_grad():
        for _ in range(20):
            model.backbone(torch.randn(32, *SHAPE))
        if method["name"] == "simple_shot":
            model.mean.normal_(0, 0.1)
    return FewShotClassifier.from_weights(spec, model.state_dict())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of other sizes and modes than the model's."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for number in range(14):
        coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((31 + number, 40), Image.Resampling.BICUBIC)
        image.convert("L" if number % 5 == 1 else "RGBA" if number % 5 == 2 else "RGB").save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / "turned.jpg", exif=exif)
    return folder


def exported(classifier: FewShotClassifier, folder: Path, photographs: Path, **keys: object) -> dict:
    classifier.save(folder / "model")
    words = [f"model={folder / 'model'}", f"output={folder / 'out'}", f"images={photographs}"]
    return export(compose("export", [*words, *(f"{key}={value}" for key, value in keys.items())]))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))
def test_the_page_answers_like_the_model(method: dict, tmp_path: Path, photographs: Path) -> None:
    classifier = classifier_of(method)
    found = exported(classifier, tmp_path, photographs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["few_shot.py", "model.json", "network.onnx"]
    assert max(found["differences"].values()) < 1e-5
    files = sorted(photographs.iterdir())
    few_shot = _load(tmp_path / "out" / "few_shot.py")
    page = few_shot.FewShot(tmp_path / "out")
    pixels = np.stack([few_shot.read(path, page.shape) for path in files])
    np.testing.assert_array_equal(pixels, read_images(files, SHAPE).images)
    labels = ["pear", "plum", "pear", "quince", "plum", "fig"]  # any number of images a class
    page.enrol(pixels[:6], labels)
    answers = classifier.classify(classifier.enrol(pixels[:6], labels), pixels[6:])
    names, probabilities, scores, known = page.classify(pixels[6:])
    assert names == answers.labels and known.all()
    np.testing.assert_allclose(probabilities, answers.probabilities, atol=1e-5)
    np.testing.assert_allclose(scores, answers.scores, rtol=1e-4, atol=1e-5)
    assert page.classify(pixels[6:], "none")[3].all()
    alone = np.concatenate([page.classify(pixels[number : number + 1])[2] for number in range(6, len(pixels))])
    np.testing.assert_allclose(alone, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 224, 224), (3, 320, 280)], ids=["enlarged", "reduced"])
def test_a_pretrained_network_takes_its_own_preparation_along(
    shape: tuple[int, int, int], tmp_path: Path, photographs: Path, real_data: Path
) -> None:
    weights = real_data / "pretrained" / "tf_efficientnet_lite0.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    pytest.importorskip("timm")
    options = {"name": "timm", "model": "tf_efficientnet_lite0", "weights": str(weights)}
    spec = {
        "method": {"name": "simple_shot"}, "backbone": described(options), "way": 5, "shot": 1, "classes": 7,
        "input": {"shape": list(shape), "scaling": "backbone", **recipe(options, 3)},
    }  # fmt: skip
    model = build_model(spec)
    give(model.backbone, options)
    found = exported(FewShotClassifier.from_weights(spec, model.state_dict()), tmp_path, photographs)
    assert max(found["differences"].values()) < 1e-3


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("method", [METHODS[0], METHODS[3]], ids=["prototypical", "imprinted"])
def test_strangers_are_told_by_the_same_score(score: str, method: dict, tmp_path: Path, photographs: Path) -> None:
    plain = classifier_of(method)
    width = 12 if method["name"] == "imprinted" else plain.method.width
    background = Background(torch.randn(9, width, generator=torch.manual_seed(1)))
    files = sorted(photographs.iterdir())
    pixels = read_images(files, SHAPE).images
    labels = ["a", "b", "a", "c", "b", "c"]

    def calibrated(threshold: float) -> FewShotClassifier:
        rate = Rate(0.05, threshold, Share(0.05, 0, 0.1), Share(0.1, 0, 0.2))
        fixed = {"rates": (rate,), "equal_error": 0.1, "accuracy": 0.9, "enrolled_queries": 10, "stranger_queries": 10}
        point = CalibrationPoint(3, 2, threshold, 0.05, 0.1, **fixed, score=score, temperature=2.5)
        return FewShotClassifier(
            plain.spec, plain.method, plain.preprocess, Calibration(0.05, "val", 0, (point,), background)
        )

    without = calibrated(0.0)
    middle = float(np.median(without.classify(without.enrol(pixels[:6], labels), pixels[6:]).scores))
    classifier = calibrated(middle + 1e-3 * abs(middle))
    exported(classifier, tmp_path, photographs)
    page = _load(tmp_path / "out" / "few_shot.py").FewShot(tmp_path / "out")
    page.enrol(pixels[:6], labels)
    answers = classifier.classify(classifier.enrol(pixels[:6], labels), pixels[6:])
    names, probabilities, scores, known = page.classify(pixels[6:])
    np.testing.assert_allclose(scores, answers.scores, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(probabilities, answers.probabilities, atol=1e-5)
    assert known.tolist() == answers.known.tolist() and 0 < known.sum() < len(known)


def test_the_share_of_strangers_is_said_when_asking(tmp_path: Path, photographs: Path) -> None:
    plain, files = classifier_of(METHODS[0]), sorted(photographs.iterdir())
    pixels, labels = read_images(files, SHAPE).images, ["a", "b", "a", "c", "b", "c"]
    scores = np.sort(plain.classify(plain.enrol(pixels[:6], labels), pixels[6:]).scores).astype(float)
    rates = tuple(
        Rate(asked, threshold, Share(asked, 0, 1), Share(0.1, 0, 1))
        for asked, threshold in ((0.05, float(scores[-1])), (0.2, float(scores[0])))
    )
    fixed = {"equal_error": 0.1, "accuracy": 0.9, "enrolled_queries": 10, "stranger_queries": 10}
    point = CalibrationPoint(3, 2, rates[0].threshold, 0.05, 0.1, **fixed, rates=rates, stranger_images=50)
    classifier = FewShotClassifier(plain.spec, plain.method, plain.preprocess, Calibration(0.05, "val", 0, (point,)))
    exported(classifier, tmp_path, photographs)
    page = _load(tmp_path / "out" / "few_shot.py").FewShot(tmp_path / "out")
    page.enrol(pixels[:6], labels)
    enrolment, counted = classifier.enrol(pixels[:6], labels), []
    for share in (0.08, 0.125, 0.17):
        known = page.classify(pixels[6:], unknown_pass=share)[3]
        assert known.tolist() == classifier.classify(enrolment, pixels[6:], unknown_pass=share).known.tolist()
        counted.append(int(known.sum()))
    assert 0 < counted[0] < counted[2] < len(scores)
    for share in (0.055, 0.3):  # fewer than three of fifty strangers, and more than was measured
        with pytest.raises(PipelineError):
            classifier.classify(enrolment, pixels[6:], unknown_pass=share)
        with pytest.raises(ValueError, match=r"validation tells 0.06 to 0.2"):
            page.classify(pixels[6:], unknown_pass=share)


def test_the_page_needs_neither_torch_nor_this_package(tmp_path: Path, photographs: Path) -> None:
    exported(classifier_of(METHODS[0]), tmp_path, photographs)
    script = (
        "import sys; sys.modules['torch'] = sys.modules['pipeline'] = None\n"
        "from few_shot import FewShot, read; from pathlib import Path\n"
        f"files = sorted(Path({str(photographs)!r}).iterdir()); model = FewShot('.')\n"
        "model.enrol([read(path, model.shape) for path in files], [path.name for path in files])\n"
        "labels, *_ = model.classify([read(files[3], model.shape)]); print(labels == [files[3].name])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_a_network_that_answers_otherwise_is_not_written(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, write = classifier_of(METHODS[0], seed=1), exporting.write_network
    monkeypatch.setattr(exporting, "write_network", lambda _, *rest: write(other.method, *rest))
    with pytest.raises(PipelineError, match="the exported features differ from the model's by"):
        exported(classifier_of(METHODS[0]), tmp_path, photographs)
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["maml", "r2d2", "relation", "pmf", "soft_kmeans", "rfs"])
def test_a_method_that_learns_by_more_than_means_is_refused(name: str, tmp_path: Path, photographs: Path) -> None:
    spec = {
        "method": {"name": name}, "backbone": {"name": "relation_encoder" if name == "relation" else "conv4"},
        "way": 5, "shot": 1, "classes": 7, "input": {"shape": [3, 84, 84], "scaling": "unit"},
    }  # fmt: skip
    method = build_model(spec)
    if name == "pmf":
        method.settle(0.001)  # without a rate it is a prototypical network
    with pytest.raises(PipelineError, match=f"method {name} learns new classes by more than the means"):
        exported(FewShotClassifier.from_weights(spec, method.state_dict()), tmp_path, photographs)


def test_the_folder_may_be_given_as_an_address(
    tmp_path: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier_of(METHODS[0]).save(tmp_path / "model")
    export(compose("export", ["model=model", f"output=file://{tmp_path}/out", f"images={photographs}"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, photographs: Path) -> None:
    classifier = classifier_of(METHODS[0])
    with pytest.raises(PipelineError, match="1 images are too few"):
        exported(classifier, tmp_path, photographs / "0.png")
    classifier.save(tmp_path / "model")
    words = [f"model={tmp_path / 'model'}", f"output={tmp_path / 'out'}"]
    with pytest.raises(PipelineError, match="dataset cannot be read here .*give images=FOLDER"):
        export(compose("export", words))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(PipelineError, match="is there already"):
        export(compose("export", words))
    assert json.loads((tmp_path / "model" / "model.json").read_text())["schema"] == 1


def test_the_page_refuses_images_that_the_model_refuses(tmp_path: Path, photographs: Path) -> None:
    exported(classifier_of(METHODS[0]), tmp_path, photographs)
    page = _load(tmp_path / "out" / "few_shot.py").FewShot(tmp_path / "out")
    pixels = read_images(sorted(photographs.iterdir())[:3], SHAPE).images
    with pytest.raises(ValueError, match=r"^no classes are known yet: call enrol\(images, labels\) first$"):
        page.classify(pixels)
    page.enrol(pixels.astype(int).tolist(), "aba")  # whole numbers from 0 to 255 are what they say
    for wrong in (pixels / 255, pixels.astype(int) + 256, pixels.astype(np.int8), pixels[:, :1], pixels[:0], []):
        with pytest.raises(ValueError, match=r"^images are .*: give uint8 \[N, 3, 24, 20\], values 0 to 255$"):
            page.classify(wrong)
    with pytest.raises(ValueError, match="3 images came with 2 labels"):
        page.enrol(pixels, "cd")
    with pytest.raises(ValueError, match="threshold='low': give auto, none or a number"):
        page.classify(pixels, "low")
    assert page.classify(pixels)[0] == ["a", "b", "a"]


def test_the_page_refuses_what_it_would_read_wrongly(tmp_path: Path) -> None:
    """Deep greys and colours that a file calls transparent are read by the format's rules, which the page lacks."""
    page = _load(Path(portable.__file__))
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    colour = np.random.default_rng(0).integers(0, 65536, (8, 8, 3))
    for number, content in enumerate((
        png_file(ramp, 16), tiff_file(ramp), tiff_file(ramp.astype(np.float32) / 65535), png_file(ramp % 4, 2, (3,)),
        png_file(colour, 16, tuple(colour[0, 0].tolist())),
    )):  # fmt: skip
        (tmp_path / str(number)).write_bytes(content)
        with pytest.raises(ValueError, match=f"{number}: save it with eight bits a channel"):
            page.read(tmp_path / str(number), (3, 8, 8))


def test_the_page_reads_lab_in_grey_as_the_model_does(tmp_path: Path, photographs: Path) -> None:
    file = tmp_path / "lab.tif"
    Image.open(photographs / "0.png").convert("RGB").convert("LAB").save(file)
    read = _load(Path(portable.__file__)).read
    np.testing.assert_array_equal(read(file, (1, 24, 20)), read_images([file], (1, 24, 20)).images[0])
