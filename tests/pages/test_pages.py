"""Pages from a tracking store: what stands on them, and what a hostile store cannot make of them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jobs._main import run as run_job
from jobs.report import dispatch as report
from pipeline import workflow
from pipeline.config import compose
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, plan_episodes
from pipeline.errors import PipelineError
from pipeline.evaluation.evaluate import EpisodicProtocol, Result
from pipeline.evaluation.model import Model
from pipeline.model import build_model, build_preprocess
from pipeline.pages.build import make_pages
from pipeline.pages.card import CARD, SHEET, draw_card
from pipeline.pages.facts import Card, Tiles, checked
from pipeline.pages.images import Sheet
from pipeline.pages.render import file_name
from pipeline.pages.tables import Cell, Table, number
from pipeline.training.runs import CALIBRATION, Run
from tests.pages.stores import EVIL, PAPERS, make_run, tracking_in


@pytest.fixture(scope="module")
def pages(pages_folder) -> dict[str, str]:
    """The text of every page of a store with models and campaigns, by file name."""
    return {path.name: path.read_text() for path in pages_folder.glob("*.html")}


@pytest.fixture(scope="module")
def evil_pages(evil_folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in evil_folder.glob("*.html")}


class Outline(HTMLParser):
    """Elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def test_every_page_is_there_and_every_link_leads_to_one(pages):
    assert set(pages) == {
        "index.html", "model-glyphs.html", "model-matching.html", "campaign-alpha.html",
        "campaign-running.html",
    }  # fmt: skip
    for text in pages.values():
        for tag, attributes in Outline(text).elements:
            if tag == "a":
                where = str(attributes["href"])
                if where.startswith("data:text/csv"):
                    continue
                name, _, anchor = where.partition("#")
                assert name in pages
                assert not anchor or f'id="{anchor}"' in pages[name]


def test_nothing_is_fetched_from_anywhere(pages, evil_pages):
    for text in [*pages.values(), *evil_pages.values()]:
        for tag, attributes in Outline(text).elements:
            assert tag not in ("iframe", "object", "embed", "form", "base")
            for key in ("src", "srcset", "action", "xlink:href"):
                assert attributes.get(key) is None or str(attributes[key]).startswith("data:image/"), (tag, attributes)
            assert tag != "link" or attributes["href"] == "data:,"
            assert not any(key.startswith("on") or key == "style" for key in attributes), (tag, attributes)


def test_markup_of_the_store_is_text(evil_pages):
    assert len(evil_pages) == 4  # two models, a campaign and the leaderboard
    for name, text in evil_pages.items():
        assert text.count("<script>") == 1 and text.count("<style>") == 1
        assert "<img src=x" not in text
        assert re.fullmatch(r"[a-z0-9_.-]+", name)
    assert sum("&lt;script&gt;document.title" in text for text in evil_pages.values()) == len(evil_pages) - 1
    card = next(text for name, text in evil_pages.items() if name.startswith("model-script"))
    assert "What it confuses" in card and "Episode 3" in card


def test_figures_that_are_none_are_left_out(evil_pages):
    assert "700.00" not in evil_pages["index.html"] and "50.00 ± 10.00" in evil_pages["index.html"]


def test_the_policy_allows_this_style_and_script_alone(pages):
    for text in pages.values():
        policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
        assert policy is not None
        allowed = policy[1].replace("&#39;", "'")
        assert allowed.startswith("default-src 'none'; img-src data:;")
        for tag in ("style", "script"):
            body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
            assert body is not None
            digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in allowed


def test_the_leaderboard_has_every_run_with_its_model(pages):
    text = pages["index.html"]
    for name in ("first", "second", "matching"):
        assert f"<code>{name}</code>" in text
    assert 'href="model-glyphs.html">glyphs v1</a>' in text and "@champion v1" in text
    assert 'href="campaign-alpha.html">alpha</a>' in text and "running" in text


