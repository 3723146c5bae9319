"""A search that is interrupted or killed comes to what it would have come to, and measures only what is missing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from edgeprune.criteria.calibration import DamageCalibration
from edgeprune.loop.interruption import Interruption
from edgeprune.loop.multitask.journal import Journal
from edgeprune.loop.multitask.pagcp import Pagcp
from edgeprune.loop.multitask.per_task import PerTask
from edgeprune.loop.pruning import prune
from edgeprune.recovery.fine_tuning import FineTuning
from edgeprune.tasks.task import Task

PAGCP = Pagcp(rounds=2, batches=2, metric_batches=2, tuning_steps=6)
PER_TASK = PerTask(batches=2, metric_batches=2, corrections=1, calibration=DamageCalibration(kept=(0.5,), batches=1))


class Drawn(list):
    """Batches in an order that is drawn anew each time, from the generator of torch."""

    def __iter__(self):
        return iter([self[place] for place in torch.randperm(len(self))])


def another_process(case, seed):
    """A planner where everything random begins at a seed."""
    torch.manual_seed(seed)
    limits = {"seg": "10%", "depth": "30%"}
    train = Drawn(case.train)
    task = Task(tuple(replace(one, train=train, limit=limits[one.name]) for one in case.task().objectives))
    return case.planner(task=task)


def run(case, seed, settings, folder=None):
    planner = another_process(case, seed)
    option = {"pagcp": settings} if isinstance(settings, Pagcp) else {"per_task": settings}
    # Two rounds, and one of tuning between them.
    budget = "78%" if isinstance(settings, Pagcp) else "50%"
    tuning = FineTuning(epochs=1, lr=3e-3)
    return prune(
        case.model,
        case.example,
        budget,
        planner=planner,
        fine_tuning=tuning,
        checkpoint=folder,
        **option,
    )


def without_costs(record):
    """What was computed for others, and is gone, is computed again."""
    left_out = ("multiply_accumulates", "passes")
    return replace(record, details={name: value for name, value in record.details.items() if name not in left_out})


def stopping_at(monkeypatch, count):
    """Ctrl-C while something is measured for the time that is given."""
    measured, append = [], Journal._append

    def stopped(journal, entry):
        measured.append(entry)
        if len(measured) == count:
            raise KeyboardInterrupt
        append(journal, entry)

    monkeypatch.setattr(Journal, "_append", stopped)
    return measured


@pytest.mark.parametrize(("settings", "stops"), [(PAGCP, (5, 30)), (PER_TASK, (4,))], ids=["pagcp", "per task"])
def test_it_goes_on_to_the_same_plan_and_weights(case, tmp_path, settings, stops):
    usual = run(case, 1, settings)
    assert usual.recovery[0].details.get("rounds", 2) == 2
    folder = tmp_path / "tuning"
    for seed, stop in enumerate(stops):
        with pytest.MonkeyPatch.context() as patch:
            stopping_at(patch, stop)
            with pytest.raises(KeyboardInterrupt):
                run(case, 1 + seed, settings, folder)
        assert Interruption(folder).read() is not None
        Interruption(folder).require_own()
    known = len((folder / "search" / "measured.jsonl").read_text().splitlines())
    # The last line was cut off when the power failed.
    with (folder / "search" / "measured.jsonl").open("ab") as file:
        file.write(b'{"request": "12')
    with pytest.MonkeyPatch.context() as patch:
        measured = stopping_at(patch, -1)
        resumed = run(case, 9, settings, folder)
    assert known - 1 >= sum(stops) - len(stops)
    assert resumed.plan.hash == usual.plan.hash
    assert without_costs(resumed.recovery[0]) == without_costs(usual.recovery[0])
    assert resumed.recovery[1:] == usual.recovery[1:]
    assert all(
        torch.equal(value, resumed.module.state_dict()[name]) for name, value in usual.module.state_dict().items()
    )
    assert not (folder / "search").exists(), "it is over"
    # Nothing was measured twice.
    with pytest.MonkeyPatch.context() as patch:
        everything = stopping_at(patch, -1)
        run(case, 1, settings, tmp_path / "again")
    assert known - 1 + len(measured) == len(everything)


def test_a_search_with_other_settings_begins_anew(case, tmp_path):
    folder = tmp_path / "tuning"
    with pytest.MonkeyPatch.context() as patch:
        stopping_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(case, 1, PER_TASK, folder)
    other = replace(PER_TASK, mean_share=0.2)
    usual = run(case, 1, other)
    found = run(case, 1, other, folder)
    assert found.plan.hash == usual.plan.hash
    assert any("was not gone on with: it differs in search" in note for note in found.notes)


def test_what_is_asked_for_otherwise_is_measured(tmp_path):
    first = Journal(tmp_path / "own", {"search": "one"})
    assert [first.recall(request, lambda: [1.5, float("inf")]) for request in ("a", "b", "c")] == [
        [1.5, float("inf")]
    ] * 3

    def never():
        raise AssertionError

    again = Journal(tmp_path / "own", {"search": "one"})
    assert again.recall("a", never) == [1.5, float("inf")]
    assert again.recall("other", lambda: 2.0) == 2.0
    once_more = Journal(tmp_path / "own", {"search": "one"})
    assert [once_more.recall(request, never) for request in ("a", "other")] == [[1.5, float("inf")], 2.0]
    tuning = once_more.checkpoint("round-1")
    tuning.write_bytes(b"of that search")
    assert Journal(tmp_path / "own", {"search": "two"}).recall("a", lambda: 3.0) == 3.0
    assert not tuning.exists()
    assert Journal(None, {}).checkpoint("round-1") is None


KILLED = """
import os, signal, sys
from pathlib import Path
from edgeprune.loop.multitask.journal import Journal
journal = Journal(Path(sys.argv[1]), {})
for place in range(100):
    journal.recall(place, lambda: place)
    if place == 6:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_measured_before_a_kill_is_there(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "own")], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    lines = (tmp_path / "own" / "measured.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines[1:]] == list(range(7))
    journal = Journal(tmp_path / "own", {})
    assert [journal.recall(place, lambda: -1) for place in range(8)] == [*range(7), -1]
