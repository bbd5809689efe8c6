"""``jobs.embed``: a dataset's features by a frozen network, once, as a dataset that heads are trained on."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from pipeline import store
from pipeline.commands import command, data_root
from pipeline.config import Config, Section, validate
from pipeline.config_kinds import Cluster, Count, Name
from pipeline.data.dataset import read_manifest
from pipeline.data.features import Network
from pipeline.data.ingest import DataSection
from pipeline.data.manifest import FEATURES, MANIFEST_NAME, Manifest
from pipeline.data.write import Target
from pipeline.errors import PipelineError
from pipeline.evaluation.embed_dataset import Embedding, embed_dataset, load_network
from pipeline.evaluation.model import Model
from pipeline.evaluation.seen import TRAINED, with_turns
from pipeline.model import network_shape
from pipeline.nets import build_backbone
from pipeline.nets.norm import looks_at_the_batch
from pipeline.training.check import described_input
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.config import Augment, Input
from pipeline.training.models import model_of_run, takes_features
from pipeline.training.paths import absolute
from pipeline.training.runs import find_run
from pipeline.weights import described, give, settle


class EmbedConfig(Section):
    """Keys of ``conf/embed.yaml``."""

    data: DataSection
    run: Name | None
    backbone: dict[str, Any] | None = None
    input: Input
    storage: str
    name: Name | None
    views: Annotated[int, Field(ge=0)]
    augmentation: Augment
    seed: int
    batch: Count | None
    shard_mb: Annotated[int, Field(ge=1, le=1024)]
    overwrite: bool
    cluster: Cluster


def embed(raw: Config) -> dict[str, Any]:
    """Make the dataset of features that ``raw`` describes (see :class:`EmbedConfig`); its place and figures."""
    raw = {**raw, "data": {**raw["data"], "root": absolute("data.root", str(raw["data"]["root"]))}}
    config = validate(EmbedConfig, raw)
    manifest = read_manifest(config.data.uri)
    if manifest.encoding == FEATURES:
        raise PipelineError(f"data.name={config.data.name}: this dataset holds features already; give one of images")
    network, who, trained = _network(config, manifest)
    if looks_at_the_batch(load_network(network)):
        raise PipelineError(f"{who}: its batch-norm looks at the batch, so that an image by itself has no features")
    name = config.name or f"{config.data.name}-{who}"
    if config.views and not config.augmentation.build().active:
        raise PipelineError(f"views={config.views} are all alike: give augmentation.flip=true or another of its keys")
    place = store.join(config.data.root, name)
    if store.exists(store.join(place, MANIFEST_NAME)) and read_manifest(place).encoding != FEATURES:
        raise PipelineError(f"name={name}: {place} is a dataset of images, which features never replace; give another")
    target = Target(place, config.overwrite, resume=True)
    gpus, began = config.cluster.gpus_per_worker, time.perf_counter()
    embedding = Embedding.of(config.data.uri, network, config.batch, config.shard_mb * 2**20, gpus > 0)
    embedding = replace(embedding, views=config.views, augmentation=config.augmentation.build(), seed=config.seed)
    start_ray(config.cluster)
    check_resources(config.cluster)
    print(f"{target.uri}: features of {manifest.rows:,} images by {who}", flush=True)
    try:
        source = {"kind": FEATURES, "dataset": config.data.uri, "network": who, TRAINED: trained}
        source |= {key: manifest.source[key] for key in ("max_pixels",) if key in manifest.source}
        made = embed_dataset(embedding, target, name, source, gpus, lambda line: print(line, flush=True))
    finally:
        target.leave()
    seconds = time.perf_counter() - began
    print(f"{target.uri}: {made.rows:,} rows of {made.shape[0]:,} features, {seconds:.1f} s")
    head = command("train", "data=features", f"data.name={name}", *data_root(config.data.root), "backbone=features")
    print(f"train a head on them: {head} method=...")
    return {
        "uri": target.uri, "name": name, "fingerprint": made.fingerprint, "rows": made.rows, "views": made.views,
        "features": made.shape[0], "network": made.network, "seconds": seconds,
    }  # fmt: skip


def _network(config: EmbedConfig, manifest: Manifest) -> tuple[Network, str, list[str]]:
    """The network, what it is called in names of datasets, and digests of the classes that it was trained on, where it
    is a run's."""
    if (config.run is None) == (config.backbone is None):
        raise PipelineError("give one of run=NAME and backbone=NAME: whose network embeds; see: jobs.embed --help")
    if config.run is not None:
        run = find_run(config.run, config.storage)
        return _of_run(model_of_run(run), manifest), run.name, with_turns(run.dataset.get(TRAINED, []), manifest)
    assert config.backbone is not None
    options = settle(config.backbone)
    given = described_input(options, config.input.scaling, manifest)
    torch.manual_seed(config.seed)
    backbone = build_backbone(described(options), network_shape({"input": given}))
    found = give(backbone, options)
    if found is None:
        print(f"backbone={options['name']}: its weights are drawn by seed={config.seed}; a trained network: run=NAME")
        return Network(dict(options), given, dict(backbone.state_dict())), str(options["name"]), []
    print(f"backbone.weights={options['weights']}: SHA-256 {found.sha256[:12]}, trained on {options['trained_on']}")
    if config.input.scaling != "backbone":
        print("the weights were made with another input, perhaps: see input.scaling=backbone")
    options = {**described(options), "weights_sha256": found.sha256}
    return Network(options, given, dict(backbone.state_dict())), Path(str(options["model"])).name, []


def _of_run(model: Model, manifest: Manifest) -> Network:
    """The backbone of a run, where it is one that stands by itself."""
    if takes_features(model.spec):
        raise PipelineError(f"run={model.label}: it was trained on features itself; give the network that made them")
    shape, seen = tuple(model.spec["input"]["shape"]), network_shape(model.spec)
    if shape != manifest.shape:
        raise PipelineError(
            f"run={model.label} takes images of {_size(shape)}; dataset {manifest.name!r} has {_size(manifest.shape)}"
        )
    method, _ = model.build()
    extractor, example = method.extractor(), torch.rand(2, *seen, generator=torch.Generator().manual_seed(0))
    network = Network(dict(model.spec["backbone"]), dict(model.spec["input"]), dict(extractor.state_dict()))
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        if torch.allclose(load_network(network)(example), extractor(example)):
            return network
    raise PipelineError(
        f"run={model.label}: method {model.spec['method']['name']} altered its backbone, which does not stand by itself"
    )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