def test_a_model_card_has_its_parts(pages):
    text = pages["model-glyphs.html"]
    for part in (
        "@champion", "Accuracy by way and shot", "untrained, %", "23.45", "Data and recipe",
        "python -m jobs.train method=prototypical",
        "strangers that pass", "expected calibration error", "What it confuses", "How it sees unseen classes",
        "Episodes it fails on", "there was no champion", "60 train, 40 val, 40 test",
        "How strangers are told", "87.12", "too few strangers", "AUROC of the scores that were compared",
        "strangers that pass 1.0 to 23.0; too few classes to promise 5 %", '<span class="warn">45.00</span>',
        "what is marked is no promise: 7 validation classes or fewer leave room for more than 2 times the strangers",
    ):  # fmt: skip
        assert part in text, part
    assert "data:image/png;base64," in text and text.count("<svg") == 5


def test_a_campaign_page_has_its_parts(pages):
    text = pages["campaign-alpha.html"]
    for part in ("+5.00 points", "method.scale (log scale)", "Parallel coordinates", "not among the best at step 20",
                 "the loss is no number", "finalist, seed 2", "jobs.train config=best.yaml"):  # fmt: skip
        assert part in text, part
    assert text.count("<svg") == 3
    running = pages["campaign-running.html"]
    assert "not ended yet" in running and "not among the best at step 20" in running and running.count("<svg") == 3


def test_published_figures_stand_beside_those_of_the_runs(pages, evil_pages):
    assert "paper 61.5 ± 0.4" in pages["index.html"] and "◇ published" in pages["index.html"]
    assert "Prototypical networks" in pages["index.html"] and "a paper" in pages["model-glyphs.html"]
    assert "a paper" not in pages["model-matching.html"]
    assert "published" not in evil_pages["index.html"], "without a file nothing is said of papers"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("{}", "row 1: needs label, method"),
        (json.dumps([*PAPERS, {**PAPERS[0], "accuracy": "61"}]), "row 2: needs label, method"),
        (json.dumps([{k: v for k, v in PAPERS[0].items() if k != "shot"}]), "row 1: .* way and shot or a setting"),
        (None, "does not exist"),
    ],
)
def test_a_file_of_published_figures_is_checked(tmp_path, content, message):
    if content is not None:
        (tmp_path / "papers.json").write_text(content)
    arguments = ["what=pages", f"output={tmp_path}/html", f"tracking.uri=sqlite:///{tmp_path}/none.db"]
    with pytest.raises(PipelineError, match=message):
        report(compose("report", [*arguments, f"published={tmp_path}/papers.json"]))
    assert not (tmp_path / "html").exists()


@pytest.mark.slow
def test_an_evaluation_after_training_is_published(ray_session, glyphs, database, tmp_path):
    """Figures of other episodes come beside those that are there, and the card is made anew."""
    tracking = tracking_in(tmp_path, database)
    make_run(glyphs, tmp_path / "runs", "late")
    asked = ["run=late", f"storage={tmp_path}/runs", "way=[3]", "shot=[1]", "query=2", "episodes=6", "publish=true"]
    given = [f"tracking.{key}={value}" for key, value in tracking.items()]
    found = workflow.evaluate_job(compose("evaluate", [*asked, *given]))
    made = make_pages(tracking, str(tmp_path / "html"))
    assert made["problems"] == []
    text = (tmp_path / "html" / "index.html").read_text()
    assert f"{100 * found['results'][0]['accuracy']:.2f} ±" in text
    assert all(heading in text for heading in ("3-way 1-shot", "5-way 1-shot", "5-way 5-shot"))
    card = json.loads((tmp_path / "runs" / "late" / "report" / CARD).read_text())
    assert card["question"]["way"] == 3 and card["question"]["episodes"] == 6
    points = json.loads((tmp_path / "runs" / "late" / "report" / CALIBRATION).read_text())["points"]
    assert len(points) == 12 and all(len(point["rates"]) > 10 for point in points)  # calibrated by this version


def test_only_a_runs_own_episodes_are_published():
    with pytest.raises(PipelineError, match="publish=true"):
        workflow.evaluate_job(compose("evaluate", ["run=any", "protocol=generalized", "publish=true"]))


def test_an_empty_store_says_what_to_do(tmp_path, capsys):
    arguments = ["pages", f"output={tmp_path}/html", f"tracking.uri=sqlite:///{tmp_path}/none.db", "--json"]
    with pytest.raises(SystemExit) as ended:
        run_job("report", report, arguments, word="what")
    assert ended.value.code == 0
    made = json.loads(capsys.readouterr().out)
    assert made["pages"] == ["index.html"]
    assert "python -m jobs.demo" in (tmp_path / "html" / "index.html").read_text()
    assert not (tmp_path / "none.db").exists()


