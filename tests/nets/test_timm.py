"""A network of timm is timm's network: with its weights, its stages and its input."""

from __future__ import annotations

import pytest
import timm
import torch

from pipeline.errors import PipelineError
from pipeline.model import build_model
from pipeline.nets import build_backbone
from pipeline.nets.by_name import construct
from pipeline.nets.norm import batch_norms
from pipeline.nets.wrapped import library
from pipeline.weights import recipe, settle, with_weights
from tests.nets.pretrained import timm_file

SHAPE = (3, 64, 64)
PLAIN = {"name": "timm", "model": "test_resnet", "weights": None}


def test_builds_of_torch_that_do_not_go_together_are_told(tmp_path, monkeypatch):
    (tmp_path / "odd_builds.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PipelineError, match="timm: odd_builds cannot be imported .*nms.*install both from one index"):
        library("timm", "odd_builds")

    class Lazy:
        def __init__(self) -> None:
            raise ModuleNotFoundError("Could not import module 'ViTModel'.")

    with pytest.raises(PipelineError, match="Lazy cannot be made .*'ViTModel'.*install both from one index"):
        construct("backbone", Lazy, {}, {})


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_features_are_those_of_the_library(tmp_path, suffix):
    path = timm_file(tmp_path, suffix=suffix)
    found = with_weights({**PLAIN, "weights": path}, SHAPE)
    torch.manual_seed(0)
    own = timm.create_model("test_resnet")
    own(torch.randn(8, 3, 64, 64))
    own.reset_classifier(0)
    images = torch.rand(3, *SHAPE)
    with torch.no_grad():
        expected = own.eval()(images.to(memory_format=torch.channels_last))  # which convolutions are fastest with
        assert torch.equal(found(images), expected) and not found.training
        torch.testing.assert_close(expected, own(images))
    assert found.out_features == own.num_features


def test_the_lite_network_of_the_shared_folder(real_data):
    path = real_data / "pretrained" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path}")
    options = {"name": "timm", "model": "tf_efficientnet_lite0", "weights": str(path)}
    features = with_weights(options, (3, 224, 224))(torch.full((1, 3, 224, 224), 0.5))
    assert features.shape == (1, 1280) and float(features.detach().norm()) > 1
    assert recipe(options, 3) == {
        "mean": [0.5] * 3, "std": [0.5] * 3, "size": [224, 224], "crop": 0.875, "interpolation": "bicubic"
    }  # fmt: skip


def test_a_transformer_is_built_for_the_size_of_the_images():
    assert build_backbone({**PLAIN, "model": "test_vit"}, (1, 96, 64))(torch.rand(2, 1, 96, 64)).shape == (2, 64)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_efficientnet"])
def test_frozen_stages_stay_as_they_are(model):
    free = build_backbone({**PLAIN, "model": model}, (3, 160, 160))
    count = len(free.stage_parameters())
    whole = build_backbone({**PLAIN, "model": model, "freeze": "all"}, (3, 160, 160)).train()
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(m.training for m in whole.network.modules())
    part = build_backbone({**PLAIN, "model": model, "freeze": 2}, (3, 160, 160)).train()
    trained = [name for name, p in part.network.named_parameters() if p.requires_grad]
    last = sum(free.stage_parameters()[2:], [])
    assert trained == [name for name, _ in free.network.named_parameters() if name in last] and trained
    before = {name: tensor.clone() for name, tensor in part.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in part.parameters() if p.requires_grad], lr=0.1)
    part(torch.rand(4, 3, 160, 160)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in part.network.state_dict().items() if not torch.equal(tensor, before[name])}
    stages = [{name.rpartition(".")[0] for name in stage} for stage in part.stage_parameters()]
    assert not {name.rpartition(".")[0] for name in changed} & set.union(*stages[:2]), "averages of batch-norm too"
    assert changed
    with pytest.raises(PipelineError, match=rf"freeze=99: give all, none, or how many of its {count} stages"):
        build_backbone({**PLAIN, "model": model, "freeze": 99}, (3, 160, 160))


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet"])
def test_batch_norm_goes_by_its_averages_where_asked(model):
    plain = build_backbone({**PLAIN, "model": model}, (3, 160, 160))
    kept = build_backbone({**PLAIN, "model": model, "batch_norm": "averages"}, (3, 160, 160))
    kept.load_state_dict(plain.state_dict())
    images, before = torch.rand(4, 3, 160, 160), {name: t.clone() for name, t in kept.state_dict().items()}
    expected = plain.eval()(images)
    torch.testing.assert_close(kept.train()(images), expected)
    assert not torch.allclose(plain.train()(images), expected)
    kept(images).square().sum().backward()
    assert all(p.grad is not None for name, p in kept.named_parameters() if p.requires_grad), "they are trained"
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())


def test_averages_stay_where_a_method_puts_its_own_batch_norm_in():
    spec = {
        "method": {"name": "baseline", "head": "finetune_all"}, "backbone": {**PLAIN, "batch_norm": "averages"},
        "classes": 3, "input": {"shape": SHAPE, "scaling": "unit"},
    }  # fmt: skip
    method = build_model(spec).train()
    assert batch_norms(method.backbone), "the package's own"
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    images = torch.rand(4, *SHAPE)
    in_training = method.backbone(images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    torch.testing.assert_close(in_training, method.eval().backbone(images))


@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_averages_are_refused_where_a_method_has_none(method):
    spec = {
        "method": {"name": method}, "backbone": {**PLAIN, "batch_norm": "averages"}, "way": 3,
        "input": {"shape": SHAPE, "scaling": "unit"},
    }  # fmt: skip
    with pytest.raises(PipelineError, match=r"^backbone.batch_norm=averages: this method normalises by the images"):
        build_model(spec)
    build_model(spec | {"backbone": {**PLAIN, "freeze": 1}})  # whose frozen stages were never asked


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = build_backbone({**PLAIN, "model": "test_vit", "gradient_checkpointing": checkpointing}, (3, 160, 160))
        net.train()(torch.ones(2, 3, 160, 160)).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": None}, "backbone.model must be given"),
        ({"model": "resnet5"}, "timm has no such network; did you mean resnet50"),
        ({"model": "resnet50.nothing"}, "timm has no such weights; it has a1_in1k"),
        ({"weights": "hub"}, "pipeline.weights.with_weights reads them"),
        ({"freeze": "some"}, "freeze='some': give all, none"),
        ({"batch_norm": "none"}, "batch_norm='none'"),
        ({"widht": 3}, "no option widht"),
        ({"model": "dla46x_c", "gradient_checkpointing": True}, "timm does not offer it for dla46x_c; leave it out"),
    ],
)
def test_refusals_are_one_line(options, says):
    with pytest.raises(PipelineError) as caught:
        build_backbone({**PLAIN, **options}, SHAPE)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_it_says_what_its_weights_were_trained_on():
    assert settle({"name": "timm", "model": "resnet50.a1_in1k", "weights": "hub"})["trained_on"] == "a1_in1k"
    assert settle({"name": "timm", "model": "resnet50", "weights": "x", "trained_on": "birds"})["trained_on"] == "birds"
    assert settle({"name": "conv4", "width": 8}) == {"name": "conv4", "width": 8}
