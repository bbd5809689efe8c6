"""What ``jobs.report`` does with a user's own runs: pages; and trained runs beside each other on one dataset, as
extractors crossed with classifiers, on other datasets, by how clustered their features are, and by strangers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline import store
from pipeline.config import Config, Section, validate
from pipeline.config_kinds import Cluster, Count, Name, Positive, Several
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.evaluation import clustering, cross_table
from pipeline.evaluation.evaluate import EpisodicProtocol, check, check_images, evaluate
from pipeline.evaluation.model import kind, matched
from pipeline.evaluation.protocols import Counts, Place
from pipeline.evaluation.seen import refuse_seen
from pipeline.evaluation.spread import EmbeddedSplits
from pipeline.pages import strangers
from pipeline.pages.build import make_pages
from pipeline.pages.comparison_tables import COMPARISONS
from pipeline.pages.published import read_published
from pipeline.pages.record import record_comparison
from pipeline.registry.tracking_config import TrackingConfig
from pipeline.tables import text_table
from pipeline.training.checkpoint import Checkpoint, load_checkpoint
from pipeline.training.cluster import check_resources, start_ray
from pipeline.training.models import model_for, model_of
from pipeline.training.runs import Run, best_checkpoint, find_run
from pipeline.weights import origin_of

Head = Literal["svm", "ridge", "prototypes", "nearest", "linear", "cosine", "maml"]


class FineTune(Section):
    steps: Count
    lr: Positive
    norm: Literal["running", "batch"]


class ReportConfig(Section):
    """Keys of ``conf/report.yaml``."""

    what: Literal[
        "pages", "cross_table", "cross_domain", "clustering", "strangers",
        "results", "reproduction", "campaign", "embeddings",
    ]  # fmt: skip
    published: str | None
    runs: list[Name]
    storage: str
    dataset: Place | None
    datasets: list[Place]
    split: str
    strangers: str | None
    way: Count
    shot: Counts
    query: Count
    episodes: Several
    tasks: Count
    seed: int
    heads: Annotated[list[Head], Field(min_length=1)]
    fine_tune: FineTune
    pairs: Annotated[int, Field(ge=2)]
    classes: Annotated[int, Field(ge=2)]
    images: Count | None
    projection: Literal["lda", "pca"]
    output: str | None
    record: str | None
    cluster: Cluster
    tracking: TrackingConfig


def compare(config: ReportConfig) -> dict[str, Any]:
    """The comparison ``config.what``, printed as a table."""
    if config.record:
        store.check_output(config.record, "record")
    subjects = Subjects(config)
    subjects.check(config)
    start_ray(config.cluster)
    check_resources(config.cluster)
    found = _FOUND[config.what](config, subjects)
    content = {"runs": subjects.described(), **found}
    print(COMPARISONS[config.what](content, text_table), flush=True)
    subjects.record(config, found)
    return content


class Subjects:
    """The runs that are compared, with their models and the dataset that they share."""

    def __init__(self, config: ReportConfig) -> None:
        if not config.runs:
            raise PipelineError(f"{config.what} needs runs=[NAME,...], the trained runs to compare")
        runs = [find_run(name, config.storage) for name in config.runs]
        if len({run.name for run in runs}) < len(runs):  # figures are told apart by it
            raise PipelineError(f"runs={config.runs}: every run once, each with a name of its own")
        loaded = [(run, load_checkpoint(best_checkpoint(run.uri))) for run in runs]
        self.models = [model_of(c, run.name) for run, c in loaded]
        self.trained: list[tuple[Run, Checkpoint, str]] = [
            (run, checkpoint, kind(model)) for (run, checkpoint), model in zip(loaded, self.models, strict=True)
        ]
        known = {c.dataset["fingerprint"]: c.dataset for _, c in loaded}
        if config.dataset is None and len(known) > 1 and config.what != "cross_domain":
            names = ", ".join(sorted({str(d["name"]) for d in known.values()}))
            raise PipelineError(f"the runs were trained on different datasets ({names}): give dataset=FOLDER")
        self.dataset = config.dataset or str(next(iter(known.values()))["uri"])

    def check(self, config: ReportConfig) -> None:
        """Refuse what was trained on the classes that are asked for, or takes other images or features."""
        elsewhere = config.what == "cross_domain"
        for uri in config.datasets if elsewhere else [self.dataset]:
            manifest = read_manifest(uri)
            for model, (_, checkpoint, _) in zip(self.models, self.trained, strict=True):
                refuse_seen(model.label, checkpoint.dataset, manifest, config.split, "measure another split")
        if not elsewhere:  # where images are brought to every model's shape
            self.models = [model_for(model, self.dataset) for model in self.models]
            for model in self.models:
                check_images(model, manifest)

    def described(self) -> list[dict[str, Any]]:
        return [
            {
                "name": run.name,
                "kind": kind,
                "dataset": {"name": checkpoint.dataset["name"]},
                "method": checkpoint.spec["method"]["name"],
                "steps": checkpoint.step,
                "weights": origin_of(checkpoint.spec, checkpoint.dataset.get("uri")),
            }
            for run, checkpoint, kind in self.trained
        ]

    def record(self, config: ReportConfig, found: dict[str, Any]) -> None:
        if config.record:
            record_comparison(config.record, self.trained, found, config.what, config)
            print(f"recorded in {config.record}")


def _cross_table(config: ReportConfig, subjects: Subjects) -> dict[str, Any]:
    if len(config.shot) > 1:
        raise PipelineError(f"shot={config.shot}: cross_table is made for one number of shots")
    asked = {**_asked(config), "shot": config.shot[0]}
    protocol = EpisodicProtocol(subjects.dataset, **asked, tasks=config.tasks)
    fine_tune = cross_table.FineTune(config.fine_tune.steps, config.fine_tune.lr, config.fine_tune.norm)
    table = cross_table.cross_table(subjects.models, protocol, config.heads, fine_tune, config.cluster.gpus_per_worker)
    results = []
    for model in subjects.models:
        for head in config.heads:
            cell = table.cell(model.label, head)
            results.append({"run": model.label, "head": head, "accuracy": cell.mean, "interval": cell.interval})
    comparisons = [
        {"meta": meta.label, "classical": classical.label, "head": head, **vars(comparison)}
        for meta, classical, head, comparison in table.comparisons()
    ]
    return {"question": asked, "fine_tune": vars(fine_tune), "results": results, "comparisons": comparisons}


def _asked(config: ReportConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("split", "way", "shot", "query", "episodes", "seed")}


def _cross_domain(config: ReportConfig, subjects: Subjects) -> dict[str, Any]:
    """Every model on every dataset, whose images are brought to the model's input."""
    if not config.datasets:
        raise PipelineError("cross_domain needs datasets=[FOLDER,...], what the runs are measured on")
    asked = _asked(config)
    manifests = {uri: read_manifest(uri) for uri in dict.fromkeys(config.datasets)}
    if len({manifest.name for manifest in manifests.values()}) < len(config.datasets):
        raise PipelineError(f"datasets={config.datasets}: every dataset once, each with a name of its own")
    shots = [{**asked, "shot": shot, "tasks": config.tasks, "resize": True} for shot in config.shot]
    questions = {uri: [EpisodicProtocol(uri, **question) for question in shots] for uri in manifests}
    for model in subjects.models:
        for uri in manifests:  # all that can be refused, before anything is computed
            for question in questions[uri]:
                check(model_for(model, uri), question)
    results = []
    for model in subjects.models:
        for uri, manifest in manifests.items():
            about = {"dataset": manifest.name, "fingerprint": manifest.fingerprint, "shape": list(manifest.shape)}
            for result in evaluate(model_for(model, uri), questions[uri], config.cluster.gpus_per_worker):
                results.append({"run": model.label, **about, **result.summary()})
    return {"question": asked, "results": results, "comparisons": []}


