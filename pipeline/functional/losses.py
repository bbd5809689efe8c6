"""Classification losses and accuracy over tasks; the label -1 marks padding and counts nowhere."""

import torch.nn.functional as F
from torch import Tensor

PADDING = -1


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over all labelled items of [..., N, way] and [..., N]: scalar."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=PADDING)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, over: str = "others") -> Tensor:
    """As :func:`cross_entropy`, against labels of which a share ``smoothing`` is spread over other classes.

    Args:
        over: "others": over the wrong classes, so that the right one keeps 1 - smoothing (MetaOptNet's code and
            Proxy-NCA's). "all": over all classes alike, the right one too (Szegedy et al. 2016; PyTorch).
    """
    if over == "others":
        smoothing *= logits.shape[-1] / max(1, logits.shape[-1] - 1)
    flat, true = logits.flatten(0, -2), labels.flatten()
    return F.cross_entropy(flat, true, ignore_index=PADDING, label_smoothing=smoothing)


def divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Mean over items of KL(teacher || student) of softmax(logits / temperature), times temperature^2 (Hinton et al.
    2015), so that its gradients stay as large at any temperature: [N, classes] twice."""
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, taught))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled items of each task: [..., N, way] and [..., N] give [...]."""
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=PADDING, reduction="none")
    return losses.view(labels.shape).sum(-1)


def labelled(labels: Tensor) -> Tensor:
    """How many items of each task carry a label: [..., N] gives [...]."""
    return (labels != PADDING).sum(-1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers among the labelled items of all tasks, detached."""
    right = (logits.detach().argmax(-1) == labels) & (labels != PADDING)
    return right.sum() / labelled(labels).sum()
