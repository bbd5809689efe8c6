"""A campaign: its configuration, checked (keys and defaults stand in ``conf/tune.yaml``), and the whole ``jobs.train``
configuration of every trial."""

import copy
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from pydantic import BeforeValidator, Field

from pipeline import store
from pipeline.commands import command, from_anywhere
from pipeline.config import Config, Section, as_argument, chosen_files, compose, flat, given_keys, validate
from pipeline.config_kinds import Count, Name, Positive, Several
from pipeline.data.dataset import read_manifest
from pipeline.errors import PipelineError
from pipeline.ray_start import in_submitted_job
from pipeline.registry.tracking_config import check_tracking
from pipeline.search.arguments import (
    OBJECTIVE,
    check_arguments,
    check_classes,
    check_searched,
    check_trial,
    key_of,
    without_gone,
)
from pipeline.search.space import Space, Values, as_overrides, meets
from pipeline.training.config import TrainConfig
from pipeline.training.paths import absolute, with_absolute_files, with_checkpoints
from pipeline.training.prepare import prepare
from pipeline.training.runs import RUN_FILE, Run, read_run

CAMPAIGN_FILE = "campaign.json"
Nonnegative = Annotated[int, Field(ge=0)]


class Objective(Section):
    """The validation episodes that all trials are measured on; null: as the base configuration has it."""

    split: str | None
    way: Count | None
    shot: Count | None
    query: Count | None
    episodes: Several | None
    seed: int | None


class Search(Section):
    kind: Literal["tpe", "random"]
    startup: Nonnegative
    seed: int


def _renamed(kind: Any) -> Any:
    return "pbt" if kind == "population" else kind  # campaigns of an earlier release go on


class Scheduler(Section):
    kind: Annotated[Literal["asha", "hyperband", "pbt", "none"], BeforeValidator(_renamed)]
    grace: Count | None
    factor: Annotated[int, Field(ge=2)]


class Finalists(Section):
    count: Nonnegative
    seeds: Nonnegative


class Settings(Section):
    """What else is set where some values are chosen."""

    when: dict[str, Any]
    set: list[str]


class CampaignConfig(Section):
    """Keys of ``conf/tune.yaml``."""

    campaign: Name | None
    name: Name | None
    storage: str
    resume: Name | None
    base: list[str]
    overrides: list[str]
    space: dict[str, Any]
    fix: list[str]
    settings: list[Settings]
    first: list[dict[str, Any]]
    objective: Objective
    trials: Count
    search: Search
    scheduler: Scheduler
    finalists: Finalists
    cpus_per_trial: Positive | None
    gpus_per_trial: Positive | None
    concurrent: Count | None
    register_as: Name | None
    tracking: dict[str, Any]


