"""Methods that look at features only: an embedding, shared by all tasks, and a head that is fitted to each."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes, Images
from pipeline.functional.distances import unit
from pipeline.functional.heads import Head, Prototype
from pipeline.functional.losses import accuracy, cross_entropy
from pipeline.methods.base import Method, State, embed


@dataclass(frozen=True)
class ClassMeans:
    """Everything about a head whose classes are means of features: what another program needs to answer like it.

    A feature vector f is seen as f - centre, then brought to unit length where ``unit`` says so; a class is the mean of
    its images' (``unit_means``: brought to unit length), and its logit minus ``scale`` times the distance to it.
    """

    distance: str
    scale: float = 1.0
    centre: Tensor | None = None  # [D]; None: 0
    unit: bool = False
    unit_means: bool = False


class HeadMethod(Method, ABC):
    """A subclass says how a head is fitted to the support's features and what it answers for a query's.

    It implements :meth:`fit` and :meth:`scores`. Where it has layers between backbone and head, :meth:`project`; where
    training is not by cross-entropy, :meth:`objective`; and where training does not go by the answers to the queries at
    all, :meth:`loss`.
    """

    embeds_once = True
    joint_forward = False  # while training, support and query are embedded in one call, so that batch-norm sees both

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """The state of T tasks from the features [T, S, D] of their support; labels [T, S] as :meth:`adapt` has."""

    @abstractmethod
    def scores(self, state: State, query: Tensor) -> Tensor:
        """Logits [T, Q, way] of query features [T, Q, D]."""

    def project(self, features: Tensor) -> Tensor:
        """What the head sees of the backbone's features: [..., D] to [..., D']."""
        return features

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, of logits [..., N, classes] and labels [..., N]."""
        return cross_entropy(logits, labels)

    def class_means(self) -> ClassMeans | None:
        """The head as plain numbers, where it is one of class means; else None."""
        return None

    def features(self, images: Tensor) -> Tensor:
        """[T, N, C, H, W] -> [T, N, D]."""
        return self.project(embed(self.backbone, images))

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        way = self.check_support(labels, way)
        return self.fit(self.features(support), labels, way)

    def classify(self, state: State, query: Tensor) -> Tensor:
        return self.scores(state, self.features(query))

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, meaned over all queries of all tasks."""
        assert isinstance(batch, Episodes)
        logits = self.answers(batch, *self.both(batch))[1]
        return self.objective(logits, batch.query_labels), {"accuracy": accuracy(logits, batch.query_labels)}

    def both(self, batch: Episodes) -> tuple[Tensor, Tensor]:
        """Features of support and query, with ``joint_forward`` from one call."""
        if not self.joint_forward:
            return self.features(batch.support), self.features(batch.query)
        support, query = self.together(batch)[0].split([batch.support.shape[1], batch.query.shape[1]], dim=1)
        return support, query

    def together(self, batch: Episodes) -> tuple[Tensor, Tensor]:
        """Features [T, S + Q, D] of support and query from one call, and their labels [T, S + Q]."""
        labels = torch.cat([batch.support_labels, batch.query_labels], dim=1)
        return self.features(torch.cat([batch.support, batch.query], dim=1)), labels

    def answers(self, batch: Episodes, support: Tensor, query: Tensor) -> tuple[State, Tensor]:
        """The states of a batch's tasks and the logits of their queries, of features."""
        state = self.fit(support, batch.support_labels, batch.way)
        return state, self.scores(state, query)

    @torch.no_grad()
    def accuracy_of(self, batch: Episodes, features: Tensor) -> Tensor:
        """Of the queries of a batch, from the features that :meth:`together` returned: a figure to log."""
        support, query = features.split([batch.support.shape[1], batch.query.shape[1]], dim=1)
        return accuracy(self.answers(batch, support, query)[1], batch.query_labels)


class ClassicalMethod(HeadMethod):
    """Trained as a classifier of the training classes, by their images without tasks; its features are for new classes.

    New classes are learnt by ``new_classes``, unless :meth:`fit` and :meth:`scores` are a subclass's own.

    Args:
        backbone: the features.
        classes: number of training classes, of which a linear ``classifier`` is made; None: the subclass sets another
            one, or has its own :meth:`base_scores`.
    """

    regime = "classical"
    classifier: nn.Module
    new_classes: Head = Prototype()
    keeps_mean = False  # the backbone's features of all training images are averaged before a checkpoint, to ``mean``
    mean: Tensor
    centred = normalised = False  # features for new classes have ``mean`` taken off; and then unit length

    @abstractmethod  # a method has options of its own
    def __init__(self, backbone: nn.Module, classes: int | None = None) -> None:
        super().__init__(backbone)
        if classes is not None:
            self.classifier = nn.Linear(self.width, classes)
        if self.keeps_mean:
            self.register_buffer("mean", torch.zeros(self.width))

    def represent(self, features: Tensor) -> Tensor:
        """What new classes are learnt by and answered for: [..., D] to [..., D']."""
        centred = features - self.mean if self.centred else features
        return unit(centred) if self.normalised else centred

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        return self.new_classes.fit(self.represent(features), labels, way)

    def scores(self, state: State, query: Tensor) -> Tensor:
        return self.new_classes.scores(state, self.represent(query))

    def distances(self, logits: Tensor) -> Tensor | None:
        if self._has_own("fit", "scores"):
            return None
        return -logits if isinstance(self.new_classes, Prototype) else None  # Nearest is one too

    def class_means(self) -> ClassMeans | None:
        if self._has_own("fit", "scores", "represent") or type(self.new_classes) is not Prototype:
            return None
        centre = self.mean if self.centred else None
        return ClassMeans(self.new_classes.distance, centre=centre, unit=self.normalised)

    def _has_own(self, *functions: str) -> bool:
        """Whether a subclass answers for new classes in a way that ``new_classes`` does not tell."""
        return any(getattr(type(self), name) is not getattr(ClassicalMethod, name) for name in functions)

    def summarise(self, features: Tensor, labels: Tensor) -> Tensor | None:
        return features.double().sum(0) if self.keeps_mean else None

    def keep_summary(self, total: Tensor, images: int) -> None:
        self.mean.copy_(total / images)

    def base_scores(self, features: Tensor) -> Tensor:
        """Logits [N, classes] of the training classes from features [N, D]."""
        return self.classifier(features)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective over the training classes."""
        assert isinstance(batch, Images)
        logits = self.base_scores(self.project(self.backbone(batch.images)))
        return self.objective(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}
