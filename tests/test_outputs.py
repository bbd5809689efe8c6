"""Files that a job is to write are tried before its work, not after it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.studies.scale import scale
from jobs._main import run
from pipeline import store
from pipeline.config import compose
from pipeline.data.dataset import Dataset, _fetch
from pipeline.errors import PipelineError, Unavailable
from pipeline.pages.report import report
from pipeline.registry.classify import classify
from pipeline.registry.export import export
from pipeline.registry.tracking_config import check_tracking
from pipeline.training.prepare import prepare
from pipeline.workflow import evaluate_job

ROOT = Path(__file__).resolve().parent.parent


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store.check_output(str(tmp_path / "new" / "out.json"), "output")
    store.check_output(str(tmp_path / "file"), "output")
    for place, why in (
        (str(tmp_path), "is a folder; give the name of a file in it"),
        (f"{tmp_path}/file/out.json", r"cannot be written \(File exists\); give another file"),
        ("/proc/nope/out.json", r"cannot be written \(No such file or directory\); give another file"),
    ):
        with pytest.raises(PipelineError, match=f"output={place} {why}"):
            store.check_output(place, "output")
    assert (tmp_path / "file").read_text() == "x"


def test_the_jobs_refuse_before_they_look_for_anything_else(tmp_path: Path) -> None:
    given = [f"model={tmp_path}/no-model", f"support={tmp_path}", f"save_enrolment={tmp_path}"]
    with pytest.raises(PipelineError, match="save_enrolment=.* is a folder"):
        classify(compose("classify", given))
    with pytest.raises(PipelineError, match="output=.* is a folder"):
        evaluate_job(compose("evaluate", ["run=nowhere", f"storage={tmp_path}", f"output={tmp_path}"]))
    with pytest.raises(PipelineError, match="record=/proc/nope/x cannot be written"):
        evaluate_job(compose("evaluate", ["run=nowhere", f"storage={tmp_path}", "record=/proc/nope/x"]))
    with pytest.raises(PipelineError, match="record needs run=NAME"):
        evaluate_job(compose("evaluate", ["model=models:/x/1", f"record={tmp_path}/x"]))
    with pytest.raises(PipelineError, match="compare needs at least 2 episodes"):
        evaluate_job(compose("evaluate", ["run=one", "compare=other", "episodes=1", f"storage={tmp_path}"]))
    with pytest.raises(PipelineError, match="output=/proc/nope cannot be written"):
        report(compose("report", ["what=pages", "output=/proc/nope"]))


@pytest.mark.parametrize("place", ["/proc/nope", "/etc/hostname"])
def test_a_storage_that_cannot_be_written_is_refused_in_one_line(glyphs: str, place: str) -> None:
    root, name = glyphs.rsplit("/", 1)
    with pytest.raises(PipelineError, match=f"storage={place} cannot be written .*; give another folder"):
        prepare(compose("train", [f"data.root={root}", f"data.name={name}", f"storage={place}", "tracking=none"]))
    with pytest.raises(PipelineError, match=f"{place}/x.json cannot be written"):
        store.write_bytes(f"{place}/x.json", b"")


def test_a_cache_that_cannot_be_written_is_refused_in_one_line(glyphs: str) -> None:
    shard = Dataset(glyphs).manifest.shards[0]
    with pytest.raises(PipelineError, match="/proc/nope/0123 cannot be written .*; give another PIPELINE_CACHE"):
        _fetch(glyphs, shard.file, shard.sha256, "/proc/nope", "0123")


def test_a_place_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    long = tmp_path / ("x" * 300)
    for action, place, why in (
        (store.read_bytes, tmp_path, "Is a directory"),
        (store.read_bytes, f"file://{tmp_path}", "Is a directory"),
        (store.read_bytes, tmp_path / "file" / "below", "Not a directory"),
        (store.read_bytes, tmp_path / "loop", "Too many levels of symbolic links"),
        (store.list_names, tmp_path / "file", "Not a directory"),
        (store.exists, long, "File name too long"),
    ):
        with pytest.raises(PipelineError) as refused:
            action(str(place))
        assert str(refused.value) == f"{place} cannot be read ({why})" and not isinstance(refused.value, Unavailable)
    assert store.list_names(str(tmp_path / "nothing")) == [] and not store.exists(str(tmp_path / "file" / "below"))
    arguments = ["what=pages", f"published={tmp_path}", f"output={tmp_path}/html"]
    with pytest.raises(PipelineError, match=f"{tmp_path} cannot be read"):
        report(compose("report", arguments))
    with pytest.raises(PipelineError, match=f"{tmp_path}/file cannot be read"):
        evaluate_job(compose("evaluate", ["run=any", f"storage={tmp_path}/file"]))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, None])
def test_a_reading_that_may_succeed_another_time_is_no_mistake(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def fail(self, _: object) -> None:
            raise OSError("of the disk") if number is None else OSError(number, os.strerror(number))

        open_input_stream = get_file_info = fail

    monkeypatch.setattr(store, "open_store", lambda uri: (Failing(), uri))
    expected = Unavailable if number == errno.ENOSPC else OSError
    for action in (store.read_bytes, store.list_names, store.exists):
        with pytest.raises(expected) as raised:
            action(str(tmp_path / "file"))
        assert number == errno.ENOSPC or raised.value.errno == number


def test_every_letter_of_a_key_counts() -> None:
    for prefix in ("run #3", "who?", "a%20b", "a;b"):
        keys = [store.open_store(f"s3://bucket/{prefix}/{name}")[1] for name in ("a.json", "b.json")]
        assert keys == [f"bucket/{prefix}/a.json", f"bucket/{prefix}/b.json"]
    for wrong in ("gs://bucket/x", "s3:///x"):
        with pytest.raises(PipelineError, match="is no folder this pipeline reads"):
            store.open_store(wrong)


def test_a_disk_that_fails_for_a_while_may_be_tried_again() -> None:
    with pytest.raises(Unavailable, match="cannot be written"), store.writing("/mnt/share", "folder"):
        raise OSError(errno.ESTALE, "Stale file handle")


JOB = """
from jobs._main import run

