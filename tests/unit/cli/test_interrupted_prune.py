"""Ctrl-C while `edgeprune prune` tunes: nothing half-written, and the same command or `--resume` goes on to the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgeprune.cli.console import Output
from edgeprune.cli.loading import load_model
from edgeprune.cli.pruning_result import earlier_result
from edgeprune.cli.pruning_run import begin, go_on
from edgeprune.cli.record import PruneOptions, PruningRecord, absolute_reference, check_out
from edgeprune.errors import ConfigError
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.multitask.journal import Journal

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
MODEL_FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.first, self.second = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        return self.head(x.mean((2, 3)))
"""
TASK_FILE = """
import os, pathlib, edgeprune, torch

class Batches(list):
    def __iter__(self):
        for place, batch in enumerate(super().__iter__()):
            # As a Ctrl-C in the middle of the epoch after the first one that was finished.
            if place == 2 and pathlib.Path(os.environ.get("STOP_WHEN_THERE_IS", "/nowhere")).exists():
                raise KeyboardInterrupt
            yield batch

def colors():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        targets = torch.randint(0, 3, (16,), generator=generator)
        images = torch.randn(16, 1, 8, 8, generator=generator) * 0.3
        images[torch.arange(16), 0, targets] += 1
        batches.append((images, targets))
    return edgeprune.Task.single(train=Batches(batches[:4]), validation=batches[4:],
        loss=torch.nn.functional.cross_entropy, metric=lambda outputs, targets: (outputs.argmax(1) == targets).float().mean())
"""


@pytest.fixture
def options(tmp_path: Path) -> PruneOptions:
    stored = LatencyTable.load(TABLE)
    LatencyTable({**stored.header, "board": "stored"}, stored._rows).save(tmp_path / "table.parquet")
    (tmp_path / "net.py").write_text(MODEL_FILE)
    (tmp_path / "task.py").write_text(TASK_FILE)
    return PruneOptions(
        model=absolute_reference(f"{tmp_path / 'net.py'}:Net"),
        table=tmp_path / "table.parquet",
        latency="70%",
        input=("x=1x1x8x8:float32",),
        task=absolute_reference(f"{tmp_path / 'task.py'}:colors"),
        backend="onnxruntime",
        allocator="exact",
        epochs=3,
        lr=5e-3,
        distill=("logits", "features"),
        tap=("first",),
        ema=0.9,
    )