def _clustering(config: ReportConfig, subjects: Subjects) -> dict[str, Any]:
    protocol = clustering.ClusteringProtocol(subjects.dataset, config.split, config.pairs, config.seed)
    found = {
        model.label: clustering.measure_clustering(model, protocol, config.cluster.gpus_per_worker)
        for model in subjects.models
    }
    results = [{"run": label, **result.summary()} for label, result in found.items()]
    comparisons = [
        {"meta": meta.label, "classical": classical.label, "measure": measure, **vars(comparison)}
        for meta, classical in matched(subjects.models)
        for measure, comparison in clustering.compare(found[meta.label], found[classical.label]).items()
    ]
    return {"results": results, "comparisons": comparisons}


def _strangers(config: ReportConfig, subjects: Subjects) -> dict[str, Any]:
    results = [
        row
        for model, (_, checkpoint, _) in zip(subjects.models, subjects.trained, strict=True)
        for row in strangers.measure(
            model, checkpoint.config, subjects.dataset, config.split, config.strangers, config.seed,
            EmbeddedSplits(model, config.cluster.gpus_per_worker),
        )
    ]
    asked = {"dataset": read_manifest(subjects.dataset).name, "split": config.split, "strangers": config.strangers}
    return {"question": {**asked, "seed": config.seed}, "results": results, "comparisons": []}


_FOUND = {
    "cross_table": _cross_table,
    "cross_domain": _cross_domain,
    "clustering": _clustering,
    "strangers": _strangers,
}


def report(raw: Config) -> dict[str, Any]:
    """Make the pages, or the comparison ``what``; with ``record`` its figures are written as JSON too."""
    config = validate(ReportConfig, raw)
    if config.what != "pages":
        return compare(config)
    papers = read_published(config.published) if config.published else []
    output = config.output or "pages"
    store.check_folder(output, "output")
    found = make_pages(config.tracking.model_dump(), output, papers)
    for problem in found["problems"]:
        print(f"left out: {problem}")
    print(f"{len(found['pages'])} pages; begin with {found['index']}")
    return found
