"""Every configuration composes and builds; what is wrong is refused in one line that names the key."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs._main import run
from pipeline import renamed, store
from pipeline.config import CONF, compose, config_hash, help_text, to_yaml, validate
from pipeline.errors import PipelineError, Stopped, Unavailable
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess
from pipeline.nets.base import Backbone
from pipeline.nets.by_name import resolve
from pipeline.options import check_options
from pipeline.training.config import TrainConfig
from pipeline.training.optim import build_optimizer, build_schedule, check_optimizer

SIZES = {"koch": 105}  # of images, where 28 pixels are too few
OPTIONS = {  # that a backbone cannot do without
    "timm": ["backbone.model=test_resnet", "backbone.weights=null"],
    "module": [f"backbone.path={Path(__file__).parent / 'nets' / 'own_network.py'}"],
}
OWN_BACKBONE = {"relation": "relation_encoder"}  # of methods that cannot do with any


def classes(method: dict, backbone: dict) -> dict:
    return {
        "method": resolve("method", method["name"], "pipeline.methods", Method),
        "backbone": resolve("backbone", backbone["name"], "pipeline.nets", Backbone),
    }


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("method", "backbone", "optimizer", "schedule"),
    [(method, OWN_BACKBONE.get(method, "conv4"), "adam", "constant") for method in choices("method")]
    + [("prototypical", backbone, "adam", "constant") for backbone in choices("backbone") if backbone != "huggingface"]
    + [*itertools.product(["prototypical"], ["conv4"], choices("optimizer"), choices("schedule"))],
)
def test_every_choice_builds(method, backbone, optimizer, schedule):
    raw = compose(
        "train",
        [f"method={method}", f"backbone={backbone}", f"optimizer={optimizer}", f"schedule={schedule}"]
        + OPTIONS.get(backbone, []),
    )
    config = validate(TrainConfig, raw)
    size = 1 if backbone == "features" else SIZES.get(backbone, 28)
    spec = {
        "method": config.method, "backbone": config.backbone, "way": 5, "shot": 1, "classes": 10,
        "input": {"shape": [1, size, size], "scaling": config.input.scaling, "mean": [0.1], "std": [0.3]},
    }  # fmt: skip
    model = build_model(spec)
    build_preprocess(spec)
    build_optimizer(model, config.optimizer)
    check_optimizer(model, config.optimizer)
    factors = [build_schedule(config.schedule, 100)(step) for step in range(100)]
    assert all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion", "lr": 0.1}, r"optimizer.name='lion': choose one of adam, adamw"),
        ({"name": "adam", "lr": 0.1, "momentum": 0.9}, r"unknown key 'optimizer.momentum': adam takes amsgrad, betas"),
        ({"name": "adam", "lr": -1.0}, "optimizer=adam: Invalid learning rate: -1.0"),
        ({"name": "adamw", "lr": 0.1, "betas": [2, 1]}, "optimizer=adamw: Invalid beta parameter at index 0"),
        ({"name": "sgd", "lr": 0.1, "nesterov": True}, "optimizer=sgd: Nesterov momentum requires a momentum"),
        ({"name": "rmsprop", "lr": 0.1, "alpha": "much"}, "optimizer.alpha='much': input should be a valid number"),
    ],
)
def test_a_wrong_optimizer_is_refused_before_it_is_made_and_when_it_is(options, message):
    spec = {
        "method": {"name": "prototypical"}, "backbone": {"name": "mlp", "widths": [4]}, "way": 5, "shot": 1,
        "classes": 5, "input": {"shape": [1, 4, 4], "scaling": "unit", "mean": [0.1], "std": [0.3]},
    }  # fmt: skip
    for judge in (build_optimizer, check_optimizer):
        with pytest.raises(PipelineError, match=message):
            judge(build_model(spec), options)


@pytest.mark.parametrize("recipe", choices("recipe"))
def test_every_recipe_composes(recipe):
    config = validate(TrainConfig, compose("train", [f"recipe={recipe}"]))
    for kind, cls in classes(config.method, config.backbone).items():
        check_options(kind, cls, {key: value for key, value in getattr(config, kind).items() if key != "name"})
    build_schedule(config.schedule, config.steps)


@pytest.mark.parametrize("group", ["cluster", "tracking", "data"])
def test_every_group_composes(group):
    for choice in choices(group):
        validate(TrainConfig, compose("train", [f"{group}={choice}"]))


@pytest.mark.parametrize("key", ["way", "shot"])
def test_an_evaluation_of_nothing_is_refused(key):
    with pytest.raises(PipelineError, match=rf"evaluation.{key}=\[\]: list should have at least 1 item"):
        validate(TrainConfig, compose("train", [f"evaluation.{key}=[]"]))


def test_shares_that_are_given_whole_take_the_place_of_the_usual_ones():
    given = ["data=folder", "data.source.fractions={train: 0.7, test: 0.3}"]
    for job in ("ingest", "retrain"):
        assert compose(job, given)["data"]["source"]["fractions"] == {"train": 0.7, "test": 0.3}
        found = compose(job, ["data=folder", "data.source={path: '~/a b', fractions: {train: 0.7, test: 0.3}}"])
        usual = compose(job, ["data=folder", "data.source.path=~/a b"])["data"]["source"]
        assert found["data"]["source"] == {**usual, "fractions": {"train": 0.7, "test": 0.3}}
    with pytest.raises(PipelineError, match=r"unknown key 'data.source.pth'; did you mean 'data.source.path'"):
        compose("ingest", ["data=folder", "data.source={pth: a}"])
    one = compose("ingest", ["data=folder", "data.source.fractions.val=0.1"])["data"]["source"]["fractions"]
    assert one == {"train": 0.64, "val": 0.1, "test": 0.2}
    with pytest.raises(PipelineError, match=r"unknown key 'data.source.fractions'"):
        compose("ingest", ["data=glyphs", *given[1:]])


@pytest.mark.parametrize("override", ["data.source.size=96", "++data.source.new=1", "data.source={kind: folder}"])
def test_a_training_refuses_keys_of_the_ingest(override):
    with pytest.raises(PipelineError, match=r"data\.source.*: jobs.train takes the dataset as it was ingested"):
        compose("train", [override])


def test_every_key_has_a_comment():
    """Beside it; what the first line of a file says of the whole need not be said again of its name."""
    for path in CONF.rglob("*.yaml"):
        if path.parent.name in ("recipe", "campaign"):  # set keys that are documented where they are defined
            continue
        lines = path.read_text().splitlines()
        assert lines[0].startswith("#"), f"{path.name} does not say what it is"
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text and not text.startswith(("#", "-")) and text.split(":")[0] not in ("name", "kind", "defaults"):
                assert "#" in text, f"{path.name}:{number} has no comment: {text}"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["step=3"], "unknown key 'step'; did you mean 'steps'?"),
        (["train.ways=3"], "unknown key 'train.ways'; did you mean 'train.way'?"),
        (["method=prototypcal"], "method=prototypcal: there is no such method; choose one of"),
        (["steps"], "'steps' is not key=value"),
        (["steps=-1"], "steps=-1: input should be greater than or equal to 0"),
        (["steps=many"], "steps='many'"),
        (["precision=half"], "precision='half'"),
        (["train.shot=[1,2,3]"], "train.shot"),
        (["train.holdout=1.5"], "train.holdout=1.5"),
        (["clip.norm=-1"], "clip.norm=-1"),
        (["cluster.workers=0"], "cluster.workers=0"),
        (["steps=[1"], "steps=[1"),
    ],
)
def test_mistakes_are_refused_in_one_line(overrides, says):
    with pytest.raises(PipelineError) as error:
        validate(TrainConfig, compose("train", overrides))
    assert says in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_a_job_prints_one_line_and_exits_with_2(tmp_path):
    job = [sys.executable, "-m", "jobs.train", f"data.root={tmp_path}", "stepz=3"]
    done = subprocess.run(job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == "error: unknown key 'stepz'; did you mean 'steps'?; see: python -m jobs.train --help"
    job[-1] = "steps=3"
    done = subprocess.run(job, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no dataset at" in done.stderr and "python -m jobs.ingest data=glyphs" in done.stderr


@pytest.mark.parametrize(("error", "status"), [(PipelineError, 2), (Unavailable, 75), (Stopped, 143)])
def test_the_status_says_whether_to_try_again(error, status, capsys):
    def fails(config):
        raise error("what, where")

    with pytest.raises(SystemExit) as exited:
        run("train", fails, [])
    assert exited.value.code == status and "what, where" in capsys.readouterr().err


def test_what_the_cluster_lost_is_one_line_and_what_a_task_raised_a_bug(capsys):
    from ray.exceptions import RayTaskError, WorkerCrashedError

    def fails(config):
        raise config["error"]

    def status(error):
        with pytest.raises(SystemExit) as exited:
            run("train", lambda config: fails({"error": error}), [])
        return exited.value.code, capsys.readouterr().err

    code, said = status(WorkerCrashedError())
    assert code == 75 and said.startswith("error: the cluster lost") and said.count("\n") == 1
    with pytest.raises(ValueError):
        status(RayTaskError("work", "", ValueError("a bug")).as_instanceof_cause())


def test_help_shows_every_key_and_choice():
    text = help_text("train")
    assert "optimizer steps" in text and "--- method: one of" in text and "imprinted" in text
    for key in yaml.safe_load((CONF / "train.yaml").read_text()):
        assert key in text


def test_help_and_suggestions_are_those_of_the_chosen_group():
    assert "per_class" in help_text("ingest") and "per_class" not in help_text("ingest", ["data=folder"])
    assert "# data=folder" in help_text("ingest", ["data=folder", "data.source.path=x"])
    for overrides, says in (
        (["data=folder", "data.source.per_class=3"], r"'data.source.per_class'; did you mean 'data.source.path'\?"),
        (
            ["data=folder", "data.source.frations=3"],
            "did you mean 'data.source.fractions'.* jobs.ingest data=folder --h",
        ),
        (["data.source.per_clas=3"], "did you mean 'data.source.per_class'"),
    ):
        with pytest.raises(PipelineError, match=says):
            compose("ingest", overrides)
    with pytest.raises(PipelineError, match=r"space is a group of keys: add to it with \+space="):
        compose("tune", ["space={optimizer.lr: {low: 0.001}}"])


@pytest.mark.parametrize(
    "typed",
    ["/tmp/\u00e9t\u00e9", "photo (1).png", "/tmp/a,b", "it's", 'a"b', "a=b", "a b", "C:\\x", "{a}", "[x] y"]
    + ["a\\", "1_0", "1e5", "true", "/tmp/a#b", "\u65e5\u672c", "-x", "$x", "/tmp/caf\udce9"],
)  # fmt: skip
def test_paths_and_names_are_taken_as_they_are_typed(typed):
    config = compose("ingest", ["data=folder", f"data.source.path={typed}", f"data.name={typed}", f"data.root={typed}"])
    assert (config["data"]["source"]["path"], config["data"]["name"], config["data"]["root"]) == (typed,) * 3
    assert compose("train", [f"name={typed}"])["name"] == typed
    assert compose("train", ["storage='x,y'"])["storage"] == "x,y"


def test_what_else_may_stand_for_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = compose("ingest", ["data=folder", "data.source.path=~/photos", "data.root='~/sets'", "data.name=~x"])[
        "data"
    ]
    assert (config["source"]["path"], config["root"], config["name"]) == ("/home/me/photos", "/home/me/sets", "~x")
    assert compose("ingest", ["data=folder", "data.source.path=null"])["data"]["source"]["path"] is None
    assert compose("ingest", ["data.root=${oc.env:HOME}/sets"])["data"]["root"] == "/home/me/sets"
    assert compose("classify", ["model=m", "queries=[a.png, b.png]"])["queries"] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("job", "override"), [("classify", "queries="), ("train", "resume="), ("ingest", "data.root=")]
)
def test_an_empty_path_or_name_is_not_the_working_folder(job, override):
    with pytest.raises(PipelineError, match=f"^{override} is empty, as of a variable of the shell that is not set"):
        compose(job, [override])


def test_the_hash_ignores_order():
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


def test_a_key_of_another_name_is_understood_and_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(renamed, "_said", set())
    assert compose("train", ["train.tasks=7"])["train"]["meta_batch_size"] == 7
    assert compose("train", ["++train.tasks=7"])["train"]["meta_batch_size"] == 7
    said = capsys.readouterr().err.splitlines()
    assert said == ["note: train.tasks is called train.meta_batch_size now; the old name goes with the next release"]
    assert compose("ingest", ["max_skipped_share=0.2"])["max_skipped_fraction"] == 0.2
    assert compose("retrain", ["retrain.max_skipped_share=0.2"])["retrain"]["max_skipped_fraction"] == 0.2


def test_a_stored_configuration_with_a_former_key_is_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(renamed, "_said", set())
    now = compose("train")
    stored = renamed.former(now)
    assert "tasks" in stored["train"] and "meta_batch_size" not in stored["train"] and "tasks" in stored["validation"]
    assert validate(TrainConfig, stored) == validate(TrainConfig, now)
    (tmp_path / "best.yaml").write_text(to_yaml(stored))
    assert compose("train", [f"config={tmp_path}/best.yaml"]) == now
    assert "train.tasks is called" in capsys.readouterr().err
    assert renamed.current(renamed.former(now)) == now == renamed.current(now)


def test_a_stored_configuration_is_read_from_an_object_store(moto_bucket, tmp_path):
    """As the command asks that a campaign on one prints; what cannot be read is one line, there and here."""
    now = compose("train", ["data.root=/données"])
    store.write_bytes(f"{moto_bucket}/runs/best.yaml", yaml.safe_dump(now, allow_unicode=True).encode("utf-8"))
    assert compose("train", [f"config={moto_bucket}/runs/best.yaml"]) == now
    (tmp_path / "latin.yaml").write_bytes("name: donnée".encode("latin-1"))
    for place, why in (
        (f"{moto_bucket}/runs/none.yaml", "does not exist"),
        (f"{moto_bucket}/runs", "does not exist|Path does not exist"),
        (f"{tmp_path}/none.yaml", "does not exist"),
        (f"{tmp_path}", "directory"),
        (f"{tmp_path}/latin.yaml", "'utf-8' codec can't decode"),
        ("gs://bucket/best.yaml", "give a local path or s3"),
    ):
        with pytest.raises(PipelineError, match=f"^config={place} cannot be read .*({why})") as refused:
            compose("train", [f"config={place}"])
        assert "\n" not in str(refused.value)


def test_both_names_at_once_are_refused():
    raw = compose("train")
    raw["train"]["tasks"] = 3
    with pytest.raises(PipelineError, match="unknown key 'train.tasks'"):
        validate(TrainConfig, raw)


@pytest.mark.parametrize("job", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_whatever_is_a_path_is_taken_as_it_was_typed_by_every_job(job, monkeypatch):
    """Of every key of a job whose comment begins with a file, a folder or a name."""
    monkeypatch.setenv("HOME", "/home/me")
    places = "file|folder|name or folder|image file"
    begins = re.compile(rf"^(\w+):[^#]*#\s*(?:an? |the )?(?:new )?(?:[\w:]+ )?(?:{places})\b")
    keys = [found[1] for line in (CONF / f"{job}.yaml").read_text().splitlines() if (found := begins.match(line))]
    for key in keys:
        others = {"register": ["run=x"], "replay": ["run=x", "step=1"], "classify": ["model=x"], "promote": ["name=x"],
                  "export": ["model=x", "output=x"]}.get(job, [])  # fmt: skip
        rest = [other for other in others if not other.startswith(f"{key}=")]
        for typed, meant in (("/tmp/\u00e9, (1)", None), ("2024_11_28", None), ("~/a b", "/home/me/a b")):
            assert compose(job, [*rest, f"{key}={typed}"])[key] == (meant or typed), f"{job}: {key}"


def test_keys_that_are_a_path_in_one_job_alone_and_words():
    assert compose("export", ["model=x", "output=y", "images=/tmp/a, (1)"])["images"] == "/tmp/a, (1)"
    assert compose("report", ["images=12"])["images"] == 12
    assert compose("report", ["published=/tmp/a, b"])["published"] == "/tmp/a, b"
    assert compose("promote", ["name=x", "dataset=~/x y"])["dataset"].endswith("/x y")
    for job in ("train", "retrain"):
        assert compose(job, ["resume=~/runs/a"])["resume"] == str(Path.home() / "runs" / "a")
    assert compose("retrain", ["retrain.force=2024_11_28"])["retrain"]["force"] == "2024_11_28"
    assert compose("retrain", ["retrain.force=true"])["retrain"]["force"] is True
    text = "ImageNet (1k), 2012"
    assert compose("train", ["backbone=timm", f"backbone.trained_on={text}"])["backbone"]["trained_on"] == text


@pytest.mark.parametrize("job", ["embed", "demo"])
def test_other_jobs_on_a_dataset_refuse_keys_of_the_ingest_too(job):
    with pytest.raises(PipelineError, match=f"data.source.size: jobs.{job} takes the dataset as it was ingested"):
        compose(job, ["data.source.size=96"])
