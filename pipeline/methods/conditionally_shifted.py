"""Conditionally shifted neurons (Munkhdalai, Yuan, Mehri & Trischler 2018)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.attention import SIMILARITIES, mixture, recall
from pipeline.functional.inner_loop import out_of_inference
from pipeline.functional.losses import PADDING, summed_cross_entropy
from pipeline.functional.precision import in_float32
from pipeline.functional.prototypes import one_hot
from pipeline.methods.base import Method, State, embed
from pipeline.nets.blocks import fresh_copy, per_coordinate
from pipeline.nets.by_name import choose
from pipeline.nets.stages import OtherStatistics, stages

VALUES = "values."
OUTPUT = "values.output"


class ConditionallyShifted(Method):
    """A network whose neurons are shifted, query by query, by what the support set taught about them.

    A hidden layer is h = sigma(a) + sigma(beta) with the backbone's ReLU as sigma, the output softmax(a_T + beta_T).
    The shifts beta of a query are read from a memory: every support image stores a key, from a network of its own, and
    for every neuron a value, which one small network makes of how the base network failed on that image (sections 2.1
    to 2.3).

    A neuron is a single value of a feature map: one channel at one position, where the ReLU is applied, which in conv4
    is after pooling. Layers above a shifted one normalise queries by running averages of their own, because their
    activations are distributed differently from those of the unshifted support.

    Args:
        backbone: the base network's hidden layers: conv4 (adaCNN; published 98.42 / 99.37 / 96.12 / 98.43 on Omniglot
            with direct feedback) or mlp. adaResNet's 56.88 / 71.94 on mini-ImageNet are with a residual network.
        feedback: what values are made of. "direct": sigma'(a_t) dL/da_T, a vector of ``way`` numbers for every neuron
            (for an output neuron j: dL/da_T,j dL/da_T, since there sigma' would be the same for all). "gradient":
            dL/da_t, one number a neuron.
        similarity: of keys, "cosine" or, as a re-implementation, "dot".
        shift: "outside": sigma(a) + sigma(beta); "inside": sigma(a + beta), as a re-implementation.
        shifted: how many of the last hidden layers have shifts, beside the output; null: all.
        units: width of the three-layer network that makes values; all neurons share it.
        key_features: width of the key network's output. It has the architecture of the base network.
    """

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        feedback: str = "direct",
        similarity: str = "cosine",
        shift: str = "outside",
        shifted: int | None = None,
        units: int = 20,
        key_features: int = 64,
    ) -> None:
        super().__init__(backbone)
        layers = stages(backbone)
        depth = len(layers)
        if shifted is not None and not 0 <= shifted <= depth:
            raise PipelineError(f"shifted={shifted}: the backbone has {depth} hidden layers")
        self.fixed_way = way
        self.direct = choose("feedback", feedback, ("direct", "gradient")) == "direct"
        self.similarity = choose("similarity", similarity, SIMILARITIES)
        self.inside = choose("shift", shift, ("outside", "inside")) == "inside"
        self.first = depth - (depth if shifted is None else shifted)  # of the shifted layers
        self.keys = nn.Sequential(fresh_copy(backbone), nn.Linear(self.width, key_features))
        self.head = nn.Linear(self.width, way)
        self.value = per_coordinate(way if self.direct else 1, units)
        above = {str(t): norm for t in range(self.first + 1, depth) if (norm := layers.norm(t)) is not None}
        self.statistics = nn.ModuleDict({t: OtherStatistics(norm) for t, norm in above.items()})

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """keys [T, S, D], which images are ``present`` [T, S], and values [T, S, neurons] of every shifted layer."""
        way = self.check_support(labels, way)
        state = {"keys": embed(self.keys, support), "present": labels != PADDING}
        if self.direct:
            return state | self._values_of_direct_feedback(support, labels)
        keep_graph = self.training and torch.is_grad_enabled()
        with out_of_inference(support, labels) as (support, labels), torch.enable_grad():
            values = self._values_of_gradients(support, labels, keep_graph)
        return state | (values if keep_graph else {name: value.detach() for name, value in values.items()})

    def classify(self, state: State, query: Tensor) -> Tensor:
        weights = recall(embed(self.keys, query), state["keys"], state["present"], self.similarity)
        layers, h = stages(self.backbone), query.flatten(0, 1)
        for t in range(len(layers)):
            own = partial(self.statistics[str(t)], like=layers.norm(t)) if str(t) in self.statistics else None
            a = layers.pre_activation(t, h, own)
            if t < self.first:
                h = F.leaky_relu(a, layers.slope)
                continue
            shift = mixture(weights, state[f"{VALUES}{t}"]).flatten(0, 1).view_as(a)
            h = shifted_activation(a, shift, self.inside, layers.slope)
        logits = self.head(layers.features(h)).unflatten(0, query.shape[:2])
        return logits + mixture(weights, state[OUTPUT])

    def _values_of_direct_feedback(self, support: Tensor, labels: Tensor) -> State:
        layers, logits = self._unshifted(support)
        error, slope = output_error(logits, labels), stages(self.backbone).slope
        # sigma'(a_t) is 1 above 0 and the ReLU's slope below: there are two values for all neurons of an image
        active, silent = self.value(error), self.value(slope * error)
        shifted = {f"{VALUES}{t}": a.flatten(2) for t, a in layers.items() if t >= self.first}
        values = {name: torch.where(a > 0, active, silent) for name, a in shifted.items()}
        values[OUTPUT] = self.value(error.unsqueeze(-1) * error.unsqueeze(-2)).squeeze(-1)
        return values

    def _values_of_gradients(self, support: Tensor, labels: Tensor, create_graph: bool) -> State:
        layers, logits = self._unshifted(support, leaves=True)
        neurons = {f"{VALUES}{t}": a for t, a in layers.items() if t >= self.first} | {OUTPUT: logits}
        loss = summed_cross_entropy(logits, labels).sum()
        gradients = torch.autograd.grad(loss, list(neurons.values()), create_graph=create_graph)
        return {n: self.value(g.flatten(2).unsqueeze(-1)).squeeze(-1) for n, g in zip(neurons, gradients, strict=True)}

    def _unshifted(self, images: Tensor, leaves: bool = False) -> tuple[dict[int, Tensor], Tensor]:
        """Pre-activations [T, S, ...] of every hidden layer and the logits [T, S, way] of the base network as it is.

        ``leaves``: gradients can be taken at them, also where all weights are frozen.
        """
        layers, h, found = stages(self.backbone), images.flatten(0, 1), {}
        for t in range(len(layers)):
            a = layers.pre_activation(t, h)
            if leaves and not a.requires_grad:
                a.requires_grad_()
            found[t] = a.unflatten(0, images.shape[:2])
            h = F.leaky_relu(found[t].flatten(0, 1), layers.slope)
        return found, self.head(layers.features(h)).unflatten(0, images.shape[:2])


def shifted_activation(pre: Tensor, shift: Tensor, inside: bool = False, slope: float = 0.0) -> Tensor:
    """h = sigma(a) + sigma(beta) (equation 1); ``inside``: sigma(a + beta), as a re-implementation.

    sigma is the ReLU, or with a ``slope`` below 0 the leaky one.
    """
    if inside:
        return F.leaky_relu(pre + shift, slope)
    return F.leaky_relu(pre, slope) + F.leaky_relu(shift, slope)


@in_float32
def output_error(logits: Tensor, labels: Tensor) -> Tensor:
    """dL/da_T of the cross-entropy of every item alone: softmax(a_T) - y, [..., S, way]; 0 for padding."""
    error = logits.softmax(-1) - one_hot(labels, logits.shape[-1], logits.dtype)
    return error * (labels != PADDING).unsqueeze(-1)
