"""Pickles are read as data: what NumPy and Python wrote comes back, and nothing of theirs is ever run."""

from __future__ import annotations

import io
import pickle
import pickletools
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources.cifar import Cifar100
from pipeline.data.sources.splits import published
from pipeline.data.sources.unpickle import read_arrays
from pipeline.errors import PipelineError

MARKER = "executed"


def read(content: bytes) -> Any:
    return read_arrays(io.BytesIO(content), "the file")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", ">i4", "bool"])
def test_arrays_come_back(protocol: int, dtype: str) -> None:
    array = np.random.default_rng(0).integers(0, 100, (3, 4, 5)).astype(dtype)
    content = {"data": array, "turned": np.asfortranarray(array.T), "labels": [1, 2, 3], b"names": ["a", b"b"]}
    found = read(pickle.dumps(content, protocol=protocol))
    assert found["data"].dtype == array.dtype and found["labels"] == [1, 2, 3] and found["names"] == ["a", "b"]
    np.testing.assert_array_equal(found["data"], array)
    np.testing.assert_array_equal(found["turned"], array.T)


def test_a_pickle_of_python_2_comes_back() -> None:
    """As CIFAR's own: byte strings as text, and NumPy under its old name."""
    content = (
        b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nI3\ntcnumpy\ndtype\n"
        b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x02\\x03\\xff\\x05\\x06'\ntbsS'fine_labels'\n(lI4\naI5\nas."
    )
    found = read(content)
    np.testing.assert_array_equal(found["data"], np.array([[1, 2, 3], [255, 5, 6]], np.uint8))
    assert found["fine_labels"] == [4, 5]


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def attacks(target: Path) -> list[tuple[str, Any]]:
    import os
    import subprocess

    return [
        ("posix.system", Attack(os.system, f"touch {target}")),
        ("builtins.eval", Attack(eval, f"open({str(target)!r}, 'w')")),
        ("builtins.exec", Attack(exec, f"open({str(target)!r}, 'w')")),
        ("subprocess.Popen", Attack(subprocess.Popen, ["touch", str(target)])),
        ("builtins.getattr", Attack(getattr, "x", "upper")),
        ("numpy.load", Attack(np.load, str(target))),
        ("numpy.fromfile", Attack(np.fromfile, "/dev/zero", "u1", 3)),
    ]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_attacks_are_refused_by_name_and_never_run(tmp_path: Path, number: int, protocol: int) -> None:
    name, attack = attacks(tmp_path / MARKER)[number]
    content = pickle.dumps({"data": [np.zeros(3, np.uint8), attack]}, protocol=protocol)
    with pytest.raises(PipelineError, match="the file is refused: its pickle asks for ") as refusal:
        read(content)
    assert name.rpartition(".")[2] in str(refusal.value) and "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_the_attacks_would_work_elsewhere(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    pickle.loads(pickle.dumps(attacks(tmp_path / MARKER)[0][1]))
    assert [path.name for path in tmp_path.iterdir()] == [MARKER]


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(PipelineError, match="refused: its pickle asks for an array"):
        read(pickle.dumps({"data": np.array([{}, []], dtype=object)}))


def test_an_array_that_lies_about_its_shape_is_refused() -> None:
    content = pickle.dumps(np.arange(7, dtype=np.uint8), protocol=2).replace(b"K\x07\x85", b"K\x63\x85")
    assert b"K\x63\x85" in content
    with pytest.raises(PipelineError, match="bytes do not match its shape"):
        read(content)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_one_line_or_in_plain_data(content: bytes) -> None:
    try:
        found = read(content)
    except PipelineError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, int | float | str | list | dict | tuple | bytearray | set | frozenset | complex | None)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_an_altered_pickle_ends_in_one_line_or_in_plain_data(position: int, value: int) -> None:
    batch = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2]}
    content = bytearray(pickle.dumps(batch, protocol=2))
    content[position % len(content)] = value
    try:
        read(bytes(content))
    except PipelineError as error:
        assert len(str(error).splitlines()) == 1


