"""A packaged model behind MLflow's scoring server: every form of a request, and every refusal in one sentence."""

from __future__ import annotations

import asyncio
import base64
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.pyfunc import scoring_server
from PIL import Image

from pipeline.config import compose
from pipeline.errors import PipelineError
from pipeline.inference import FewShotClassifier
from pipeline.inference.folders import read_queries, read_support
from pipeline.inference.requests import ENROLMENTS
from pipeline.model import build_model
from pipeline.registry.classify import classify
from pipeline.registry.package import save_model
from tests.test_documentation import ROOT, blocks

SHAPE = (3, 16, 20)
SPEC = {
    "method": {"name": "prototypical"},
    "backbone": {"name": "conv4", "width": 8},
    "input": {"shape": list(SHAPE), "scaling": "unit"},
    "way": 3,
    "classes": 12,
}
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def classifier() -> FewShotClassifier:
    torch.manual_seed(0)
    return FewShotClassifier.from_weights(SPEC, build_model(SPEC).state_dict())


@pytest.fixture(scope="module")
def packaged(classifier: FewShotClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packaged") / "model"
    save_model(classifier, folder, Model())
    return folder


@pytest.fixture(scope="module")
def model(packaged: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(packaged))


@pytest.fixture
def ask(model: mlflow.pyfunc.PyFuncModel, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Posts a body to the server's application; its status and what it answered."""
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")  # the application sets it, and leaves it
    app = scoring_server.init(model)

    def post(body: Any) -> tuple[int, Any]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/invocations", "raw_path": b"/invocations", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "scheme": "http", "http_version": "1.1",
            "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip
        asyncio.run(app(scope, receive, send))
        content = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(content)

    return post


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of many formats and sizes: three classes known, and four new images."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("photographs")
    sizes = [(31, 64), (90, 40), (16, 20), (120, 121)]
    for number in range(10):
        place = f"known/{('pear', 'plum', 'quince')[number % 3]}" if number < 6 else "new"
        pixels = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((25, 25, 1)))[: sizes[number % 4][0]]
        image = Image.fromarray(pixels[:, : sizes[number % 4][1]].astype(np.uint8))
        path = folder / place / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 8:
            image.save(path, exif=_turned(image))
        else:
            (image.convert("L") if number == 9 else image).save(path)
    return folder


def _turned(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[274] = 6
    return exif


@pytest.fixture
def request_(photographs: Path) -> dict[str, Any]:
    """The photographs as REST has them."""
    known = sorted(photographs.glob("known/*/*"))
    return {
        "support_images": [text_of(path) for path in known],
        "support_labels": [path.parent.name for path in known],
        "query_images": [text_of(path) for path in sorted(photographs.glob("new/*"))],
    }


def text_of(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def pixels_of(classifier: FewShotClassifier, photographs: Path) -> dict[str, Any]:
    """The photographs as arrays."""
    support, labels = read_support(photographs / "known", classifier.shape)
    queries = read_queries(photographs / "new", classifier.shape)
    return {"support_images": support.images, "support_labels": labels, "query_images": queries.images}


def test_shell_python_and_rest_see_the_same_files(
    classifier: FewShotClassifier, model: Any, ask: Ask, photographs: Path, request_: dict[str, Any], tmp_path: Path
) -> None:
    classifier.save(tmp_path / "folder")
    arguments = [f"model={tmp_path}/folder", f"support={photographs}/known", f"queries={photographs}/new"]
    shell = classify(compose("classify", arguments))["answers"]
    status, answer = ask({"inputs": request_})
    assert status == 200, answer
    rest = answer["predictions"]
    known, new = sorted(photographs.glob("known/*/*")), sorted(photographs.glob("new/*"))
    served = model.unwrap_python_model()
    python = model.predict({
        "support_images": np.stack([served.read_image(path) for path in known]),
        "support_labels": [path.parent.name for path in known],
        "query_images": [path.read_bytes() for path in new],
    })  # fmt: skip
    assert [row["label"] for row in rest] == [row["nearest"] for row in shell] == python["label"].tolist()
    np.testing.assert_allclose([row["score"] for row in rest], [row["score"] for row in shell], rtol=1e-5)
    np.testing.assert_allclose(python["score"], [row["score"] for row in shell], rtol=1e-5)
    with pytest.raises(PipelineError, match="cannot be read"):
        served.read_image(__file__)


def test_forms_of_a_request(
    classifier: FewShotClassifier, model: Any, ask: Ask, photographs: Path, request_: dict[str, Any]
) -> None:
    arrays = pixels_of(classifier, photographs)
    lists = {name: np.asarray(value).tolist() for name, value in arrays.items()}
    expected = model.predict(arrays)["label"].tolist()
    wrapped = {
        **request_,
        "query_images": [f"data:image/png;base64,{t[:40]}\n{t[40:]}" for t in request_["query_images"]],
    }
    mixed = {**request_, "query_images": [request_["query_images"][0], *lists["query_images"][1:]]}
    rows = [{"support_images": a, "support_labels": b} for a, b in zip(*list(request_.values())[:2], strict=True)]
    rows += [{"query_images": image} for image in request_["query_images"]]
    columns = list(request_)
    split = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    frame = pd.DataFrame(rows)
    for given in (
        lists,
        request_,
        wrapped,
        frame,
        {**arrays, "support_labels": pd.Series(arrays["support_labels"])},
        rows,
        pd.DataFrame([lists]),
        pd.DataFrame([request_]),
        mixed,
    ):
        assert model.predict(given)["label"].tolist() == expected
    bodies: list[Any] = [
        {"inputs": lists},
        {"inputs": wrapped},
        {"dataframe_records": rows},
        {"dataframe_split": split},
    ]
    for body in [*bodies, {"inputs": rows}, {"dataframe_records": [request_]}]:
        status, answer = ask(body)
        assert status == 200, answer
        assert [row["label"] for row in answer["predictions"]] == expected
    numbered = [
        {**row, "support_labels": index % 2} if "support_labels" in row else row for index, row in enumerate(rows)
    ]
    assert set(model.predict(pd.DataFrame(numbered))["label"]) <= {0, 1}


def test_the_documented_request(ask: Ask, tmp_path: Path) -> None:
    (request,) = [text for text in blocks(ROOT / "docs" / "your_images.md", "bash") if text.startswith("curl")]
    for number, name in enumerate(("known/pear", "known/plum", "new")):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), (90 * number, 0, 200)).save(tmp_path / name / "1.jpg")
    body = subprocess.run(
        ["bash", "-c", f"curl() {{ cat; }}\n{request}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    status, answer = ask(json.loads(body.stdout))
    assert status == 200 and set(answer["predictions"][0]["top_labels"]) == {"pear", "plum"}


def wrong_requests(good: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    pixels = np.zeros((2, *SHAPE), dtype=int).tolist()
    text = base64.b64encode(b"no image").decode()
    return {
        "fractions": ({**good, "query_images": np.full((1, *SHAPE), 0.5).tolist()}, {}, "query_images is float64"),
        "too bright": ({**good, "query_images": np.full((1, *SHAPE), 256).tolist()}, {}, "values from 256 to 256"),
        "other size": ({**good, "query_images": np.zeros((1, 3, 5, 5), int).tolist()}, {}, r"int64 \[1, 3, 5, 5\]"),
        "one image": ({**good, "query_images": pixels[0]}, {}, r"int64 \[3, 16, 20\]"),
        "no list": ({**good, "query_images": good["query_images"][0]}, {}, "query_images is str: give a list"),
        "no file": ({**good, "query_images": [text]}, {}, r"query_images\[0\] cannot be read"),
        "no base64": ({**good, "query_images": ["/etc/passwd.png"]}, {}, "no image file in base64"),
        "labels": ({**good, "support_labels": [0.5] * 6}, {}, "labels are of type float"),
        "fewer labels": ({**good, "support_labels": ["a"]}, {}, "6 support images came with 1 labels"),
        "no text": ({**good, "support_labels": ["\ud800", *"abcde"]}, {}, r"label '\\ud800' holds half of a character"),
        "no support": ({"query_images": good["query_images"]}, {}, "no support images"),
        "no query": ({key: value for key, value in good.items() if key[0] == "s"}, {}, "give query_images"),
        "misspelt": ({**good, "suport_images": []}, {}, "unknown column 'suport_images'"),
        "threshold": (good, {"threshold": "nan"}, "threshold='nan'"),
        "share": (good, {"unknown_pass": "few"}, "unknown_pass='few': give auto or a share of strangers"),
        "no calibration": (good, {"unknown_pass": "0.1"}, "this model has no calibration for 3 classes"),
        "top_k": (good, {"top_k": 99}, "top_k=99: give 1 to 3"),
        "no top_k": (good, {"top_k": None}, "top_k=None: give 1 to 3"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", wrong_requests({"support_images": [], "support_labels": [], "query_images": [""]}))
def test_what_is_wrong_is_said_in_one_sentence(model: Any, ask: Ask, request_: dict[str, Any], kind: str) -> None:
    given, params, sentence = wrong_requests(request_)[kind]
    status, answer = ask({"inputs": given, "params": params})
    assert status == 400 and answer["error_code"] == "INVALID_PARAMETER_VALUE", answer
    assert "stack_trace" not in answer and "\n" not in answer["message"] and len(answer["message"]) < 250
    with pytest.raises(MlflowException, match=sentence):
        model.predict(given, params=params)
    with pytest.raises(MlflowException, match=sentence):
        raise MlflowException(answer["message"])


def test_a_fault_of_the_model_tells_nothing_of_the_server(
    model: Any, ask: Ask, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = model.unwrap_python_model()
    monkeypatch.setattr(served.classifier, "enrol", lambda *_: 1 / 0)
    status, answer = ask({"inputs": request_})
    assert status == 500 and "server's log" in answer["message"] and "stack_trace" not in answer
    assert __file__ not in json.dumps(answer) and request_["query_images"][0] not in json.dumps(answer)


def test_enrolments_are_read_from_one_folder_only(
    classifier: FewShotClassifier, model: Any, ask: Ask, photographs: Path, request_: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arrays = pixels_of(classifier, photographs)
    enrolment = classifier.enrol(arrays["support_images"], arrays["support_labels"])
    folder = tmp_path / "enrolments"
    folder.mkdir()
    enrolment.save(folder / "shop.enrolment")
    enrolment.save(tmp_path / "outside.enrolment")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to(tmp_path / "outside.enrolment")
    (folder / "inner").symlink_to("shop.enrolment")
    (folder / "text").write_text("no enrolment")
    queries = {"query_images": request_["query_images"]}

    def message(name: str) -> str:
        status, answer = ask({"inputs": queries, "params": {"enrolment": name}})
        assert status == 400, answer
        return answer["message"]

    assert ENROLMENTS in message("shop.enrolment")
    monkeypatch.setenv(ENROLMENTS, str(folder))
    expected = classifier.classify(enrolment, arrays["query_images"]).labels
    for name in ("shop.enrolment", "inner"):
        for given in (queries, {**queries, "support_images": [], "support_labels": []}):
            status, answer = ask({"inputs": given, "params": {"enrolment": name}})
            assert status == 200 and [row["label"] for row in answer["predictions"]] == expected
    more = {**queries, "support_images": request_["support_images"][:1], "support_labels": ["apple"]}
    status, answer = ask({"inputs": more, "params": {"enrolment": "shop.enrolment", "top_k": 4}})
    assert status == 200 and "apple" in answer["predictions"][0]["top_labels"]
    there = [message(name) for name in ("pipe", "link", "text", "missing")]
    assert {text.split(": ", 1)[1] for text in there} == {"the server has no enrolment of this name"}
    for name in ("../outside.enrolment", str(folder / "shop.enrolment"), "..", ".hidden", "a\\b", "a\0b"):
        assert "give the name of a file" in message(name) and str(tmp_path) not in message(name).split(": ", 1)[1]


@pytest.mark.parametrize("file", ["own_nets.py", "own_nets/__init__.py"])
def test_a_model_is_not_answered_for_by_another_ones_code(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Three registered models bring a module of one name, the first and the second the same."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    folders = [shutil.copytree(packaged, tmp_path / str(number)) for number in range(3)]
    for number, folder in enumerate(folders):
        (folder / "code" / file).parent.mkdir(exist_ok=True)
        (folder / "code" / file).write_text(f"SHIFT = {number // 2}")
    mlflow.pyfunc.load_model(str(folders[0]))
    importlib.import_module("own_nets")  # as its network would
    mlflow.pyfunc.load_model(str(folders[1]))
    with pytest.raises(PipelineError, match="own code own_nets.* is not the .* load the model in a process of its own"):
        mlflow.pyfunc.load_model(str(folders[2]))
