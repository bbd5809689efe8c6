"""An image encoder of transformers is transformers' encoder: its tokens, pooled; and needs its folder once only."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

from pipeline.errors import PipelineError
from pipeline.nets import Preprocess, build_backbone
from pipeline.weights import described, recipe, settle, with_weights
from tests.nets.pretrained import SIZE, encoder, encoder_folder

SHAPE = (3, SIZE, SIZE)


@pytest.mark.parametrize("kind", ["ViT", "CLIPVision", "SiglipVision", "Dinov2", "ResNet"])
def test_features_are_the_librarys_tokens_pooled(tmp_path, kind):
    folder, images = encoder_folder(tmp_path, kind), torch.rand(2, *SHAPE)
    with torch.no_grad():
        out = encoder(kind)(images, **({"interpolate_pos_encoding": True} if kind == "Dinov2" else {}))
        last = out.last_hidden_state
        mean = last.mean((2, 3)) if kind == "ResNet" else last[:, 0 if kind == "SiglipVision" else 1 :].mean(1)
        own = last[:, 0] if kind == "ViT" else out.pooler_output.flatten(1)  # a ViT's pooler is rarely trained
        for pooling, expected in (("cls", own), ("mean", mean), ("both", torch.cat([own, mean], 1))):
            found = with_weights({"name": "huggingface", "model": folder, "pooling": pooling}, SHAPE)
            assert torch.equal(found(images), expected) and found.out_features == expected.shape[1]
            found.train()(images)
            used = [p for p in found.parameters() if p.requires_grad]
            with torch.enable_grad():
                gradients = torch.autograd.grad(found(images).sum(), used, allow_unused=True)
            assert all(gradient is not None for gradient in gradients), "what is trained has a part in the features"


def test_the_folder_is_needed_once(tmp_path):
    folder = encoder_folder(tmp_path)
    settled = settle({"name": "huggingface", "model": folder, "weights": "hub", "freeze": "all"})
    weights = with_weights(settled, SHAPE).state_dict()
    shutil.rmtree(folder)
    again = build_backbone(described(settled), SHAPE)
    again.load_state_dict(weights)
    assert len(again.stage_parameters()) == 4  # what comes before the blocks and the three; the norm after is none


def test_images_of_another_size_than_that_of_training(tmp_path):
    found = with_weights({"name": "huggingface", "model": encoder_folder(tmp_path)}, (3, 48, 40))
    assert found(torch.rand(2, 3, 48, 40)).shape == (2, 16)


def test_its_input(tmp_path):
    options = {"name": "huggingface", "model": encoder_folder(tmp_path)}
    assert recipe(options, 3) == {
        "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "size": [SIZE, SIZE], "crop": 0.8, "interpolation": "bicubic"
    }  # fmt: skip
    (tmp_path / "ViT" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.5, 0.6]}))
    with pytest.raises(PipelineError, match="does not say 'size'; give unit or standard"):
        recipe(options, 3)
    (tmp_path / "ViT" / "preprocessor_config.json").unlink()
    with pytest.raises(PipelineError, match="has no preprocessor_config.json that says how"):
        recipe(options, 3)


@pytest.mark.parametrize(("edge", "cut"), [(224, 224 / 256), (384, 1.0)])
def test_a_cut_that_is_told_as_a_share(tmp_path, edge, cut):
    """ConvNeXt's images are cut where they are small, and only resized where they are large: as the library does it."""
    library = ConvNextImageProcessorPil(size={"shortest_edge": edge})
    library.save_pretrained(tmp_path)
    found = recipe({"name": "huggingface", "model": str(tmp_path)}, 3)
    assert (found["size"], found["crop"]) == ([edge, edge], cut)
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
    expected = np.asarray(library(image, return_tensors="np")["pixel_values"][0])
    ours = Preprocess("backbone", **found)(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0].numpy()
    assert np.abs(ours - expected).mean() < 0.01


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": None}, "backbone.model must be given"),
        ({"model": "/no/such/folder"}, "no model's folder, and no name on the hub"),
        ({"pooling": "max"}, "pooling='max' is not known: choose one of cls, mean, both"),
        ({"architecture": '{"model_type": "bert"}'}, "no image encoder of the kind 'bert'"),
        ({"architecture": "{}"}, "backbone.architecture describes no model"),
    ],
)
def test_refusals_are_one_line(tmp_path, options, says):
    given = {"name": "huggingface", "model": encoder_folder(tmp_path), "weights": None, **options}
    with pytest.raises(PipelineError) as caught:
        build_backbone(given, SHAPE)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(PipelineError, match="takes images of 3 channels, not 1"):
        build_backbone({"name": "huggingface", "model": encoder_folder(tmp_path), "weights": None}, (1, SIZE, SIZE))
