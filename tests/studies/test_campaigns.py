"""What a campaign found becomes a small file, and the file a table with its plots."""

from __future__ import annotations

import json

import pytest

from docs.studies import results
from docs.studies.campaigns import command, record_campaign
from docs.studies.report import report
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate

GIVEN = [
    "campaign=metric_scale", "trials=3", "base.steps=12", "fix.method=prototypical", "fix.method.distance=cosine",
    "objective.query=3", "scheduler.kind=none",
]  # fmt: skip


def trial(number: int, scale: float, accuracy: float | None, status: str = "finished", seed: int | None = None) -> dict:
    return {
        "number": number, "run": f"c-{number}", "seed": seed,
        "values": {"method": "prototypical", "method.scale": scale}, "status": status, "reason": "",
        "steps": 12, "accuracy": accuracy,
    }  # fmt: skip


@pytest.fixture
def storage(tmp_path) -> str:
    folder = tmp_path / "runs" / "small"
    (folder / "plots").mkdir(parents=True)
    raw = {**compose("tune", translate(GIVEN)), "name": "small", "storage": str(tmp_path), "tracking": {"uri": "x"}}
    dataset = {"name": "omniglot", "fingerprint": "f" * 64, "uri": str(tmp_path)}
    (folder / "campaign.json").write_text(json.dumps({"config": raw, "dataset": dataset}))
    trials = [trial(0, 1.0, 0.5), trial(1, 10.0, 0.8), trial(2, 90.0, None, "failed"), trial(3, 5.0, 0.7)]
    trials += [trial(4, 0.5, 0.4), trial(1, 10.0, 0.81, seed=1)]
    finalists = [
        {
            "number": n,
            "values": trials[n]["values"],
            "accuracy": a,
            "interval": 0.02,
            "by_seed": [a, a],
            "default": not n,
        }
        for n, a in ((1, 0.81), (0, 0.52))
    ]
    summary = {"trials": trials, "finalists": finalists, "comparison": {"seeds": None}, "statement": "the best is good"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "ledger.jsonl").write_text('{"began": 100.0, "ended": 160.0}\n{"began": 130.0, "ended": 220.0}\n')
    (folder / "plots" / "accuracy_over_method.scale.png").write_bytes(b"png")
    (folder / "plots" / "accuracy_over_method.scale.svg").write_bytes(b"svg")
    return str(tmp_path / "runs")


def test_a_campaign_is_recorded_and_rendered(storage, tmp_path, monkeypatch):
    found = record_campaign(tmp_path / "case.json", "small", storage)
    assert found["command"] == "python -m jobs.tune " + " ".join(
        ["campaign=metric_scale", "base.steps=12", "fix.method=prototypical", "fix.method.distance=cosine"]
        + ["objective.query=3", "trials=3", "scheduler.kind=none"]
    )
    assert found["seconds"] == 120 and str(tmp_path) not in json.dumps(found)
    assert (tmp_path / "case_scale.png").read_bytes() == b"png"
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    text = results.render("case")
    assert "| 10 | 81.00 ± 2.00 | 81.00 81.00 |  |" in text and "| 1 | 52.00 ± 2.00 | 52.00 52.00 | default |" in text
    assert (
        "Accuracy over method.scale, one seed: 0.5: 40.00, 1: 50.00, 5: 70.00, 10: 80.00." in text
        and "The best is good." in text
    )
    assert "![Validation accuracy over method.scale](case_scale.png)" in text
    assert f"`{found['command']}`, 5 trials, 1 failed, 2 minutes on {found['machine']['cores']} cores" in text


def test_a_record_and_its_plots_lie_where_they_were_said_to(storage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["what=campaign", "runs=[small]", f"storage={storage}", f"record=file://{tmp_path}/kept/case.json"]
    report(compose("report", arguments))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["case.json", "case_scale.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "runs"]
    record_campaign("case.json", "small", storage)
    assert (tmp_path / "case_scale.png").exists()


def test_every_key_of_a_finalist_and_the_best_of_each_choice_are_shown(storage, tmp_path, monkeypatch):
    """Also where the best has fewer keys than the others."""
    found = record_campaign(tmp_path / "case.json", "small", storage)
    methods = ["simple_shot", "rfs", "rfs", "matching", "siamese"]
    found["results"] = [
        {**found["results"][0], "number": n, "values": {"method": m} | ({"method.cost": n} if m == "rfs" else {}),
         "accuracy": 0.9 - n / 10}
        for n, m in enumerate(methods)
    ]  # fmt: skip
    for place, standing in enumerate(found["finalists"]):
        standing["values"] = found["results"][place]["values"]
    (tmp_path / "case.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    text = results.render("case")
    assert "| simple_shot |  | 81.00 ± 2.00 |" in text and "| rfs | 1 | 52.00 ± 2.00 |" in text
    assert "The best of each method, one seed: simple_shot 90.00, rfs 80.00, matching 60.00, siamese 50.00." in text


def test_the_recorded_command_makes_the_same_campaign():
    raw = compose("tune", translate(GIVEN))
    again = command(raw).split()[3:]
    assert compose("tune", translate(again)) == raw


def test_one_that_has_not_ended_is_refused(storage, tmp_path):
    with pytest.raises(PipelineError, match="other is not a campaign that has ended.*resume=other"):
        record_campaign(tmp_path / "case.json", "other", storage)
    assert not (tmp_path / "case.json").exists()
