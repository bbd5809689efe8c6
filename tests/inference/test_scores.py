"""Every score against its formula in float64, and what a method has to say for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from pipeline.errors import PipelineError
from pipeline.inference import Calibration, CalibrationPoint, FewShotClassifier, calibrate
from pipeline.inference.background import Background, survey
from pipeline.inference.rates import Rate, Share
from pipeline.inference.scores import OF_BACKGROUND, OF_ONE_CLASS, SCORES, Evidence, gather_evidence, score_queries
from pipeline.inference.temperature import fit_temperature
from tests.inference.conftest import SHAPE, classifier_of, spec_of


def test_scores_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    logits, background, cohort = (
        rng.normal(-6, 1, (2, 6, 4)),
        rng.normal(-5, 1, (2, 6, 9)),
        rng.normal(-5, 1, (2, 9, 4)),
    )
    given = Evidence(*(torch.from_numpy(x).float() for x in (logits, -logits, background, cohort)))
    t = 0.7
    for task, query in np.ndindex(2, 6):
        z, b, c = logits[task, query], background[task, query], cohort[task]
        ordered, answer = np.sort(z)[::-1], z.argmax()
        weights = np.exp(z / t)
        want = {
            "logit": z.max(),
            "probability": weights.max() / weights.sum(),
            "margin": ordered[0] - ordered[1],
            "energy": t * np.log(weights.sum()),
            "ratio": -ordered[0] / ordered[1],  # distances are minus the logits
            "background": z.max() - b.mean(),
            "normalised": ((z.max() - b.mean()) / b.std() + (z.max() - c[:, answer].mean()) / c[:, answer].std()) / 2,
        }
        assert list(want) == list(SCORES)
        for name, value in want.items():
            assert float(score_queries(name, given, t)[task, query]) == pytest.approx(value, rel=1e-5), name


def test_scores_that_a_model_cannot_tell_are_none() -> None:
    alone = Evidence(torch.randn(1, 3, 1), torch.rand(1, 3, 1), torch.randn(1, 3, 4), torch.randn(1, 4, 1))
    assert {name for name in SCORES if score_queries(name, alone, 1.0) is not None} == set(OF_ONE_CLASS)
    logits_only = Evidence(torch.randn(1, 3, 5))
    told = {name for name in SCORES if score_queries(name, logits_only, 1.0) is not None}
    assert told == {"logit", "probability", "margin", "energy"}


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_temperature_is_the_most_likely(scale: float) -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 2, (2000, 5))
    labels = (truth + rng.gumbel(size=truth.shape)).argmax(1)  # so that softmax(truth) is the probability
    logits = truth * scale

    def entropy(log_t: float) -> float:
        z = logits / np.exp(log_t)
        return float((np.logaddexp.reduce(z, axis=1) - z[np.arange(len(z)), labels]).mean())

    best = np.exp(minimize_scalar(entropy, bounds=(-12, 12), method="bounded").x)
    assert fit_temperature(logits.astype(np.float32), labels) == pytest.approx(best, rel=0.02)
    assert best == pytest.approx(scale, rel=0.1)


def test_answers_that_are_all_right_leave_some_doubt() -> None:
    """N right answers are no proof that the next is: the stated probability of a mistake is of the order of 1 / N."""
    logits = np.eye(4)[np.arange(100) % 4] * 5
    t = fit_temperature(logits, np.arange(100) % 4)
    mistake = 3 / (3 + np.exp(5 / t))
    assert 1 / 500 < mistake < 1 / 50
    assert fit_temperature(np.zeros((9, 3)), np.zeros(9, dtype=np.int64)) == 1


def rate(asked: float) -> Rate:
    return Rate(asked, 10 - 10 * asked, Share(asked, asked / 2, asked * 2), Share(1 - asked, 0.5 - asked / 2, 1.0))


def point(way: int = 5, shot: int = 1, strangers: int = 400, **other) -> CalibrationPoint:
    found = {"score": "energy", "temperature": 0.5, "auroc": {"logit": 0.8, "energy": 0.9}, "oscr": 0.7}
    rates = tuple(rate(asked) for asked in (0.005, 0.05, 0.1, 0.5))
    return CalibrationPoint(way, shot, 9.5, 0.05, 0.2, 0.1, 0.9, 500, 500, rates=rates, stranger_images=strangers,
                            stranger_classes=20, **{**found, **other})  # fmt: skip


def test_a_rate_between_stored_ones_is_between() -> None:
    assert point().rate(0.05) == rate(0.05)
    found = point().rate(0.075)
    assert found.threshold == pytest.approx(9.25)
    assert (found.passed.value, found.passed.high, found.refused.value) == pytest.approx((0.075, 0.15, 0.925))


def test_a_rate_that_validation_does_not_bear_out_is_refused() -> None:
    for share, told in (
        (0.004, "too few to tell a rate under 0.008"),
        (0.6, "from 0.005 to 0.5"),
        (float("nan"), "from"),
    ):
        with pytest.raises(PipelineError, match=told):
            point().rate(share)
    assert point(strangers=60).rate(0.05).asked == 0.05
    with pytest.raises(PipelineError, match="59 strangers, too few to tell a rate under 0.051"):
        point(strangers=59).rate(0.05)
    with pytest.raises(PipelineError, match="by an earlier version"):
        CalibrationPoint(5, 1, 1.0, 0.05, 0.1, 0.07, 0.9, 10, 10).rate(0.05)


def test_stored_calibrations_come_back_and_damaged_ones_are_refused() -> None:
    whole = Calibration(0.05, "val", 0, (point(score="background"), point(1)), Background(torch.randn(3, 4)))
    assert Calibration.from_dict(whole.to_dict()) == whole
    old = {"target": 0.05, "split": "val", "seed": 0, "points": [{
        "way": 5, "shot": 1, "threshold": -1.5, "false_acceptance": 0.05, "false_rejection": 0.1, "equal_error": 0.07,
        "accuracy": 0.9, "enrolled_queries": 10, "stranger_queries": 10,
    }]}  # fmt: skip
    read = Calibration.from_dict(old)
    assert read.to_dict() == old and (read.points[0].score, read.points[0].temperature) == ("logit", 1.0)
    for damage in ({"score": "luck"}, {"temperature": 0}, {"rates": [{"asked": 1}]}, {"auroc": {"logit": "high"}}):
        with pytest.raises((ValueError, KeyError)):
            Calibration.from_dict({**old, "points": [{**old["points"][0], **damage}]})
    with pytest.raises(ValueError, match="no rate for its target"):
        Calibration.from_dict({**whole.to_dict(), "target": 0.07})
    with pytest.raises(ValueError, match="needs a background"):
        Calibration.from_dict({**whole.to_dict(), "background": None})
    with pytest.raises(ValueError, match="no numbers"):
        Calibration.from_dict({**whole.to_dict(), "background": Background(torch.full((3, 4), torch.nan)).to_dict()})


@pytest.mark.parametrize(
    "method", ["prototypical", "simple_shot", "imprinted", "proxy_nca", "triplet", "nca", "baseline"]
)
def test_metric_methods_tell_their_distances(method: str, pictures: np.ndarray) -> None:
    options = {"nca": {"answer": "nearest"}, "baseline": {"head": "prototype"}}.get(method, {})
    classifier = classifier_of(spec_of(method, **options))
    images = torch.from_numpy(pictures[:6]).float() / 255
    with torch.no_grad():
        state = classifier.method.adapt(images[None, :, 0], torch.arange(6)[None], 6)
        logits = classifier.method.classify(state, images[None, :, 0])
        distances = classifier.method.distances(logits)
    assert distances is not None and float(distances.min()) > -1e-3
    assert distances.argmin(-1).tolist() == logits.argmax(-1).tolist() == [list(range(6))]
    assert float(distances.diagonal(dim1=1, dim2=2).max()) < 1e-2 < float(distances.mean())


@pytest.mark.parametrize("method", ["discriminative_kshot", "rfs", "r2d2"])
def test_other_methods_have_none(method: str) -> None:
    assert classifier_of(spec_of(method)).method.distances(torch.zeros(1, 2, 3)) is None


@pytest.mark.parametrize("score", OF_BACKGROUND)
def test_a_model_answers_by_the_score_that_calibration_chose(
    score: str, classifier: FewShotClassifier, pictures: np.ndarray, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The served score is the calibrated one: strangers are refused as the stored rates say, after a way to disk."""

    def images(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return pictures[classes, numbers]

    background = survey(classifier.method, classifier.preprocess, images, np.full(10, 12))
    assert background is not None and background.means.shape[0] == 10
    monkeypatch.setattr("pipeline.inference.calibrating.SCORES", {score: SCORES[score]})
    calibration = calibrate(
        classifier.method, classifier.preprocess, lambda c, n: images(c + 10, n), [12] * 30,
        ways=(1, 5), shots=(2,), queries=400, background=background,
    )  # fmt: skip
    assert calibration is not None and {p.score for p in calibration.points} == {score}
    model = FewShotClassifier(classifier.spec, classifier.method, classifier.preprocess, calibration)
    model.save(tmp_path)
    model = FewShotClassifier.load(tmp_path)
    enrolment = model.enrol(pictures[10:15, :2].reshape(-1, *SHAPE), np.repeat(np.arange(5), 2))
    queries = pictures[10:40, 2:8].reshape(-1, *SHAPE)
    strict, loose = (model.classify(enrolment, queries, unknown_pass=share) for share in (0.05, 0.4))
    with torch.no_grad():
        state = {name: value for name, value in enrolment.state.items()}
        told = gather_evidence(model.method, state, model.preprocess(torch.from_numpy(queries)[None]), background)
    np.testing.assert_array_equal(strict.scores, score_queries(score, told, 1.0)[0].numpy())
    assert strict.score == score and strict.threshold == calibration.points[1].rate(0.05).threshold
    assert loose.threshold < strict.threshold and loose.known.sum() > strict.known.sum()
    assert strict.known[30:].mean() < 0.2 < loose.known[30:].mean() + 0.15
    z = model.logits(enrolment, queries) / calibration.points[1].temperature
    np.testing.assert_allclose(strict.probabilities, np.exp(z - np.logaddexp.reduce(z, axis=1)[:, None]), rtol=1e-4)
    alone = model.enrol(pictures[10, :2], [0, 0])
    assert model.classify(alone, queries).threshold == calibration.points[0].threshold
    for given, told in ((("none", 0.1), "leave out threshold=none"), (("auto", 0.7), "from 0.005 to 0.5")):
        with pytest.raises(PipelineError, match=told):
            model.classify(enrolment, queries, *given)


def test_one_class_is_not_judged_by_a_score_that_compares_two(
    classifier: FewShotClassifier, pictures: np.ndarray
) -> None:
    calibration = Calibration(0.05, "val", 0, (point(score="margin"),))
    model = FewShotClassifier(classifier.spec, classifier.method, classifier.preprocess, calibration)
    answers = model.classify(model.enrol(pictures[0, :2], [0, 0]), pictures[:, 3])
    assert answers.threshold is None and answers.known.all() and answers.score == "logit"
    with pytest.raises(PipelineError, match="no calibration for 1 classes"):
        model.classify(model.enrol(pictures[0, :2], [0, 0]), pictures[:, 3], unknown_pass=0.1)


def test_methods_that_adapt_have_no_background(pictures: np.ndarray) -> None:
    method = classifier_of(spec_of("maml", inner_steps_eval=1))
    assert survey(method.method, method.preprocess, lambda c, n: pictures[c, n], np.full(9, 12)) is None
