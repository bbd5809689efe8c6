"""Without Ray: trials in their order, the ledger and what is resumed from it, the finalists, the best configuration."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import store
from pipeline.config import CONF, compose, to_yaml, validate
from pipeline.errors import PipelineError
from pipeline.search.arguments import translate
from pipeline.search.asha import ASHA
from pipeline.search.campaign import begin
from pipeline.search.delivery import Delivery
from pipeline.search.finalists import choose, judge
from pipeline.search.ledger import Ledger, Record
from pipeline.search.results import statement, summary, trials_table
from pipeline.search.run import conclude
from pipeline.search.searchers import FinalistTrials, SearchTrials, room
from pipeline.search.space import propose
from pipeline.training.checkpoint import save_checkpoint
from pipeline.training.config import TrainConfig
from pipeline.training.learner import Learner
from pipeline.training.prepare import prepare
from pipeline.training.runs import write_run

DEFAULT = {
    "method": "prototypical", "method.distance": "squared_euclidean", "method.scale": 1.0, "method.learn_scale": False,
}  # fmt: skip


def surrogate(record: Record) -> float:
    return round(0.9 - 0.1 * abs(np.log10(record.values["method.scale"]) - 1), 6)


def work(plan, trials: int | None = None) -> list[Record]:
    """Do what Tune does with trials that all finish; stop in the midst of the last."""
    done: list[Record] = []
    while (found := plan.next()) is not None:
        record, _ = found
        record = record.with_point(6, surrogate(record) - 0.1)
        plan.ledger.put(record)
        if len(done) + 1 == trials:
            return done
        plan.end(replace(record.with_point(12, surrogate(record)), status="finished"))
        done.append(record)
    return done


@pytest.mark.parametrize("name", sorted({path.stem for path in (CONF / "campaign").glob("*.yaml")} - {"heads"}))
def test_the_first_trials_of_every_ready_campaign_can_be(arguments, name):
    """Those on features: tests/evaluation/test_embed_dataset.py."""
    raw = compose("tune", translate(arguments("first=[{}]", campaign=name)))
    small = begin(raw)
    whole = compose("tune", [f"campaign={name}"])
    assert whole["campaign"] == name and whole["first"]
    small.prepare(small.default, "small-0000")


def test_the_first_trials_are_the_base_where_nothing_is_given(campaign):
    assert campaign().first[0] == DEFAULT
    small = campaign(first=[{}, {"method.scale": 0.0}])
    assert small.first == [DEFAULT, {**DEFAULT, "method.scale": 0.0}]
    for wrong in ({"method.scale": "high"}, {"method.distance": "manhattan"}, {"method.scales": 1}):
        with pytest.raises(PipelineError, match=r"first\[0\]: method.*(outside the space|no key of the space)"):
            campaign(first=[wrong])
    with pytest.raises(PipelineError, match="objective.episodes=1: .*greater than or equal to 2"):
        campaign("objective.episodes=1")


@pytest.mark.parametrize("method", ["prototypical", "matching", "tadam"])
def test_the_metric_scale_of_every_method_can_be_searched(campaign, method):
    assert {values["method"] for values in campaign(f"fix.method={method}").first} == {method}
    assert campaign(f"base.method={method}").default == DEFAULT


def test_a_fixed_number_is_the_same_however_it_is_written_and_leaves_no_first_trial_twice(campaign):
    metrics = ("squared_euclidean", "euclidean", "cosine")
    for scale, said in (("1", metrics), ("1.0", metrics), ("10", ("cosine",))):
        first = campaign("fix.method=prototypical", f"fix.method.scale={scale}").first
        assert [values["method.distance"] for values in first] == list(said)
        assert {values["method.scale"] for values in first} == {float(scale)}
    small = campaign("fix.method=maml", "fix.method.adapt_parameters=head", campaign="inner_lr")
    assert len(small.first) == 1 and small.default["method.adapt_parameters"] == "head"
    with pytest.raises(PipelineError, match="fix.method.learn_scale=1 lies outside the space"):
        campaign("fix.method.learn_scale=1")


def test_so_many_trials_after_the_first_are_drawn_at_random(campaign):
    small = campaign("trials=6", "search.startup=3", first=[{}, {"method.scale": 5.0}])
    plan = SearchTrials(small, Ledger(small.uri))
    at_random = []
    for number in range(6):
        known = [record.known("best") for record in plan.known()]
        record, _ = plan.next()
        at_random.append(record.values == propose(small.space, "tpe", 0, number, known, startup=99))
        plan.end(replace(record.with_point(12, surrogate(record)), status="finished"))
    assert at_random == [False, False, True, True, True, False]


def test_a_group_is_taken_as_it_was_chosen_and_not_by_the_name_in_its_file(campaign):
    space = {"backbone": {"choices": ["conv4", "conv4_strided"]}}
    small = campaign("base.backbone=conv4_strided", space=space, first=[{}])
    assert small.default == {"backbone": "conv4_strided"} and small.compose(small.default)["backbone"]["strided"]


def test_trials_begin_with_runs_that_lie_beside_the_campaign(campaign):
    """As ``jobs.train`` with the same key does; a name that no run has is refused before the first trial."""
    storage = campaign().config.storage
    run = prepare(campaign().compose({}, "first") | {"storage": storage})[2]
    write_run(run)
    learner = Learner(validate(TrainConfig, run.config), run.spec)
    save_checkpoint(store.join(run.uri, "step_00000012"), learner.checkpoint({}, {}))
    small = campaign("base.initial=first")
    _, trial = SearchTrials(small, Ledger(small.uri)).next()
    assert trial.config["initial"] == store.join(run.uri, "step_00000012")
    assert small.whole(small.default, 0)["initial"] == trial.config["initial"]
    with pytest.raises(PipelineError, match=f"initial=firts: neither .* nor the name of a run in {storage}"):
        campaign("base.initial=firts")


def test_a_key_of_the_space_can_be_fixed(campaign):
    whole = compose("tune", ["campaign=metric_scale"])
    fix = {"method": "prototypical", "method.distance": "cosine", "method.learn_scale": False}
    small = campaign(*[f"fix.{key}={json.dumps(value)}" for key, value in fix.items()], first=whole["first"])
    assert small.first == [{**fix, "method.scale": 1.0}, {**fix, "method.scale": 10.0}]
    plan = SearchTrials(small, Ledger(small.uri))
    for number in range(4):
        record, run = plan.next()
        assert {key: record.values[key] for key in fix} == fix and run.config["method"]["distance"] == "cosine"
        plan.end(replace(record.with_point(12, 0.1 * number), status="finished"))
    assert len({record.values["method.scale"] for record in plan.known()}) == 4
    assert campaign("fix.method=matching", first=[{"method": "prototypical"}]).default["method"] == "matching"
    with pytest.raises(PipelineError, match="fix.method.distance=manhattan lies outside the space"):
        campaign("fix.method.distance=manhattan")
    with pytest.raises(PipelineError, match="fix.method.way: the space has no such key; it has method, "):
        campaign("fix.method.way=5")


def test_an_interrupted_search_ends_as_an_untouched_one(campaign):
    """No finished trial is handed out again, the interrupted one goes on with its values, and all values are equal."""
    small = campaign("trials=9", "search.startup=3")
    whole = Ledger(f"{small.uri}/whole")
    work(SearchTrials(small, whole))
    done: list[str] = []
    for stop in (3, 1, 4, None):
        ledger = Ledger(f"{small.uri}/parts")  # all that is left is the file
        done += [record.run for record in work(SearchTrials(small, ledger), stop)]
    assert len(done) == len(set(done)) == 9
    untouched, resumed = whole.search, Ledger(f"{small.uri}/parts").search
    assert [(r.number, r.run, r.values, r.curve) for r in untouched] == [
        (r.number, r.run, r.values, r.curve) for r in resumed
    ]
    assert {record.status for record in resumed} == {"finished"}


def test_a_search_ends_when_all_of_its_space_was_tried(campaign):
    small = campaign("trials=9", space={"method.distance": {"choices": ["cosine", "squared_euclidean"]}}, first=[{}])
    plan = SearchTrials(small, Ledger(small.uri))
    while (found := plan.next()) is not None:
        plan.end(replace(found[0].with_point(12, 0.5), status="finished"))
    assert sorted(r.values["method.distance"] for r in plan.known()) == ["cosine", "squared_euclidean"]
    assert not plan.open()


def test_what_asks_for_the_impossible_has_failed_and_the_others_go_on(campaign):
    space = {"train.way": {"low": 2, "high": 20, "integer": True}}
    small = campaign("trials=4", space=space, first=[{}, {"train.way": 500}])
    ledger = Ledger(small.uri)
    told: list[Record] = []
    plan = SearchTrials(small, ledger, told.append)
    while (found := plan.next()) is not None:
        plan.end(replace(found[0].with_point(12, 0.5), status="finished"))
    assert len(ledger.search) == len(told) == 4
    failed = ledger.search[1]
    assert failed.status == "failed" and "500" in failed.reason and "\n" not in failed.reason
    assert "failed" in trials_table(ledger.search, small.space, "best")


def test_a_damaged_ledger_is_refused(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(PipelineError, match="ledger.jsonl is damaged"):
        Ledger(str(tmp_path))


def test_a_campaign_is_begun_once_and_keeps_its_configuration(arguments, tmp_path):
    raw = compose("tune", translate(arguments("trials=5")))
    assert begin(raw).config.trials == 5
    with pytest.raises(PipelineError, match="has this name; go on with it: python -m jobs.tune resume=small storage="):
        begin(raw)
    place = f"storage={tmp_path}/runs"
    assert begin(compose("tune", ["resume=small", place])).config.trials == 5
    assert begin(compose("tune", ["resume=small", place, "concurrent=1"])).config.concurrent == 1
    with pytest.raises(PipelineError, match="trials: a resumed campaign keeps its stored configuration"):
        begin(compose("tune", ["resume=small", place, "trials=9"]))
    by_folder = begin(compose("tune", [f"resume={tmp_path}/runs/small"]))
    assert (by_folder.name, by_folder.uri) == ("small", f"{tmp_path}/runs/small")
    assert begin(compose("tune", [f"resume={tmp_path}/runs/small/."])).uri == f"{tmp_path}/runs/small"
    with pytest.raises(PipelineError, match="resume=other: no campaign of this name"):
        begin(compose("tune", ["resume=other", place]))


def test_a_campaign_that_was_copied_or_renamed_is_refused_and_not_taken_for_the_one_of_its_name(arguments, tmp_path):
    begin(compose("tune", translate(arguments())))
    runs = tmp_path / "runs"
    shutil.copytree(runs / "small", runs / "other")
    for name in ("other", f"{runs}/other/"):
        with pytest.raises(
            PipelineError, match=f"^resume={runs}/other: this is a copy of campaign small, or .* renamed"
        ):
            begin(compose("tune", [f"resume={name}", f"storage={runs}"]))
    shutil.copytree(runs / "small", tmp_path / "moved" / "small")
    moved = begin(compose("tune", ["resume=small", f"storage={tmp_path}/moved"]))
    assert moved.uri == f"{tmp_path}/moved/small"


def test_a_resumed_campaign_is_told_single_keys_of_where_it_reports(arguments, tmp_path):
    """Whoever gives another timeout keeps the server; what is the default counts where it is named."""
    given = [argument for argument in arguments("concurrent=1") if argument != "tracking=none"]
    begin(compose("tune", translate([*given, "tracking=server", "tracking.uri=http://mlflow:5000"])))
    place = ["resume=small", f"storage={tmp_path}/runs"]
    later = begin(compose("tune", [*place, "tracking.timeout=5"]))
    kept = {"uri": "http://mlflow:5000", "artifacts": None, "experiment": "few-shot", "timeout": 5}
    assert later.config.tracking == kept and later.resume.endswith("tracking.timeout=5")
    assert begin(compose("tune", [*place, "tracking=embedded"])).config.tracking["uri"].startswith("sqlite:///")
    assert begin(compose("tune", [*place, "concurrent=null"])).config.concurrent is None
    assert begin(compose("tune", place)).config.concurrent == 1


NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape=None):
        super().__init__()
        self.layer = nn.Linear(28 * 28, 8)
    def forward(self, x):
        return self.layer(x.flatten(1))
"""


