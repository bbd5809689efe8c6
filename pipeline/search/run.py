"""``jobs.tune``: the search, the finalists, and what is made of them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline import store
from pipeline.commands import command
from pipeline.config import Config, to_yaml
from pipeline.errors import PipelineError, Unavailable
from pipeline.files import to_json
from pipeline.registry.aliases import CHALLENGER
from pipeline.registry.tracking_config import check_tracking, say_undelivered
from pipeline.registry.versions import register_run, set_alias
from pipeline.search.asha import ASHA, BRACKETS
from pipeline.search.campaign import Campaign, begin
from pipeline.search.delivery import Delivery
from pipeline.search.finalists import Verdict, choose, judge, measure
from pipeline.search.ledger import LEDGER_FILE, Ledger, Record
from pipeline.search.pbt import PBT
from pipeline.search.results import draw_campaign, finalists_table, statement, summary, trials_table, values_text
from pipeline.search.searchers import FinalistTrials, SearchTrials, room, run_trials
from pipeline.training.alone import alone
from pipeline.training.cluster import capacity, check_resources, start_ray
from pipeline.training.preemption import stopping_on_sigterm

BEST, SUMMARY, PLOTS = "best.yaml", "summary.json", "plots"
NOTHING = 3  # exit code: not one trial finished


def tune(raw: Config) -> dict[str, Any]:
    """Run a campaign, or go on with one that was interrupted, to its best configuration."""
    campaign = begin(raw)
    check_tracking(campaign.config.tracking)
    start_ray(campaign.train.cluster)
    check_resources(campaign.train.cluster)
    with alone(campaign.uri, f"campaign {campaign.name}"):
        return _tune(campaign)


def _tune(campaign: Campaign) -> dict[str, Any]:
    _say_begin(campaign)
    ledger, delivery = Ledger(campaign.uri), Delivery(campaign)
    again = f"go on with it: {campaign.resume}"
    try:
        with stopping_on_sigterm(f"campaign {campaign.name}: stopped as asked; {again}"):
            _search(campaign, ledger, delivery)
            verdict = _finals(campaign, ledger, delivery)
            return conclude(campaign, ledger, delivery, verdict)
    except Unavailable as error:
        raise Unavailable(f"campaign {campaign.name}: {error}; {again}") from error
    except KeyboardInterrupt:
        print(f"\n{again}", flush=True)
        raise


def _search(campaign: Campaign, ledger: Ledger, delivery: Delivery) -> None:
    config, how, scheduler = campaign.config, campaign.config.scheduler, None
    searcher = (PBT if how.kind == "pbt" else SearchTrials)(campaign, ledger, _telling(campaign, delivery))
    if how.kind in BRACKETS and campaign.grace < campaign.train.steps:
        scheduler = ASHA(
            how.kind, campaign.train.steps, campaign.grace, how.factor, config.search.seed, len(campaign.first)
        )
        searcher.replay(scheduler)
    if searcher.open():
        run_trials(searcher, scheduler, config.concurrent)
    tried = len(ledger.search)
    if how.kind != "pbt" and tried < config.trials:
        print(f"\nno more than {tried} of {config.trials} trials: the space has no other values", flush=True)


def _finals(campaign: Campaign, ledger: Ledger, delivery: Delivery) -> Verdict | None:
    """Train the finalists with other seeds and judge them; None where no trial finished."""
    config, select = campaign.config, campaign.train.validation.select
    chosen = choose(ledger.search, campaign.default, max(1, config.finalists.count), select)
    if not chosen:
        return None
    if not config.finalists.count or not config.finalists.seeds:
        runs = {record.number: [record.run] for record in chosen}
        trained = [record for record in chosen if record.curve and record.status != "failed"]
    else:
        seeds = [campaign.train.seed + 1 + number for number in range(config.finalists.seeds)]
        searcher = FinalistTrials(campaign, ledger, chosen, seeds, _telling(campaign, delivery))
        if searcher.open():
            print(f"\n{len(chosen)} configurations, the default among them, with {len(seeds)} other seeds", flush=True)
            run_trials(searcher, None, config.concurrent)
        runs = {record.number: [f"{record.run}-seed{seed}" for seed in seeds] for record in chosen}
        trained = [record for record in ledger.repetitions if record.status == "finished"]
    if not trained:
        return None
    measured = {record.run: measure(campaign, record.run) for record in trained}
    return judge(chosen, campaign.default, measured, runs)


def conclude(campaign: Campaign, ledger: Ledger, delivery: Delivery, verdict: Verdict | None) -> dict[str, Any]:
    select = campaign.train.validation.select
    records = [*ledger.search, *ledger.repetitions]
    found: dict[str, Any] = {"campaign": campaign.name, "folder": campaign.uri}
    found.update(summary(records, verdict, select))
    print(f"\n{trials_table(ledger.search, campaign.space, select)}", flush=True)
    files = {f"{PLOTS}/{name}": content for name, content in draw_campaign(campaign, ledger, verdict).items()}
    figures: dict[str, float] = {}
    if verdict is not None:
        winner = verdict.winner
        whole = campaign.whole(winner.record.values, _seed(ledger, winner.run, campaign))
        files[BEST] = to_yaml(whole).encode()
        found["best"] = {
            "values": winner.record.values, "number": winner.record.number, "run": winner.run,
            "accuracy": winner.estimate.mean, "config": store.join(campaign.uri, BEST),
        }  # fmt: skip
        figures = _figures(verdict)
        print(f"\n{finalists_table(verdict, campaign.default)}\n\n{statement(verdict)}", flush=True)
    files[SUMMARY] = to_json(found, indent=1).encode()
    for name, content in files.items():
        store.write_bytes(store.join(campaign.uri, name), content)
    files[LEDGER_FILE] = store.read_bytes(ledger.uri) if records else b""
    found["mlflow_run"] = delivery.close(records, files, figures)
    if verdict is not None and found["mlflow_run"]:
        found.update(_register(campaign, verdict))
    elif verdict is not None and delivery.failed is not None:
        found.update(say_undelivered(delivery.failed))
    _say_made(campaign, found, verdict, delivery)
    return {"exit_code": 0 if verdict is not None else NOTHING, **found}


def _seed(ledger: Ledger, run: str | None, campaign: Campaign) -> int:
    record = ledger.get(run) if run else None
    return campaign.train.seed if record is None or record.seed is None else record.seed


def _figures(verdict: Verdict) -> dict[str, float]:
    best = verdict.winner.estimate
    figures = {"best/accuracy": best.mean, "best/interval": best.interval}
    if verdict.default is not None:
        figures["default/accuracy"] = verdict.default.estimate.mean
    if verdict.over_episodes is not None:
        figures["best/over_default"] = verdict.over_episodes.difference
    return {name: float(value) for name, value in figures.items() if np.isfinite(value)}


def _register(campaign: Campaign, verdict: Verdict) -> dict[str, Any]:
    """The winner's best run as a version of the registered model, and its challenger."""
    tracking = campaign.config.tracking
    name = campaign.whole(verdict.winner.record.values, campaign.train.seed)["register_as"]
    if name is None or verdict.winner.run is None:
        return {}
    try:
        version = register_run(store.join(campaign.uri, verdict.winner.run), tracking, name)
        set_alias(tracking, version.name, CHALLENGER, version.version)
    except PipelineError as error:
        return say_undelivered(error)
    return {"model": version.uri, "name": version.name, "version": version.version}


