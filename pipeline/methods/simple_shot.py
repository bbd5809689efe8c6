"""SimpleShot (Wang, Chao, Weinberger & van der Maaten 2019)."""

from torch import Tensor, nn

from pipeline.functional.distances import unit
from pipeline.methods.head import ClassicalMethod, ClassMeans
from pipeline.nets.by_name import choose


class SimpleShot(ClassicalMethod):
    """The nearest class mean, of features that are centred on those of the training images and have unit length (CL2N).

    Published for Conv-4 on 5-way mini-ImageNet, with 1 / 5 shots: 49.69 / 66.92.

    Args:
        backbone: the features.
        classes: number of training classes, of which a linear classifier is trained.
        centring: at test, on the mean of the training images' features, "train_mean"; "none": not.
        normalise: features have unit length at test.
    """

    extendable = keeps_mean = True

    def __init__(self, backbone: nn.Module, classes: int, centring: str = "train_mean", normalise: bool = True) -> None:
        super().__init__(backbone, classes)
        self.centring, self.normalise = choose("centring", centring, ("train_mean", "none")), normalise

    def represent(self, features: Tensor) -> Tensor:
        centred = features - self.mean if self.centring == "train_mean" else features
        return unit(centred) if self.normalise else centred

    def class_means(self) -> ClassMeans:
        centre = self.mean if self.centring == "train_mean" else None
        return ClassMeans("squared_euclidean", centre=centre, unit=self.normalise)