def test_a_campaign_goes_on_from_any_folder_with_what_lay_in_that_of_its_beginning(
    arguments, glyphs, tmp_path, monkeypatch
):
    """As its command says; and so does the winner's configuration."""
    (home := tmp_path / "home").mkdir()
    (elsewhere := tmp_path / "elsewhere").mkdir()
    shutil.copytree(glyphs, home / "datasets" / "glyphs")
    (home / "net.py").write_text(NET)
    monkeypatch.chdir(home)
    own = [a for a in arguments() if not a.startswith(("base.data.root=", "base.backbone."))]
    small = begin(compose("tune", translate([*own, "base.backbone=module", "base.backbone.path=net.py"])))
    monkeypatch.chdir(elsewhere)
    again = begin(compose("tune", shlex.split(small.resume)[3:]))
    places = str(home / "datasets"), str(home / "net.py")
    for found in (again.base, again.whole(again.default, 0)):
        assert (found["data"]["root"], found["backbone"]["path"]) == places
    monkeypatch.chdir(home)
    assert small.whole(small.default, 0)["backbone"]["path"] == places[1]
    monkeypatch.setattr("pipeline.search.campaign.in_submitted_job", lambda: True)
    named = [f"base.data.root={home}/datasets", "base.backbone=module", "base.backbone.path=net.py", "name=job"]
    job = begin(compose("tune", translate([*own, *named])))
    assert job.raw["overrides"] == job.config.overrides, "the job's files are there again for the next job"