def _telling(campaign: Campaign, delivery: Delivery) -> Callable[[Record], None]:
    """A function that says what became of a trial, and delivers it."""

    def ended(record: Record) -> None:
        score = record.score(campaign.train.validation.select)
        shown = "" if score is None else f"{100 * score:6.2f} %  "
        what = values_text(record.values) if record.seed is None else f"seed {record.seed}"
        reason = f": {record.reason}" if record.reason else ""
        print(f"trial {record.number:>4}  {shown}{what}  {record.status}{reason}", flush=True)
        delivery.trial(record)

    return ended


def _say_begin(campaign: Campaign) -> None:
    config, train = campaign.config, campaign.train
    places = min(config.concurrent or 10**6, room(train.cluster, capacity()))
    how = train.validation
    print(
        f"campaign {campaign.name}: {config.trials} trials of {train.steps:,} steps on {campaign.manifest.name}, "
        f"{places} at once; measured on {how.episodes} {how.way}-way {how.shot}-shot episodes of split {how.split!r}"
    )
    for key, dimension in campaign.space.dimensions.items():
        when = f" (with {values_text(dimension.when)})" if dimension.when else ""
        print(f"  {key} {dimension}{when}")
    print(flush=True)


def _say_made(campaign: Campaign, found: dict[str, Any], verdict: Verdict | None, delivery: Delivery) -> None:
    counts = ", ".join(f"{found[status]} {status}" for status in ("finished", "stopped", "failed"))
    print(f"\ncampaign   {campaign.uri} ({counts})")
    if verdict is None:
        print("best       none: not one trial finished")
    else:
        print(f"best       {values_text(verdict.winner.record.values)}, run {verdict.winner.run}")
        print(f"again      {command('train', 'config=' + found['best']['config'])}")
    print(f"plots      {store.join(campaign.uri, PLOTS)}")
    if "model" in found:
        print(f"model      {found['model']} (also @{CHALLENGER})")
    if delivery.problem and "undelivered" not in found:
        print(f"MLflow     incomplete: {delivery.problem}; deliver it with: {campaign.resume}")
