"""TADAM's network on a tiny scale: embeddings, modulation, logits, gradients, auxiliary logits and L2 terms."""

from __future__ import annotations

import pytest
import torch

from pipeline.batch import Episodes, Images
from pipeline.methods.tadam import TADAM
from pipeline.nets.film import film_of
from pipeline.nets.resnet12_tadam import ResNet12Tadam

CASES = "tadam_net_*.npz"
UNITS = 3


def build(case, request) -> TADAM:
    """The case's method with its parameters."""
    name = request.node.callspec.id
    widths = [case[f"in_shortcut{b}_w"].shape[0] for b in range(int(case["meta_num_blocks"]))]
    backbone = ResNet12Tadam(
        tuple(case["in_x_support"].shape[1:]),
        widths=widths,
        num_max_pools=int(case["meta_max_pool_blocks"]),
        eps=float(case["meta_bn_eps"]),
    )
    method = TADAM(
        backbone,
        classes=case["in_aux_b"].shape[0],
        metric="cosine" if "cosine" in name else "euclidean",
        scale=1.0 if "prototypical" in name else float(case["meta_alpha"]),
        conditioning="film" in name,
    ).to(case["in_x_support"].dtype)
    with torch.no_grad():
        for parameter, key in pairs(case, method):
            parameter.copy_(case[f"in_{key}"])
        for key, norm in norms(method):
            norm.running_mean.copy_(case[f"in_{key}_bn_mean"])
            norm.running_var.copy_(case[f"in_{key}_bn_var"])
        method.classifier.weight.copy_(case["in_aux_W"].T)
        method.classifier.bias.copy_(case["in_aux_b"])
    return method.train("_train_" in name)


def norms(method):
    for b, block in enumerate(method.backbone.blocks):
        yield f"shortcut{b}", block.shortcut_norm
        for u, norm in enumerate(block.norms):
            yield f"conv{b}_{u}", norm


def pairs(case, method, gradients: bool = False):
    """Every parameter of the few-shot task (or its gradient), as the case names it."""
    get = (lambda p: p.grad) if gradients else (lambda p: p)
    for b, block in enumerate(method.backbone.blocks):
        yield get(block.shortcut.weight), f"shortcut{b}_w"
        for u, conv in enumerate(block.convs):
            yield get(conv.weight), f"conv{b}_{u}_w"
    for key, norm in norms(method):
        yield get(norm.weight), f"{key}_bn_gamma"
        yield get(norm.bias), f"{key}_bn_beta"
    ten = method.task_embedding
    for layer in range(0 if ten is None else len(ten.widths)):
        b, u = divmod(layer, UNITS)
        nets = ten.nets[str(ten.widths[layer])]
        for kind in ("gamma", "beta"):
            place = ten.place(layer, kind)
            for depth in range(3):
                yield get(nets.weights[depth])[place], f"ten_{kind}_{b}_{u}_l{depth}_W"
                yield get(nets.biases[depth])[place, 0], f"ten_{kind}_{b}_{u}_l{depth}_b"
            yield get(nets.multiplier)[place, 0, 0], f"ten_{kind}0_{b}_{u}"


def episodes(case) -> Episodes:
    tasks, way, shot = (int(case[f"in_n_{k}"]) for k in ("tasks", "way", "shot"))
    return Episodes(
        support=case["in_x_support"].unflatten(0, (tasks, way * shot)),
        support_labels=torch.arange(way).repeat_interleave(shot).expand(tasks, -1),
        query=case["in_x_query"].unflatten(0, (tasks, -1)),
        query_labels=case["in_query_labels"].view(tasks, -1),
        classes=torch.arange(way).expand(tasks, way),
        way=way,
    )


def test_embeddings_modulation_and_logits(case, check, request):
    method, e = build(case, request), episodes(case)
    state = method.adapt(e.support, e.support_labels, e.way)
    check(state["prototypes"], "out_prototypes")
    check(method.classify(state, e.query).flatten(0, 1), "out_logits")
    if method.task_embedding is not None:
        widths = list(method.task_embedding.widths)
        for layer, (gamma, beta) in enumerate(film_of(state["gamma"], state["beta"], widths, 1)):
            b, u = divmod(layer, UNITS)
            check(gamma, f"out_gamma_delta_{b}_{u}")
            check(beta, f"out_beta_{b}_{u}")
    check(method._embed(state, e.support).flatten(0, 1), "out_support_feat")
    check(method._embed(state, e.query).flatten(0, 1), "out_query_feat")
    plain = method.backbone(e.support.flatten(0, 1)).unflatten(0, e.support.shape[:2])
    means = plain.unflatten(1, (e.way, -1)).mean(2)
    check(means, "out_proto_uncond")
    check(means.mean(1), "out_task_repr")


def test_loss_and_gradients(case, check, request):
    method, e = build(case, request), episodes(case)
    loss, _ = method(e)
    loss.backward()
    check(loss, "out_loss_ce_mean")
    for gradient, key in pairs(case, method, gradients=True):
        check(gradient, f"out_grad_{key}")
    assert method.classifier.weight.grad is None


def test_shuffled_support_and_queries_of_every_task(case, check, request):
    """And tasks in another order: the answers move with them."""
    method, e = build(case, request), episodes(case)
    generator = torch.Generator().manual_seed(0)
    tasks = torch.randperm(e.tasks, generator=generator)
    s, q = (torch.randperm(n, generator=generator) for n in (e.support.shape[1], e.query.shape[1]))
    state = method.adapt(e.support[tasks][:, s], e.support_labels[tasks][:, s], e.way)
    logits = method.classify(state, e.query[tasks][:, q])
    check(logits[:, q.argsort()][tasks.argsort()].flatten(0, 1), "out_logits")


def test_auxiliary_task(case, check, request):
    method = build(case, request)
    logits = method.classifier(method.backbone(case["in_x_aux"]))
    check(logits, "out_aux_logits")
    labels = torch.arange(len(logits)) % logits.shape[1]
    loss, figures = method(Images(case["in_x_aux"], labels))
    assert loss.item() == pytest.approx(-logits.log_softmax(1)[range(len(labels)), labels].mean().item(), rel=1e-5)
    assert figures["accuracy"].item() == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_l2_terms(case, check, request):
    terms = build(case, request).penalties(5e-4)
    check(terms.pop("backbone"), "out_reg_conv_0p0005")
    for name, key in (("task_embedding", "ten_weights_0p0005"), ("multipliers", "postmultipliers_0p01")):
        assert (name in terms) is (float(case[f"out_reg_{key}"]) > 0)
        if name in terms:
            check(terms[name], f"out_reg_{key}")
