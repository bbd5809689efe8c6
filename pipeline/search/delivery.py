"""A campaign in MLflow: one parent run, one child a trial, brought there by the driver alone, beside the search."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline import store as folders
from pipeline.config import to_yaml
from pipeline.errors import PipelineError
from pipeline.registry.masking import first_line
from pipeline.registry.publish import publish
from pipeline.registry.record import open_run, put_files
from pipeline.registry.tracking import connect, reaching
from pipeline.search.campaign import Campaign
from pipeline.search.ledger import Record
from pipeline.training.runs import RUN_FILE, checkpoints, read_run

CAMPAIGN_TAG = "pipeline.campaign"
_ENDS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Delivery:
    """Trials are delivered by a thread; what could not be is named at the end. Nothing is doubled by a second try."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign, self._tracking = campaign, campaign.config.tracking
        self._on = self._tracking.get("uri") is not None
        self._thread = ThreadPoolExecutor(1, "delivery")
        self._delivered: set[str] = set()
        self.problem = ""  # why something is missing
        self.failed: PipelineError | None = None  # why the campaign itself is

    def trial(self, record: Record) -> None:
        """Deliver a trial that ended. Returns at once and never raises."""
        if self._on:
            self._thread.submit(self._try_trial, record)

    def close(self, records: list[Record], files: Mapping[str, bytes], figures: Mapping[str, float]) -> str | None:
        """Deliver what is missing and end the campaign's run; its id; None where no store answers."""
        if not self._on:
            return None
        for record in records:
            self.trial(record)
        found = self._thread.submit(self._finish, files, figures)
        try:
            return found.result()
        except PipelineError as error:
            self.failed = error
            return None

    def _try_trial(self, record: Record) -> None:
        if record.run in self._delivered:
            return
        try:
            self._trial(record)
            self._delivered.add(record.run)
        except Exception as error:  # the campaign goes on; the next try is at its end
            self.problem = first_line(error)

    def _trial(self, record: Record) -> None:
        campaign = self._campaign
        uri = folders.join(campaign.uri, record.run)
        begun = folders.exists(folders.join(uri, RUN_FILE))
        store = connect(self._tracking)
        parent = open_run(store, campaign.name, campaign.raw, campaign.dataset)
        if begun and checkpoints(uri):
            run_id = publish(uri, self._tracking).run_id
        else:
            config = read_run(uri).config if begun else {"values": record.values}
            run_id = open_run(store, record.run, config, campaign.dataset)
        tags = {
            MLFLOW_PARENT_RUN_ID: parent,
            CAMPAIGN_TAG: campaign.name,
            "trial.number": str(record.number),
            "trial.status": record.status,
            "trial.reason": record.reason,
            "trial.kind": "search" if record.seed is None else f"finalist, seed {record.seed}",
        }
        for key, value in tags.items():
            store.client.set_tag(run_id, key, value)
        store.client.set_terminated(run_id, status=_ENDS[record.status])

    def _finish(self, files: Mapping[str, bytes], figures: Mapping[str, float]) -> str:
        campaign = self._campaign
        with reaching(self._tracking, f"deliver the campaign later with: {campaign.resume}"):
            store = connect(self._tracking)
            run_id = open_run(store, campaign.name, campaign.raw, campaign.dataset)
            store.client.set_tag(run_id, CAMPAIGN_TAG, campaign.name)
            put_files(store, run_id, [("space.yaml", to_yaml(campaign.config.space).encode()), *files.items()])
            known = store.client.get_run(run_id).data.metrics
            for name, value in figures.items():
                if known.get(name) != value:
                    store.client.log_metric(run_id, name, value)
            store.client.set_terminated(run_id, status="FINISHED")
        return run_id
