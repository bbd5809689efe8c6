"""The classifier with scikit-learn's manners answers as the one behind it does, whatever labels and images it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.inference import Enrolment, FewShotClassifier
from pipeline.inference.estimator import Classifier, read
from pipeline.inference.folders import read_images, read_queries, read_support
from pipeline.inference.requests import sent_images
from tests.inference.conftest import SHAPE, classifier_of, spec_of

NAMES = ["pear", "apple", "quince"]


def support(pictures: np.ndarray) -> tuple[np.ndarray, list[str]]:
    return pictures[:3, :4].reshape(-1, *SHAPE), [name for name in NAMES for _ in range(4)]


def queries(pictures: np.ndarray) -> np.ndarray:
    return pictures[:3, 4:].reshape(-1, *SHAPE)


def test_it_answers_like_the_classifier_behind_it(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images, labels = support(pictures)
    fitted = Classifier(classifier).fit(images, labels)
    answers = classifier.classify(classifier.enrol(images, labels), queries(pictures), "none")
    assert fitted.classes_.tolist() == sorted(NAMES)
    assert fitted.predict(queries(pictures)).tolist() == answers.labels
    columns = [answers.classes.index(name) for name in fitted.classes_]
    np.testing.assert_array_equal(fitted.predict_proba(queries(pictures)), answers.probabilities[:, columns])
    assert fitted.score(queries(pictures), answers.labels) == 1.0


@pytest.mark.parametrize(
    "values",
    [["b", "a", "c"], [7, -1, 3], [0.5, 2.0, 0.25], [True, False, True], [("x", 1), ("x", 0), ("w", 5)], [None, "", 1]],
    ids=["names", "numbers", "fractions", "truths", "pairs", "mixed"],
)
def test_labels_of_any_kind(classifier: FewShotClassifier, pictures: np.ndarray, values: list) -> None:
    images, names = support(pictures)
    labels = [values[NAMES.index(name)] for name in names]
    plain = Classifier(classifier).fit(images, [values.index(label) for label in labels]).predict(queries(pictures))
    fitted = Classifier(classifier).fit(images, labels)
    assert fitted.predict(queries(pictures)).tolist() == [values[number] for number in plain]
    assert set(fitted.classes_.tolist()) == set(values)
    if all(isinstance(value, int | float | str) for value in values):
        assert fitted.classes_.tolist() == sorted(set(values))


def test_numpy_labels(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images, names = support(pictures)
    for labels in (np.asarray(names), np.asarray(names, dtype=object)):
        assert set(Classifier(classifier).fit(images, labels).classes_) == set(NAMES)
    assert Classifier(classifier).fit(images, np.repeat([3, 1, 2], 4)).classes_.dtype.kind == "i"
    days = np.repeat(np.asarray(["2026-01-03", "2026-01-01", "2026-01-02"], "datetime64[ns]"), 4)
    fitted = Classifier(classifier).fit(images, days)
    assert fitted.predict(images).dtype == days.dtype and fitted.score(images, fitted.predict(images)) == 1.0


def test_classes_can_be_added(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images, labels = support(pictures)
    whole = Classifier(classifier).fit(images, labels)
    grown = Classifier(classifier).partial_fit(images[:8], labels[:8]).partial_fit(images[8:], labels[8:])
    np.testing.assert_array_equal(grown.predict_proba(queries(pictures)), whole.predict_proba(queries(pictures)))
    pairs = Classifier(classifier).fit(images[:8], [(name, 0) for name in labels[:8]])
    pairs.partial_fit(images[8:], [(name, 0) for name in labels[8:]])
    assert pairs.predict(queries(pictures)).tolist() == [(name, 0) for name in whole.predict(queries(pictures))]
    cases: list[tuple[list[Any], Any]] = [([0.0, 1.0], 2.0), ([False, False], True), ([0, 1], 2)]
    for first, more in cases:  # which are also positions
        numbers = Classifier(classifier).fit(images[:8], np.repeat(first, 4)).partial_fit(images[8:], [more] * 4)
        assert numbers.classes_.tolist() == sorted({*first, more}), "of one type"
        assert numbers.partial_fit(images[:1], [first[0]]).predict(queries(pictures)).dtype == np.asarray(first).dtype
    whole_numbers = Classifier(classifier).fit(images[:8], [0] * 4 + [1] * 4).partial_fit(images[:1], [0.0])
    assert whole_numbers.classes_.dtype == int and whole_numbers.enrolment_.counts == [5, 4]
    assert whole.fit(images[:8], labels[:8]).classes_.tolist() == ["apple", "pear"]  # fitted anew


def test_a_name_is_one_class_in_every_unicode_form(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    """'caf\u00e9' as a Mac's folders have it and as it is typed elsewhere."""
    images, _ = support(pictures)
    composed, apart = "caf\u00e9", "cafe\u0301"
    labels = [apart] * 4 + ["b"] * 4
    whole = Classifier(classifier).fit(images, [composed, composed, apart, apart] + ["b"] * 4 + ["c"] * 4)
    assert sorted(whole.enrolment_.classes) == whole.classes_.tolist() == ["b", "c", composed]
    grown = Classifier(classifier).fit(images[:8], np.asarray(labels))
    grown.partial_fit(images[8:], ["c"] * 4)
    np.testing.assert_array_equal(grown.predict_proba(queries(pictures)), whole.predict_proba(queries(pictures)))
    answers = whole.predict(queries(pictures)).tolist()
    assert composed in answers
    for name in (composed, apart):
        assert whole.score(queries(pictures), [name if a == composed else a for a in answers]) == 1.0
    assert grown.partial_fit(images[:1], [composed]).enrolment_.counts == [5, 4, 4]


