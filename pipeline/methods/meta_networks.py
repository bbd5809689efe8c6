"""Meta Networks (Munkhdalai & Yu 2017)."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.attention import mixture, recall
from pipeline.functional.distances import euclidean
from pipeline.functional.inner_loop import out_of_inference
from pipeline.functional.losses import PADDING, labelled, summed_cross_entropy
from pipeline.functional.meta_lstm import preprocess as log_and_sign
from pipeline.functional.precision import in_float32
from pipeline.functional.sequences import reordered, sequence_order
from pipeline.functional.triplets import negatives, positives
from pipeline.methods.base import Method, State, embed
from pipeline.nets.blocks import fresh_copy, per_coordinate
from pipeline.nets.by_name import choose
from pipeline.nets.fast_layers import FastLayers

MEMORY, TASK = "memory.", "task."
Loss = Callable[..., Tensor]  # of representation, answers and labels


class MetaNetworks(Method):
    """Networks whose slow weights are trained and whose fast weights are made from the support set's gradients.

    There are two, a representation learner u and a base learner b, each a backbone followed by layers with fast weights
    (algorithm 1):

    1. The gradients of u's loss on the support images are read one after the other by an LSTM d, coordinate by
       coordinate, which answers with fast weights of u for the task.
    2. The gradient of b's loss on each support image becomes, by a small network m, fast weights of b for that image,
       kept in a memory under the key u(image).
    3. A query reads, by the cosine of keys, a mixture of the fast weights of b, and is answered by b with both.

    Args:
        backbone: the layers before those with fast weights, with batch-norm. The authors' network for mini-ImageNet
            (49.21 one-shot) has three blocks of 32 filters (conv4 with width: [32, 32, 32]).
        convolutions: how many convolutions have fast weights; null: 2, or 0 where the backbone's map is 1x1.
        filters: of each of them.
        hidden: width of the linear layer with fast weights; null: as many as it has inputs.
        units: of the LSTM and of the small network. Convolutions and linear layers have one of each.
        representation_loss: "cross_entropy" (one-shot) or "contrastive" (several images a class).
        margin: of the contrastive loss, the distance beyond which two classes are apart.
        steps: of the LSTM, at most; more images than steps are averaged in equal groups, as the authors' code does.
        precision: p of the gradients' preprocessing (7 in the authors' code).
        first_order: gradients are constants for the meta-gradient, as in the authors' code. Then u's output layer,
            which only its loss uses, stays as it started. false: differentiate through them.
    """

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        convolutions: int | None = None,
        filters: int = 32,
        hidden: int | None = None,
        units: int = 20,
        representation_loss: str = "cross_entropy",
        margin: float = 1.0,
        steps: int = 10,
        precision: float = 7.0,
        first_order: bool = True,
    ) -> None:
        super().__init__(backbone)
        choose("representation_loss", representation_loss, ("cross_entropy", "contrastive"))
        shape = tuple(getattr(backbone, "map_shape", (backbone.out_features, 1, 1)))
        if convolutions is None:
            convolutions = 2 if shape[1] * shape[2] > 1 else 0
        if steps < 1 or convolutions < 0:
            raise PipelineError(f"steps={steps}, convolutions={convolutions}: give at least 1 and at least 0")
        self.map_shape, self.convolutions, self.fixed_way = shape, convolutions, way
        self.contrastive = representation_loss == "contrastive"
        self.margin, self.steps, self.precision, self.first_order = margin, steps, precision, first_order
        self.base = FastLayers(shape, convolutions, filters, hidden, way)
        self.key_backbone = fresh_copy(backbone)
        self.key_layers = FastLayers(shape, convolutions, filters, hidden, None if self.contrastive else way)
        if first_order and self.key_layers.output is not None:
            self.key_layers.output.requires_grad_(False)
        kinds = ["linear"] if convolutions == 0 else ["convolution", "linear"]
        self.lstm = nn.ModuleDict({kind: nn.LSTM(2, units) for kind in kinds})
        self.lstm_output = nn.ModuleDict({kind: nn.Linear(units, 1) for kind in kinds})
        self.small = nn.ModuleDict({kind: per_coordinate(2, units) for kind in kinds})

    def begun_elsewhere(self, drawn: Collection[str]) -> None:
        """u's backbone, where it did not come with b's, begins as that: a frozen one would stay as it was drawn."""
        if any(name.startswith("key_backbone.") for name in drawn):
            self.key_backbone.load_state_dict(self.backbone.state_dict())

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """keys [T, S, D] of the images that are ``present`` [T, S]; fast weights of u [T, O, K] under "task."; fast
        weights of b [T, S, O * K] under "memory."."""
        self.check_support(labels, way)
        order = sequence_order(labels, shuffle=self.training)
        support, labels = reordered(support, order), labels.gather(1, order)
        present = labels != PADDING
        maps, key_maps = self._maps(self.backbone, support), self._maps(self.key_backbone, support)
        gradients = self._gradients(self.key_layers, key_maps, labels, self._key_loss)
        task = self._task_weights(gradients[: self.convolutions + 1], present)  # u's output layer has no use for any
        memory = [
            self.small[self._kind(index)](log_and_sign(gradient.flatten(2), self.precision)).squeeze(-1)
            for index, gradient in enumerate(self._gradients(self.base, maps, labels, self._base_loss))
        ]
        keys, _ = self.key_layers(key_maps, task)
        state = {"keys": keys, "present": present}
        state |= {f"{TASK}{index}": weights for index, weights in enumerate(task)}
        return state | {f"{MEMORY}{index}": weights for index, weights in enumerate(memory)}

    def classify(self, state: State, query: Tensor) -> Tensor:
        task = [state[f"{TASK}{index}"] for index in range(self.convolutions + 1)]
        keys, _ = self.key_layers(self._maps(self.key_backbone, query), task)
        weights = recall(keys, state["keys"], state["present"])
        slow = self.base.weights()
        fast = [
            mixture(weights, state[f"{MEMORY}{index}"]).flatten(0, 1).view(-1, *own.shape)
            for index, own in enumerate(slow)
        ]
        maps = self._maps(self.backbone, query).flatten(0, 1).unsqueeze(1)  # every query is a group of its own
        _, answers = self.base(maps, fast)
        assert answers is not None
        return answers.squeeze(1).unflatten(0, query.shape[:2])

    def _gradients(self, layers: FastLayers, maps: Tensor, labels: Tensor, loss: Loss) -> list[Tensor]:
        """The gradient of every image's own loss for the slow weights of every layer: [T, S, O, K] of each."""
        keep_graph = self.training and torch.is_grad_enabled() and not self.first_order
        with out_of_inference(maps, labels) as (maps, labels), torch.enable_grad():
            weights = layers.weights()
            if not keep_graph:
                maps, weights = maps.detach(), [weight.detach() for weight in weights]
            *outputs, tape = layers.slow(maps.flatten(0, 1), weights)
            products = [product for _, product in tape]
            deltas = torch.autograd.grad(loss(*outputs, labels), products, create_graph=keep_graph)
            gradients = [delta @ columns.mT for delta, (columns, _) in zip(deltas, tape, strict=True)]
        return [(g if keep_graph else g.detach()).unflatten(0, labels.shape) for g in gradients]

    def _base_loss(self, representation: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
        return summed_cross_entropy(answers.unflatten(0, labels.shape), labels).sum()

    def _key_loss(self, representation: Tensor, answers: Tensor | None, labels: Tensor) -> Tensor:
        if answers is not None:
            return self._base_loss(representation, answers, labels)
        return contrastive_loss(representation.unflatten(0, labels.shape), labels, self.margin)

    def _task_weights(self, gradients: list[Tensor], present: Tensor) -> list[Tensor]:
        """Fast weights [T, O, K] of u from gradients [T, S, O, K] in the order in which the LSTM reads them."""
        shapes = [gradient.shape[2:] for gradient in gradients]
        found: list[Tensor] = []
        parts = {"convolution": gradients[: self.convolutions], "linear": gradients[self.convolutions :]}
        for kind in self.lstm:
            part = parts[kind]
            sequence, last = in_steps(torch.cat([g.flatten(2) for g in part], dim=2), present, self.steps)
            tasks, _, coordinates = sequence.shape
            inputs = log_and_sign(sequence, self.precision).transpose(0, 1).flatten(1, 2)  # [steps, T * P, 2]
            read = self._read(kind, inputs).unflatten(1, (tasks, coordinates))
            read = read[last, torch.arange(tasks, device=last.device)]  # [T, P, units], after the last image
            weights = self.lstm_output[kind](read).squeeze(-1)
            found += weights.split([g[0, 0].numel() for g in part], dim=1)
        return [weights.unflatten(1, shape) for weights, shape in zip(found, shapes, strict=True)]

    @in_float32
    def _read(self, kind: str, inputs: Tensor) -> Tensor:
        """[steps, N, 2] -> [steps, N, units]; not every processor has a recurrent layer in half precision."""
        return self.lstm[kind](inputs)[0]

    def _kind(self, index: int) -> str:
        """Of a layer with fast weights."""
        return "convolution" if index < self.convolutions else "linear"

    def _maps(self, backbone: nn.Module, images: Tensor) -> Tensor:
        return embed(backbone, images).unflatten(-1, self.map_shape)


@in_float32
def in_steps(gradients: Tensor, present: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The gradients of a task's images as a sequence of at most ``steps`` means over equally many images, but the last.

    Args:
        gradients: [T, S, P], those that are ``present`` [T, S] first.

    Returns:
        [T, min(S, steps), P], zeros after the last step of a task, and int64 [T], that last step.
    """
    count = present.sum(1, keepdim=True)
    size = (count + steps - 1) // steps
    place = torch.arange(present.shape[1], device=present.device).expand_as(present)
    step = torch.where(present, place // size.clamp(min=1), -1)
    members = (step.unsqueeze(1) == torch.arange(min(present.shape[1], steps), device=step.device).view(-1, 1)).to(
        gradients.dtype
    )
    return members @ gradients / members.sum(-1, keepdim=True).clamp(min=1), step.amax(1)


@in_float32
def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Every image's mean, over the others of its task, of d^2 for its class and max(0, margin - d)^2 for other classes,
    halved and summed over images and tasks. [T, S, D] and labels [T, S] (-1 is padding)."""
    same, other = positives(labels), negatives(labels)
    distance = euclidean(embeddings, embeddings)
    losses = distance.square().where(same, (margin - distance).relu().square()).where(same | other, 0)
    return 0.5 * (losses.sum((1, 2)) / (labelled(labels) - 1).clamp(min=1)).sum()
