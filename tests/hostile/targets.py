"""What is thrown at everything that reads files or arrays, and what must come of it.

Every target takes a generator of random numbers, makes a hostile input of a good one, and returns what was answered:
"refused" (a ``PipelineError`` of one line) or "taken". Anything else that is raised is a fault; so is a file outside
the target's folder, code that ran, and an answer that takes more than ``SECONDS``.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import compose, validate
from pipeline.data.archives import BadMember, list_zip, open_zip
from pipeline.data.dataset import Dataset, class_table
from pipeline.data.episodes import EpisodeSpec, check_spec, plan_episodes
from pipeline.data.manifest import Manifest
from pipeline.data.sources.files import Rule, Unusable, decode
from pipeline.data.write import write_dataset
from pipeline.errors import PipelineError
from pipeline.inference import Enrolment, FewShotClassifier
from pipeline.model import build_model
from pipeline.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.training.config import TrainConfig

SECONDS = 20.0  # of CPU time, far more than any refusal takes
Target = Callable[[random.Random], str]

SPEC = {
    "method": {"name": "prototypical"},
    "backbone": {"name": "conv4", "width": 4},
    "input": {"shape": [1, 16, 16], "scaling": "unit"},
    "way": 3,
    "classes": 4,
}
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, -(2**63), 0.5, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "/etc/passwd", "\0", "é\u202e", "9" * 400, [], {}, [[]], [0] * 50, {"a": 1}, "os.system", "__import__('os')",
    "s3://", "s3://nowhere/x", "${oc.env:HOME}", "!!python/object/apply:os.system ['true']",
]  # fmt: skip


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bits flipped, a part cut out, doubled, replaced or everything after a place gone."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        if kind == 0 and data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            del data[place : place + draw.randint(1, 40)]
        elif kind == 3:
            data[place:place] = draw.randbytes(draw.randint(1, 40))
        elif kind == 4:
            data[place:place] = data[place : place + draw.randint(1, 200)]
        else:
            count = draw.choice((4, 8))
            data[place : place + count] = draw.choice((b"\xff", b"\x00", b"\x7f")) * count
    return bytes(data)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value in which one thing, at any depth, is something odd, is missing, or is there twice."""
    value = json.loads(json.dumps(value))
    holders = list(_holders(value))
    if not holders:
        return draw.choice(ODD)
    holder, key = draw.choice(holders)
    kind = draw.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 2 and isinstance(holder, dict):
        holder[draw.choice(["x", "", "__class__", "../up"])] = draw.choice(ODD)
    else:
        holder[key] = draw.choice(ODD)
    return value


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(items):
        yield value, key
        yield from _holders(part)


@contextmanager
def folder() -> Iterator[Path]:
    """A folder within a folder, in which nothing else may appear."""
    with tempfile.TemporaryDirectory() as outer:
        inner = Path(outer) / "inner"
        inner.mkdir()
        yield inner
        assert [path.name for path in Path(outer).iterdir()] == ["inner"], "something was written outside the folder"


