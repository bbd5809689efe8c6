"""Model-agnostic meta-learning (Finn, Abbeel & Levine 2017), its first-order form, and ANIL (Raghu et al. 2020)."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes
from pipeline.functional.inner_loop import Parameters, gradient, out_of_inference, vmap_tasks
from pipeline.functional.losses import accuracy, labelled, summed_cross_entropy
from pipeline.methods._fast_weights import _FastWeights
from pipeline.methods.base import State
from pipeline.nets.by_name import choose
from pipeline.nets.norm import batch_norms


class MAML(_FastWeights):
    """Adapt by a few gradient steps on the support set; train the start from which they lead far (algorithm 2).

    Args:
        inner_lr: alpha, the step size of the inner loop (.4 for 5-way Omniglot, .1 for 20-way, .01 for mini-ImageNet).
        inner_steps, inner_steps_eval: number of inner steps in training and in evaluation.
        first_order: treat inner gradients as constants (section 5.2; published 5-way mini-ImageNet 48.07 / 63.15
            against 48.70 / 63.11 with second order).
        loss_scaling: "finn": the sum over examples divided by the number of support images a class, in both loops, as
            the official code; its nominal inner_lr of .4 for 5-way equals 2.0 with "mean", the mean over examples.
        adapt_parameters: "all"; "all_but_norm", where batch-norm's gain and bias are shared by all inner steps, as in
            the official code; "head", which is ANIL (46.7 / 61.5 on mini-ImageNet).
        transductive: true: queries are normalised by their own batch statistics, as every published number. false:
            by the statistics of the support set under the adapted parameters, so that an answer does not depend on
            which other queries are asked.
        inner_loop: "loop", "vmap" or "auto": see :class:`_FastWeights`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        inner_lr: float = 0.4,
        inner_steps: int = 1,
        inner_steps_eval: int = 3,
        first_order: bool = False,
        loss_scaling: str = "finn",
        adapt_parameters: str = "all",
        transductive: bool = True,
        inner_loop: str = "auto",
    ) -> None:
        super().__init__(backbone, way, inner_loop)
        self.inner_lr, self.inner_steps, self.inner_steps_eval = inner_lr, inner_steps, inner_steps_eval
        self.first_order, self.transductive = first_order, transductive
        self.loss_scaling = choose("loss_scaling", loss_scaling, ("finn", "mean"))
        self._adapted = self._adapted_names(adapt_parameters)
        self._head_only = adapt_parameters == "head"

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """The adapted parameters [T, ...] by name and, where not transductive, batch-norm statistics of the support.

        In training they carry the graph back to the parameters; in evaluation they are plain values, and gradients are
        taken even under ``torch.no_grad``.
        """
        self.check_support(labels, way)
        keep_graph = self.training and torch.is_grad_enabled()
        each_task = self._each_task(support)
        with out_of_inference(support, labels) as (support, labels), torch.enable_grad():
            adapt_one = partial(self._adapt_one, self._start(), each_task is vmap_tasks)
            state: State = each_task(adapt_one, support, labels)
        return state if keep_graph else {name: value.detach() for name, value in state.items()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over tasks of the query loss at the adapted parameters."""
        assert isinstance(batch, Episodes)
        state = self.adapt(batch.support, batch.support_labels, batch.way)
        logits = self.classify(state, batch.query)
        loss = self._reduce(summed_cross_entropy(logits, batch.query_labels), batch.query_labels, batch.support_labels)
        return loss.mean(), {"accuracy": accuracy(logits, batch.query_labels)}

    def _adapt_one(self, start: Parameters, mapped: bool, support: Tensor, labels: Tensor) -> State:
        """One task: support [S, C, H, W] and labels [S] to parameters and statistics without the task dimension."""
        state: State = {}
        if self._head_only:  # the features do not change while the head is fitted
            with nullcontext() if self.transductive else self._recording(state):
                features = self._features(start, support)

        def loss(parameters: Parameters) -> tuple[Tensor, State]:
            x = features if self._head_only else self._features({**start, **parameters}, support)
            losses = summed_cross_entropy(self._head({**start, **parameters}, x), labels)
            return self._reduce(losses, labels, labels), {}

        adapted = {name: value for name, value in start.items() if name in self._adapted}
        steps = self.inner_steps if self.training else self.inner_steps_eval
        second_order = self.training and not self.first_order
        for _ in range(steps):
            gradients, _ = gradient(loss, adapted, mapped, second_order)
            adapted = {name: value - self.inner_lr * gradients[name] for name, value in adapted.items()}
        return adapted | (state if self._head_only else self._statistics({**start, **adapted}, support))

    def _statistics(self, parameters: Parameters, support: Tensor) -> State:
        return {} if self.transductive else super()._statistics(parameters, support)

    def _start(self) -> Parameters:
        """theta: in training the parameters themselves, otherwise values.

        A frozen parameter still adapts; it is only not meta-trained.
        """
        own = self.named_parameters()
        return {name: p if self.training and p.requires_grad else p.detach() for name, p in own}

    def _adapted_names(self, which: str) -> frozenset[str]:
        norms = {f"backbone.{layer}" for layer in batch_norms(self.backbone)}
        left_out = {
            "all": lambda name: False,
            "all_but_norm": lambda name: name.rpartition(".")[0] in norms,
            "head": lambda name: not name.startswith("head."),
        }[choose("adapt_parameters", which, ("all", "all_but_norm", "head"))]
        return frozenset(name for name, _ in self.named_parameters() if not left_out(name))

    def _reduce(self, summed: Tensor, labels: Tensor, support_labels: Tensor) -> Tensor:
        """Summed losses [...] of items with ``labels`` [..., N], divided as ``loss_scaling`` says."""
        if self.loss_scaling == "mean":
            return summed / labelled(labels)
        return summed * self.head.out_features / labelled(support_labels)
