"""What is done to a training on several nodes, and what must hold: the untouched run's weights, bit for bit.

Every test ends in bounded time, and says what the fault cost: ``make test-faults`` prints the table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.cluster.bed import Bed, fill_store, meanwhile
from tests.cluster.nodes import Nodes, environment_for, object_store, wait_for

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(420)]

Says = Callable[[str, str, float, float], None]


@pytest.fixture(scope="module")
def whole_bed(tmp_path_factory: pytest.TempPathFactory, glyphs: str) -> Iterator[Bed]:
    """A head, two nodes and a store, for all tests; nodes that a test takes away are replaced before the next."""
    with object_store() as store:
        environment = environment_for(store)
        before = dict(os.environ)
        os.environ.update(environment)
        fill_store(os.path.dirname(glyphs))
        nodes = Nodes(tmp_path_factory.mktemp("nodes"), environment)
        try:
            nodes.start(2)
            bed = Bed(nodes, store, os.path.dirname(glyphs), tmp_path_factory.mktemp("notes"))
            bed.reference()
            yield bed
        finally:
            nodes.stop()
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def bed(whole_bed: Bed) -> Iterator[Bed]:
    whole_bed.nodes.replace(2)
    yield whole_bed
    whole_bed.store.fail()


@pytest.fixture
def says(record_property: Callable[[str, object], None]) -> Says:
    """Put a line into the table of faults."""

    def note(fault: str, outcome: str, seconds: float, untouched: float) -> None:
        record_property("fault", {"fault": fault, "outcome": outcome, "seconds": seconds, "lost": seconds - untouched})

    return note


SAME = "same weights, bit for bit; every episode once"


@pytest.mark.parametrize(("place", "at"), [("forward", 23), ("validation", 3)])
def test_a_worker_is_killed(bed: Bed, says: Says, place: str, at: int) -> None:
    run, seconds = bed.train(f"killed-{place}", f"+method.fault={place}", f"+method.at={at}", "+method.rank=1")
    says(f"worker killed in {place}", SAME, seconds, bed.check(run))


def test_a_worker_is_killed_in_all_reduce(bed: Bed, says: Says) -> None:
    """One worker is held back before its part of the sum; the other, which waits for it, is killed."""
    name = "killed-all-reduce"

    def kill() -> None:
        held = bed.notes / name / "held"
        wait_for(held.exists, 180, "a worker in all-reduce")
        first = next(line for line in _notes(bed, name) if line["rank"] == 0)
        os.kill(first["pid"], 9)

    fault = meanwhile(kill)
    run, seconds = bed.train(name, "+method.fault=all_reduce", "+method.at=23", "+method.rank=1")
    fault.done()
    says("worker killed in all-reduce", SAME, seconds, bed.check(run))


def test_a_worker_is_killed_while_it_writes_a_checkpoint(bed: Bed, says: Says) -> None:
    """The store holds the upload of step 20 back; the worker that uploads dies in it, and the others with it."""
    bed.store.fail({"match": "P(U|OS)T .*killed-checkpoint/step_00000020/", "kind": "slow", "delay": 20, "times": 1})

    def kill() -> None:
        wait_for(lambda: bed.store.met() == [1], 180, "the upload of a checkpoint")
        first = next(line for line in _notes(bed, "killed-checkpoint") if line["rank"] == 0)
        os.kill(first["pid"], 9)

    fault = meanwhile(kill)
    run, seconds = bed.train("killed-checkpoint")
    fault.done()
    says("worker killed while it writes a checkpoint", SAME, seconds, bed.check(run))


def _notes(bed: Bed, name: str) -> list[dict]:
    import json

    lines = []
    for file in (bed.notes / name).glob("*.jsonl"):
        lines.append(json.loads(file.read_text().splitlines()[0]) | {"pid": int(file.stem.rpartition("-")[2])})
    return lines
