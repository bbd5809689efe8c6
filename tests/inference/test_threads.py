"""Threads that share a classifier, as those of MLflow's server do, get the answers that each would get alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

import pipeline
from pipeline.inference import FewShotClassifier
from pipeline.inference.files import model_fingerprint
from pipeline.model import build_model
from tests.inference.conftest import classifier_of, spec_of

METHODS = sorted(path.stem for path in (Path(pipeline.__file__).parent / "conf" / "method").glob("*.yaml"))
OPTIONS = {
    "meta_networks": {"filters": 4, "hidden": 4},
    "maml": {"inner_steps_eval": 2},
    "maml_plus_plus": {"inner_steps": 2, "inner_steps_eval": 2},
    "reptile": {"inner_steps_eval": 3},
    "meta_lstm": {"inner_steps_eval": 2},
    "baseline": {"head": "finetune_all", "epochs": 2},
}


@pytest.mark.parametrize("name", METHODS)
def test_two_threads(name: str, pictures: np.ndarray) -> None:
    spec = {**spec_of(name, **OPTIONS.get(name, {})), "shot": 1, "backbone": {"name": "conv4", "width": 4}}
    if name == "relation":
        spec["backbone"] = {"name": "relation_encoder", "width": 4}
        spec["input"] = {"shape": [1, 28, 28], "scaling": "unit"}
    torch.manual_seed(0)
    classifier = FewShotClassifier.from_weights(spec, build_model(spec).state_dict())
    pictures = np.pad(pictures, [(0, 0)] * 3 + [(0, classifier.shape[1] - 20)] * 2)
    questions = [np.arange(5), np.arange(10, 15)]

    def ask(classes: np.ndarray) -> np.ndarray:
        enrolment = classifier.enrol(pictures[classes, 0], classes.tolist())
        return classifier.logits(enrolment, pictures[classes, 1:4].reshape(-1, *classifier.shape))

    alone = [ask(classes) for classes in questions]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(ask, questions * 4))
    for answer, wanted in zip(together, alone * 4, strict=True):
        np.testing.assert_array_equal(answer, wanted)
    for classes, wanted in zip(questions, alone, strict=True):
        np.testing.assert_array_equal(ask(classes), wanted)


def test_the_last_queries_have_company(monkeypatch: pytest.MonkeyPatch, pictures: np.ndarray) -> None:
    """A transductive method normalises the queries that are asked at once: none is left by itself."""
    classifier: FewShotClassifier = classifier_of(spec_of("maml", inner_steps_eval=1))
    seen: list[int] = []
    answer = classifier._answer
    monkeypatch.setattr(
        classifier, "_answer", lambda state, *asked: seen.append(asked[0].shape[1]) or answer(state, *asked)
    )
    monkeypatch.setattr("pipeline.inference.classifier.PIXELS_AT_ONCE", 10 * 20 * 20)
    enrolment = classifier.enrol(pictures[:5, 0], list(range(5)))
    classifier.logits(enrolment, pictures[:7, 1:4].reshape(-1, *classifier.shape))
    assert seen == [7, 7, 7]


def test_a_model_is_known_by_its_own_weights_while_another_thread_learns(
    monkeypatch: pytest.MonkeyPatch, pictures: np.ndarray
) -> None:
    """Enrolments belong to a model by the SHA-256 of its weights, which learning a task may alter for a while."""
    classifier: FewShotClassifier = classifier_of(spec_of("prototypical"))
    expected = model_fingerprint(classifier.spec, classifier.method.state_dict())
    learn, begun, asked = classifier.method.adapt, Event(), Event()

    def adapt(*given: Any) -> Any:
        weight = next(classifier.method.parameters())
        weight.data += 1
        begun.set()
        asked.wait(0.5)
        weight.data -= 1
        return learn(*given)

    monkeypatch.setattr(classifier.method, "adapt", adapt)
    with ThreadPoolExecutor(2) as threads:
        learning = threads.submit(classifier.enrol, pictures[:5, 0], list(range(5)))
        begun.wait()
        found = threads.submit(lambda: classifier.fingerprint)
        assert found.result() == expected
        asked.set()
        assert learning.result().model == expected
