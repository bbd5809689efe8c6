"""``jobs.register`` and ``jobs.classify`` as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs._main import run as run_job
from pipeline import store, workflow
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.inference import Enrolment, FewShotClassifier
from pipeline.inference.folders import read_queries, read_support
from pipeline.inference.rates import Rate, Share
from pipeline.registry import deliver as registering
from pipeline.registry.classify import classify
from pipeline.registry.deliver import deliver
from pipeline.registry.versions import pull
from pipeline.retraining import run as retraining
from pipeline.search import run as search
from pipeline.training.checkpoint import load_checkpoint
from tests.registry.conftest import SPEC
from tests.registry.test_versions import CALIBRATION

ROOT = Path(__file__).resolve().parents[2]
JOBS = {"classify": classify, "register": deliver}


def job(name: str, *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error, in this process: imports cost more than the jobs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run_job(name, JOBS[name], list(arguments))
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def result(name: str, *arguments: str) -> dict:
    status, out, err = job(name, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def options(tracking: dict) -> list[str]:
    return [f"tracking.{key}={value}" for key, value in tracking.items() if key != "timeout"]


def test_a_name_that_no_model_can_have_is_refused_before_the_work(run, tracking, tmp_path, glyphs, monkeypatch):
    """Not after the hours of a training, and not as a failed attempt of a retraining. A run of earlier code ends."""

    def worked(*args: object, **options: object) -> None:
        raise InterruptedError

    for module, work in ((workflow, "begin"), (search, "start_ray"), (retraining, "lease"), (registering, "publish")):
        monkeypatch.setattr(module, work, worked)
    root, name = glyphs.rsplit("/", 1)
    stored = [f"tracking.{key}={value}" for key, value in tracking.items()]
    data = [f"data.name={name}", f"data.root={root}"]
    made = [f"storage={tmp_path}/runs", *stored]
    campaign = ["campaign=metric_scale", f"base={data}", "name=asked", *made]
    asked = {
        workflow.train: compose("train", ["name=asked", *data, *made, "register_as=team/products"]),
        search.tune: compose("tune", [*campaign, "register_as=team/products"]),
        retraining.retrain: compose("retrain", ["data=folder", "data.source.path=images", *data, *made])
        | {"register_as": "team/products"},
        deliver: compose("register", [f"run={run}", *stored, "register_as=team/products"]),
    }
    for job, raw in asked.items():
        with pytest.raises(PipelineError, match=r"^register_as='team/products': a model's name is made of letters"):
            job(raw)
        with pytest.raises(InterruptedError):
            job({**raw, "register_as": "team products"})
    assert not (tmp_path / "runs" / "asked" / "run.json").exists()


@pytest.fixture
def album(tmp_path: Path, pictures: np.ndarray) -> Path:
    """Five people with two images each, and queries of them and of a stranger, one of them broken."""
    for person in range(6):
        for number in range(4):
            kind = "support" if number < 2 else "queries"
            if kind == "support" and person == 5:
                continue
            path = tmp_path / kind / f"person {person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[person, number, 0]).save(path)
    (tmp_path / "queries" / "broken.png").write_bytes(b"no image")
    return tmp_path


@pytest.fixture
def model(tmp_path: Path, run: Path) -> Path:
    checkpoint = load_checkpoint(str(run / "step_000008"))
    FewShotClassifier.from_weights(SPEC, checkpoint.model, CALIBRATION).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_run_that_was_to_be_registered_nowhere_is_delivered_without(run: Path, tracking: dict) -> None:
    described = json.loads((run / "run.json").read_text())
    described["config"]["register_as"] = None
    store.write_bytes(str(run / "run.json"), json.dumps(described).encode())
    status, out, said = job("register", f"run={run}", *options(tracking), "--json")
    assert status == 0 and json.loads(out)["metrics_added"] > 0 and "model" not in json.loads(out)
    assert "register_as=NAME" in said
    assert result("register", f"run={run}", "register_as=people", *options(tracking))["model"] == "models:/people/1"


def test_register_then_classify_from_the_registry(run: Path, tracking: dict, album: Path) -> None:
    calibration = json.dumps(CALIBRATION.to_dict()).encode()
    store.write_bytes(str(run / "report" / "calibration.json"), calibration)
    made = result("register", "run=first-run", f"storage={run.parent}", *options(tracking))
    assert made["created"] and made["model"] == "models:/people/1"
    again = result("register", f"run={run}", *options(tracking))
    assert not again["created"] and again["metrics_added"] == 0 and again["version"] == 1
    asked = [f"support={album}/support", f"queries={album}/queries", *options(tracking)]
    answers = result("classify", "model=models:/people@challenger", *asked, "top_k=2")
    classifier = pull("models:/people/1", tracking)
    support, labels = read_support(album / "support", classifier.shape)
    queries = read_queries(album / "queries", classifier.shape)
    own = classifier.classify(classifier.enrol(support.images, labels), queries.images)
    assert [row["nearest"] for row in answers["answers"]] == own.labels
    assert [row["known"] for row in answers["answers"]] == own.known.tolist()
    assert [row["label"] is None for row in answers["answers"]] == (~own.known).tolist()
    np.testing.assert_allclose([row["score"] for row in answers["answers"]], own.scores)
    assert all(len(row["top"]) == 2 for row in answers["answers"])
    assert [Path(entry["file"]).name for entry in answers["skipped"]] == ["broken.png"]


def test_enrol_once_and_ask_often(model: Path, album: Path, tmp_path: Path) -> None:
    file = tmp_path / "people.safetensors"
    made = result("classify", f"model={model}", f"support={album}/support", f"save_enrolment={file}")
    assert made["classes"] == [f"person {n}" for n in range(5)] and "answers" not in made
    more = album / "more" / "person 5"
    more.mkdir(parents=True)
    (album / "queries" / "person 5" / "3.png").rename(more / "3.png")
    grown = result(
        "classify", f"model={model}", f"enrolment={file}", f"support={more.parent}", f"save_enrolment={file}"
    )
    assert grown["enrolment"] == "1 classes added, 5 untouched" and Enrolment.load(file).way == 6
    answers = result("classify", f"model={model}", f"enrolment={file}", f"queries={album}/queries", "threshold=none")
    assert answers["enrolment"] == f"6 classes from {file}", "nothing was added now"
    assert Enrolment.load(file).images is not None
    given_away = [f"enrolment={file}", f"save_enrolment={album}/bare", "keep_images=false"]
    for support in ([], [f"support={more.parent}"]):  # with images that were in the file, and with new ones besides
        result("classify", f"model={model}", *given_away, *support)
        assert Enrolment.load(f"{album}/bare").images is None
    right = [Path(row["file"]).parent.name == row["label"] for row in answers["answers"]]
    assert len(right) == 11 and sum(right) >= 9


@pytest.mark.parametrize("kind", ["bucket", "file"])
def test_an_enrolment_lies_where_it_was_said_to(
    kind: str, model: Path, album: Path, tmp_path: Path, moto_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at an address, and where that is no place of this machine: nothing is made in the working directory."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    place = f"{moto_bucket}/enrolments/people" if kind == "bucket" else f"file://{tmp_path}/kept/people"
    made = result("classify", f"model={model}", f"support={album}/support", f"save_enrolment={place}")
    assert made["saved"] == place and store.exists(place) and list(work.iterdir()) == []
    (tmp_path / "copy").write_bytes(store.read_bytes(place))
    assert Enrolment.load(tmp_path / "copy").classes == made["classes"]
    asked = [f"model={model}", f"queries={album}/queries", "threshold=none"]
    there = result("classify", *asked, f"enrolment={place}")
    assert there["answers"] == result("classify", *asked, f"enrolment={tmp_path}/copy")["answers"]
    for content, said in ((b"no tensors", "is not a readable safetensors file"), (b"", "enrol the classes again")):
        store.write_bytes(place, content)
        status, _, err = job("classify", *asked, f"enrolment={place}")
        assert status == 2 and err.startswith(f"error: {place} ") and said in err and err.count("\n") == 1
    status, _, err = job("classify", *asked, f"enrolment={place}s")
    assert status == 2 and err == f"error: {place}s does not exist\n"


def test_the_table_says_what_was_done(model: Path, album: Path) -> None:
    asked = [f"model={model}", f"support={album}/support", f"queries={album}/queries"]
    command = [sys.executable, "-m", "jobs.classify", *asked, "threshold=-1e-9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "5 classes learnt from 10 images"
    assert lines[1].split() == ["file", "answer", "probability", "score", "nearest"]
    assert sum(" unknown  " in line for line in lines) == 12
    assert lines[-2] == "12 images, 12 unknown (threshold -1e-09)"
    assert lines[-1].startswith("1 file could not be read:") and "broken.png" in lines[-1]
    _, calibrated, _ = job("classify", *asked)
    assert "calibrated for 5 classes of 1 images: 5.0 % of strangers pass, 20.0 % of enrolled fail" in calibrated


def test_a_class_called_unknown_is_told_from_strangers(model: Path, album: Path) -> None:
    (album / "support" / "person 0").rename(album / "support" / "unknown")
    asked = [f"model={model}", f"support={album}/support", f"queries={album}/queries"]
    answered = {}
    for threshold in ("none", "1e9"):
        _, told, _ = job("classify", *asked, f"threshold={threshold}")
        answered[threshold] = [line.split(".png")[1].split()[0] for line in told.splitlines() if " %  " in line]
    assert "unknown" in answered["none"] and answered["1e9"] == ["(unknown)"] * 12


def test_a_terminal_shows_names_as_they_are(model: Path, album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No brackets are markup, and no colons an emoji's."""
    queries = album / "queries" / "person 0"
    (queries / "2.png").rename(queries / "img[final].png")
    (queries / "3.png").rename(queries / ":apple:[bold].png")
    closing = queries / "x[" / "a].png"
    closing.parent.mkdir()
    (album / "queries" / "person 1" / "2.png").rename(closing)
    for person, name in enumerate(("[red]apple", "a:apple:b", "[")):
        (album / "support" / f"person {person}").rename(album / "support" / name)
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "200")
    with contextlib.redirect_stdout(terminal):
        asked = ["threshold=none", "top_k=5", f"support={album}/support", f"queries={queries}"]
        classify(compose("classify", [f"model={model}", *asked]))
    shown = terminal.getvalue()
    for name in ("img[final].png", ":apple:[bold].png", "x[/a].png", "[red]apple", "a:apple:b", "[ "):
        assert shown.count(name) >= (1 if name.endswith("png") else 3), name
    assert "\x1b[" in shown, "it was drawn for a terminal"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_give_a_terminal_no_commands(model: Path, album: Path, terminal: bool) -> None:
    """A file's name may hold them, or a line break, and photographs come from strangers."""
    queries, screen = album / "queries" / "person 0", io.StringIO()
    (queries / "2.png").rename(queries / "two\nlines.png")
    (queries / "3.png").rename(queries / "\x1b[2Jgone.png")
    (queries / "\x1b[1mbroken.png").write_bytes(b"no image")
    screen.isatty = lambda: terminal  # type: ignore[method-assign]
    with contextlib.redirect_stdout(screen):
        asked = ["threshold=none", f"support={album}/support", f"queries={queries}"]
        answers = classify(compose("classify", [f"model={model}", *asked]))["answers"]
    for name in (r"two\nlines.png", r"\x1b[2Jgone.png", r"\x1b[1mbroken.png"):
        assert name in screen.getvalue()
    assert "\x1b[2J" not in screen.getvalue()
    assert {Path(answer["file"]) for answer in answers} == {queries / "two\nlines.png", queries / "\x1b[2Jgone.png"}