def test_an_enrolment_keeps_the_names(classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path) -> None:
    fitted = Classifier(classifier).fit(*support(pictures))
    fitted.enrolment_.save(tmp_path / "fruit")
    assert Enrolment.load(tmp_path / "fruit").classes == NAMES


def test_strangers_are_not_known(pictures: np.ndarray) -> None:
    fitted = Classifier(classifier_of(spec_of())).fit(*support(pictures))
    scores = fitted.model.classify(fitted.enrolment_, queries(pictures)).scores
    limit = float(np.median(scores))
    assert fitted.known(queries(pictures), limit).tolist() == (scores >= limit).tolist()
    assert fitted.known(queries(pictures)).all()  # this model is not calibrated


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_form_give_the_pixels_that_classify_reads(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng(0)
    shape = (channels, 20, 20)
    large = rng.integers(0, 256, (4, 30, 41, channels), dtype=np.uint8)
    pictures = [Image.fromarray(image[:, :, 0] if channels == 1 else image) for image in large]
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    wanted = read_images(files, shape).images
    forms = [files, [str(file) for file in files], pictures, large, list(large), large.transpose(0, 3, 1, 2)]
    if channels == 1:
        forms += [large[:, :, :, 0], list(large[:, :, :, 0])]
    for form in forms:
        np.testing.assert_array_equal(read(form, shape), wanted)
    np.testing.assert_array_equal(read(wanted, shape), wanted)
    np.testing.assert_array_equal(read(wanted.transpose(0, 2, 3, 1), shape), wanted)


def test_a_grey_image_suits_a_network_of_colour(pictures: np.ndarray) -> None:
    grey = pictures[0, :2, 0]
    assert (read(grey, (3, 20, 20)) == grey[:, None]).all()


@pytest.mark.parametrize(
    "images, said",
    [
        (np.zeros((2, *SHAPE), dtype=np.float32), "image 0 is float32"),
        (np.zeros((2, 20, 20, 7), dtype=np.uint8), "image 0 is uint8"),
        (np.zeros((2, 0, 9, 1), dtype=np.uint8), r"image 0 is uint8 \[0, 9, 1\]"),
        ([np.zeros((9, 0), dtype=np.uint8)] * 2, r"image 0 is uint8 \[9, 0\]"),
        ([Image.new("L", (0, 9))] * 2, r"image 0 is uint8 \[9, 0\]"),
        (["nowhere.png", "nowhere.png"], "image nowhere.png cannot be read"),
        ("nowhere.png", "give a list of images"),
        ([object(), object()], "image 0 is object"),
    ],
)
def test_what_is_no_image_is_refused(classifier: FewShotClassifier, images: object, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        Classifier(classifier).fit(images, ["a", "b"])


def test_wrong_calls_are_refused(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images, labels = support(pictures)
    with pytest.raises(PipelineError, match="call fit"):
        Classifier(classifier).predict(images)
    with pytest.raises(PipelineError, match="one label an image|one label per image"):
        Classifier(classifier).fit(images, labels[:-1])
    with pytest.raises(PipelineError, match="hashable"):
        Classifier(classifier).fit(images, [[label] for label in labels])
    with pytest.raises(PipelineError, match="another type"):
        Classifier(classifier).fit(images[:8], labels[:8]).partial_fit(images[8:], [1, 1, 1, 1])
    for wrong in ("pear", None, 3):
        with pytest.raises(PipelineError, match="give a list, one label an image"):
            Classifier(classifier).fit(images[:4], wrong)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="rows of several values"):
        Classifier(classifier).fit(images[:4], np.eye(4))
    assert Classifier(classifier).fit(images[:2], np.asarray([[7], [8]])).classes_.tolist() == [7, 8], "one a row"
    fitted = Classifier(classifier).fit(images, labels)
    with pytest.raises(PipelineError, match="12 images came with 11 labels"):
        fitted.score(images, labels[:-1])
    with pytest.raises(PipelineError, match="0 images came with 0 labels"):
        fitted.score([], [])
    for nothing in (None, 5):
        with pytest.raises(PipelineError, match="give a list of images"):
            fitted.predict(nothing)


@pytest.mark.parametrize("missing", [float("nan"), np.datetime64("NaT"), pd.NA, pd.NaT], ids=repr)
def test_a_label_that_is_missing_is_no_class(
    classifier: FewShotClassifier, pictures: np.ndarray, missing: object
) -> None:
    """As pandas has gaps in a column: each would be a class of its own, which no prediction is equal to."""
    images, labels = support(pictures)
    with pytest.raises(PipelineError, match="the label of image 3 is missing"):
        Classifier(classifier).fit(images, [*labels[:3], missing, *labels[4:]])


def test_it_says_what_it_is(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    fresh = Classifier(classifier)
    assert repr(fresh) == "Classifier(prototypical, images 1×20×20, not fitted)"
    assert "3 classes" in repr(fresh.fit(*support(pictures)))


@pytest.mark.parametrize(("limit", "taken"), [(None, False), (1000, False), (90_000_000, True)])
def test_a_model_takes_images_as_large_as_it_was_trained_on(tmp_path: Path, limit: int | None, taken: bool) -> None:
    spec, large = spec_of(), tmp_path / "known" / "a" / "large.png"
    large.parent.mkdir(parents=True)
    Image.new("1", (10_000, 9_000), 1).save(large)
    origin = {"dataset": {"name": "photos"} if limit is None else {"name": "photos", "max_pixels": limit}}
    model = FewShotClassifier.from_weights(spec, classifier_of(spec).method.state_dict(), origin=origin)
    if taken:
        white = np.full((1, *SHAPE), 255, np.uint8)
        np.testing.assert_array_equal(read([large], SHAPE, model.max_pixels), white)
        assert Classifier(model).fit([large], ["a"]).predict([large]).tolist() == ["a"]
        pictures, labels = read_support(tmp_path / "known", SHAPE, max_pixels=model.max_pixels)
        assert labels == ["a"] and not read_queries(tmp_path, SHAPE, max_pixels=model.max_pixels).skipped
        sent = sent_images([large.read_bytes()], "query_images", SHAPE, max_pixels=model.max_pixels)
        np.testing.assert_array_equal(sent, white)
        np.testing.assert_array_equal(pictures.images, white)
    else:
        with pytest.raises(PipelineError, match="10000 x 9000 pixels, more than 89,478,485"):
            Classifier(model).fit([large], ["a"])
