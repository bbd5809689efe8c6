"""Enrol, classify, extend, save, load: against the method itself and against each other."""

from __future__ import annotations

import copy
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import PipelineError
from pipeline.inference import Enrolment, FewShotClassifier
from pipeline.inference import classifier as classifier_module
from tests.inference.conftest import SHAPE, classifier_of, spec_of


def support_of(pictures: np.ndarray, classes: list[int], shots: int) -> tuple[np.ndarray, list[str]]:
    images = pictures[classes, :shots].reshape(-1, *SHAPE)
    return images, [f"class {c}" for c in classes for _ in range(shots)]


def test_logits_are_those_of_the_definition(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images, labels = support_of(pictures, [3, 1, 4], 2)
    queries = pictures[[3, 1, 4, 8], 5]
    got = classifier.logits(classifier.enrol(images, labels), queries)
    with torch.no_grad():
        embed = lambda x: classifier.method.backbone(torch.from_numpy(x).float() / 255).double().numpy()  # noqa: E731
        means = embed(images).reshape(3, 2, -1).mean(1)
        want = -((embed(queries)[:, None] - means[None]) ** 2).sum(-1)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_answers(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    classes = list(range(10))
    enrolment = classifier.enrol(*support_of(pictures, classes, 2))
    answers = classifier.classify(enrolment, pictures[classes, 7], threshold="none")
    assert np.mean([a == f"class {c}" for a, c in zip(answers.labels, classes, strict=True)]) > 0.8
    logits = classifier.logits(enrolment, pictures[classes, 7]).astype(np.float64)
    want = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(answers.probabilities, want / want.sum(1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(answers.scores, logits.max(1).astype(np.float32))
    assert answers.known.all() and answers.threshold is None and len(answers) == 10
    labels, probabilities = answers.top(3)
    assert [row[0] for row in labels] == answers.labels
    assert probabilities.shape == (10, 3) and (np.diff(probabilities, axis=1) <= 0).all()


def test_a_threshold_divides_the_scores(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    enrolment = classifier.enrol(*support_of(pictures, [0, 1, 2], 2))
    queries = pictures[:, 7]
    scores = classifier.classify(enrolment, queries, threshold=None).scores
    limit = float(np.sort(scores)[20])  # the score of a query: it is known itself
    np.testing.assert_array_equal(classifier.classify(enrolment, queries, threshold=limit).known, scores >= limit)
    with pytest.raises(PipelineError, match="give auto, none or a number"):
        classifier.classify(enrolment, queries, threshold="often")


def test_images_that_nobody_may_write_to_are_taken_without_a_warning(
    classifier: FewShotClassifier, pictures: np.ndarray, recwarn: pytest.WarningsRecorder
) -> None:
    """As np.load(FILE, mmap_mode="r") gives them: PyTorch warns of undefined behaviour."""
    images = pictures[:3, 0].copy()
    images.flags.writeable = False
    torch.set_warn_always(True)
    try:
        assert classifier.classify(classifier.enrol(images, [3, 1, 2]), images).labels == [3, 1, 2]
    finally:
        torch.set_warn_always(False)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_labels_keep_their_kind_and_order(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    images = pictures[[5, 2, 5], [0, 0, 1]]
    enrolment = classifier.enrol(images, np.asarray([70, -3, 70]))
    assert enrolment.classes == [70, -3] and enrolment.counts == [2, 1] and enrolment.shot == 1.5
    answer = classifier.classify(enrolment, images[:1]).labels[0]
    assert type(answer) is int and answer == 70


@pytest.mark.parametrize("first", [1, 2, 5, 16, 30])
@pytest.mark.parametrize("added", [1, 3, 10])
def test_extension_leaves_old_logits_bitwise(
    classifier: FewShotClassifier, pictures: np.ndarray, first: int, added: int
) -> None:
    before = classifier.enrol(*support_of(pictures, list(range(first)), 2))
    after = classifier.extend(before, *support_of(pictures, list(range(first, first + added)), 1))
    queries = pictures[:, 9]
    old, new = classifier.logits(before, queries), classifier.logits(after, queries)
    np.testing.assert_array_equal(old, new[:, :first])
    assert after.classes == [f"class {c}" for c in range(first + added)]
    assert before.way == first and after.counts == [2] * first + [1] * added
    assert after.note == f"{added} classes added, {first} untouched"
    whole = classifier.enrol(after.images, [after.classes[p] for p in after.positions])
    np.testing.assert_allclose(new, classifier.logits(whole, queries), rtol=1e-4, atol=1e-5)


def test_more_images_of_an_enrolled_class(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    before = classifier.enrol(*support_of(pictures, [0, 1, 2], 1))
    images, labels = support_of(pictures, [1, 8], 3)
    after = classifier.extend(before, images[1:], labels[1:])
    assert after.classes == ["class 0", "class 1", "class 2", "class 8"] and after.counts == [1, 3, 1, 3]
    assert "learnt anew from 8 images: enrolled classes got more images" in after.note
    everything = np.concatenate([before.images, images[1:]])
    names = ["class 0", "class 1", "class 2", *labels[1:]]
    queries = pictures[:, 9]
    np.testing.assert_array_equal(
        classifier.logits(after, queries), classifier.logits(classifier.enrol(everything, names), queries)
    )


def test_enrolment_without_images_can_still_gain_classes(
    classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path
) -> None:
    before = classifier.enrol(*support_of(pictures, [0, 1], 1), keep_images=False)
    after = classifier.extend(before, *support_of(pictures, [2], 1))
    assert after.images is None and after.way == 3
    with pytest.raises(PipelineError, match="keeps no support images, so it cannot give an enrolled class more"):
        classifier.extend(before, *support_of(pictures, [1], 1))
    after.save(tmp_path / "people.safetensors")
    assert Enrolment.load(tmp_path / "people.safetensors").images is None
    assert pictures[0, 0].tobytes() not in (tmp_path / "people.safetensors").read_bytes()


def test_enrolment_file_gives_the_same_answers(
    classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path
) -> None:
    enrolment = classifier.enrol(*support_of(pictures, [0, 1, 2, 3], 2))
    enrolment.save(tmp_path / "deep" / "people.safetensors")
    loaded = Enrolment.load(tmp_path / "deep" / "people.safetensors")
    np.testing.assert_array_equal(
        classifier.logits(enrolment, pictures[:, 5]), classifier.logits(loaded, pictures[:, 5])
    )
    content = (tmp_path / "deep" / "people.safetensors").read_bytes()
    assert Enrolment.from_bytes(content, "people").to_bytes() == content == enrolment.to_bytes()
    more = support_of(pictures, [1, 9], 3)
    np.testing.assert_array_equal(
        classifier.logits(classifier.extend(enrolment, *more), pictures[:, 5]),
        classifier.logits(classifier.extend(loaded, *more), pictures[:, 5]),
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["people.safetensors"]


def test_a_failed_write_keeps_the_old_enrolment(
    classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "people.safetensors"
    classifier.enrol(*support_of(pictures, [0], 1)).save(path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space left"):
        patched.setattr(os, "fsync", full)
        classifier.enrol(*support_of(pictures, [0, 1], 1)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_enrolment_of_another_model_is_refused(classifier: FewShotClassifier, pictures: np.ndarray) -> None:
    other = classifier_of(spec_of(), seed=1)
    enrolment = other.enrol(*support_of(pictures, [0, 1], 1))
    with pytest.raises(PipelineError, match="made by another model"):
        classifier.classify(enrolment, pictures[:, 0])
    with pytest.raises(PipelineError, match="made by another model"):
        classifier.extend(enrolment, *support_of(pictures, [2], 1))


def test_damaged_enrolments_are_refused(classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "people.safetensors"
    classifier.enrol(*support_of(pictures, [0, 1], 2)).save(path)
    whole = path.read_bytes()
    for content in (
        whole[:-7],
        whole[:100],
        b"",
        b"\x80\x04pickle",
        whole.replace(b'counts\\": [2, 2]', b'counts\\": [2, 3]'),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(PipelineError, match="enrol the classes again"):
            Enrolment.load(path)
    save_file({"state.prototypes": torch.zeros(1, 2, 3)}, path)
    with pytest.raises(PipelineError, match="is not an enrolment"):
        Enrolment.load(path)


def test_chunks_change_no_answer(
    classifier: FewShotClassifier, pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    enrolment = classifier.enrol(*support_of(pictures, [0, 1, 2], 2))
    queries = pictures[:, :3].reshape(-1, *SHAPE)
    sizes: list[int] = []
    hook = classifier.method.backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    whole = classifier.logits(enrolment, queries)
    monkeypatch.setattr(classifier_module, "PIXELS_AT_ONCE", 7 * SHAPE[1] * SHAPE[2])
    parts = classifier.logits(enrolment, queries)
    hook.remove()
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    assert sizes[0] == 120 and len(sizes) == 19 and set(sizes[1:]) == {6, 7}  # as equal as can be
    assert classifier.logits(enrolment, queries[:0]).shape == (0, 3)
    assert len(classifier.classify(enrolment, queries[:0])) == 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, *SHAPE), dtype=np.float32), [0, 1], "images are float32"),
        (np.zeros((2, 3, 20, 20), dtype=np.uint8), [0, 1], r"this model takes uint8 \[N, 1, 20, 20\]"),
        (np.zeros((2, *SHAPE), dtype=np.uint8), [0], "2 support images came with 1 labels"),
        (np.zeros((2, *SHAPE), dtype=np.uint8), [0, "a"], "labels are of type int, str"),
        (np.zeros((1, *SHAPE), dtype=np.uint8), [True], "labels are of type bool"),
        (np.zeros((1, *SHAPE), dtype=np.uint8), [0.5], "labels are of type float"),
        (np.zeros((0, *SHAPE), dtype=np.uint8), [], "no support images"),
    ],
)
def test_bad_support_is_refused(classifier: FewShotClassifier, images: np.ndarray, labels: list, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        classifier.enrol(images, labels)


def test_model_folder_keeps_everything(classifier: FewShotClassifier, pictures: np.ndarray, tmp_path: Path) -> None:
    classifier.save(tmp_path)
    before = torch.random.get_rng_state()
    loaded = FewShotClassifier.load(tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    assert loaded.fingerprint == classifier.fingerprint and not loaded.method.training
    support = support_of(pictures, [0, 1, 2], 2)
    np.testing.assert_array_equal(
        loaded.logits(loaded.enrol(*support), pictures[:, 4]),
        classifier.logits(classifier.enrol(*support), pictures[:, 4]),
    )


def test_damaged_models_are_refused(classifier: FewShotClassifier, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(PipelineError, match=message) as caught:
            FewShotClassifier.load(tmp_path)
        assert "\n" not in str(caught.value)

    refused("model.json does not exist")
    classifier.save(tmp_path)
    model, weights = tmp_path / "model.json", tmp_path / "weights.safetensors"
    text, content = model.read_text(), weights.read_bytes()
    weights.write_bytes(content[:-5])
    refused("not a readable safetensors file")
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("SHA-256 differs")
    weights.write_bytes(content)
    for key, value, message in [
        ("schema", 9, "schema 9 is not 1"),
        ("spec", None, "spec and origin are not objects"),
        ("calibration", {"points": []}, "a calibration without points"),
    ]:
        model.write_text(json.dumps({**json.loads(text), key: value}))
        refused(message)
    for old, new, message in [
        ('"width": 16', '"width": 17', r"is torch.float32 \[16, 1, 3, 3\], not torch.float32 \[17, 1, 3, 3\]"),
        ('"prototypical"', '"no_such_method"', "no_such_method"),
        ('"conv4"', '"mlp"', "mlp|MLP"),
    ]:
        assert old in text
        model.write_text(text.replace(old, new))
        refused(message)
    model.write_text(text[:40])
    refused("not readable JSON")


def test_weights_of_another_type_are_refused(classifier: FewShotClassifier) -> None:
    weights = classifier.method.state_dict()
    name = next(iter(weights))
    with pytest.raises(PipelineError, match="float64"):
        FewShotClassifier.from_weights(spec_of(), {**weights, name: weights[name].double()})
    with pytest.raises(PipelineError, match="'more' is not the model's"):
        FewShotClassifier.from_weights(spec_of(), {**weights, "more": torch.zeros(1)})


def test_a_name_is_one_class_in_every_unicode_form(pictures: np.ndarray) -> None:
    """'caf\u00e9' typed on a Mac and on Linux; also where an enrolment of old holds the other form."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    classifier = classifier_of(spec_of())
    images, _ = support_of(pictures, [0, 1], 2)
    enrolment = classifier.enrol(images, [composed, apart, "b", "b"])
    assert enrolment.classes == [composed, "b"] and enrolment.counts == [2, 2]
    old = replace(enrolment, classes=[apart, "b"])
    grown = classifier.extend(old, images[:1], [composed])
    assert grown.classes == [apart, "b"] and grown.counts == [3, 2]


def test_maml_learns_anew_what_it_cannot_extend(pictures: np.ndarray, tmp_path: Path) -> None:
    classifier = classifier_of(spec_of("maml", way=3))
    enrolment = classifier.enrol(*support_of(pictures, [0, 1, 2], 2))
    assert not any(tensor.requires_grad for tensor in enrolment.state.values())
    more = support_of(pictures, [1], 4)
    images = np.concatenate([enrolment.images, more[0]])
    labels = [enrolment.classes[p] for p in enrolment.positions] + more[1]
    grown = classifier.extend(enrolment, *more)
    np.testing.assert_array_equal(
        classifier.logits(grown, pictures[:, 5]), classifier.logits(classifier.enrol(images, labels), pictures[:, 5])
    )
    with pytest.raises(PipelineError, match="built for 3 classes and cannot answer for 4"):
        classifier.extend(enrolment, *support_of(pictures, [7], 1))
    grown.save(tmp_path / "maml.safetensors")
    np.testing.assert_array_equal(
        classifier.logits(Enrolment.load(tmp_path / "maml.safetensors"), pictures[:, 5]),
        classifier.logits(grown, pictures[:, 5]),
    )


def test_imprinted_classes_are_added(pictures: np.ndarray) -> None:
    classifier = classifier_of(spec_of("imprinted"))
    before = classifier.enrol(*support_of(pictures, [0, 1, 2], 2))
    after = classifier.extend(before, *support_of(pictures, [3, 4], 2))
    np.testing.assert_array_equal(
        classifier.logits(before, pictures[:, 9]), classifier.logits(after, pictures[:, 9])[:, :3]
    )


@pytest.mark.parametrize("threshold", ["nan", "inf", float("nan"), float("-inf")])
def test_a_threshold_is_finite(classifier: FewShotClassifier, pictures: np.ndarray, threshold: float | str) -> None:
    enrolment = classifier.enrol(*support_of(pictures, [0, 1], 1))
    with pytest.raises(PipelineError, match="finite number"):
        classifier.classify(enrolment, pictures[0, :1], threshold)


@pytest.mark.parametrize("method", ["prototypical", "maml"])
def test_a_copy_answers_the_same(pictures: np.ndarray, method: str) -> None:
    classifier = classifier_of(spec_of(method, way=3))
    enrolment = classifier.enrol(*support_of(pictures, [0, 1, 2], 2))
    answers = classifier.logits(enrolment, pictures[:3, 9])
    for again in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert again.method is not classifier.method and again.fingerprint == classifier.fingerprint
        np.testing.assert_array_equal(again.logits(enrolment, pictures[:3, 9]), answers)
        assert again.enrol(*support_of(pictures, [0, 1, 2], 2)).counts == [2, 2, 2]


def test_nan_is_no_answer(pictures: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of()
    broken = classifier_of(spec)
    weights = broken.method.state_dict()
    name = next(name for name, tensor in weights.items() if tensor.is_floating_point())
    with pytest.raises(PipelineError, match="NaN or infinite values"):
        FewShotClassifier.from_weights(spec, {**weights, name: torch.full_like(weights[name], torch.nan)})
    enrolment = broken.enrol(*support_of(pictures, [0, 1], 1))
    classify = broken.method.classify
    monkeypatch.setattr(broken.method, "classify", lambda state, query: classify(state, query) * torch.nan)
    with pytest.raises(PipelineError, match="NaN or infinite scores"):
        broken.classify(enrolment, pictures[0, :1])