def test_no_store_at_all_is_said_in_one_line(tmp_path):
    with pytest.raises(PipelineError, match="tracking.uri is null"):
        report(compose("report", ["what=pages", "tracking=none", f"output={tmp_path}"]))


def test_figures_can_be_had_as_csv_that_computes_nothing():
    table = Table(["name", "x"], [[Cell("=HYPERLINK(1)"), number(-0.5)], [Cell("a,b"), Cell()]])
    text = base64.b64decode(table.csv.partition(",")[2]).decode()
    assert text.splitlines() == ["name,x", "'=HYPERLINK(1),-0.5", '"a,b",']


def test_file_names_are_plain_and_different():
    names = ["a", "A", file_name("", "A")[1:-5], "a b", "a-b", "../../etc", "", "é", "a" * 300, "a" * 301, EVIL]
    made = [file_name("model", name) for name in names]
    assert len(set(made)) == len(names) and all(re.fullmatch(r"model-[a-z0-9_-]+\.html", name) for name in made)


def test_an_image_that_is_none_gives_no_image():
    described = Tiles(columns=4, width=4, height=4, count=10)
    assert Sheet(b"GIF89a", described).uri(0) is None
    assert Sheet(None, described).uris([0, 1]) == ()


@pytest.fixture(scope="module")
def made(glyphs):
    """A card's files, and what it must say: confusions, queries asked, accuracies; episodes answered one by one."""
    import torch

    torch.manual_seed(0)
    spec = {
        "method": {"name": "prototypical"}, "backbone": {"name": "conv4", "width": 4},
        "input": {"shape": [1, 28, 28], "scaling": "unit"}, "way": 5, "classes": 60,
    }  # fmt: skip
    method, preprocess, dataset = build_model(spec), build_preprocess(spec), Dataset(glyphs, verify=False)
    for _ in range(30):  # batch-norm learns what images are like: answers do not hang on the last bit
        method.backbone(preprocess(torch.from_numpy(dataset.gather(np.arange(0, 1200, 12)))))
    table = class_table(dataset.manifest, "test")
    counts, asked, accuracies = {}, {}, []
    for episode in range(8):
        plan = plan_episodes(table, EpisodeSpec(5, 2, 3), 3, np.asarray([episode]))
        images = preprocess(torch.from_numpy(dataset.gather(plan.rows[0])))[None]
        labels = torch.from_numpy(plan.labels[:, : plan.support].copy())
        with torch.no_grad():
            method.eval()
            state = method.adapt(images[:, : plan.support], labels, 5)
            answers = method.classify(state, images[:, plan.support :]).argmax(-1)[0].tolist()
        truth = plan.labels[0, plan.support :].tolist()
        accuracies.append(np.mean([a == t for a, t in zip(answers, truth, strict=True)]))
        names = [dataset.manifest.class_names[int(i)] for i in plan.classes[0]]
        for t, a in zip(truth, answers, strict=True):
            for other in names:
                asked[names[t], other] = asked.get((names[t], other), 0) + 1
            counts[names[t], names[a]] = counts.get((names[t], names[a]), 0) + 1
    protocol = EpisodicProtocol(glyphs, "test", 5, 2, 3, 8, 3)
    files = draw_card(method, preprocess, dataset, protocol, np.asarray(accuracies), {"run": "r", "step": 4})
    return files, counts, asked, accuracies, dataset


