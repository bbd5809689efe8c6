"""Files that a job is to write are tried before its work, not after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import store
from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.registry.classify import classify
from pipeline.workflow import evaluate_job


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
