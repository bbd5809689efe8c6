"""Relation networks (Sung, Yang, Zhang, Xiang, Torr & Hospedales 2018)."""

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.inner_loop import tasks_by
from pipeline.functional.losses import labelled
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot
from pipeline.methods.base import State
from pipeline.methods.head import HeadMethod
from pipeline.nets.by_name import choose
from pipeline.nets.norm import always_by_the_batch
from pipeline.nets.relation_module import RelationModule


class Relation(HeadMethod):
    """A learnt score for every pair of a class map and a query map; a query belongs to the class that scores highest.

    Logits are the scores before their sigmoid. Images of support and query are embedded apart. Padding takes part in
    the batch statistics of its task, as every image that is given, and counts nowhere else.

    Args:
        backbone: the encoder, with feature maps (an attribute ``map_shape``): relation_encoder is the paper's.
        width: filters of the relation module's convolutions.
        hidden: width of its first linear layer.
        padding: of its convolutions: 0 for 84x84 images, 1 for 28x28; null: by the size of the maps.
        shots: "sum" over the maps of a class, as the paper's; "mean", which does not grow with the number of images.
        transductive: true: batch-norm of encoder and module uses the statistics of what it is given, task by task, in
            training and evaluation. The official code's networks are never put in evaluation mode, so that every
            published number (50.44 / 65.32 on mini-ImageNet, 99.6 / 99.8 / 97.6 / 99.1 on Omniglot) has answers that
            depend on which other queries are asked (there 3 or 5 of every class at once). false: running averages.
        tasks: how every task becomes a batch of its own: "loop", "vmap", or "auto": on CPU the loop, which is 3 to 6
            times as fast there.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int = 64,
        hidden: int = 8,
        padding: int | None = None,
        shots: str = "sum",
        transductive: bool = True,
        tasks: str = "auto",
    ) -> None:
        super().__init__(backbone)
        map_shape = getattr(backbone, "map_shape", None)
        if map_shape is None:
            raise PipelineError(
                f"relation needs feature maps, and backbone {type(backbone).__name__} has no map_shape: "
                "choose backbone=relation_encoder"
            )
        self.map_shape, self.transductive = tuple(map_shape), transductive
        self.extendable = not transductive  # batch statistics tie new classes to those that came before
        self.mean = choose("shots", shots, ("sum", "mean")) == "mean"
        self.task_by_task = transductive
        if transductive:
            always_by_the_batch(backbone)
        self.tasks = choose("tasks", tasks, ("auto", "loop", "vmap"))
        statistics = "batch_statistics" if transductive else "batch"
        self.relation = RelationModule(self.map_shape, width, hidden, padding, statistics)

    def features(self, images: Tensor) -> Tensor:
        """[T, N, ...] -> feature maps [T, N, C, H, W]."""
        if not self.transductive:
            return super().features(images).unflatten(-1, self.map_shape)
        return tasks_by(self.tasks, images)(self.backbone, images).unflatten(-1, self.map_shape)

    def fit(self, features: Tensor, labels: Tensor, way: int) -> State:
        """maps [T, way, C, H, W] of the classes."""
        return {"maps": class_maps(features, labels, way, self.mean)}

    def scores(self, state: State, query: Tensor) -> Tensor:
        if not self.transductive:
            return self.relation(state["maps"], query)
        return tasks_by(self.tasks, query)(self._scores, state["maps"], query)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of all relation scores (equation 2)."""
        return relation_loss(logits, labels)

    def _scores(self, classes: Tensor, queries: Tensor) -> Tensor:
        """One task: [way, C, H, W] and [Q, C, H, W] to [Q, way]."""
        return self.relation(classes[None], queries[None])[0]


@in_float32
def class_maps(maps: Tensor, labels: Tensor, way: int, mean: bool = False) -> Tensor:
    """Element-wise sum (section 3.2) of the feature maps of every class, or their ``mean``.

    [T, S, C, H, W] and labels [T, S] give [T, way, C, H, W]; the label -1 belongs to no class.
    """
    members = one_hot(labels, way, maps.dtype)
    summed = members.mT @ maps.flatten(2)
    if mean:
        summed = summed / members.sum(-2).clamp(min=1).unsqueeze(-1)
    return summed.unflatten(-1, maps.shape[2:])


@in_float32
def relation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the relation scores sigmoid(``logits``) [T, Q, way] against 1 for the class of the query and 0
    for the others (equation 2), mean over the entries of all queries that have a label [T, Q]."""
    squared = (logits.sigmoid() - one_hot(labels, logits.shape[-1], logits.dtype)).square().sum(-1)
    return squared.where(labels >= 0, 0).sum() / (labelled(labels).sum() * logits.shape[-1])