class TestCard:
    """What is measured for a model card, against episodes drawn and answered one by one."""

    def test_confusion_is_of_the_evaluated_episodes(self, made):
        files, counts, asked, accuracies, _ = made
        card = json.loads(files[CARD])
        assert card["accuracy"] == pytest.approx(np.mean(accuracies))
        assert card["pairs"]
        for pair in card["pairs"]:
            names = card["classes"][pair["true"]]["name"], card["classes"][pair["given"]]["name"]
            assert names[0] != names[1]
            assert pair["count"] == counts[names] and pair["asked"] == asked[names]
        wrong = sorted((count for (t, g), count in counts.items() if t != g), reverse=True)
        assert [pair["count"] for pair in card["pairs"]] == wrong[: len(card["pairs"])]

    def test_the_worst_episodes_are_those_and_are_replayed(self, made):
        files, _, _, accuracies, _ = made
        card = json.loads(files[CARD])
        assert [number for number, _ in card["worst"]] == np.argsort(accuracies, kind="stable").tolist()
        for failure in card["failures"]:
            assert failure["accuracy"] == pytest.approx(accuracies[failure["number"]])
            right = sum(one["right"] for one in failure["classes"])
            assert right / 15 == pytest.approx(failure["accuracy"])

    def test_images_on_the_sheet_are_the_classes_own(self, made, tmp_path):
        files, _, _, _, dataset = made
        (tmp_path / "sheet.png").write_bytes(files[SHEET])
        sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
        card = json.loads(files[CARD])
        for known in card["classes"]:
            position = dataset.manifest.class_names.index(known["name"])
            for offset, tile in enumerate(known["tiles"]):
                row, column = divmod(tile, card["tiles"]["columns"])
                found = sheet[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
                start = int(dataset.manifest.class_starts[position])
                assert np.array_equal(found, dataset.gather(np.asarray([start + offset]))[0, 0])

    def test_a_card_is_what_the_pages_take(self, made):
        card = checked(Card, json.loads(made[0][CARD]))
        assert card is not None and card.consistent
        total = sum(b.queries for b in card.reliability.bins)
        assert total == 8 * 15
        right = sum(b.queries * b.accuracy for b in card.reliability.bins)
        assert right / total == pytest.approx(card.accuracy)


def test_a_run_is_published_by_its_own_figures_though_another_has_its_name(glyphs, tmp_path, monkeypatch):
    """One of another folder of runs that it is compared with, or its own first weights where it is called untrained."""
    protocol = EpisodicProtocol(glyphs, "test", 5, 1, 4, episodes=2)
    subjects = {}
    for folder in ("mine", "theirs"):
        run = Run("untrained", f"{tmp_path}/{folder}/untrained", compose("train"), {}, {})
        subjects[folder] = Model({"backbone": {}}, {}, "untrained", glyphs), run
    measured = [0.1, 0.2, 0.3]  # of mine, its first weights, theirs
    written: dict[str, bytes] = {}
    cards: list[list[dict]] = []
    monkeypatch.setattr(workflow, "_subject", lambda name, *rest: subjects[name])
    monkeypatch.setattr(workflow, "_untrained", lambda model, run: replace(model, label="untrained"))
    monkeypatch.setattr(Model, "build", lambda self: [SimpleNamespace(summarises=False), None])
    monkeypatch.setattr(workflow, "EmbeddedSplits", lambda *given: SimpleNamespace(of=lambda *which: None))
    monkeypatch.setattr(workflow, "model_for", lambda model, dataset: model)
    for name in ("start_ray", "check_resources", "_write_calibration"):
        monkeypatch.setattr(workflow, name, lambda *given: None)
    monkeypatch.setattr(
        workflow, "measure",
        lambda config, models, *rest: [
            (model, [Result(protocol, np.asarray([of, of]))]) for model, of in zip(models, measured, strict=True)
        ],
    )  # fmt: skip
    monkeypatch.setattr(workflow, "_write_report", lambda run, files: written.update(files))
    monkeypatch.setattr(workflow, "_write_card", lambda *given: cards.append(given[-2]))
    monkeypatch.setattr(workflow, "best_checkpoint", lambda uri: f"{uri}/step_00000012")
    monkeypatch.setattr("pipeline.registry.publish.publish", lambda *given, **how: SimpleNamespace(run_id="x"))
    asked = ["run=mine", "compare=theirs", "untrained=true", "way=5", "shot=1", "query=4", "episodes=2", "publish=true"]
    found = workflow.evaluate_job(compose("evaluate", asked))
    assert [(entry["accuracy"], entry["step"]) for entry in json.loads(written["evaluation.json"])] == [(0.1, 12)]
    assert [entry["accuracy"] for entry in cards[0]] == [0.2]
    assert [entry["model"] for entry in found["results"]] == ["untrained", "untrained", f"{tmp_path}/theirs/untrained"]
