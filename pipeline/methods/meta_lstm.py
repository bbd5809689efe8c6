"""The LSTM meta-learner (Ravi & Larochelle 2017): a learnt optimizer and the weights it begins with."""

import math
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.functional.flat import flatten, unflatten
from pipeline.functional.inner_loop import Parameters, gradient, out_of_inference, vmap_tasks
from pipeline.functional.losses import labelled, summed_cross_entropy
from pipeline.functional.meta_lstm import CellWeights, cell_step, first_state, replayed
from pipeline.methods._fast_weights import STATISTICS, _FastWeights, at_least_one
from pipeline.methods.base import State
from pipeline.nets.by_name import choose

GRAPH = 1_600_000  # coordinates times updates whose graph is kept: about 1 GB at 20 hidden units

Statistics = dict[str, Tensor]  # "statistics.<layer>.mean" and ".var", each [T, C]


class MetaLSTM(_FastWeights):
    """An LSTM reads loss and gradient of the support set and updates the learner: its cell state is the weights.

    Every weight of backbone and head is a coordinate with an LSTM state of its own; the LSTM's parameters are shared by
    all. The weights that tasks begin with, the initial cell state, are trained with it. Gradients and losses are
    constants to the meta-gradient, which goes through the chain of updates. Each update sees the whole support set.

    The published 43.44 / 60.60 on mini-ImageNet (5-way, 1 and 5 shots) were made with the defaults (5 shots:
    ``inner_steps=8 statistics_momentum=0.95``), a conv4 of width 32 with ``eps=1e-3 bias=true``, 15 queries a class,
    one episode a step, Adam 1e-3 and ``clip.norm=0.25``.

    Args:
        backbone: the features. Batch-norm uses the batch's statistics in every update and for training's queries;
            evaluation's queries are normalised by running averages over the updates of their own support set.
        hidden: units of the LSTM.
        inner_steps, inner_steps_eval: number of updates in training and in evaluation.
        initial_rate: share of the gradient that an update of the untrained LSTM takes, about its inner learning rate,
            in (0, 1); None: drawn as in the official code, from .007 to .018.
        preprocess_p: p of the preprocessing, which keeps gradients of all magnitudes apart.
        gate_feedback: what the update's gates see of themselves: "pre_sigmoid", as the official code, or
            "post_sigmoid", as the paper's notation says.
        gradient_scale: "div_n": the gradient of the mean loss is divided by the number of images once more, as in the
            official code; "plain": it is not.
        statistics_momentum: share of an update's statistics in the running averages.
        inner_loop: how learners' gradients are taken: "loop" over tasks, "vmap" over all at once, or "auto": on CPU and
            with convolutions the loop, otherwise vmap. The LSTM always takes all coordinates of all tasks at once.
    """

    few_values = 0  # first-order steps on CPU: the loop was never much slower than vmap, and up to six times as fast

    def __init__(
        self,
        backbone: nn.Module,
        way: int,
        hidden: int = 20,
        inner_steps: int = 12,
        inner_steps_eval: int = 12,
        initial_rate: float | None = None,
        preprocess_p: float = 10.0,
        gate_feedback: str = "pre_sigmoid",
        gradient_scale: str = "div_n",
        statistics_momentum: float = 0.9,
        inner_loop: str = "auto",
    ) -> None:
        at_least_one(hidden=hidden, inner_steps=inner_steps, inner_steps_eval=inner_steps_eval)
        super().__init__(backbone, way, inner_loop)
        self.inner_steps, self.inner_steps_eval = inner_steps, inner_steps_eval
        self.preprocess_p, self.statistics_momentum = preprocess_p, statistics_momentum
        self.gate_feedback = choose("gate_feedback", gate_feedback, ("pre_sigmoid", "post_sigmoid"))
        self.gradient_scale = choose("gradient_scale", gradient_scale, ("div_n", "plain"))
        small = partial(nn.init.uniform_, a=-0.01, b=0.01)
        self.cell_inputs = nn.Parameter(small(torch.empty(4 * hidden, 4)))
        self.cell_hidden = nn.Parameter(small(torch.empty(4 * hidden, hidden)))
        self.cell_bias = nn.Parameter(small(torch.empty(4 * hidden)))
        self.gate_weight = nn.Parameter(small(torch.empty(2, hidden + 2)))
        forget, entry = torch.empty(1).uniform_(4, 5), torch.empty(1).uniform_(-5, -4)  # keep what is there, at first
        if initial_rate is not None:
            if not 0 < initial_rate < 1:
                raise PipelineError(f"initial_rate={initial_rate}: give a share between 0 and 1, or null")
            entry.fill_(math.log(initial_rate / (1 - initial_rate)))
        self.gate_bias = nn.Parameter(torch.cat([forget, entry]))

    def adapt(self, support: Tensor, labels: Tensor, way: int | None = None) -> State:
        """The weights [T, ...] by name after the updates and, in evaluation, batch-norm's averages over them."""
        self.check_support(labels, way)
        keep_graph = self.training and torch.is_grad_enabled()
        with out_of_inference(support, labels) as (support, labels), torch.set_grad_enabled(keep_graph):
            start = flatten(self._weights()).expand(len(support), -1)
            steps = self.inner_steps if self.training else self.inner_steps_eval
            if keep_graph and start.numel() * steps > GRAPH:
                with torch.no_grad():
                    end, statistics, seen = self._update(start, support, labels, steps, remember=True)
                end = replayed(end, self._cell(), start, *seen, *self._options())
            else:
                end, statistics, _ = self._update(start, support, labels, steps)
            state = unflatten(end, self._shapes())
        return state if keep_graph else {name: value.clone() for name, value in state.items()} | statistics

    def _update(
        self, theta: Tensor, support: Tensor, labels: Tensor, steps: int, remember: bool = False
    ) -> tuple[Tensor, Statistics, tuple[Tensor, Tensor]]:
        """theta [T, P] after ``steps`` updates, running statistics in evaluation, and gradients [K, T, P] and losses
        [K, T] if they are to be remembered."""
        each_task, statistics = self._each_task(support), Statistics()
        look = partial(self._look_one, each_task is vmap_tasks)
        cell, state = self._cell(), first_state(theta, self.cell_hidden.shape[1])
        divisor = labelled(labels).unsqueeze(-1) if self.gradient_scale == "div_n" else 1
        seen = []
        for _ in range(steps):
            found = each_task(look, state.theta.detach(), support, labels)
            gradients, losses = found.pop("gradient") / divisor, found.pop("loss")
            state = cell_step(cell, state, gradients, losses, *self._options())
            self._average(statistics, found)
            if remember:
                seen.append((gradients, losses))
        kept = [torch.stack(values) for values in zip(*seen, strict=True)] if remember else [theta, theta]
        return state.theta, statistics, (kept[0], kept[1])

    def _look_one(self, mapped: bool, weights: Tensor, support: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """One task: gradient [P] and value of the mean loss at weights [P]; in evaluation the support's statistics."""

        def loss(parameters: Parameters) -> tuple[Tensor, dict[str, Tensor]]:
            statistics: State = {}
            values: dict[str, int] = {}  # behind each mean
            with nullcontext() if self.training else self._recording(statistics, values):
                logits = self._logits(parameters, support)
            for name, n in values.items():  # running averages take unbiased variances
                statistics[f"{STATISTICS}{name}.var"] = statistics[f"{STATISTICS}{name}.var"] * n / (n - 1)
            value = summed_cross_entropy(logits, labels) / labelled(labels)
            return value, {"loss": value, **statistics}

        gradients, found = gradient(loss, unflatten(weights, self._shapes()), mapped)
        return {"gradient": flatten(gradients), **found}

    def _average(self, running: Statistics, new: Statistics) -> None:
        """Exponential averages, in place, from mean 0 and variance 1."""
        share = self.statistics_momentum
        for name, value in new.items():
            before = running.get(name, 1.0 if name.endswith(".var") else 0.0)
            running[name] = (1 - share) * before + share * value

    def _cell(self) -> CellWeights:
        return CellWeights(self.cell_inputs, self.cell_hidden, self.cell_bias, self.gate_weight, self.gate_bias)

    def _options(self) -> tuple[float, bool]:
        return self.preprocess_p, self.gate_feedback == "pre_sigmoid"