@pytest.mark.parametrize("told", ["", "--json"])
def test_queries_may_be_relative_and_absolute(
    told: str, model: Path, album: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(album / "queries")
    queries = f"queries=[person 0,{album}/queries/person 1/2.png]"
    status, out, err = job("classify", f"model={model}", f"support={album}/support", queries, *filter(None, [told]))
    assert status == 0, err
    files = [line.partition(".png")[0] for line in (err if told else out).splitlines() if ".png" in line]
    assert files == ["person 0/2", "person 0/3", "person 1/2"]
    if told:
        assert json.loads(out)["answers"][0]["file"] == "person 0/2.png"


def test_the_rate_of_strangers_is_asked_for(run: Path, album: Path, tmp_path: Path) -> None:
    """The answer tells what the threshold did in validation, how sure that is, and what it cannot promise."""
    rates = tuple(
        Rate(asked, -asked, Share(asked, asked / 2, asked * 2), Share(0.5 - asked, 0.2, 0.6))
        for asked in (0.01, 0.05, 0.2)
    )
    point = replace(
        CALIBRATION.points[0], way=3, shot=2, threshold=-0.05, score="energy", auroc={"energy": 0.9}, oscr=0.8,
        rates=rates, stranger_images=30, stranger_classes=12,
    )  # fmt: skip
    checkpoint = load_checkpoint(str(run / "step_000008"))
    made = FewShotClassifier.from_weights(SPEC, checkpoint.model, replace(CALIBRATION, points=(point,)))
    made.save(tmp_path / "model")
    asked = [f"model={tmp_path}/model", f"support={album}/support", f"queries={album}/queries"]
    _, told, _ = job("classify", *asked, "unknown.pass=0.2")
    assert "threshold -0.2, calibrated for 3 classes of 2 images by the log-sum-exp of the logits: " in told
    assert "20.0 % (10.0 to 40.0) of strangers pass, 30.0 % (20.0 to 60.0) of enrolled fail" in told
    assert "from 30 strangers of 12 classes; validation had too few classes to tell about 5" in told
    assert "no promise" not in told
    _, told, _ = job("classify", *asked)
    assert "threshold -0.05" in told and "too few to tell a rate under 10.0 %" in told
    wide = replace(rates[2], passed=Share(0.2, 0.1, 0.41))
    points = (replace(point, rates=(*rates[:2], wide)),)
    FewShotClassifier.from_weights(SPEC, checkpoint.model, replace(CALIBRATION, points=points)).save(tmp_path / "few")
    _, told, _ = job("classify", f"model={tmp_path}/few", *asked[1:], "unknown.pass=0.2")
    assert "no promise: 12 validation classes are too few for 20 %, of other strangers up to 41.0 % may pass" in told
    for arguments, message in (
        (["unknown.pass=0.05"], "unknown.pass=0.05: validation had 30 strangers, too few to tell a rate under 0.1"),
        (["unknown.pass=0.2", "threshold=none"], "unknown.pass=0.2 sets the threshold: leave out threshold=none"),
        (["unknown.pass=1.5"], "unknown.pass=1.5: input should be less than 1"),
    ):
        status, _, err = job("classify", *asked, *arguments)
        assert status == 2 and message in err, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=x"], "give support=FOLDER of labelled images, or enrolment=FILE"),
        (["model=x", "support=."], "give queries=FOLDER"),
        (["model=nowhere", "support=.", "queries=."], "model=nowhere: give models:/NAME@ALIAS"),
        (["model=x", "support=.", "queries=.", "threshold=often"], "threshold='often': give auto, none or a number"),
        (["model=x", "support=.", "queries=.", "device=abacus"], "device=abacus: torch cannot use it here"),
        (["modle=x"], "modle"),
        ([], "model must be given"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    status, out, err = job("classify", *arguments)
    assert status == 2 and out == ""
    (line,) = err.strip().splitlines()
    assert message in line
