"""Published and measured figures side by side."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from docs.studies import results
from docs.studies.reproduction import entries, finished, markdown, published, summary, text
from pipeline.pages.published import by_setting, matching, protocol, setting


def run_file(folder, name="x", method="maml", dataset="omniglot", accuracy=0.99, interval=0.004, **method_options):
    content = {
        "command": f"python -m jobs.train recipe={name}", "evaluation": "python -m jobs.evaluate run=RUN",
        "protocol": "episodic", "method": method, "dataset": {"name": dataset, "fingerprint": "f" * 64},
        "steps": 1234, "seed": 0, "train_seconds": 600, "machine": {"cores": 2},
        "config": {"method": {"name": method, "adapt_parameters": "all", "first_order": False} | method_options},
        "results": [
            {"model": "trained", "way": 5, "shot": 1, "episodes": 9, "accuracy": accuracy, "interval": interval},
            {"model": "untrained", "way": 5, "shot": 1, "episodes": 9, "accuracy": 0.3, "interval": 0.01},
        ],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_the_weights_that_a_run_began_with_cost_their_training(tmp_path):
    run_file(tmp_path)
    whole = json.loads((tmp_path / "x.json").read_text())
    begun = {"command": "python -m jobs.train", "steps": 4000, "train_seconds": 1200}
    begun |= {"config": {"cluster": {"workers": 2, "cpus_per_worker": 1.0}}, "machine": {"cores": 2}}
    whole["initial"] = begun
    (tmp_path / "x.json").write_text(json.dumps(whole))
    table = markdown(entries(tmp_path))
    assert "| 4,000 + 1,234 | 60 |" in table and "begun with the weights of `python -m jobs.train`" in table
    whole["initial"] = begun | {"initial": begun | {"command": "python -m jobs.train first", "steps": 500}}
    (tmp_path / "x.json").write_text(json.dumps(whole))
    table = markdown(entries(tmp_path))
    assert "| 500 + 4,000 + 1,234 | 100 |" in table and "weights of `python -m jobs.train first`" in table


def test_published_rows_are_whole():
    rows = published()
    keys = [(row["label"], row["dataset"], setting(row)) for row in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert 0 < row["accuracy"] < 1 and row["source"] and 0 < row.get("interval", 0.01) < 0.05
        assert set(row) <= {
            "label", "method", "options", "dataset", "way", "shot", "setting", "accuracy", "interval", "source",
            "memory", "reruns",
        }  # fmt: skip
    assert {protocol(row) for row in rows} == {"episodic", "generalized", "one_shot_runs"}


def test_options_of_published_figures_are_options_of_the_methods():
    from pipeline.config import compose, flat

    for method in sorted({row["method"] for row in published()}):
        import_module(f"pipeline.methods.{method}")
        known = flat({"method": compose("train", [f"method={method}"])["method"]})
        for row in published():
            if row["method"] == method:
                assert [k for k in row.get("options", {}) if k.startswith("method.") and k not in known] == []


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "MAML"),
        ({"adapt_parameters": "all_but_norm"}, "MAML"),
        ({"first_order": True}, "First-order MAML"),
        ({"adapt_parameters": "head"}, "ANIL"),
    ],
)
def test_a_run_is_compared_with_the_figures_of_its_form(tmp_path, options, label):
    run_file(tmp_path, **options)
    [entry] = [entry for entry in entries(tmp_path) if entry.run is not None]
    assert entry.label == label and list(entry.measured) == ["5-way 1-shot"]
    rows = matching(published(), "maml", entry.run["config"])
    assert {row["label"] for row in rows} == {label}
    assert entry.published == by_setting(rows, "omniglot")


def test_conditions_on_a_number():
    def labels(consensus):
        config = {"method": {"consensus": consensus, "query_statistics": "batch"}}
        return {row["label"] for row in matching(published(), "reptile", config)}

    assert labels(0.0) == {"Reptile, transductive"} and labels(0.1) == {"Reptile with weight clustering"}


def test_the_table_has_every_method_its_command_and_its_time(tmp_path):
    run_file(tmp_path, "omniglot_maml")
    run_file(tmp_path, "other", method="prototypical", accuracy=0.9)
    run_file(tmp_path, "mine", method="relation", dataset="my_data")
    found = entries(tmp_path)
    for shown in (text(found), markdown(found)):
        assert all(row["label"] in shown for row in published())
        assert "python -m jobs.train recipe=omniglot_maml" in shown and "1,234 of 60,000" in shown
        assert "48.7 ± 1.84" in shown and "49.21 ± 0.96°" in shown and "30.00" not in shown
        assert "Of 2 measured figures with a published one, 1 reach it" in shown
    page = markdown(found)
    assert "| MAML | 5-way 1-shot | 98.7 | 99.00 | ± 0.40 | 1,234 of 60,000 | 20 | yes |" in page
    assert "| Prototypical networks | 5-way 1-shot | 98.8 | 90.00 | ± 0.40 | 1,234 | 20 | no |" in page
    assert "| Relation networks | 5-way 1-shot |  | 99.00 | ± 0.40 | 1,234 | 20 |  |" in page
    assert "| MAML |  | 99.9 |" in page, "a setting that was not measured stands in the table of those"
    row = "| MAML | omniglot | 5-way 1-shot | 98.7 | 99.00 | ± 0.40 | 1,234 of 60,000 | 20 |"
    assert finished(found).splitlines()[2:] == [row]
    by_name = {(e["method"], e["dataset"]): e for e in summary(found)}
    figure = by_name["MAML", "omniglot"]["figures"]["5-way 1-shot"]
    assert (figure["published"], figure["measured"], figure["reached"]) == (0.987, 0.99, True)
    assert by_name["MAML", "omniglot"]["steps"] == 1234
    assert by_name["Relation networks", "my_data"]["figures"]["5-way 1-shot"]["published"] is None


def test_what_two_runs_of_a_method_measured_is_not_said_to_be_missing(tmp_path):
    """One row a method: what neither of them measured."""
    run_file(tmp_path)
    run_file(tmp_path, name="again")
    again = json.loads((tmp_path / "again.json").read_text())
    again["results"][0]["shot"] = 5
    (tmp_path / "again.json").write_text(json.dumps(again))
    page = markdown(entries(tmp_path))
    [row] = [line for line in page.splitlines() if line.startswith("| MAML |") and "95.8" in line]
    assert "98.7" not in row and "99.9" not in row


@pytest.mark.parametrize(("accuracy", "reached"), [(0.9829, False), (0.9831, True), (0.999, True)])
def test_a_figure_is_reached_within_the_intervals(tmp_path, accuracy, reached):
    run_file(tmp_path, accuracy=accuracy)  # ± 0.4 beside MAML's 98.7
    [entry] = [entry for entry in entries(tmp_path) if entry.run is not None]
    assert entry.reached("5-way 1-shot") is reached and entry.reached("20-way 1-shot") is None


def test_the_projects_own_measurements():
    found = entries(results.FOLDER)
    runs = [path for path in results.FOLDER.glob("*.json") if "method" in json.loads(path.read_text())]
    assert len([entry for entry in found if entry.run is not None]) == len(runs)


def test_comparisons_in_a_page(tmp_path, monkeypatch):
    runs = [{"name": n, "kind": k, "method": "m", "steps": 5} for n, k in (("A", "meta"), ("B", "classical"))]
    figures = [{"run": n, "head": "svm", "accuracy": 0.5, "interval": 0.01} for n in "AB"]
    difference = {"meta": "A", "classical": "B", "head": "svm", "difference": 0.02, "low": 0.01, "high": 0.03}
    content = {"runs": runs, "results": figures, "comparisons": [difference]}
    for run in content["runs"]:
        run |= {"command": f"python -m jobs.train name={run['name']}", "train_seconds": 120}
    content |= {"protocol": "cross_table", "command": "python -m jobs.report cross_table 'runs=[A,B]'"}
    (tmp_path / "cross_table_x.json").write_text(json.dumps(content))
    run_file(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    block = "<!-- measured: {} -->\nold\n<!-- end -->\n"
    page = f"a\n{block.format('cross_table_x')}b\n{block.format('compared_omniglot')}"
    made = results.page_text(page)
    assert "\nold\n" not in made and "| A | m (meta) | 50.00 ± 1.00 |" in made and "+2.00 [+1.00, +3.00]" in made
    assert "`python -m jobs.train name=B`, 5 steps, 2 minutes" in made
    assert "| MAML | 5-way 1-shot | 98.7 | 99.00 |" in made
    assert results.page_text(made) == made
    with pytest.raises(results.PipelineError, match=r"jobs.report clustering runs=\[...\] record=clustering_y.json"):
        results.render("clustering_y")
