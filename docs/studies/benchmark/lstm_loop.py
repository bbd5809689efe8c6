"""The LSTM meta-learner as public PyTorch code computes it: the reference of a row of the benchmark.

A row a coordinate, ``torch.nn.LSTMCell`` over all of them, a fresh backward pass of a second learner for every update,
and the graph of all updates kept until the end of the episode.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

P = 10.0


class LoopForm:
    """One meta-training episode at a time, 84x84x3 images."""

    def __init__(self, width: int, way: int, updates: int, hidden: int = 20) -> None:
        self.updates = updates
        self.learner, self.second = lstm_learner(width, way), lstm_learner(width, way)
        self.lstm = nn.LSTMCell(4, hidden)
        self.start = nn.Parameter(parameters_to_vector(self.learner.parameters()).detach().unsqueeze(1))
        small = [nn.Parameter(torch.empty(hidden + 2, 1).uniform_(-0.01, 0.01)) for _ in range(2)]
        self.forget, self.entry = small
        self.forget_bias, self.entry_bias = nn.Parameter(torch.tensor([[5.0]])), nn.Parameter(torch.tensor([[-4.5]]))
        gates = [self.start, self.forget, self.entry, self.forget_bias, self.entry_bias]
        self.parameters = [*self.lstm.parameters(), *gates]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)

    def episode(self, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> None:
        theta = self._adapt(support, labels)
        parts = theta.squeeze(1).split([p.numel() for p in self.learner.parameters()])
        weights = {n: part.view_as(p) for (n, p), part in zip(self.learner.named_parameters(), parts, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(self.learner, weights, (query,)), query_labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 0.25)
        self.optimizer.step()

    def _adapt(self, support: Tensor, labels: Tensor) -> Tensor:
        """theta [P, 1] after the updates, each on the whole support set."""
        theta: Tensor = self.start
        state: tuple[Tensor, Tensor] | None = None
        forget = entry = torch.zeros_like(theta)
        for _ in range(self.updates):
            vector_to_parameters(theta.detach().squeeze(1), self.second.parameters())
            loss = F.cross_entropy(self.second(support), labels)
            self.second.zero_grad()
            loss.backward()
            gradients = [p.grad for p in self.second.parameters() if p.grad is not None]
            gradient = torch.cat([g.reshape(-1) for g in gradients]).div(len(support)).unsqueeze(1)
            seen = torch.cat([_preprocess(loss.detach().view(1, 1)).expand(len(gradient), 2), _preprocess(gradient)], 1)
            state = self.lstm(seen, state)
            forget = torch.cat([state[0], theta, forget], 1) @ self.forget + self.forget_bias
            entry = torch.cat([state[0], theta, entry], 1) @ self.entry + self.entry_bias
            theta = forget.sigmoid() * theta - entry.sigmoid() * gradient
        return theta


def lstm_learner(width: int, way: int) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (3, width, width, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width, 1e-3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * 5 * 5, way))


def _preprocess(x: Tensor) -> Tensor:
    """[N, 1] to [N, 2]: (log|x| / p, sign x) where |x| >= e^-p, otherwise (-1, e^p x)."""
    large = (x.abs() >= math.exp(-P)).to(x.dtype)
    magnitude = large * torch.log(x.abs() + 1e-8) / P - (1 - large)
    return torch.cat([magnitude, large * x.sign() + (1 - large) * math.exp(P) * x], 1)