class Campaign:
    """Everything about a campaign that does not change while it runs.

    Args:
        raw: a configuration that :class:`CampaignConfig` takes, with a name and an absolute ``storage``.
        again: arguments of the command that goes on with it, which its folder does not know.
    """

    def __init__(self, raw: Config, again: Sequence[str] = ()) -> None:
        self.raw, self.config = raw, validate(CampaignConfig, raw)
        self.again = tuple(again)
        config = self.config
        check_arguments(config.base, "base")
        check_arguments(config.overrides, "base")
        for part in config.settings:
            check_searched([key_of(argument) for argument in part.set], "settings")
        check_searched(config.space)
        self.fixed = _values(config.fix)
        self.space = Space(_narrowed(config.space, self.fixed))
        assert config.name is not None
        self.name, self.uri = config.name, store.join(config.storage, config.name)
        asked = config.objective.model_dump()
        self._objective = {key: value for key, value in asked.items() if value is not None}
        self.base = self.compose({})
        self._objective = {key: self.base["validation"][key] for key in OBJECTIVE}
        self.train = validate(TrainConfig, self.base)
        self.manifest = read_manifest(self.train.dataset_uri)
        check_classes(self.manifest, self.base)
        cluster = self.train.cluster
        if 0 < cluster.gpus_per_worker < 1 < cluster.workers:
            raise PipelineError(
                f"gpus_per_trial={cluster.gpus_per_worker * cluster.workers:g} over base.cluster.workers="
                f"{cluster.workers}: workers of one trial cannot share a GPU: set base.cluster.workers=1"
            )
        first = [
            (number, values)
            for number, values in enumerate(config.first)
            if all(values.get(key, value) == value for key, value in self.fixed.items())
        ]
        given = [self._first(number, values) for number, values in first or [(0, {})]]
        self.first = [values for number, values in enumerate(given) if values not in given[:number]]
        self.default = self.first[0]  # what everything is compared with: the paper's choice
        manifest, uri = self.manifest, self.train.dataset_uri
        self.dataset = {"name": manifest.name, "fingerprint": manifest.fingerprint, "uri": uri}

    @property
    def resume(self) -> str:
        """The command that goes on with the campaign, from any folder."""
        return going_on(self.name, self.config.storage, self.again)

    @property
    def grace(self) -> int:
        return self.config.scheduler.grace or self.train.validation.every

    def compose(self, values: Values, name: str | None = None, seed: int | None = None) -> Config:
        """The configuration of a trial with ``values``; only then equal to what ``jobs.train`` gets by hand."""
        config = self.config
        raw = compose("train", [*self._arguments(values), "evaluation=null", "register_as=null", "resume=null"])
        raw = with_checkpoints(raw, config.storage)  # of runs beside the campaign: its own folder holds its trials
        raw["name"], raw["storage"], raw["tracking"] = name, self.uri, dict(config.tracking)
        if seed is not None:
            raw["seed"] = seed
        cluster = raw["cluster"]  # cores and GPUs of a trial, over its workers
        if config.cpus_per_trial is not None:
            cluster["cpus_per_worker"] = config.cpus_per_trial / cluster["workers"]
        if config.gpus_per_trial is not None:
            cluster["gpus_per_worker"] = config.gpus_per_trial / cluster["workers"]
        return raw

    def _arguments(self, values: Values) -> list[str]:
        """Of ``jobs.train``, one a key: the last that was given."""
        arguments = [*self.config.base, *self.config.overrides]
        for part in self.config.settings:
            if meets(values, part.when):
                arguments += part.set
        arguments += as_overrides(values)
        arguments += [f"validation.{key}={value}" for key, value in self._objective.items()]
        return list({key_of(argument): argument for argument in arguments}.values())

    def prepare(self, values: Values, name: str, seed: int | None = None) -> Run:
        """A trial's run, checked.

        Raises:
            PipelineError: the values ask for the impossible.
        """
        raw = self.compose(values, name, seed)
        check_trial(raw, self.base)
        uri = store.join(self.uri, name)
        return read_run(uri) if store.exists(store.join(uri, RUN_FILE)) else prepare(raw)[2]

    def whole(self, values: Values, seed: int) -> Config:
        """What ``jobs.train config=FILE`` takes: a trial's configuration, and the evaluation that no trial has."""
        raw = self.compose(values, None, seed)
        plain = compose("train", [*{key_of(a): a for a in [*self.config.base, *self.config.overrides]}.values()])
        raw["storage"], raw["data"]["root"] = self.config.storage, absolute("data.root", str(raw["data"]["root"]))
        raw["backbone"] = with_absolute_files(raw["backbone"])
        raw["evaluation"] = plain["evaluation"]
        raw["register_as"] = self.config.register_as or plain["register_as"]
        validate(TrainConfig, raw)
        return raw

    def _first(self, number: int, given: Values) -> Values:
        """The values of a first trial, those that are left out taken from the base configuration."""
        where = f"first[{number}]"
        self.space.check({k: v for k, v in given.items() if k not in self.space.dimensions}, where)
        values: Values = {}
        config: Config | None = None
        for key, dimension in self.space.dimensions.items():
            if not self.space.active(key, values):
                if key in given:
                    raise PipelineError(f"{where}: {key} does not exist beside the other values")
                continue
            if key in given:
                values[key] = given[key]
            elif key in self.fixed:
                values[key] = self.fixed[key]
            else:
                config = self.compose(values) if config is None else config
                values[key] = self._present(key, values, config)
            if dimension.choices is not None:
                config = None  # other keys may come with it
        self.space.check(values, where)
        return values

    def _present(self, key: str, values: Values, config: Config) -> Any:
        if isinstance(config.get(key), dict):  # a group: its choice
            return chosen_files("train", self._arguments(values)).get(key)
        known = flat(config)
        if key not in known:
            raise PipelineError(f"space.{key}: jobs.train has no such key with {as_overrides(values) or 'the base'}")
        return known[key]


def _values(arguments: list[str]) -> Values:
    """``key=value`` in Hydra's grammar, as values by key."""
    parser, found = OverridesParser.create(), {}
    for argument in arguments:
        try:
            key, _, value = argument.partition("=")
            found[key] = parser.parse_override(f"value={value}").value()
        except HydraException as error:
            raise PipelineError(f"fix: {argument!r} is not key=value") from error
    return found


def _narrowed(space: dict[str, Any], fixed: Values) -> dict[str, Any]:
    """A space with one choice where a value is fixed."""
    narrow = dict(space)
    for key, value in fixed.items():
        if key not in space:
            raise PipelineError(f"fix.{key}: the space has no such key; it has {', '.join(space)}")
        dimension = Space({key: {**space[key], "when": {}}}).dimensions[key]
        if not dimension.holds(value):
            raise PipelineError(f"fix.{key}={value} lies outside the space ({dimension})")
        narrow[key] = {"choices": [value], "when": space[key].get("when", {})}
    return narrow


def going_on(name: str, storage: str, again: Sequence[str] = ()) -> str:
    """The command that goes on with a campaign."""
    return command("tune", f"resume={name}", f"storage={storage}", *again)


