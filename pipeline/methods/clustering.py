"""Classical training whose features are made to cluster (Goldblum et al. 2020, sections 4.3 and 4.4)."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from pipeline.batch import Batch, Images
from pipeline.errors import PipelineError
from pipeline.functional.clustering import (
    PREFACTORS,
    feature_clustering,
    hyperplane_variation,
    official_feature_clustering,
    official_hyperplane_variation,
)
from pipeline.functional.heads import HEADS
from pipeline.functional.losses import accuracy, cross_entropy
from pipeline.methods.head import ClassicalMethod
from pipeline.nets.by_name import choose


class Clustering(ClassicalMethod):
    """A linear classifier of the training classes, with a penalty on the spread of its features.

    loss = cross-entropy + ``feature_clustering`` R_FC + ``hyperplane_variation`` R_HV, the penalties meaned over groups
    of images. New classes are learnt by a ``head`` on frozen features.

    Published for 5-way 1-shot mini-ImageNet: R2-D2's backbone without penalty 48.39, with R_FC 50.39, with R_HV 50.16;
    ResNet-12 56.18, 59.38 and 59.37 (from memory of the paper's table). The official code has the two functions' names
    swapped: by default it trains with the one that measures hyperplanes, under the name of feature clustering.

    Args:
        feature_clustering: coefficient of R_FC; 0: none.
        hyperplane_variation: coefficient of R_HV; 0: none.
        form: "paper", or "official": the official code's formulas, with its constants in the denominators and the
            hyperplane term squared and four times as large.
        prefactor: of the paper's R_FC: "c_over_n", "one_over_n" or "none".
        group: [classes, images] of the groups that batches consist of, as ``train.grouping``; all but the paper's R_FC
            need [2, 2].
        head: "svm", "ridge", "prototype", "nearest", "votes", "linear" or "cosine".
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        feature_clustering: float = 1.0,
        hyperplane_variation: float = 0.0,
        form: str = "paper",
        prefactor: str = "c_over_n",
        group: Sequence[int] = (2, 2),
        head: str = "svm",
    ) -> None:
        super().__init__(backbone, classes)
        self.feature_weight, self.hyperplane_weight = feature_clustering, hyperplane_variation
        self.official = choose("form", form, ("paper", "official")) == "official"
        self.prefactor = choose("prefactor", prefactor, PREFACTORS)
        self.group = tuple(group)
        if len(self.group) != 2 or min(self.group) < 2:
            raise PipelineError(f"group={list(group)} must be [classes, images], at least 2 of each")
        if self.group != (2, 2) and (self.official or hyperplane_variation):
            raise PipelineError(f"group={list(group)}: hyperplane variation and the official forms need [2, 2]")
        self.new_classes = HEADS[choose("head", head, HEADS)]()
        self._grouped = False  # whether a batch was seen to come in groups

    def check_batches(self, workers: int, grouping: Sequence[int] | None) -> None:
        classes, images = grouping or (0, 0)
        fit = images == self.group[1] and classes and classes % self.group[0] == 0
        if (self.feature_weight or self.hyperplane_weight) and not fit:
            raise self._not_in_groups()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy and penalties; the figures have each penalty before its coefficient."""
        assert isinstance(batch, Images)
        features = self.backbone(batch.images)
        logits = self.classifier(features)
        loss, figures = cross_entropy(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}
        if self.feature_weight or self.hyperplane_weight:
            for name, coefficient, penalty in self._penalties(self._groups(features, batch.labels)):
                loss = loss + coefficient * penalty
                figures[name] = penalty.detach()
        return loss, figures

    def _penalties(self, groups: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """(name, coefficient, mean over groups) of the penalties in use, of features [G, classes, images, D]."""
        if self.feature_weight:
            each = official_feature_clustering(groups) if self.official else feature_clustering(groups, self.prefactor)
            yield "feature_clustering", self.feature_weight, each.mean()
        if self.hyperplane_weight:
            each = official_hyperplane_variation(groups) if self.official else hyperplane_variation(groups)
            yield "hyperplane_variation", self.hyperplane_weight, each.mean()

    def _groups(self, features: Tensor, labels: Tensor) -> Tensor:
        """[B, D] -> [G, classes, images, D]; the first batch's labels are looked at."""
        whole = len(labels) % (self.group[0] * self.group[1]) == 0
        if whole and not self._grouped:
            rows = labels.view(-1, *self.group)
            firsts = rows[..., 0].sort(1).values
            self._grouped = bool((rows == rows[..., :1]).all() and (firsts.diff(dim=1) > 0).all())
        if not whole or not self._grouped:
            raise self._not_in_groups()
        return features.view(-1, *self.group, features.shape[-1])

    def _not_in_groups(self) -> PipelineError:
        return PipelineError(
            f"clustering compares images in groups of {self.group[0]} classes with {self.group[1]} images each: "
            f"set train.grouping=[{self.group[0]},{self.group[1]}]"
        )