def test_campaigns_that_begin_in_one_second_have_folders_of_their_own(arguments, monkeypatch):
    """Also where both looked before one of them wrote."""
    monkeypatch.setattr("pipeline.search.campaign.time.strftime", lambda form: "now")
    given = [argument for argument in arguments() if argument != "name=small"]
    names = [begin(compose("tune", translate(given))).name for _ in range(2)]
    monkeypatch.setattr(store, "exists", lambda uri, _exists=store.exists: "campaign.json" not in uri and _exists(uri))
    names.append(begin(compose("tune", translate(given))).name)
    assert names == ["metric_scale-now", "metric_scale-now-2", "metric_scale-now-3"]
    with pytest.raises(PipelineError, match="name=metric_scale-now: a campaign in .* has this name; go on with it"):
        begin(compose("tune", translate([*given, "name=metric_scale-now"])))


def test_a_base_that_is_not_the_default_s_is_refused(arguments):
    """The first trial of the campaign says what it is compared with, and would have gone before."""
    for wrong, has in (("method=matching", "method=prototypical"), ("method.scale=3", "method.scale=1.0")):
        says = rf"base.{wrong}: .* first trial, which has {has}; to keep \S+ at one value: fix.{wrong}; or leave it out"
        with pytest.raises(PipelineError, match=says):
            begin(compose("tune", translate(arguments(f"base.{wrong}"))))
    both = begin(compose("tune", translate(arguments("base.method=matching", "fix.method=matching"))))
    assert both.default["method"] == "matching"


