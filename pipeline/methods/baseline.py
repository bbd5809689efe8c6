"""Baselines: classical training, then a new classifier for every task (Ravi & Larochelle 2017; Chen et al. 2019;
Dhillon et al. 2020)."""

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Images
from pipeline.errors import PipelineError
from pipeline.functional.fine_tuning import Descent, cosine_scale, cosine_scores
from pipeline.functional.heads import DISTANCES, SVM, Cosine, Head, Linear, Nearest, Prototype, Ridge, Votes
from pipeline.functional.losses import accuracy, smoothed_cross_entropy
from pipeline.functional.support_initialised import hardness
from pipeline.methods._tuned import Tuner
from pipeline.methods.base import State
from pipeline.methods.head import ClassicalMethod, ClassMeans
from pipeline.nets.by_name import choose
from pipeline.nets.norm import replace_native

FROZEN = ("linear", "cosine", "nearest", "votes", "prototype", "svm", "ridge")
TUNED = ("finetune_all", "support_initialised")
EPOCHS = {"linear": 100, "cosine": 100, "finetune_all": 15, "support_initialised": 25}
RATES = {"linear": 0.01, "cosine": 0.01, "finetune_all": 0.01, "support_initialised": 5e-5}


class Baseline(ClassicalMethod):
    """Features of a classifier of the training classes; ``head`` says how new classes are learnt from them.

    Published for 5-way mini-ImageNet, 1-shot / 5-shot: Baseline and Baseline++ with Conv-4 42.11 / 62.53 and
    48.24 / 66.43 (Chen); nearest image and fine-tuning of all weights 41.08 / 51.04 and 28.86 / 49.79 (Ravi); WRN-28-10
    with a classifier that starts from the support, as it starts, fine-tuned, and fine-tuned on the queries too:
    56.17 / 73.31, 57.73 / 78.17 and 65.73 / 78.40 (Dhillon).

    Args:
        classifier: of the training classes: "linear", or "cosine" (Baseline++).
        scale: of cosine scores; None: 2 for at most 200 classes, otherwise 10, as Chen's code.
        label_smoothing: share of the target that is spread over the other classes in training (.1 in Dhillon).
        mixup: training images are mixed in pairs with a Beta(mixup, mixup) weight (.25 in Dhillon); 0: they are not.
        head: "linear" (Baseline) or "cosine" (Baseline++), trained on frozen features; "nearest" image or "prototype"
            by ``distance``; "votes" of all images by their cosines (NIL, Raghu et al. 2020); "svm" or "ridge"
            regression with MetaOptNet's constants; "finetune_all": a new linear layer and all weights (Ravi);
            "support_initialised": all weights, from a classifier that is read off the support (Dhillon).
        distance: "cosine", "euclidean" or "squared_euclidean".
        epochs, lr: of training the head; None: the paper's, 100 and .01 for linear and cosine, 15 and .01 for
            finetune_all (Ravi chooses the rate by validation tasks), 25 and 5e-5 for support_initialised, where 0
            epochs leave the classifier as it starts.
        batch_size, momentum, dampening, weight_decay: of linear and cosine.
        lr_decay: of finetune_all: the rate of step t is lr / (1 + lr_decay t); chosen like the rate.
        initialisation: of support_initialised: "dhillon": from the rectified scores of the training classes;
            "features": from the rectified features; "blog": from features as they are, and scores stay cosines.
        entropy: which answers support_initialised makes certain: those to the "query" images, so that an answer depends
            on the other queries (Dhillon's transductive fine-tuning), to the "support", or "none".
        entropy_weight: of that term beside the support's cross-entropy.
        norm: batch-norm while all weights are tuned: "batch": by the images at hand, which enter the averages that
            answers use (Ravi); "running": by the averages of training; None: batch for finetune_all, else running.
        tasks: how all weights are tuned to every task: by a "loop", by "vmap", or "auto": by device.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        classifier: str = "linear",
        scale: float | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        head: str = "linear",
        distance: str = "cosine",
        epochs: int | None = None,
        lr: float | None = None,
        batch_size: int = 4,
        momentum: float = 0.9,
        dampening: float = 0.9,
        weight_decay: float = 0.001,
        lr_decay: float = 0.0,
        initialisation: str = "dhillon",
        entropy: str = "query",
        entropy_weight: float = 1.0,
        norm: str | None = None,
        tasks: str = "auto",
    ) -> None:
        linear = choose("classifier", classifier, ("linear", "cosine")) == "linear"
        super().__init__(backbone, classes if linear else None)
        if not linear:
            self.classifier = _CosineLayer(self.width, classes, scale)
        if not 0 <= label_smoothing < 1 or mixup < 0:
            raise PipelineError(f"label_smoothing={label_smoothing} must be in [0, 1), mixup={mixup} at least 0")
        self.label_smoothing, self.mixup = label_smoothing, mixup
        choose("head", head, (*FROZEN, *TUNED))
        choose("initialisation", initialisation, ("dhillon", "features", "blog"))
        choose("entropy", entropy, ("query", "support", "none"))
        choose("norm", norm, (None, "batch", "running"))
        choose("tasks", tasks, ("auto", "loop", "vmap"))
        choose("distance", distance, DISTANCES)
        epochs, lr = EPOCHS.get(head, 1) if epochs is None else epochs, RATES.get(head, 0.01) if lr is None else lr
        if epochs < (head != "support_initialised") or batch_size < 1:
            raise PipelineError(f"epochs={epochs}, batch_size={batch_size}: there is at least one")
        descent = Descent(epochs, batch_size, lr, momentum, dampening, weight_decay)
        frozen: dict[str, Head] = {
            "linear": Linear(descent),
            "cosine": Cosine(descent, scale),
            "nearest": Nearest(distance),
            "votes": Votes(),
            "prototype": Prototype(distance),
            "svm": SVM(),
            "ridge": Ridge(),
        }
        by_batch = norm == "batch" or (norm is None and head == "finetune_all")
        start = "random" if head == "finetune_all" else initialisation
        self.extendable = head == "prototype"
        self.new_classes = frozen.get(head, Prototype())
        self._tuner = Tuner(self, start, epochs, lr, lr_decay, entropy, entropy_weight, by_batch, tasks)
        self.frozen = head in FROZEN
        self.embeds_once = self.frozen or epochs == 0
        self.task_by_task = head == "finetune_all"  # support_initialised starts from features of all tasks at once
        if not self.embeds_once and by_batch:
            replace_native(backbone)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """What the head keeps; where all weights are tuned, the classifier that they start with."""
        if self.frozen:
            return super().fit(features, labels, way)
        return self._tuner.start(self._tuner.representation(features), labels, way)

    def scores(self, state: State, query: Tensor) -> Tensor:
        """Of the head; where all weights are tuned, of the classifier that they start with."""
        if self.frozen:
            return super().scores(state, query)
        return self._tuner.scores(state, self._tuner.representation(query))

    def distances(self, logits: Tensor) -> Tensor | None:
        return -logits if self.frozen and isinstance(self.new_classes, Prototype) else None

    def class_means(self) -> ClassMeans | None:
        return ClassMeans(self.new_classes.distance) if self.extendable else None  # type: ignore[attr-defined]

    @torch.no_grad()
    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """The fitted head or the tuned weights; where queries take part in tuning, what it begins with."""
        start = super().adapt(support, labels, way)
        if self.embeds_once:
            return start
        if self._tuner.transductive:
            return {**start, "support": support, "labels": labels}
        return self._tuner.tune(start, support, labels)

    def classify(self, state: State, query: Tensor) -> Tensor:
        if self.embeds_once:
            return super().classify(state, query)
        if self._tuner.transductive:
            start = {name: state[name] for name in ("weight", "bias")}
            state = self._tuner.tune(start, state["support"], state["labels"], query)
        return self._tuner.answer(state, query)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the training classes."""
        assert isinstance(batch, Images)
        images, pairs = batch.images, [(batch.labels, 1.0)]
        if self.mixup:
            images, other, share = mix_pairs(images, self.mixup)
            pairs = [(batch.labels, share), (batch.labels[other], 1 - share)]
        logits = self.classifier(self.backbone(images))
        losses = [share * smoothed_cross_entropy(logits, labels, self.label_smoothing) for labels, share in pairs]
        return torch.stack(losses).sum(), {"accuracy": accuracy(logits, batch.labels)}

    @torch.no_grad()
    def hardness(self, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
        """How hard tasks are for a support-initialised classifier before it is tuned, [T] (Dhillon, section 4.4).

        Args:
            support, labels, query, query_labels: [T, S, C, H, W], [T, S], [T, Q, C, H, W] and [T, Q].
        """
        start = super().adapt(support, labels)
        return hardness(self.scores(start, self.features(query)), query_labels)


class _CosineLayer(nn.Module):
    """Scores scale g_c cos(w_c, x) of Baseline++; directions w and lengths g start as those of a linear layer."""

    def __init__(self, features: int, classes: int, scale: float | None) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(features, classes, bias=False).weight.detach())
        self.length = nn.Parameter(self.direction.detach().norm(dim=-1, keepdim=True))
        self.scale = cosine_scale(classes) if scale is None else scale

    def forward(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., classes]."""
        return cosine_scores(features, self.direction, self.length, self.scale)


def mix_pairs(images: Tensor, concentration: float) -> tuple[Tensor, Tensor, float]:
    """Every image [N, ...] mixed with another of the batch.

    Returns:
        share x_i + (1 - share) x_j, the indices j [N], and the share, drawn once from Beta(concentration,
        concentration) by PyTorch's global generator.
    """
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    other = torch.randperm(len(images)).to(images.device)
    return share * images + (1 - share) * images[other], other, share
