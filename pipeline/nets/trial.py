"""A network tried on an image before anything depends on it."""

import torch
from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.nets.base import Shape


def tried(network: nn.Module, shape: Shape, what: str) -> tuple[int, set[str]]:
    """How many features the network makes of an image [C, H, W], and the names of the parameters that have no part in
    them.

    Layers that take their shapes from the first image get them here.

    Raises:
        PipelineError: the network fails on images of this shape, or returns no tensor [N, D] for N of them.
    """
    training = network.training
    network.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            features = network(_images(network, shape))
    except PipelineError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise PipelineError(f"{what} fails on an image of shape {list(shape)} ({why})") from error
    finally:
        network.train(training)
    if not isinstance(features, Tensor):
        raise PipelineError(f"{what} returns a {type(features).__name__}: it must return one tensor [images, features]")
    if features.ndim != 2 or len(features) != 2:
        hint = ": take their mean over height and width, or flatten them" if features.ndim == 4 else ""
        raise PipelineError(
            f"{what} returns a tensor of shape {list(features.shape)} for 2 images: it must be [2, features]{hint}"
        )
    reached = {id(parameter) for parameter in _leaves(features)}
    return features.shape[1], {n for n, p in network.named_parameters() if p.requires_grad and id(p) not in reached}


def mappable(network: nn.Module, images: Tensor) -> bool:
    """Whether ``torch.func.vmap`` can map the network's gradients over tasks with weights of their own, for images of
    the shape of ``images`` [..., C, H, W]: it cannot where values decide what is computed, or a buffer is changed."""
    modules = list(network.modules())
    if any(isinstance(module, nn.RNNBase) for module in modules):
        return False  # PyTorch has no batching rule for them, and says so only where it takes its own kernel
    reparametrised = any(isinstance(module, nn.utils.parametrize.ParametrizationList) for module in modules)
    known = all(type(module).__module__.startswith(("torch.nn.modules.", "pipeline.")) for module in modules)
    if known and not reparametrised:
        return True
    buffers = [(m, n, b, b.clone()) for m in network.modules() for n, b in m._buffers.items() if b is not None]
    weights = {n: torch.stack([p.detach()] * 2).requires_grad_() for n, p in network.named_parameters()}

    def loss(own: dict[str, Tensor], seen: Tensor) -> Tensor:
        return torch.func.functional_call(network, own, (seen,)).square().sum()

    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            drawn = torch.rand(2, 2, *images.shape[-3:], device=images.device)
            gradients = torch.func.vmap(torch.func.grad(loss), randomness="different")(weights, drawn)
            torch.autograd.grad(
                [g.sum() for g in gradients.values() if g.requires_grad], [*weights.values()], allow_unused=True
            )
        return all(m._buffers[n] is b and torch.equal(b, before) for m, n, b, before in buffers)
    except Exception:  # PyTorch's of any kind: what it says is of the inside of vmap
        return False
    finally:
        for module, name, buffer, before in buffers:
            module._buffers[name] = buffer.copy_(before)


def _images(network: nn.Module, shape: Shape) -> Tensor:
    like = next(network.parameters(), torch.empty(0))
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    return images.to(like.device, like.dtype if like.is_floating_point() else torch.float32)


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that gradients of ``value`` end in."""
    found, seen, todo = [], set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found
