"""One small step, forward and backward, before anything starts: a network that was not written for this package may
not be what its method needs."""

import torch
from torch import Tensor, nn

from pipeline.batch import Batch, Episodes, Images
from pipeline.data.episodes import bounds
from pipeline.data.manifest import Manifest
from pipeline.errors import PipelineError, some
from pipeline.methods.base import Method
from pipeline.training.config import TrainConfig

SHOWN = 5  # names in a message


def try_step(config: TrainConfig, manifest: Manifest, method: Method, preprocess: nn.Module) -> None:
    """Refuse what cannot be trained; the method is not to be used any more.

    Raises:
        PipelineError: the network fails in its method's training, nothing of it is trained, or, where several workers
            train, a part of it has no part in the loss.
    """
    name = f"backbone={config.backbone['name']} with method={config.method['name']}"
    method.train()
    try:
        for batch in _batches(config, manifest, method, preprocess):
            loss = method(batch)[0]
            if loss.requires_grad:
                loss.backward()
    except PipelineError:
        raise
    except Exception as error:  # of the user's code, and of PyTorch in it: of any kind
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise PipelineError(f"{name} fails in a training step ({why})") from error
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}
    if all(parameter.grad is None for parameter in named.values()):
        raise PipelineError(f"{name} has nothing to train: measure and register it as it is with steps=0")
    unused = [n for n, p in named.items() if n.startswith("backbone.") and p.grad is None]
    unused = [name.removeprefix("backbone.").removeprefix("network.") for name in unused]
    if unused:
        said = f"{name}: these parameters have no part in its loss: {some(unused, SHOWN)}"
        if config.cluster.workers > 1:
            raise PipelineError(f"{said}; several workers cannot train them: leave them out, or requires_grad_(False)")
        print(said, flush=True)


def _batches(config: TrainConfig, manifest: Manifest, method: Method, preprocess: nn.Module) -> list[Batch]:
    """As small as the method takes them."""
    way, each = bounds(config.train.way)[1], 2

    def images(count: int) -> Tensor:
        drawn = torch.randint(0, 256, (count, *manifest.shape), dtype=torch.uint8)
        prepared: Tensor = preprocess(drawn)
        return prepared

    def labelled(count: int) -> Images:
        return Images(images(count), torch.arange(count) % 2)

    if method.regime == "classical":
        classes, group = config.train.grouping or (2, 2)
        labels = torch.arange(classes * group) // group
        return [Images(images(len(labels)), labels)]
    shot = bounds(config.train.shot)[1]
    support, query = (torch.arange(way).repeat(count) for count in (shot, each))
    episodes = Episodes(
        images(len(support))[None], support[None], images(len(query))[None], query[None], torch.arange(way)[None], way
    )
    return [episodes, labelled(4)] if method.regime == "both" else [episodes]