def begin(raw: Config) -> Campaign:
    """A new campaign in its folder, or the one that ``resume`` names."""
    if raw.get("resume"):
        return _resumed(raw)
    raw = without_gone(raw)
    config = validate(CampaignConfig, raw)
    if not config.campaign and not config.space:
        raise PipelineError("give campaign=NAME, a FILE.yaml, or resume=CAMPAIGN; see: python -m jobs.tune --help")
    first, number = config.name or f"{config.campaign or 'campaign'}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    storage = absolute("storage", config.storage)
    tracking = raw["tracking"] if in_submitted_job() else from_anywhere(raw["tracking"])
    name = first
    while True:
        campaign = Campaign({**copy.deepcopy(raw), "name": name, "storage": storage, "tracking": tracking})
        where = store.join(campaign.uri, CAMPAIGN_FILE)
        if not store.exists(where):
            _check_default(campaign)
            check_tracking(tracking, campaign.whole(campaign.default, campaign.train.seed)["register_as"])
            campaign.raw = {**campaign.raw, "overrides": [*config.overrides, *_places(campaign)]}
            record = {"config": campaign.raw, "dataset": campaign.dataset}
            if store.create_bytes(where, json.dumps(record, indent=1).encode()):  # of two that begin at once, one
                return campaign
        if config.name is not None:
            there = f"name={name}: a campaign in {storage} has this name"
            raise PipelineError(f"{there}; go on with it: {going_on(name, storage)}")
        number += 1
        name = f"{first}-{number}"


def _check_default(campaign: Campaign) -> None:
    """Refuse a ``base.KEY=VALUE`` that the campaign's first trial, with which all are compared, does not have."""
    searched = {key: a for a in campaign.config.overrides if (key := key_of(a)) in campaign.space.dimensions}
    for key, argument in searched.items():
        [value], chosen = _values([argument]).values(), campaign.default.get(key)
        if key in campaign.default and value != chosen:
            raise PipelineError(
                f"base.{argument}: this campaign searches over {key} and compares with its first trial, which has "
                f"{key}={chosen}; to keep {key} at one value: fix.{argument}; or leave it out"
            )


def _places(campaign: Campaign) -> list[str]:
    """Of what all trials have, the local files and folders made absolute: arguments by which the campaign goes on from
    any folder. In a submitted job a relative path is one of the job's files, which are there again for the next."""
    if in_submitted_job():
        return []
    base, config = campaign.base, campaign.config
    data = {"root": absolute("data.root", str(base["data"]["root"]))}
    placed = flat({**base, "data": data, "backbone": with_absolute_files(base["backbone"])})
    named = {key_of(argument): argument.partition("=")[2] for argument in [*config.base, *config.overrides]}
    return [
        as_argument(key, placed[key])
        for key in ("data.root", "initial", "method.teacher", "backbone.weights", "backbone.path", "backbone.model")
        if (key in named or key == "data.root") and placed.get(key) is not None and placed[key] != named.get(key)
    ]


def _resumed(raw: Config) -> Campaign:
    named = given_keys("tune", raw)
    for key in named:
        if key.split(".")[0] not in ("resume", "storage", "tracking", "concurrent"):
            raise PipelineError(f"{key}: a resumed campaign keeps its stored configuration; leave it out")
    name, storage = str(raw["resume"]).rstrip("/"), absolute("storage", str(raw["storage"]))
    found = [place for place in store.places(name, storage) if store.exists(store.join(place, CAMPAIGN_FILE))]
    if not found:
        raise PipelineError(f"resume={name}: no campaign of this name in {storage}, and no folder of one")
    place, where = absolute("storage", found[0]), store.join(found[0], CAMPAIGN_FILE)
    storage, _, folder = (place if store.is_remote(place) else store.open_store(place)[1]).rpartition("/")
    try:
        record = json.loads(store.read_bytes(where))
        stored, fingerprint = without_gone(record["config"], warn=False), record["dataset"]["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{where} is not a campaign's description ({error})") from error
    if folder != stored["name"]:  # its trials and MLflow know it by its name
        raise PipelineError(
            f"resume={place}: this is a copy of campaign {stored['name']}, or it was renamed: call its folder "
            f"{stored['name']}, in another folder of runs where that one has a campaign of this name"
        )
    stored["storage"] = storage
    given = {"concurrent": raw["concurrent"]} if "concurrent" in named else {}
    keys = [key.partition(".")[2] for key in named if key.startswith("tracking.")]
    if keys:  # each by itself: who gives another timeout keeps the server
        tracking = {key: raw["tracking"][key] for key in keys}
        given["tracking"] = {**stored["tracking"], **(tracking if in_submitted_job() else from_anywhere(tracking))}
    again = [as_argument(key, value) for key, value in flat(given).items() if value != flat(stored).get(key)]
    campaign = Campaign({**stored, **given}, again)
    if campaign.manifest.fingerprint != fingerprint:
        raise PipelineError(f"resume={campaign.name}: the dataset has changed since the campaign began")
    return campaign