def interrupted(options: PruneOptions, out: Path, monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("STOP_WHEN_THERE_IS", str(out / "tuning" / "epochs.safetensors"))
        with pytest.raises(KeyboardInterrupt):
            begin(options, out, output)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_tuning_goes_on_from_its_last_finished_epoch(
    options: PruneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    usual, out = tmp_path / "usual", tmp_path / "out"
    begin(options, usual, Output(json_mode=True))
    expected = json.loads(capsys.readouterr().out)
    of_run = earlier_result(PruningRecord.load(usual), usual, load_model(options.model, seed=options.seed))
    assert [step.step for step in of_run.recovery] == ["batch_norm", "fine_tuning"]
    assert of_run.recovery[-1].after == of_run.metrics_after == expected["metrics_after"]
    interrupted(options.model_copy(update={"lr": 1e-3}), out, monkeypatch, Output())
    capsys.readouterr()
    (out / "tuning" / "epochs.safetensors").unlink()  # as if it had been interrupted before its first epoch ended
    # An interrupted run of other settings, or of a task that was edited since, is not gone on with, and that is said.
    (tmp_path / "task.py").write_text(TASK_FILE + "# edited\n")
    interrupted(options, out, monkeypatch, Output())
    assert (
        f"the interrupted run in {out} differs in lr, source of the task: this one begins anew"
        in capsys.readouterr().out
    )
    assert sorted(contents(out)) == [
        "tuning/epochs.safetensors",
        "tuning/model/model.json",
        "tuning/model/plan.json",
        "tuning/model/weights.safetensors",
        "tuning/state.json",
    ]
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
    check_out(out)
    with pytest.raises(ConfigError, match="goes on with its own board, none, found local"):
        go_on(out, "local", Output())
    # Begins the same command again.
    go_on(out, None, Output())
    said = capsys.readouterr().out
    assert f"going on with the interrupted run in {out}" in said
    steps = said[said.index("validation metric, step by step") :]
    for step in of_run.recovery:
        told = (step.step.replace("_", " "), "metric", f"{step.before['metric']:.4f}", f"{step.after['metric']:.4f}")
        assert any(all(part in line for part in told) for line in steps.splitlines())
    found = json.loads((out / "prune.json").read_text())
    for name in ("plan_hash", "metrics_before", "metrics_after", "check_max_abs", "rounds"):
        assert found[name] == expected[name]
    weights, usually = (load_file(folder / "model" / "weights.safetensors") for folder in (out, usual))
    assert all(torch.equal(value, usually[name]) for name, value in weights.items())
    assert sorted(contents(out)) == sorted(contents(usual))
    with pytest.raises(ConfigError, match="needs a board to measure on"):
        go_on(out, None, Output())


def test_a_search_goes_on_from_what_it_has_measured(
    options: PruneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    search = options.model_copy(
        update={"pagcp": 1, "limit": ("metric=90%",), "epochs": 0, "distill": (), "tap": (), "ema": None}
    )
    usual, out = tmp_path / "usual", tmp_path / "out"
    begin(search, usual, Output(json_mode=True))
    expected = json.loads(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        measured: list[object] = []
        append = Journal._append

        def stopped(journal: Journal, entry: dict[str, object]) -> None:
            if len(measured) == 6:
                raise KeyboardInterrupt
            measured.append(entry)
            append(journal, entry)

        patch.setattr(Journal, "_append", stopped)
        with pytest.raises(KeyboardInterrupt):
            begin(search, out, Output())
    assert sorted(contents(out)) == ["tuning/search/measured.jsonl", "tuning/state.json"]
    check_out(out)
    go_on(out, None, Output())
    assert f"going on with the interrupted run in {out}" in capsys.readouterr().out
    found = json.loads((out / "prune.json").read_text())
    for name in ("plan_hash", "metrics_before", "metrics_after", "rounds"):
        assert found[name] == expected[name]
    assert sorted(contents(out)) == sorted(contents(usual))


def test_without_epochs_there_is_nothing_to_teach(
    options: PruneOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(options.model_copy(update={"epochs": 0}), tmp_path / "out", Output(json_mode=True))
    found = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in found["recovery"]] == ["batch_norm", "fine_tuning"]
    assert found["recovery"][1]["details"]["steps"] == 0


def test_biases_alone_can_make_up_for_what_was_removed(
    options: PruneOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = options.model_copy(update={"epochs": 0, "distill": (), "tap": (), "ema": None, "refit_biases": True})
    begin(plain, tmp_path / "out", Output(json_mode=True))
    found = json.loads(capsys.readouterr().out)
    assert [step["step"] for step in found["recovery"]] == ["bias_compensation", "fine_tuning"]
    assert found["recovery"][0]["details"]["layers"] >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refit": True, "refit_biases": True}, "--refit refits biases too, found --refit-biases beside it"),
        (
            {"distill": ("logit",)},
            "a distillation must be one of logits, features, channelwise, attention, found 'logit'",
        ),
        ({"distill": ("logits",)}, "taps are where features are compared, found taps and no distillation"),
        ({"task": None, "tap": ()}, "the dense model teaches by a task's data, found no task"),
        ({"tap": ("frist",)}, "a tap must be a module that the model runs, found 'frist'"),
    ],
)
def test_what_the_tuning_cannot_do_is_refused_before_anything_is_planned(
    options: PruneOptions, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        begin(options.model_copy(update=change), tmp_path / "out", Output(json_mode=True))
    assert not (tmp_path / "out").exists()