@functools.cache
def _dataset() -> tuple[str, dict[str, bytes]]:
    """The name and the files of a small dataset."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 1, 8, 8), dtype=np.uint8)
    names = [f"c{number}" for number in range(6)]
    with tempfile.TemporaryDirectory() as place:
        uri = f"{place}/set"
        write_dataset(uri, "set", zip(names, pixels, strict=True), {"train": names[:4], "test": names[4:]})
        return "set", {path.name: path.read_bytes() for path in Path(uri).iterdir()}


def manifest(draw: random.Random) -> str:
    """A manifest with odd values and a right fingerprint, then the dataset behind it."""
    _, files = _dataset()
    content = json.loads(files["manifest.json"])
    content.pop("fingerprint")
    for _ in range(draw.randint(1, 2)):
        content = mutate_json(content, draw)
    with folder() as place:
        for name, data in files.items():
            (place / name).write_bytes(data)
        text = json.dumps(_signed(content)).encode()
        (place / "manifest.json").write_bytes(text if draw.random() < 0.7 else mutate_bytes(text, draw))
        dataset = Dataset(str(place))
        table = class_table(dataset.manifest, next(iter(dataset.manifest.splits), "train"))
        spec = EpisodeSpec(2, 1, 1)
        check_spec(table, spec, "train")
        dataset.gather(plan_episodes(table, spec, 0, np.arange(3)).rows)
    return "taken"


def _signed(content: Any) -> Any:
    """With the fingerprint of what stands there, as somebody would write it who means harm."""
    import hashlib

    if not isinstance(content, dict):
        return content
    body = {key: value for key, value in content.items() if key not in ("source", "skipped")}
    return {**content, "fingerprint": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def shard(draw: random.Random) -> str:
    """A damaged shard whose manifest has been made to agree with it."""
    import hashlib

    _, files = _dataset()
    content = json.loads(files["manifest.json"])
    content.pop("fingerprint")
    with folder() as place:
        name = content["shards"][0]["file"]
        data = mutate_bytes(files[name], draw)
        (place / name).write_bytes(data)
        content["shards"][0] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (place / "manifest.json").write_text(json.dumps(_signed(content)))
        Dataset(str(place)).gather(np.arange(30))
    return "taken"


@functools.cache
def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"class {number}/{number}.png", _picture("PNG"))
        archive.writestr("a/b.txt", b"text" * 50)
    return buffer.getvalue()


def archive(draw: random.Random) -> str:
    """A zip archive, listed and read member by member."""
    with folder() as place:
        path = place / "set.zip"
        path.write_bytes(mutate_bytes(_archive(), draw) or b"x")
        members = list_zip(str(path))
        with open_zip(str(path)) as reader:
            for member in members:
                assert ".." not in member.name.split("/") and not member.name.startswith("/")
                try:
                    reader.read(member)
                except BadMember:  # which an ingest counts and lists
                    continue
    return "taken"


@functools.cache
def _picture(kind: str) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def image(draw: random.Random) -> str:
    """An image file, as an ingest decodes it; what is unusable is counted there."""
    content = mutate_bytes(_picture(draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP"])), draw)
    shape = (draw.choice((1, 3)), 16, 16)
    try:
        decoded, _ = decode(content, Rule(shape), keep_file=draw.random() < 0.5)
    except Unusable:
        return "refused"
    assert decoded.shape == shape and decoded.dtype == np.uint8
    return "taken"


def arguments(draw: random.Random) -> str:
    """Arguments of a job."""
    keys = ["steps", "train.way", "train", "method", "method.name", "cluster.workers", "+x", "~steps", "name", "recipe"]
    values = [json.dumps(draw.choice(ODD)), str(draw.choice(ODD)), "[1,", "{a:", "${", "$(touch x)", "'", "a=b", "\n"]
    given = [f"{draw.choice(keys)}={draw.choice(values)}" for _ in range(draw.randint(1, 3))]
    validate(TrainConfig, compose("train", given))
    return "taken"


@functools.cache
def _config() -> dict[str, Any]:
    return compose("train")


def config(draw: random.Random) -> str:
    """A whole configuration in a file, as ``config=FILE`` takes it."""
    import yaml

    content = mutate_json(_config(), draw)
    text = yaml.safe_dump(content, allow_unicode=True).encode()
    with folder() as place:
        (place / "c.yaml").write_bytes(mutate_bytes(text, draw) if draw.random() < 0.4 else text)
        validate(TrainConfig, compose("train", [f"config={place}/c.yaml"]))
    return "taken"


@functools.cache
def _checkpoint() -> dict[str, bytes]:
    torch.manual_seed(0)
    weights = build_model(SPEC).state_dict()
    found = Checkpoint(7, SPEC, {"name": "x"}, {"uri": "u"}, {"val/accuracy": 0.5}, [{"step": 7.0}], dict(weights))
    with tempfile.TemporaryDirectory() as place:
        save_checkpoint(place, found)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def checkpoint(draw: random.Random) -> str:
    """A checkpoint with a damaged file, or with odd values that its digests have been made to agree with."""
    from pipeline.training.checkpoint import _digest

    files = dict(_checkpoint())
    if draw.random() < 0.5:
        name = draw.choice(sorted(files))
        files[name] = mutate_bytes(files[name], draw)
    else:
        state = json.loads(files["state.json"])
        state.pop("digest")
        state = mutate_json(state, draw)
        if isinstance(state, dict):
            state["digest"] = _digest(state)
        files["state.json"] = json.dumps(state).encode()
    with folder() as place:
        for name, data in files.items():
            (place / name).write_bytes(data)
        found = load_checkpoint(str(place))
        FewShotClassifier.from_weights(found.spec, found.model)
    return "taken"


@functools.cache
def _classifier() -> FewShotClassifier:
    torch.manual_seed(0)
    return FewShotClassifier.from_weights(SPEC, build_model(SPEC).state_dict())


def _odd_array(draw: random.Random) -> Any:
    shapes = [
        (),
        (0,),
        (3,),
        (0, 1, 16, 16),
        (1, 1, 16, 16),
        (4, 1, 16, 16),
        (4, 3, 16, 16),
        (4, 1, 16, 15),
        (4, 16, 16),
    ]
    kinds = [
        "uint8",
        "uint8",
        "uint8",
        "int64",
        "float32",
        "float64",
        "bool",
        "object",
        "U3",
        "complex64",
        "datetime64[s]",
    ]
    return np.zeros(draw.choice(shapes), dtype=draw.choice(kinds))


def _odd_labels(draw: random.Random) -> Any:
    some = [0, 1, 2, -1, 2**63 - 1, 2**70, 0.5, float("nan"), "a", "b", "", None, True, [1], b"x"]
    listed = [draw.choice(some) for _ in range(draw.choice((0, 1, 3, 4)))]
    return draw.choice([listed, [0, 0, 1, 1], ["a", "b", "a", "b"], _odd_array(draw), None, "abcd", 5])


def prediction(draw: random.Random) -> str:
    """Arrays and labels of all kinds, to a model in use."""
    model = _classifier()
    support = draw.choice([np.zeros((4, 1, 16, 16), np.uint8), _odd_array(draw), [[1, 2], [3]], None])
    enrolled = model.enrol(support, _odd_labels(draw))
    threshold = draw.choice(["auto", "none", None, 0.5, float("nan"), "x", -1e308, True, []])
    answers = model.classify(enrolled, draw.choice([np.zeros((2, 1, 16, 16), np.uint8), _odd_array(draw)]), threshold)
    assert len(answers.labels) == len(answers.known)
    return "taken"


@functools.cache
def _enrolment() -> bytes:
    found = _classifier().enrol(np.zeros((4, 1, 16, 16), np.uint8), ["a", "b", "a", "b"])
    with tempfile.TemporaryDirectory() as place:
        found.save(f"{place}/e")
        return Path(f"{place}/e").read_bytes()


def enrolment(draw: random.Random) -> str:
    """A damaged enrolment file."""
    with folder() as place:
        (place / "e").write_bytes(mutate_bytes(_enrolment(), draw))
        found = Enrolment.load(str(place / "e"))
        _classifier().classify(found, np.zeros((2, 1, 16, 16), np.uint8))
    return "taken"


def model(draw: random.Random) -> str:
    """A damaged model folder, as a registry gives it."""
    with folder() as place:
        _classifier().save(place)
        name = draw.choice(["weights.safetensors", "model.json"])
        data = (place / name).read_bytes()
        if name == "model.json" and draw.random() < 0.6:
            data = json.dumps(mutate_json(json.loads(data), draw)).encode()
        else:
            data = mutate_bytes(data, draw)
        (place / name).write_bytes(data)
        FewShotClassifier.load(place)
    return "taken"


def manifest_text(draw: random.Random) -> str:
    """Any bytes as a manifest."""
    text = draw.randbytes(draw.randint(0, 60)) if draw.random() < 0.5 else json.dumps(draw.choice(ODD)).encode()
    Manifest.from_json(text.decode("utf-8", "replace"), "m")
    return "taken"


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        manifest, manifest_text, shard, archive, image, arguments, config, checkpoint, prediction, enrolment, model,
    )
}  # fmt: skip


def attempt(name: str, seed: int) -> str:
    """One hostile input of a target; raises what is a fault."""
    began = time.process_time()  # a machine that is busy elsewhere is no fault
    try:
        answer = TARGETS[name](random.Random(f"{name} {seed}"))
    except PipelineError as error:
        text = str(error)
        assert text and "\n" not in text, f"{name} {seed}: not one line: {text!r}"
        answer = "refused"
    seconds = time.process_time() - began
    assert seconds < SECONDS, f"{name} {seed}: took {seconds:.0f} s of CPU time"
    return answer
