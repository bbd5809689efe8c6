from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from pipeline.batch import Episodes, Images
from pipeline.config import CONF
from pipeline.errors import PipelineError
from pipeline.methods.base import Method
from pipeline.model import build_model, build_preprocess

SPEC = {
    "method": {"name": "prototypical"},
    "backbone": {"name": "conv4", "width": 4},
    "input": {"shape": [1, 16, 16], "scaling": "unit"},
    "way": 3,
    "shot": 2,
    "classes": 7,
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "method").glob("*.yaml")))
def test_every_method_trains_adapts_and_classifies_bytes(name):
    torch.manual_seed(0)
    spec = {**SPEC, "method": {"name": name}, "input": {"shape": [1, 28, 28], "scaling": "unit"}}
    if name == "relation":
        spec["backbone"] = {"name": "relation_encoder", "width": 4}
    model, preprocess = build_model(spec), build_preprocess(spec)
    support, query = (preprocess(torch.randint(256, (2, n, 1, 28, 28), dtype=torch.uint8)) for n in (6, 9))
    labels, query_labels = torch.arange(3).repeat(2, 2), torch.arange(3).repeat(2, 3)
    batch = Episodes(support, labels, query, query_labels, torch.arange(3).expand(2, 3), 3)
    if model.regime == "classical":
        batch = Images(support.flatten(0, 1), torch.arange(12).repeat_interleave(2)[:12] % 7)  # pairs of a class
    loss, metrics = model(batch)
    loss.backward()
    if model.regime == "both":
        model(Images(support.flatten(0, 1), torch.arange(12) % 7))[0].backward()
    assert loss.ndim == 0 and 0 <= metrics["accuracy"] <= 1 and not metrics["accuracy"].requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    groups = [p for g in model.parameter_groups() for p in g["params"]]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    model.after_step()
    with torch.no_grad():
        state = model.eval().adapt(support, labels)
        assert model.classify(state, query).shape == (2, 9, 3)
    assert all(value.shape[0] == 2 and not value.requires_grad for value in state.values())
    assert all(v.is_contiguous() for v in model.state_dict().values())  # safetensors needs it
    pointers = [v.data_ptr() for v in model.state_dict().values()]
    assert len(set(pointers)) == len(pointers)  # and no two names for one tensor


def test_way_and_classes_go_to_the_methods_that_take_them():
    assert build_model({**SPEC, "method": {"name": "maml"}}).fixed_way == 3
    assert build_model({**SPEC, "method": {"name": "imprinted"}}).classes == 7
    assert build_model(SPEC).fixed_way is None


class OwnMethod(Method):
    def __init__(self, backbone: nn.Module, temperature: float) -> None:
        super().__init__(backbone)
        self.temperature = temperature


def test_own_method_by_import_path(monkeypatch):
    monkeypatch.setitem(sys.modules, "own_methods", sys.modules[__name__])
    model = build_model({**SPEC, "method": {"name": "own_methods.OwnMethod", "temperature": 2.0}})
    assert isinstance(model, OwnMethod) and model.temperature == 2.0 and model.backbone.out_features == 4
    with pytest.raises(PipelineError, match="needs temperature"):
        build_model({**SPEC, "method": {"name": "own_methods.OwnMethod"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"name": "proto"}}, "choose one of baseline, clustering, conditionally_shifted, "),
        ({"method": {"name": "base"}}, "choose one of baseline, clustering, conditionally_shifted, "),
        ({"method": {"name": "head"}}, "choose one of baseline, clustering, conditionally_shifted, "),
        ({"method": {"name": "torch.nn.Linear"}}, "not a subclass of pipeline.methods.base.Method"),
        ({"method": {"name": "subprocess.Popen", "args": ["true"]}}, "not a subclass"),
        ({"method": {"name": "prototypical", "alpha": 1}}, "its options are distance, scale, learn_scale"),
        ({"method": {"name": "maml", "way": 9}}, "no option way"),
        ({"method": {}}, "unknown method"),
        ({"method": None}, "no 'method'"),
        ({"input": {"scaling": "unit"}}, "input.shape"),
        ({"input": {"shape": [28, 28]}}, "input.shape"),
        ({"method": {"name": "maml"}, "way": None}, "MAML needs way: give train.way one number of classes"),
    ],
)
def test_refusals_are_one_line(change, message):
    with pytest.raises(PipelineError) as caught:
        build_model({**SPEC, **change})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_input_option():
    with pytest.raises(PipelineError, match="its options are scaling, mean, std"):
        build_preprocess({**SPEC, "input": {"shape": [1, 16, 16], "scale": 2}})


def test_models_need_neither_ray_nor_mlflow_nor_hydra_nor_arrow():
    code = (
        "import sys, pipeline.model; m = pipeline.model.build_model({'method': {'name': 'maml'}, "
        "'backbone': {'name': 'conv4'}, 'input': {'shape': [1, 28, 28]}, 'way': 5}); "
        "print([n for n in ('ray', 'mlflow', 'hydra', 'omegaconf', 'pyarrow') if n in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
