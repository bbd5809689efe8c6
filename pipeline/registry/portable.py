"""A few-shot model without PyTorch: numpy, ONNX Runtime, and Pillow to read image files.

    model = FewShot("FOLDER")
    model.enrol([read(path, model.shape) for path in known], names)    # a name an image, any number of images a class
    labels, probabilities, scores, is_known = model.classify([read(path, model.shape) for path in new])

Everything else is in ``model.json``. The network takes uint8 images [N, C, H, W], scaled inside, and gives features.
"""

import base64
import json
from pathlib import Path

import numpy as np
import onnxruntime


class FewShot:
    def __init__(self, folder):
        about = json.loads((Path(folder) / "model.json").read_text())
        self.shape, self.head, self.calibration = about["shape"], about["head"], about["calibration"]
        self.network = onnxruntime.InferenceSession(Path(folder) / "network.onnx", providers=["CPUExecutionProvider"])
        self.classes, self.counts, self.means = [], [], np.empty(0)
        self.background = None  # the training classes' means, where a score compares with them
        stored = (self.calibration or {}).get("background")
        if stored:
            numbers = np.frombuffer(base64.b64decode(stored["float32"]), "<f4").reshape(stored["shape"])
            self.background = self.mean_of_each(self.see(numbers), np.arange(len(numbers)))

    def features(self, images, at_once=16):
        """uint8 images [N, C, H, W] to what the head sees, float64 [N, D]."""
        images = np.asarray(images)
        whole = images.size and images.dtype.kind in "iu" and images.min() >= 0 and images.max() <= 255
        if not whole or images.shape[1:] != tuple(self.shape):
            form = ", ".join(map(str, self.shape))
            raise ValueError(f"images are {images.dtype} {list(images.shape)}: give uint8 [N, {form}], values 0 to 255")
        images = images.astype(np.uint8)
        parts = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        return self.see(np.concatenate([self.network.run(None, {"images": part})[0] for part in parts]))

    def see(self, features):
        x = np.asarray(features, np.float64)
        if self.head["centre"] is not None:
            x = x - np.asarray(self.head["centre"])
        return unit(x) if self.head["unit"] else x

    def mean_of_each(self, seen, positions):
        means = np.stack([seen[positions == place].mean(0) for place in range(positions.max() + 1)])
        return unit(means) if self.head["unit_means"] else means

    def enrol(self, images, labels):
        """Learn classes anew."""
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images came with {len(labels)} labels: give one label an image")
        features = self.features(images)
        self.classes = list(dict.fromkeys(labels))
        positions = np.asarray([self.classes.index(label) for label in labels])
        self.counts = np.bincount(positions).tolist()
        self.means = self.mean_of_each(features, positions)

    def logits(self, seen, means):
        """[N, way]: minus the scaled distance."""
        if self.head["distance"] == "dot":
            distance = -seen @ means.T
        elif self.head["distance"] == "cosine":
            distance = 1 - unit(seen) @ unit(means).T
        else:
            distance = np.stack([np.square(seen - mean).sum(1) for mean in means], 1)
            distance = np.sqrt(distance) if self.head["distance"] == "euclidean" else distance
        return -self.head["scale"] * distance

    def classify(self, images, threshold="auto", unknown_pass=None):
        """Labels, probabilities [N, way], scores [N], and whether the image is of an enrolled class at all [N].

        The threshold "auto" lets the share ``unknown_pass`` of strangers pass, as 0.05 or 0.2; None: the model's own.
        "none" or None knows every image.
        """
        if isinstance(threshold, str) and threshold not in ("auto", "none"):
            raise ValueError(f"threshold={threshold!r}: give auto, none or a number")
        if not self.classes:
            raise ValueError("no classes are known yet: call enrol(images, labels) first")
        seen = self.features(images)
        logits, point = self.logits(seen, self.means), self.nearest_point()
        temperature = point.get("temperature", 1.0)
        scores = self.score(point.get("score", "logit"), seen, logits, temperature)
        limit = None if threshold in ("auto", "none") else threshold
        if threshold == "auto":
            limit = point.get("threshold") if unknown_pass is None else self.threshold_at(point, unknown_pass)
        known = np.ones(len(scores), bool) if limit is None else scores >= limit
        labels = [self.classes[place] for place in logits.argmax(1)]
        return labels, softmax(logits / temperature), scores, known

    def threshold_at(self, point, share):
        """The threshold that lets so many strangers pass, between those that validation could tell."""
        asked = [rate["asked"] for rate in point.get("rates", [])]
        least = max(3 / max(point.get("stranger_images", 0), 1), min(asked, default=1))
        if not least <= share <= max(asked, default=0):
            raise ValueError(f"unknown_pass={share}: validation tells {least:.3g} to {max(asked, default=0)}")
        return float(np.interp(share, asked, [rate["threshold"] for rate in point["rates"]]))

    def nearest_point(self):
        """What calibration found for as many classes and images; one class alone is a case of its own."""
        points = (self.calibration or {}).get("points", [])
        way, shot = len(self.classes), np.mean(self.counts)
        like = [p for p in points if (p["way"] == 1) == (way == 1)] or points
        point: dict = min(like, default={}, key=lambda p: np.log(p["way"] / way) ** 2 + np.log(p["shot"] / shot) ** 2)
        compares = point.get("score") in ("probability", "margin", "ratio")  # enrolled classes with each other
        return {} if compares and way == 1 else point

    def score(self, name, seen, logits, temperature):
        """How much a query is one of an enrolled class."""
        best = np.sort(logits, 1)[:, ::-1]
        if name == "probability":
            return softmax(logits / temperature).max(1)
        if name == "margin":
            return best[:, 0] - best[:, 1]
        if name == "energy":
            return best[:, 0] + temperature * np.log(np.exp((logits - best[:, :1]) / temperature).sum(1))
        if name == "ratio":
            zero = self.head["scale"] if self.head["distance"] == "dot" else 0  # the logit of a class at no distance
            away = np.maximum(zero - best[:, :2], 0)
            return -away[:, 0] / np.maximum(away[:, 1], np.finfo(np.float32).tiny)
        if name == "background":
            return best[:, 0] - self.logits(seen, self.background).mean(1)
        if name == "normalised":
            of_query, of_class = self.logits(seen, self.background), self.logits(self.background, self.means).T
            of_class = of_class[logits.argmax(1)]
            return sum((best[:, 0] - of.mean(1)) / of.std(1) for of in (of_query, of_class)) / 2
        return best[:, 0]


def unit(x):
    return x / np.maximum(np.sqrt(np.square(x).sum(-1, keepdims=True)), 1e-5)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def read(path, shape):
    """An image file as uint8 [C, H, W]: upright, cut to its largest central part of that form, resized bilinearly.

    Of eight bits a channel: how deeper ones are scaled depends on the format, which a page does not know.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    opened = Image.open(path)
    clear = opened.info.get("transparency")
    deep = opened.mode.startswith(("I", "F")) or (isinstance(clear, tuple) and max(clear) > 255)
    if deep or (opened.mode == "L" and isinstance(clear, int)):
        raise ValueError(f"{path}: save it with eight bits a channel, and transparency as a channel")
    image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    image = image.convert("RGB") if image.mode == "LAB" else image  # of which Pillow makes no greys
    image = image.convert("RGB" if channels == 3 else "L")
    scale = min(image.width / width, image.height / height)
    part = [max(1, round(side * scale)) for side in (width, height)]
    left, top = (image.width - part[0]) // 2, (image.height - part[1]) // 2
    image = image.crop((left, top, left + part[0], top + part[1]))
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
