"""RFS: a good embedding is all you need (Tian, Wang, Krishnan, Tenenbaum & Isola 2020)."""

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Images
from pipeline.errors import PipelineError
from pipeline.functional.heads import Logistic
from pipeline.functional.losses import accuracy, cross_entropy, divergence
from pipeline.functional.views import drawn, shifted
from pipeline.methods.base import Method, State
from pipeline.methods.head import ClassicalMethod


class RFS(ClassicalMethod):
    """A classifier of the training classes; new ones by logistic regression on its features, which have unit length.

    With a ``teacher`` the loss is alpha CE + beta KL(teacher || student), and the teacher an earlier such run of the
    same network (born again: Furlanello et al. 2018; section 3.3). The paper does it once.

    Published for 5-way CIFAR-FS with Conv-4, 1-shot / 5-shot: 62.7 / 78.7 (simple) and 63.8 / 79.5 (distilled).

    Args:
        copies: of every support image, shifted and mirrored at random, which the regression is fitted to in its place
            (5 in the authors' code); 0: it is fitted to the images as they are, and no image is embedded twice.
        crop_padding: pixels a copy is shifted by at most (4 for images of 32 pixels, 8 for 84).
        flip: mirror half of the copies.
        cost: C of the regression, the inverse of its penalty.
        normalise: features have unit length at test.
        teacher: run, or folder of a checkpoint, to distil from; None: cross-entropy alone.
        alpha, beta: weights of cross-entropy and distillation (.5 and .5 in the authors' commands).
        temperature: of distillation (4 in the authors' code).
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
        copies: int = 5,
        crop_padding: int = 4,
        flip: bool = True,
        cost: float = 1.0,
        normalise: bool = True,
        teacher: str | None = None,
        alpha: float = 0.5,
        beta: float = 0.5,
        temperature: float = 4.0,
    ) -> None:
        super().__init__(backbone, classes)
        if copies < 0 or crop_padding < 0 or cost <= 0 or temperature <= 0:
            raise PipelineError(
                f"copies={copies} and crop_padding={crop_padding} must not be below zero, cost={cost} and "
                f"temperature={temperature} above"
            )
        self.copies, self.crop_padding, self.flip, self.normalised = copies, crop_padding, flip, normalise
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.new_classes, self.embeds_once = Logistic(cost), copies == 0
        self._teacher: tuple[ClassicalMethod, ...] = ()  # in a tuple, so that it is no module of this one

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        if self.copies == 0:
            return super().adapt(support, labels, way)
        if min(support.shape[-2:]) <= self.crop_padding:
            size = f"{support.shape[-1]}x{support.shape[-2]}"
            raise PipelineError(f"images of {size} pixels have no shifted copies: set method.copies=0")
        way = self.check_support(labels, way)
        draws = drawn(support.shape[1], self.copies, 3)
        copies = [self.features(shifted(support, draw, self.crop_padding, self.flip)) for draw in draws]
        return self.fit(torch.cat(copies, dim=1), labels.repeat(1, self.copies), way)

    def imitate(self, teacher: Method) -> None:
        if not isinstance(teacher, ClassicalMethod):
            raise PipelineError(f"a {type(teacher).__name__} has no answers over the training classes to distil")
        self._teacher = (teacher,)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the training classes, with a teacher beside the divergence from its answers."""
        assert isinstance(batch, Images)
        logits = self.classifier(self.backbone(batch.images))
        loss, figures = cross_entropy(logits, batch.labels), {"accuracy": accuracy(logits, batch.labels)}
        for teacher in self._teacher:
            with torch.no_grad():
                taught = teacher.base_scores(teacher.project(teacher.backbone(batch.images)))
            apart = divergence(logits, taught, self.temperature)
            loss, figures["divergence"] = self.alpha * loss + self.beta * apart, apart.detach()
        return loss, figures
