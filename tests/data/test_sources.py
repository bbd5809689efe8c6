"""Sources: what they list, in which order, and what they refuse. No Ray here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import MAX_PIXELS
from pipeline.data.sources.base import Chunk, Plan, Source
from pipeline.data.sources.by_kind import make_source
from pipeline.data.sources.cifar import Cifar100
from pipeline.data.sources.files import Rule, Unusable, decode
from pipeline.data.sources.folder import Folder
from pipeline.data.sources.mini_imagenet import MiniImagenet
from pipeline.data.sources.omniglot import Omniglot
from pipeline.data.sources.splits import by_fractions, from_file, published
from pipeline.errors import PipelineError


def read_all(source: Source, chunk_rows: int = 100) -> tuple[Plan, Chunk]:
    """All chunks of a source as one."""
    plan = source.plan(chunk_rows, print)
    chunks = [chunk for order in plan.orders for chunk in source.read(order, chunk_rows)]
    assert all(len(chunk.images) <= chunk_rows for chunk in chunks)
    whole = Chunk(
        np.concatenate([chunk.images for chunk in chunks]),
        np.concatenate([chunk.classes for chunk in chunks]),
        [name for chunk in chunks for name in chunk.names],
        [digest for chunk in chunks for digest in chunk.digests],
        [file for chunk in chunks for file in chunk.files or []],
        plan.skipped + [skip for chunk in chunks for skip in chunk.skipped],
    )
    assert (np.diff(whole.classes) >= 0).all()
    return plan, whole


def save(path: Path, size: tuple[int, int] = (12, 10), mode: str = "RGB", seed: int = 0, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("omniglot_vinyals", (1028, 172, 423)),
        ("cifar_fs", (64, 16, 20)),
        ("fc100", (60, 20, 20)),
        ("mini_imagenet_ravi", (64, 16, 20)),
    ],
)
def test_published_splits_are_whole_and_disjoint(name: str, sizes: tuple[int, int, int]) -> None:
    splits = published(name)
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes
    assert len({member for members in splits.values() for member in members}) == sum(sizes)


def test_fractions_give_disjoint_splits_that_a_new_class_hardly_moves() -> None:
    names = [f"class {number}" for number in range(100)]
    fractions = {"train": 0.64, "val": 0.16, "test": 0.2}
    splits = by_fractions(names, fractions, seed=0)
    assert [len(members) for members in splits.values()] == [64, 16, 20]
    assert sorted(member for members in splits.values() for member in members) == sorted(names)
    assert by_fractions(names[::-1], fractions, 0)["test"][::-1] == splits["test"]
    assert by_fractions(names, fractions, 1) != splits
    more = by_fractions([*names, "one more"], fractions, seed=0)
    assert len(set(more["test"]) ^ set(splits["test"])) <= 4
    assert [len(members) for members in by_fractions(names[:3], fractions, 0).values()] == [1, 1, 1]
    assert sum(map(len, by_fractions(names, {"train": 0.5, "test": 0.1}, 0).values())) == 60
    rest = {"train": 0.95, "val": 0.02, "test": 0.02}  # less than one class for a split, and not all for the three
    assert [len(members) for members in by_fractions(names[:10], rest, 0).values()] == [8, 1, 1]


@pytest.mark.parametrize("fractions", [{"train": 0.9, "test": 0.2}, {"train": 1.0, "test": 0.0}, {"train": -1.0}])
def test_impossible_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(PipelineError, match="fractions"):
        by_fractions(["a", "b", "c"], fractions, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["a"], "test": ["a"]}', "class 'a' is in 'train' and in 'test'"),
        ('{"train": "a"}', "does not hold"),
        ("[1]", "does not hold"),
        ("{", "is not a JSON file"),
    ],
)
def test_bad_split_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(PipelineError, match=message):
        from_file(str(tmp_path / "s.json"))


# --- decoding ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    import io

    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "HSV"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_what_its_colour_looks_like(mode: str, channels: int) -> None:
    deep = mode == "I;16"
    image = Image.new(mode, (8, 6), 65535) if deep else Image.new("RGB", (8, 6), "white").convert(mode)
    if mode == "HSV":
        with pytest.raises((Unusable, OSError)):
            decode(encoded(image, "TIFF"), Rule((channels, 4, 4), modes=frozenset({"RGB"})))
        return
    kind = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    pixels, _ = decode(encoded(image, kind), Rule((channels, 4, 4)))
    assert pixels.shape == (channels, 4, 4) and pixels.dtype == np.uint8
    assert (pixels >= 254).all()


def test_transparency_is_white_paper() -> None:
    pixels, _ = decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), Rule((3, 4, 4)))
    assert (pixels == 255).all()
    palette = Image.new("P", (4, 4), 0)
    pixels, _ = decode(encoded(palette, transparency=0), Rule((1, 4, 4)))
    assert (pixels == 255).all()


def test_exact_images_keep_their_pixels_channels_first() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    taken, _ = decode(encoded(Image.fromarray(pixels)), Rule((3, 6, 5)))
    np.testing.assert_array_equal(taken, pixels.transpose(2, 0, 1))
    inverted, _ = decode(encoded(Image.fromarray(pixels)), Rule((3, 6, 5), invert=True))
    np.testing.assert_array_equal(inverted, 255 - pixels.transpose(2, 0, 1))


def test_the_central_part_is_taken() -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    taken, _ = decode(encoded(Image.fromarray(pixels)), Rule((3, 5, 5)))
    assert (taken == 200).all()


def test_photographs_stand_upright() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0, 0] = 255  # top left, as the sensor saw it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    taken, _ = decode(encoded(Image.fromarray(pixels), exif=exif), Rule((3, 4, 4)))
    assert taken[:, 0, 3].tolist() == [255] * 3 and taken.sum() == 255 * 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no image at all", "unreadable"),
        (encoded(Image.new("RGB", (64, 64), "red"), "JPEG")[:-200], "truncated"),
        (encoded(Image.effect_noise((64, 64), 9))[:2000], "truncated"),
        (encoded(Image.new("RGB", (8, 8)))[:20], "truncated"),
        (encoded(Image.effect_noise((64, 64), 9)).replace(b"IDAT", b"IDXT"), "unreadable"),
    ],
)
def test_bad_files_have_their_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as problem:
        decode(content, Rule((3, 8, 8)))
    assert problem.value.reason == reason


def test_wrong_modes_and_sizes_are_told() -> None:
    rule = Rule((3, 8, 8), modes=frozenset({"RGB"}), size=(8, 8))
    for image, reason in ((Image.new("L", (8, 8)), "wrong_mode"), (Image.new("RGB", (8, 9)), "wrong_size")):
        with pytest.raises(Unusable) as problem:
            decode(encoded(image), rule)
        assert problem.value.reason == reason


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_other_formats_are_kept_as_png(kind: str) -> None:
    image = Image.new("L", (9, 9), 77)
    pixels, kept = decode(encoded(image, kind), Rule((1, 9, 9)), keep_file=True)
    assert kept.startswith(b"\x89PNG")
    np.testing.assert_array_equal(decode(kept, Rule((1, 9, 9)))[0], pixels)


# --- folder -----------------------------------------------------------------------------------------------------------


def test_a_folder_and_its_zip_give_the_same(tmp_path: Path) -> None:
    for number, name in enumerate(["cat", "dog", "a bird", "Fisch", "ü"]):
        for image in range(4):
            mode, suffix = [("RGB", "png"), ("L", "jpg"), ("RGBA", "webp"), ("P", "gif")][image]
            path = tmp_path / "in" / "my set" / name / f"{image}.{suffix}"
            save(path, (20 + image, 30), mode, seed=10 * number + image)
    (tmp_path / "in" / "my set" / ".DS_Store").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "in").rglob("*")):
            archive.write(path, path.relative_to(tmp_path / "in"))
    folder = Folder(str(tmp_path / "in"), shape=[3, 16, 16])
    plan, chunk = read_all(folder, 7)
    assert plan.classes == ["Fisch", "a bird", "cat", "dog", "ü"]
    assert np.bincount(chunk.classes).tolist() == [4] * 5 and plan.images == 20
    assert chunk.images.shape == (20, 3, 16, 16)
    assert [skip.reason for skip in chunk.skipped] == ["hidden"]
    zipped_plan, zipped = read_all(Folder(str(tmp_path / "in.zip"), shape=[3, 16, 16]), 7)
    np.testing.assert_array_equal(zipped.images, chunk.images)
    assert (zipped_plan.classes, zipped_plan.splits) == (plan.classes, plan.splits)


def test_unusable_files_are_listed_and_the_others_stay(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", seed=ord(name) + number)
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "b" / "note.txt").write_text("not an image")
    content = (tmp_path / "c" / "0.png").read_bytes()
    (tmp_path / "c" / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "loose.png").write_bytes(content)
    _, chunk = read_all(Folder(str(tmp_path), shape=[3, 8, 8]))
    assert {(skip.file, skip.reason) for skip in chunk.skipped} == {
        ("a/empty.png", "zero_size"),
        ("b/note.txt", "unreadable"),
        ("c/cut.png", "truncated"),
        ("loose.png", "no_class"),
    }
    assert np.bincount(chunk.classes).tolist() == [3, 3, 3]


def test_nested_folders_name_classes_by_their_path(tmp_path: Path) -> None:
    for name in ("x/greek/alpha", "x/greek/beta", "x/latin/a"):
        save(tmp_path / name / "1.png")
    assert Folder(str(tmp_path)).plan(10, print).classes == ["greek/alpha", "greek/beta", "latin/a"]


@pytest.mark.parametrize(
    ("first", "second"), [("Cat", "cat"), ("e\u0301t\u00e9", "\u00e9t\u00e9"), ("a b", "a  b"), ("\ufb01sh", "fish")]
)
def test_colliding_class_names_are_refused(tmp_path: Path, first: str, second: str) -> None:
    for name in (first, second, "other"):
        save(tmp_path / name / "1.png")
    with pytest.raises(PipelineError, match="collide|different Unicode forms"):
        Folder(str(tmp_path)).plan(10, print)


def test_a_split_file_chooses_the_classes(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        save(tmp_path / "in" / name / "1.png")
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["c"], "val": ["a"], "test": ["b"]}))
    plan, chunk = read_all(Folder(str(tmp_path / "in"), splits=str(split)))
    assert plan.splits == {"train": ["c"], "val": ["a"], "test": ["b"]} and plan.classes == ["a", "b", "c"]
    assert [(skip.class_name, skip.reason) for skip in chunk.skipped] == [("d", "not_in_split")]
    split.write_text(json.dumps({"train": ["c", "zebra"], "test": ["b"]}))
    with pytest.raises(PipelineError, match="'zebra'"):
        Folder(str(tmp_path / "in"), splits=str(split)).plan(10, print)


def test_too_large_images_are_left_out_and_a_key_lets_them_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns above its own limit and fails above its double; the key decides in both."""
    for name in ("a", "b", "c"):
        save(tmp_path / name / "1.png", seed=ord(name))
        save(tmp_path / name / "big.jpg", (60, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    plan, chunk = read_all(Folder(str(tmp_path), max_pixels=2000))
    assert [skip.file for skip in chunk.skipped] == [f"{name}/big.jpg" for name in plan.classes]
    assert {(skip.reason, skip.detail) for skip in chunk.skipped} == {("too_large", "60 x 40 pixels, more than 2,000")}
    plan, chunk = read_all(Folder(str(tmp_path), max_pixels=2400))
    assert len(chunk.images) == 6 and "max_pixels" not in plan.source
    plan, _ = read_all(Folder(str(tmp_path), max_pixels=2 * MAX_PIXELS))
    assert plan.source["max_pixels"] == 2 * MAX_PIXELS  # for the model that is trained on them
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_encoded_images_keep_their_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / name / "1.jpg", (50, 40), seed=ord(name))
    _, chunk = read_all(Folder(str(tmp_path), shape=[3, 16, 16], encoding="encoded"))
    assert chunk.files == [(tmp_path / name / "1.jpg").read_bytes() for name in ("a", "b", "c")]


@pytest.mark.parametrize(
    "settings",
    [
        {"path": None},
        {"shape": [2, 8, 8]},
        {"encoding": "jpeg"},
        {"max_pixels": 0},
        {"max_pixels": 1e6},
        {"rotations": [45]},
        {"rotations": [0, 90], "shape": [1, 8, 9]},
        {"colour": 1},
        {"kind": "web"},
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(PipelineError, match="data.source"):
        make_source({"kind": "folder", "path": str(tmp_path), **settings})


# --- mini-ImageNet ----------------------------------------------------------------------------------------------------


def mini_names() -> dict[str, list[str]]:
    return published("mini_imagenet_ravi")


def test_mini_imagenet_layouts_agree(tmp_path: Path) -> None:
    """Class folders, images with tables, and cached arrays give the same classes and splits, and equal pixels."""
    arrays: dict[str, list[np.ndarray]] = {"train": [], "val": [], "test": []}
    members: dict[str, dict[str, list[int]]] = {"train": {}, "val": {}, "test": {}}
    (tmp_path / "flat" / "images").mkdir(parents=True)
    for split, names in mini_names().items():
        table = ["filename,label"]
        for name in sorted(names):
            pixels = np.random.default_rng(int(name[1:])).integers(0, 256, (2, 84, 84, 3), dtype=np.uint8)
            members[split][name] = [len(arrays[split]), len(arrays[split]) + 1]
            arrays[split] += list(pixels)
            for number, image in enumerate(pixels):
                file = f"{name}{number:08d}.png"
                (tmp_path / "folders" / split / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(tmp_path / "folders" / split / name / file, compress_level=1)
                (tmp_path / "flat" / "images" / file).hardlink_to(tmp_path / "folders" / split / name / file)
                table.append(f"{file},{name}")
        (tmp_path / "flat" / f"{split}.csv").write_text("\n".join(table) + "\n")
        write_cache(tmp_path / "cached" / f"mini-imagenet-cache-{split}.pkl", np.stack(arrays[split]), members[split])

    def by_class(layout: str) -> dict[str, np.ndarray]:
        plan, chunk = read_all(MiniImagenet(str(tmp_path / layout)))
        assert {split: sorted(names) for split, names in plan.splits.items()} == {
            split: sorted(names) for split, names in mini_names().items()
        }
        return {name: chunk.images[chunk.classes == number] for number, name in enumerate(plan.classes)}

    folders, flat, cached = by_class("folders"), by_class("flat"), by_class("cached")
    for name, images in folders.items():
        expected = np.random.default_rng(int(name[1:])).integers(0, 256, (2, 84, 84, 3), dtype=np.uint8)
        np.testing.assert_array_equal(images, expected.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(flat[name], images)
        np.testing.assert_array_equal(cached[name], images)


def write_cache(path: Path, images: np.ndarray, members: dict[str, list[int]]) -> None:
    import pickle

    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"image_data": images, "class_dict": members}, protocol=2))


def test_incomplete_mini_imagenet_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "n01532829" / "1.jpg")
    with pytest.raises(PipelineError, match="lacks 99 classes"):
        MiniImagenet(str(tmp_path)).plan(10, print)
    write_cache(tmp_path / "cached" / "mini-imagenet-cache-train.pkl", np.zeros((1, 84, 84, 3), np.uint8), {})
    with pytest.raises(PipelineError, match="mini-imagenet-cache-val.pkl"):
        MiniImagenet(str(tmp_path / "cached")).plan(10, print)


def test_tables_of_mini_imagenet_as_people_save_them(tmp_path: Path) -> None:
    """A byte-order mark, as spreadsheets write it, is no part of a name; other encodings are refused in one line."""
    table = tmp_path / "train.csv"
    save(tmp_path / "images" / "n0153282900000001.jpg")
    table.write_bytes("\ufefffilename,label\nn0153282900000001.jpg,n01532829\n".encode())
    with pytest.raises(PipelineError, match="lacks 99 classes"):
        MiniImagenet(str(tmp_path)).plan(10, print)
    table.write_bytes("filename,label\nn0153282900000001.jpg,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(PipelineError, match=r"train.csv is no UTF-8 text"):
        MiniImagenet(str(tmp_path)).plan(10, print)
    table.write_bytes(b"")
    with pytest.raises(PipelineError, match=r"train.csv is zero_size; fetch it again"):
        MiniImagenet(str(tmp_path)).plan(10, print)


# --- real archives ----------------------------------------------------------------------------------------------------


def test_omniglot_is_whole(real_data: Path) -> None:
    source = Omniglot(str(real_data / "omniglot"))
    plan = source.plan(1000, print)
    assert plan.images == 32_460 and len(plan.classes) == 1623 and plan.rotations == (0, 90, 180, 270)
    assert [len(plan.splits[split]) for split in ("train", "val", "test")] == [1028, 172, 423]
    (chunk,) = source.read(plan.orders[0], 1000)
    assert np.bincount(chunk.classes).tolist() == [20] * 50 and not chunk.skipped
    name, _, entry = plan.orders[0][21][1], *plan.orders[0][21][1:]
    with zipfile.ZipFile(entry[1]) as archive, archive.open(entry[0]) as stream:
        drawing = np.asarray(Image.open(stream).convert("L"), dtype=np.float64)
    assert name == "Alphabet_of_the_Magi/character02"
    expected = 255 - triangle_resize(drawing, 28)
    assert np.abs(chunk.images[21, 0] - expected).max() <= 1.0
    assert expected.max() > 200 and expected.mean() < 60


def test_omniglot_of_any_size(real_data: Path) -> None:
    folder = str(real_data / "omniglot")
    whole = Omniglot(folder, split="background", shape=(1, 105, 105))  # what backbone=koch sees
    order = whole.plan(1000, print).orders[0]
    (chunk,) = whole.read(order[20:22], 1000)
    with zipfile.ZipFile(order[21][2][1]) as archive, archive.open(order[21][2][0]) as stream:
        drawing = np.asarray(Image.open(stream).convert("L"))
    np.testing.assert_array_equal(chunk.images[1, 0], 255 - drawing)
    (chunk,) = Omniglot(folder, shape=[1, 56, 56]).read(order[20:22], 1000)
    assert np.abs(chunk.images[1, 0] - (255 - triangle_resize(drawing.astype(np.float64), 56))).max() <= 1.0
    assert Omniglot.rule.shape == Omniglot(folder).shape == (1, 28, 28)


def test_omniglot_in_a_shape_that_cannot_be() -> None:
    with pytest.raises(PipelineError, match=r"data.source.shape=\[28, 28\] is not \[1 or 3, height, width\]"):
        Omniglot(shape=[28, 28])
    with pytest.raises(PipelineError, match="drawings that are turned as classes are square"):
        Omniglot(shape=[1, 28, 32])
    assert Omniglot(shape=[1, 28, 32], split="background").shape == (1, 28, 32)


def triangle_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with antialiasing: the weights of a triangle as wide as the scale, in float64."""
    scale = image.shape[0] / size
    centres = (np.arange(size) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(image.shape[0]) + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ image @ weights.T


def test_omniglot_by_alphabets(real_data: Path) -> None:
    plan = Omniglot(str(real_data / "omniglot"), split="background").plan(1000, print)
    alphabets = {split: {name.split("/")[0] for name in names} for split, names in plan.splits.items()}
    assert {split: len(names) for split, names in alphabets.items()} == {"train": 25, "val": 5, "test": 20}
    assert len(plan.splits["train"]) + len(plan.splits["val"]) == 964 and len(plan.splits["test"]) == 659
    assert not alphabets["train"] & alphabets["val"]
    other = Omniglot(str(real_data / "omniglot"), split="background", seed=1).plan(1000, print)
    assert other.splits["val"] != plan.splits["val"] and other.splits["test"] == plan.splits["test"]


def test_cifar_has_the_test_part_last(real_data: Path) -> None:
    source = Cifar100(str(real_data / "cifar100"), "cifar_fs")
    plan = source.plan(600, print)
    assert plan.images == 60_000 and len(plan.orders) == 100
    (chunk,) = source.read(plan.orders[37], 600)
    assert chunk.images.shape == (600, 3, 32, 32) and set(chunk.classes) == {37}
    assert all(name.startswith(f"train/{plan.classes[37]}/") for name in chunk.names[:500])
    assert all(name.startswith(f"test/{plan.classes[37]}/") for name in chunk.names[500:])
    with zipfile.ZipFile(source.path) as archive, archive.open(chunk.names[599]) as stream:
        np.testing.assert_array_equal(chunk.images[599], np.asarray(Image.open(stream)).transpose(2, 0, 1))


def test_a_wrong_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "images_evaluation.zip").write_bytes((tmp_path / "images_background.zip").read_bytes())
    with pytest.raises(PipelineError, match="is it an archive of Omniglot"):
        Omniglot(str(tmp_path)).plan(100, print)
    with pytest.raises(PipelineError, match="has no images_background.zip"):
        Omniglot(str(tmp_path / "nowhere")).plan(100, print)
    with pytest.raises(PipelineError, match="must be given"):
        Cifar100(None, "fc100")
