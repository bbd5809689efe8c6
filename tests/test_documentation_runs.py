"""The documented commands one after the other, as a newcomer with photographs would type them: each does what is said.

Placeholders are replaced, and keys appended that make the work small.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_documentation import JOB_LINES, ROOT, blocks

SMALL = [
    "steps=6", "train.meta_batch_size=1", "backbone.width=8", "validation.every=3", "validation.episodes=10",
    "evaluation.episodes=20", "evaluation.shot=[1]", "cluster.workers=1",
]  # fmt: skip
OWN_NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], width))

    def forward(self, images):
        return self.body(images)
"""


class Newcomer:
    """A folder with photographs, and a shell in it."""

    def __init__(self, folder: Path) -> None:
        from pipeline.data.sources.glyphs import draw_glyphs

        self.folder = folder
        drawings = draw_glyphs(np.arange(66))
        for number, images in enumerate(drawings):
            for position, image in enumerate(images):
                place = "photos" if number < 60 else "known" if position < 3 else "new" if position < 5 else "spare"
                place = "more" if place == "known" and number == 65 else place
                path = folder / place / f"class {number:02d}" / f"{position}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze()).save(path)

    def runs(self, program: str) -> str:
        """Run a Python program in one process, as a notebook would; what it printed."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("PIPELINE_HOME", None)
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], cwd=self.folder, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def types(self, begin: str, *small: str, expect: tuple[int, ...] = (0,), **instead: str) -> str:
        """Run the one documented command that begins so; what it printed."""
        lines = {line.split("  #")[0].strip() for line in JOB_LINES if line.startswith(begin)}
        (line,) = {line for line in lines if len(line) == min(map(len, lines))}
        for name, value in instead.items():
            line = re.sub(rf"\b{name}\b", value, line)
        line = line.replace("python -m", f"{shlex.quote(sys.executable)} -m")
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT}"}
        environment.pop("PIPELINE_HOME", None)
        done = subprocess.run(
            ["bash", "-c", f"{line} {shlex.join(small)}"],
            cwd=self.folder, env=environment, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode in expect, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_from_photographs_to_answers_and_on(tmp_path: Path) -> None:
    user = Newcomer(tmp_path)
    user.types("python -m jobs.ingest data=folder data.name=photos", "data.source.shape=[1,28,28]", PHOTOS="photos")
    user.types("python -m jobs.train data=folder data.name=photos method=prototypical", *SMALL, "name=first")
    classify = "python -m jobs.classify model=models:/products@challenger"
    assert "class 61" in user.types(f"{classify} support=known/ queries")
    user.types(f"{classify} support=known/ save_enrolment")
    grown = user.types(f"{classify} enrolment=shop.enrolment support=more/")
    assert "1 classes added" in grown or "1 class added" in grown
    served = blocks(ROOT / "docs" / "your_images.md", "python")[0]
    arrays = "import numpy as np\nsupport = queries = np.zeros((2, 1, 28, 28), np.uint8)\nlabels = np.arange(2)\n"
    subprocess.run(
        [sys.executable, "-P", "-c", f"{arrays}{served}\nassert len(answers) == 2"],
        cwd=tmp_path, env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}, check=True,
    )  # fmt: skip
    assert "5-way 1-shot" in user.types("python -m jobs.evaluate run=RUN", "episodes=20", RUN="first")
    user.types("python -m jobs.train resume=RUN", RUN="first")
    user.types("python -m jobs.register run=RUN register_as=products", RUN="first")
    user.types("python -m jobs.promote name=products", "episodes=20", expect=(0, 3))
    again = "python -m jobs.retrain data=folder data.name=photos data.source.path=PHOTOS register_as=products"
    few = [*SMALL, "retrain.promotion.episodes=20", "data.source.shape=[1,28,28]"]
    user.types(again, *few, "retrain.force=true", PHOTOS="photos", expect=(0, 3))
    user.types(again, *few, PHOTOS="photos", expect=(4,))
    user.types("python -m jobs.replay run=RUN step=NUMBER", RUN="first", NUMBER="5")
    user.types("python -m jobs.report pages output=pages")
    assert list((tmp_path / "pages").glob("*.html"))

    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.py").write_text(OWN_NET)
    own = [key for key in SMALL if not key.startswith("backbone")]
    own_net = "python -m jobs.train data=folder data.name=photos backbone=module backbone.path=FOLDER/net.py"
    user.types(own_net, *own, "name=own", FOLDER="nets")
    assert (tmp_path / "runs" / "own" / "report" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_search_of_ones_own_and_its_winner(tmp_path: Path) -> None:
    user = Newcomer(tmp_path)
    (tmp_path / "campaign").mkdir()
    (tmp_path / "campaign" / "my_search.yaml").write_text(blocks(ROOT / "docs" / "search.md", "yaml")[0])
    user.types("python -m jobs.ingest data=glyphs data.name=characters")
    small = [f"base.{key}" for key in SMALL if not key.startswith(("steps", "evaluation", "validation.ep"))]
    user.types(
        "python -m jobs.tune campaign=campaign/my_search.yaml", *small, "base.data.name=characters", "base.steps=6",
        "objective.episodes=10", "name=mine", "trials=1", "finalists.count=0",
    )  # fmt: skip
    user.types("python -m jobs.train config=runs/CAMPAIGN/best.yaml", "name=winner", CAMPAIGN="mine")
    assert (tmp_path / "runs" / "winner" / "report" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_python_of_its_page_runs_as_it_stands_in_one_process(tmp_path: Path) -> None:
    program = "\n".join(blocks(ROOT / "docs" / "python.md", "python"))
    printed = Newcomer(tmp_path).runs(f"{program}\nprint(*classifier.classes_)")
    assert "apple pear plum quince" in printed
    assert (tmp_path / "fruit.enrolment").is_file()