def test_halving_goes_on_where_it_was():
    """Successive halving by hand: at steps 1, 3 and 9 the best third go on; replayed, it decides the same."""
    rng = np.random.default_rng(0)
    curves = {f"run{n}": [(s, float(rng.random())) for s in (1, 3, 9, 27)] for n in range(12)}
    kept: dict[str, list] = {}
    untouched, rungs = ASHA("asha", 27, 1, 3), {step: [] for step in (1, 3, 9)}
    for number, (run, curve) in enumerate(curves.items()):
        kept[run] = []
        for step, accuracy in curve:
            kept[run].append((step, accuracy))
            goes_on = untouched.goes_on(number, run, step, accuracy)
            if step == 27:
                assert goes_on
                continue
            cutoff = np.percentile(rungs[step], 200 / 3) if rungs[step] else -1
            rungs[step].append(accuracy)
            assert goes_on == (accuracy >= cutoff)
            if not goes_on:
                break
    assert 1 < sum(curve[-1][0] < 27 for curve in kept.values()) < 12
    half = [Record(n, run, {}, curve=tuple(curve)) for n, (run, curve) in enumerate(kept.items())]
    replayed = ASHA("asha", 27, 1, 3)
    assert [r.run for r in half if not replayed.replay(r)] == [record.run for record in half if record.step < 27]
    for step in (1, 3, 9):
        assert replayed.goes_on(20, "new", step, 0.6) == untouched.goes_on(20, "new", step, 0.6)
    spared = ASHA("asha", 27, 1, 3, spared=len(half))
    assert all(map(spared.replay, half)) and not spared.goes_on(len(half), "late", 1, 0.0)


