"""Small networks of the two libraries with weights in files, as people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZE = 32


def timm_file(folder: Path, model: str = "test_resnet", suffix: str = "safetensors", seed: int = 0) -> str:
    """Weights of a timm network with its classifier, whose batch-norm has averages of its own."""
    import timm

    torch.manual_seed(seed)
    network = timm.create_model(model)
    network(torch.randn(8, 3, 64, 64))  # of training mode: the averages move
    path = folder / f"{model}-{seed}.{suffix}"
    if suffix == "safetensors":
        save_file(network.state_dict(), path)
    else:
        torch.save({"epoch": 7, "state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return str(path)


def encoder(kind: str, **options: Any) -> torch.nn.Module:
    """A small image encoder of transformers."""
    import transformers

    transformer = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    hidden = {"intermediate_size": 32}
    small: dict[str, dict[str, Any]] = {
        "ViT": transformer | hidden | {"image_size": SIZE, "patch_size": 8},
        "CLIPVision": transformer | hidden | {"image_size": SIZE, "patch_size": 8},
        "SiglipVision": transformer | hidden | {"image_size": SIZE, "patch_size": 8},
        "Dinov2": transformer | {"image_size": 40, "patch_size": 8},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**small[kind], **options)
    network: torch.nn.Module = getattr(transformers, f"{kind}Model")(config)
    return network.eval()


def encoder_folder(folder: Path, kind: str = "ViT") -> str:
    """What the library itself saves, and how the images are to be prepared."""
    network = encoder(kind)
    network.save_pretrained(folder / kind)
    recipe = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3, "do_center_crop": True,
              "size": {"shortest_edge": 40}, "crop_size": {"height": SIZE, "width": SIZE}}  # fmt: skip
    (folder / kind / "preprocessor_config.json").write_text(json.dumps(recipe))
    return str(folder / kind)