def test_only_plain_names_are_admitted() -> None:
    content = pickle.dumps({"data": np.zeros(3)}, protocol=2)
    asked = {argument for code, argument, _ in pickletools.genops(content) if code.name == "GLOBAL"}
    assert asked == {"numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype", "_codecs encode"}


def python_archive(folder: Path, per_class: int = 6, batches: dict[str, Any] | None = None) -> Path:
    """An archive as the official one, with few images: five sixths in the training part."""
    names = sorted(name for members in published("fc100").values() for name in members)
    generator = np.random.default_rng(0)
    content = {"meta": {b"fine_label_names": [name.encode() for name in names]}}
    for part, count in (("train", per_class * 5 // 6), ("test", per_class // 6)):
        labels = generator.permutation(np.repeat(np.arange(100), count))
        content[part] = {
            b"data": generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8),
            b"fine_labels": labels.tolist(),
            b"filenames": [f"{names[label]}_s_{row:06d}.png".encode() for row, label in enumerate(labels)],
        }
    content.update(batches or {})
    path = folder / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for part, batch in content.items():
            data = pickle.dumps(batch, protocol=2)
            info = tarfile.TarInfo(f"cifar-100-python/{part}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_the_official_archive_gives_the_rows_of_the_png_folders(tmp_path: Path) -> None:
    from PIL import Image

    archive = python_archive(tmp_path)
    with tarfile.open(archive) as opened:
        for part in ("train", "test"):
            stream = opened.extractfile(f"cifar-100-python/{part}")
            assert stream is not None
            batch = pickle.loads(stream.read())
            names = sorted(name for members in published("fc100").values() for name in members)
            for pixels, label, file in zip(batch[b"data"], batch[b"fine_labels"], batch[b"filenames"], strict=True):
                path = tmp_path / "png" / part / names[label] / file.decode()
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)
    rows = {}
    for kind, folder in (("pickle", tmp_path), ("png", tmp_path / "png")):
        source = Cifar100(str(folder), "fc100")
        plan = source.plan(64, print)
        chunks = [chunk for order in plan.orders for chunk in source.read(order, 64)]
        rows[kind] = [np.concatenate([chunk.images for chunk in chunks]), np.concatenate([c.classes for c in chunks])]
    np.testing.assert_array_equal(rows["pickle"][0], rows["png"][0])
    np.testing.assert_array_equal(rows["pickle"][1], rows["png"][1])
    assert rows["png"][0].shape == (600, 3, 32, 32)


def test_a_hostile_batch_is_refused(tmp_path: Path) -> None:
    import os

    path = python_archive(tmp_path, batches={"test": {b"data": Attack(os.system, f"touch {tmp_path / MARKER}")}})
    source = Cifar100(str(path), "cifar_fs")
    plan = source.plan(64, print)
    with pytest.raises(PipelineError, match=r"tar.gz: test is refused: its pickle asks for posix.system"):
        list(source.read(plan.orders[0], 64))
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("where", [0.2, 0.5, 0.8])
def test_altered_archives_are_refused(tmp_path: Path, where: float) -> None:
    """What unpacks all the same, to other pixels, does not have the archive's checksum."""
    path = python_archive(tmp_path)
    content = bytearray(path.read_bytes())
    begin = int(where * len(content))
    content[begin : begin + 400] = bytes(byte ^ 0x55 for byte in content[begin : begin + 400])
    path.write_bytes(content)
    source = Cifar100(str(tmp_path), "cifar_fs")
    with pytest.raises(PipelineError, match="not a readable tar archive") as refused:
        list(source.read(source.plan(64, print).orders[0], 64))
    assert "\n" not in str(refused.value)


def test_broken_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(python_archive(tmp_path).read_bytes()[:-50_000])
    source = Cifar100(str(tmp_path), "cifar_fs")
    with pytest.raises(PipelineError, match="not a readable tar archive"):
        list(source.read(source.plan(64, print).orders[0], 64))