def test_a_trial_that_was_let_on_goes_on_when_the_campaign_is_resumed(campaign):
    """A later trial validated first: judged again in the order of the trials, it would have been among the worst."""
    small = campaign(f"trials={len(campaign().first) + 2}", "scheduler.kind=asha", "scheduler.grace=6")
    first, ledger = len(small.first), Ledger(small.uri)
    values = small.first[0]
    for number, accuracy in enumerate((0.9, 0.5), start=first):
        run = f"small-{number:04d}"
        ledger.put(Record(number, run, {**values, "method.scale": 2.0 + number}, curve=((6, accuracy),)))
    live = ASHA("asha", 12, 6, 3, spared=first)
    assert live.goes_on(first + 1, "late", 6, 0.5) and live.goes_on(first, "early", 6, 0.9)
    searcher = SearchTrials(small, Ledger(small.uri))
    searcher.replay(ASHA("asha", 12, 6, 3, spared=first))
    assert [record.status for record in searcher.running()] == ["running", "running"]


def test_a_trial_that_was_stopped_unnoted_is_stopped_when_the_campaign_is_resumed(campaign, monkeypatch):
    """The driver was killed between the decision and the ledger: later trials, which had validated by then, count."""
    small = campaign(f"trials={len(campaign().first) + 4}", "scheduler.kind=asha", "scheduler.grace=6")
    first, ledger = len(small.first), Ledger(small.uri)
    live, curves = ASHA("asha", 12, 6, 3, spared=first), [(), ((6, 0.9),), ((6, 0.8),), ((6, 0.7),)]
    for number, curve in enumerate(curves, start=first):
        run = f"small-{number:04d}"
        ledger.put(Record(number, run, {**small.first[0], "method.scale": 2.0 + number}, curve=curve))
    assert [live.goes_on(first + n, f"small-{first + n:04d}", 6, a) for n, a in ((3, 0.7), (2, 0.8), (1, 0.9))]
    unnoted = f"small-{first:04d}"
    assert not live.goes_on(first, unnoted, 6, 0.1)
    searcher = SearchTrials(small, Ledger(small.uri))
    told = lambda record: record.with_point(6, 0.1) if record.run == unnoted else record  # noqa: E731
    monkeypatch.setattr(searcher, "refreshed", told)
    searcher.replay(ASHA("asha", 12, 6, 3, spared=first))
    assert [record.number for record in searcher.running()] == [first + 1, first + 2, first + 3]
    assert searcher.ledger.get(unnoted).status == "stopped"


def test_brackets_of_hyperband_are_a_function_of_the_number():
    brackets = [[ASHA("hyperband", 27, 1, 3, seed)._bracket(n) for n in range(60)] for seed in (0, 0, 1)]
    assert brackets[0] == brackets[1] != brackets[2] and set(brackets[0]) == {0, 1, 2}


def records(*scores: float) -> list[Record]:
    return [Record(n, f"c-{n:04d}", {"x": float(n)}, "finished", curve=((6, s), (12, s))) for n, s in enumerate(scores)]