def speak(config):
    for _ in range(20_000):
        print("57.63 \u00b1 2.02 of caf\u00e9")
    open({done!r}, "w").close()
    return {{}}

run("replay", speak, ["run=x", "step=1"])
"""


@pytest.mark.parametrize("told", ["", "--json"])
def test_neither_a_closed_pipe_nor_a_poor_encoding_ends_a_job(tmp_path: Path, told: str) -> None:
    done = tmp_path / "done"
    program = JOB.format(done=str(done)).replace('"step=1"', f'"step=1", {told!r}' if told else '"step=1"')
    (tmp_path / "job.py").write_text(program)
    shell = f"{sys.executable} {tmp_path}/job.py 2>{tmp_path}/errors | head -1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(["bash", "-c", shell], text=True, capture_output=True, env=environment, check=True)
    shown = "{}" if told else r"57.63 \xb1 2.02 of caf\xe9"
    assert found.stdout.splitlines() == [shown, "0"], found
    assert done.exists()
    assert "Traceback" not in (tmp_path / "errors").read_text()


def test_a_tracking_store_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    given = {"uri": f"sqlite:///{tmp_path}/new/mlflow.db", "artifacts": None, "experiment": "x", "timeout": 1}
    check_tracking(given)
    check_tracking({**given, "artifacts": f"{tmp_path}/files"})
    (tmp_path / "notes.txt").write_text("not a database")
    for key, place, why in (
        ("uri", "sqlite:////proc/nope/mlflow.db", "tracking.uri=/proc/nope/mlflow.db cannot be written"),
        ("uri", f"sqlite:///{tmp_path}", "tracking.uri=.* is a folder"),
        ("uri", f"sqlite:///{tmp_path}/notes.txt", "tracking.uri=.*notes.txt: this file is no SQLite database"),
        ("artifacts", "/proc/nope", "tracking.artifacts=/proc/nope cannot be written"),
    ):
        with pytest.raises(PipelineError, match=why) as refused:
            check_tracking({**given, key: place})
        assert "\n" not in str(refused.value)


def test_comparisons_and_exports_try_their_files_first() -> None:
    with pytest.raises(PipelineError, match="record=/proc/nope/x cannot be written"):
        report(compose("report", ["what=clustering", "runs=[nowhere]", "record=/proc/nope/x"]))
    with pytest.raises(PipelineError, match="output=/proc/nope/x.* cannot be written"):
        export(compose("export", ["model=nowhere", "output=/proc/nope/x"]))
    with pytest.raises(PipelineError, match="a model is exported to a folder of this machine"):
        export(compose("export", ["model=nowhere", "output=s3://bucket/x"]))
    with pytest.raises(PipelineError, match="output=/proc/nope/x.md cannot be written"):
        scale(compose("scale", ["output=/proc/nope/x.md"]))


def test_json_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"interval": float("nan"), "rows": [(1.5, float("inf"))], "path": tmp_path}
    with pytest.raises(SystemExit):
        run("replay", lambda config: found, ["run=x", "step=1", "--json"])
    assert json.loads(capsys.readouterr().out) == {"interval": None, "rows": [[1.5, None]], "path": str(tmp_path)}
