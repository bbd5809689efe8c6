"""The benchmark's own machinery: registration, ratios, processes apart, and the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F

from docs.studies import results as files
from docs.studies.benchmark import photographs, rows, run, table
from docs.studies.benchmark.apart import Apart, Together
from docs.studies.benchmark.lstm_loop import LoopForm
from docs.studies.benchmark.profile import profile
from docs.studies.benchmark.rows import Bench, Finding, NotHere, Row, measured, ratio, select
from docs.studies.benchmark.timing import interleaved
from docs.studies.benchmark.usage import Peak, cpu_seconds, private_bytes
from pipeline.config import compose, validate
from pipeline.data.dataset import Dataset
from pipeline.environment import machine
from pipeline.errors import PipelineError
from pipeline.functional.meta_lstm import CellWeights, unroll

MB = 2**20


@pytest.fixture
def bench(tmp_path) -> Bench:
    config = validate(run.BenchmarkConfig, compose("benchmark"))
    return Bench(2, 0.1, tmp_path, config.cluster)


def test_select_by_theme_by_name_and_all():
    assert {r.theme for r in select("stream")} == {"stream"}
    assert [r.name for r in select("startup")] == ["startup"]
    assert len(select("all")) == len(rows.ROWS) > len(select("gpu")) > 0
    with pytest.raises(PipelineError, match="what='steam'.*stream.*stream_84"):
        select("steam")


def test_plain_pillow_makes_the_images_of_the_stream(ray_session, tmp_path, monkeypatch):
    """Both sides do the same work: files of another form than the images, cut and resized."""
    monkeypatch.setattr(photographs, "CLASSES", (1, 1, 1))
    monkeypatch.setattr(photographs, "IMAGES", 2)
    uri, paths = photographs.encoded(tmp_path)
    dataset = Dataset(uri)
    assert dataset.manifest.encoding == "encoded" and dataset.shape == (3, 224, 224) and len(paths) == 6
    np.testing.assert_array_equal(dataset.gather(np.arange(6)), np.stack([photographs.opened(path) for path in paths]))
    assert next(photographs.pillow(paths, 3)) > 0
    assert photographs.encoded(tmp_path) == (uri, paths)  # made once


def test_every_row_says_what_it_is():
    assert all(r.measure.__doc__ and len(r.measure.__doc__) < 120 for r in rows.ROWS.values())


def test_sides_are_measured_in_turn_and_each_repetition_begins_with_another():
    seen: list[str] = []

    def side(name: str, value: float) -> float:
        seen.append(name)
        return value

    found = interleaved({"a": lambda: side("a", 1.0), "b": lambda: side("b", 2.0)}, 3)
    assert seen == ["a", "b", "b", "a", "a", "b", "b", "a"]  # the first round warms up
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_ratio_is_taken_within_a_repetition():
    found = ratio("x", {"a": [2.0, 8.0, 9.0], "b": [1.0, 2.0, 3.0]}, ("a", "b"), "ms", least=3).summary()
    assert found["values"] == [2.0, 4.0, 3.0] and (found["median"], found["low"], found["high"]) == (3.0, 2.0, 4.0)
    assert found["met"] and not Finding("y", [2.0], "%", most=1.0).summary()["met"]
    assert Finding("z", [2.0], "s").summary()["met"] is None


def test_a_row_that_cannot_be_measured_says_why(bench):
    def lacking(_: Bench) -> Iterator[Finding]:
        """The row."""
        yield Finding("first", [1.0], "x")
        raise NotHere("no such device")

    first, reason = measured(Row("theme", "lacking", lacking, False), bench)
    assert first["what"] == "first" and reason["not_run"] == "no such device" and reason["what"] == "The row."


def test_gpu_rows_are_not_run_without_a_gpu(bench):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    found = [summary for r in select("gpu") for summary in measured(r, bench)]
    assert len(found) == len(select("gpu")) and {s["not_run"] for s in found} == {"no CUDA device"}


def counting(step: int) -> Iterator[tuple[int, int, int]]:
    number = 0
    while True:
        number += step
        yield number, os.getpid(), torch.get_num_threads()


def meeting(folder: Path, name: str, other: str, value: float) -> Iterator[float]:
    """Answers only while the other side is at work on the same repetition."""
    for repetition in range(100):
        (folder / f"{name}{repetition}").touch()
        deadline = time.monotonic() + 60
        while not (folder / f"{other}{repetition}").exists():
            assert time.monotonic() < deadline, "the other side waits for this one"
            time.sleep(0.005)
        yield value


def failing() -> Iterator[float]:
    yield 1.0
    raise ValueError("the disk is full")


def test_a_side_apart_keeps_its_state_and_its_threads_and_ends():
    with Apart(counting, 3, threads=2) as side:
        (first, pid, threads), (second, _, _) = side(), side()
        assert (first, second, threads) == (3, 6, 2) and pid != os.getpid() and psutil.pid_exists(pid)
    assert not psutil.pid_exists(pid)


def test_what_fails_apart_is_told_here():
    with Apart(failing) as side:
        assert side() == 1.0
        with pytest.raises(RuntimeError, match="the disk is full"):
            side()


def test_those_together_run_at_once_and_the_slowest_counts(tmp_path):
    with Apart(meeting, tmp_path, "a", "b", 0.3) as slow, Apart(meeting, tmp_path, "b", "a", 0.1) as fast:
        both = Together([slow, fast])
        assert (both(), both()) == (0.3, 0.3)


def test_cpu_time_counts_processes_that_have_ended():
    before = cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert cpu_seconds() - before >= 0.45


def test_private_memory_leaves_out_mapped_files_and_keeps_its_peak(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(64 * MB))
    me = psutil.Process()
    before = private_bytes(me)
    mapped = torch.from_file(str(path), shared=True, size=64 * MB, dtype=torch.uint8)
    assert int(mapped.sum()) == 0
    with Peak(lambda: [me]) as peak:
        held = torch.ones(64 * MB, dtype=torch.uint8)
        time.sleep(0.3)
        del held
    assert 60 * MB < peak.most - before < 110 * MB


@pytest.fixture
def content() -> dict:
    found = [
        {"theme": "t", "row": "r", **ratio("fast", {"a": [3.0], "b": [2.0]}, ("a", "b"), "ms", least=1.2).summary()},
        {"theme": "t", "row": "g", "what": "On a GPU.", "not_run": "no CUDA device"},
    ]
    return {"protocol": "benchmark", "command": "python -m jobs.benchmark", "machine": machine(), "rows": found}


def test_the_table_in_a_terminal_and_in_a_readme(content, tmp_path, monkeypatch):
    shown = table.text(content)
    assert "1.5×" in shown and "≥ 1.2×" in shown and "a 3, b 2 ms" in shown
    assert "not run: On a GPU. (no CUDA device)" in shown
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    (tmp_path / "benchmark.json").write_text(json.dumps(content))
    made = files.page_text("before\n<!-- measured: benchmark -->\nold\n<!-- end -->\nafter")
    assert "| fast | 1.5× | 1.5 – 1.5 | ≥ 1.2× | a 3, b 2 ms |" in made and "old" not in made
    assert "Not run: On a GPU (no CUDA device)." in made and "`python -m jobs.benchmark`" in made


def test_the_command_leaves_out_what_is_of_the_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/jobs/benchmark.py", "stream", "record=a.json", "folder=/tmp/x", "--json"])
    assert run._command() == "python -m jobs.benchmark stream"


def test_a_trace_is_written_to_this_machine(bench, tmp_path):
    with pytest.raises(PipelineError, match="profile=s3://bucket/trace.json: a trace is written to a file of this"):
        profile("s3://bucket/trace.json", [], tmp_path, bench.cluster)


def test_an_impossible_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="folder="), run._folder(str(tmp_path / "file" / "below")):
        pass


def test_the_loop_form_of_the_meta_lstm_computes_its_recurrence():
    """The updates of ``pipeline.functional``, from the gradients at the loop form's own weights, in float64."""
    torch.manual_seed(0)
    form = LoopForm(width=2, way=2, updates=3, hidden=4)
    for module in (form.learner, form.second, form.lstm):
        module.double()
    form.start, *rest = (torch.nn.Parameter(p.detach().double()) for p in (form.start, *_gates(form)))
    form.forget, form.entry, form.forget_bias, form.entry_bias = rest
    support, labels = torch.randn(4, 3, 84, 84, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    end = form._adapt(support, labels)

    cell = form.lstm
    gates = torch.cat([form.forget, form.entry], 1).T
    bias = torch.cat([form.forget_bias, form.entry_bias], 1)[0]
    weights = CellWeights(cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh, gates, bias)
    theta, gradients, losses = form.start.detach().T, [], []
    for _ in range(3):
        leaf = theta.detach().requires_grad_()
        parts = leaf[0].split([p.numel() for p in form.learner.parameters()])
        named = {n: q.view_as(p) for (n, p), q in zip(form.learner.named_parameters(), parts, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(form.learner, named, (support,)), labels)
        gradients.append(torch.autograd.grad(loss, leaf)[0] / 4)
        losses.append(loss.detach().view(1))
        theta = unroll(weights, form.start.detach().T, torch.stack(gradients), torch.stack(losses))
    torch.testing.assert_close(end.T, theta, rtol=1e-6, atol=1e-9)


def _gates(form: LoopForm) -> list[torch.Tensor]:
    return [form.forget, form.entry, form.forget_bias, form.entry_bias]


@pytest.mark.slow
def test_a_row_from_the_command_line_with_its_record(tmp_path):
    record = tmp_path / "found.json"
    arguments = ["step_limit", "repetitions=1", "scale=0.01", f"record=file://{record}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *arguments], cwd=Path(run.__file__).parents[3], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == json.loads(record.read_text())
    assert json.loads(done.stdout)["rows"][0]["median"] > 0.5


@pytest.mark.slow
def test_a_photographs_way_is_measured(tmp_path):
    record = tmp_path / "found.json"
    arguments = ["photographs", "repetitions=1", "scale=0.01", "cluster.object_store_mb=150", f"record={record}"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.benchmark", *arguments], cwd=Path(run.__file__).parents[3], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    stream, wait = json.loads(record.read_text())["rows"]
    assert [stream["row"], wait["row"]] == ["stream_encoded", "features_wait"]
    assert list(stream["sides"]) == ["Ray Data, 2 consumers", "Pillow, 2 processes"] and stream["unit"] == "x"
    assert stream["median"] == pytest.approx(np.divide(*stream["sides"].values())) and stream["measure"] == "images/s"
    assert wait["unit"] == "%" and wait["target"] == {"least": None, "most": 5} and 0 <= wait["median"] < 100


@pytest.mark.slow
def test_a_profile_names_the_parts_of_a_step(tmp_path):
    trace = tmp_path / "trace.json"
    done = subprocess.run(
        [
            sys.executable, "-m", "jobs.benchmark", f"profile=file://{trace}", "base.train.meta_batch_size=2",
            "base.train.query=1",
        ],  # fmt: skip
        cwd=Path(run.__file__).parents[3],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"training step", "wait for data", "forward", "optimizer"} <= names
    assert any(str(name).startswith("pipeline/") for name in names)  # Python's own functions