def test_finalists_are_distinct_finished_and_have_the_default_beside_them():
    trials = [*records(0.5, 0.9, 0.8, 0.7), Record(4, "c-0004", {"x": 1.0}, "finished", curve=((12, 0.9),))]
    trials += [
        Record(5, "c-0005", {"x": 5.0}, "stopped", curve=((6, 0.99),)),
        Record(6, "c-0006", {"x": 6.0}, "failed"),
    ]
    assert [r.number for r in choose(trials, {"x": 0.0}, 2, "best")] == [1, 2, 0]
    assert [r.number for r in choose(trials, {"x": 2.0}, 2, "best")] == [1, 2]
    assert choose([trials[5], trials[6]], {"x": 5.0}, 2, "best") == []
    fallen = [Record(0, "c", {"x": 0.0}, "finished", curve=((6, 0.9), (12, 0.1))), trials[3]]
    assert [r.number for r in choose(fallen, {"x": 9.0}, 1, "last")] == [3]


def test_the_winner_has_the_best_mean_over_seeds_and_is_compared_in_pairs():
    rng = np.random.default_rng(1)
    episodes = rng.random(200) * 0.2
    trials = records(0.5, 0.9, 0.8)
    means = {0: [0.50, 0.52, 0.51], 1: [0.70, 0.40, 0.55], 2: [0.60, 0.62, 0.61]}
    runs = {n: [f"c-{n:04d}-seed{s}" for s in (1, 2, 3)] for n in means}
    measured = {run: episodes + mean for n in means for run, mean in zip(runs[n], means[n], strict=True)}
    verdict = judge(trials, {"x": 0.0}, measured, runs)
    assert [standing.record.number for standing in verdict.standings] == [2, 1, 0]
    assert verdict.winner.run == "c-0002-seed2"
    assert verdict.over_episodes.difference == pytest.approx(0.1) and verdict.over_seeds.difference == pytest.approx(
        0.1
    )
    assert statement(verdict).startswith("the best is better than the default: +10.00 points")
    measured.pop("c-0002-seed1")  # a configuration that fails with one of its seeds does not win
    again = judge(trials, {"x": 0.0}, measured, runs)
    assert again.winner.record.number == 1 and "not measurably better" in statement(again)
    lost = {run: accuracies for run, accuracies in measured.items() if run != "c-0000-seed2"}
    fewer = judge(trials[::2], {"x": 0.0}, lost, runs)  # the winner without its first seed, the default its second
    assert fewer.over_episodes.difference == pytest.approx(0.1) and fewer.over_seeds is None
    assert statement(fewer).endswith("; by 1 of 3 seeds: with the others a run failed")
    gone = judge(trials, {"x": 0.0}, {run: a for run, a in lost.items() if "0000" not in run}, runs)
    assert statement(gone).endswith("could not be trained with the best one's seeds: nothing to compare with")
    alone = judge(trials[:1], {"x": 0.0}, measured, runs)
    assert statement(alone) == "no configuration was better than the default"
    json.dumps(summary(trials, verdict, "best"))
    with pytest.raises(PipelineError, match="no finalist could be trained"):
        judge(trials, {}, {}, runs)


def test_a_campaign_that_mlflow_did_not_take_ends_as_a_run_that_it_did_not_take(campaign, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = {"uri": "http://127.0.0.1:9", "artifacts": None, "experiment": "tests", "timeout": 1}
    small = campaign("trials=1", tracking=server)
    ledger = Ledger(small.uri)
    ledger.put(replace(records(0.5)[0], values=small.default))
    verdict = judge(ledger.search, small.default, {"c-0000": np.ones(10)}, {0: ["c-0000"]})
    found = conclude(small, ledger, Delivery(small), verdict)
    assert found["exit_code"] == 75 and "127.0.0.1:9" in found["undelivered"] and found["best"]["run"] == "c-0000"
    assert capsys.readouterr().out.count("deliver the campaign later with") == 1


def test_repetitions_are_resumed_too(campaign):
    small = campaign("trials=4")
    ledger = Ledger(small.uri)
    work(SearchTrials(small, ledger))
    chosen = choose(ledger.search, small.default, 2, "best")
    assert len(work(FinalistTrials(small, ledger, chosen, [1, 2]), 3)) == 2
    ledger = Ledger(small.uri)
    work(FinalistTrials(small, ledger, chosen, [1, 2]))
    assert [(r.number, r.seed) for r in ledger.repetitions] == [(c.number, s) for s in (1, 2) for c in chosen]
    assert small.prepare(chosen[0].values, "other-seed2", 2).config["seed"] == 2


def test_the_best_configuration_is_taken_as_it_is(campaign, tmp_path):
    """Through the file and back: what trained the trial, with the evaluation and the registration of the base."""
    small = campaign("base.optimizer=sgd", "register_as=mine")
    values = {**small.default, "method.scale": 12.5, "method.distance": "cosine"}
    whole, trial = small.whole(values, seed=4), small.compose(values, "x", 4)
    file = Path(tmp_path / "best.yaml")
    file.write_text(to_yaml(whole))
    taken = compose("train", [f"config={file}"])
    assert taken == whole
    config = validate(TrainConfig, taken)
    assert config.evaluation is not None and config.evaluation.split == "test" and config.register_as == "mine"
    own = ("name", "storage", "evaluation", "register_as")
    assert {k: v for k, v in taken.items() if k not in own} == {k: v for k, v in trial.items() if k not in own}
    moved = compose(
        "train", [f"config={file}", "name=again", "cluster.workers=2", "storage=/elsewhere", "tracking=none"]
    )
    assert (moved["name"], moved["storage"], moved["cluster"]["workers"]) == ("again", "/elsewhere", 2)
    assert moved["cluster"]["restarts"] == whole["cluster"]["restarts"] and moved["tracking"]["uri"] is None
    with pytest.raises(PipelineError, match="steps: config=FILE is taken as it is"):
        compose("train", [f"config={file}", "steps=3"])
    with pytest.raises(PipelineError, match="cannot be read"):
        compose("train", [f"config={tmp_path}/none.yaml"])


def test_trials_share_cores_and_gpus_by_fraction(campaign):
    small = campaign("cpus_per_trial=0.5", "gpus_per_trial=0.25")
    assert small.train.cluster.cpus_per_worker == 0.5 and small.train.cluster.gpus_per_worker == 0.25
    assert room(small.train.cluster, {"CPU": 16.0, "GPU": 2.0}) == 8
    assert room(small.train.cluster, {"CPU": 3.0, "GPU": 2.0}) == 3
    with pytest.raises(PipelineError, match="a trial needs .* the cluster has 16 and 0"):
        room(small.train.cluster, {"CPU": 16.0})
    with pytest.raises(PipelineError, match="workers of one trial cannot share a GPU"):
        campaign("gpus_per_trial=0.25", "base.cluster.workers=2")


def test_how_to_go_on_says_what_the_campaigns_folder_does_not_know(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [a for a in arguments("tracking.uri=sqlite:///own.db") if a != "tracking=none"]
    small = begin(compose("tune", translate(given)))
    assert small.config.tracking["uri"] == f"sqlite:///{tmp_path}/own.db", "the same in every folder"
    place = f"storage={tmp_path}/runs"
    assert small.resume == f"python -m jobs.tune resume=small {place}"
    other = begin(compose("tune", ["resume=small", place, "concurrent=2", "tracking.uri=sqlite:///it's.db"]))
    _, _, _, *words = shlex.split(other.resume)
    again = begin(compose("tune", words))
    assert again.config == other.config and again.resume == other.resume
    assert (again.config.concurrent, again.config.tracking["uri"]) == (2, f"sqlite:///{tmp_path}/it's.db")


def test_a_campaigns_file_may_have_any_name(tmp_path):
    file = tmp_path / "caf\u00e9, (1)" / "campaign" / "my own (2), \u00fc.yaml"
    file.parent.mkdir(parents=True)
    file.write_text((CONF / "campaign" / "inner_lr.yaml").read_text())
    assert compose("tune", translate([f"campaign={file}"]))["space"] == compose("tune", ["campaign=inner_lr"])["space"]
