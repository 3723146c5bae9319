"""`edgeprune prune --limit ... --pagcp`: verdicts per objective, and limits that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.cli.console import Output
from edgeprune.cli.main import run
from edgeprune.cli.pruning_run import begin
from edgeprune.cli.record import PruneOptions, PruningRecord, absolute_reference
from edgeprune.deployment.artifact import Artifact
from edgeprune.errors import BudgetInfeasibleError, ConfigError, EdgepruneError, TaskError
from edgeprune.latency.table import LatencyTable
from edgeprune.report import stored

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
MODEL_FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.sum_inner, self.sum_head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 1)
        self.top_inner, self.top_head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 1)

    def forward(self, x):
        hidden = self.stem(x).relu()
        total = self.sum_head(self.sum_inner(hidden).relu().mean((2, 3)))
        return total, self.top_head(self.top_inner(hidden).relu().amax((2, 3)))
"""
TASK_FILE = """
import edgeprune, torch
from torch.nn import functional as F

def both():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(7):
        images = torch.randn(16, 1, 8, 8, generator=generator)
        batches.append((images, {"total": images.mean((1, 2, 3))[:, None], "top": images.amax((1, 2, 3))[:, None]}))
    train, validation = batches[:5], batches[5:]
    def objective(name, place):
        return edgeprune.Objective(name, train, validation,
            lambda outputs, targets: F.mse_loss(outputs[place], targets[name]),
            lambda outputs, targets: float(F.l1_loss(outputs[place], targets[name])), higher_is_better=False)
    return edgeprune.Task((objective("total", 0), objective("top", 1)))
"""


@pytest.fixture
def options(tmp_path: Path) -> PruneOptions:
    torch.set_num_threads(1)
    stored = LatencyTable.load(TABLE)
    LatencyTable({**stored.header, "board": "stored"}, stored._rows).save(tmp_path / "table.parquet")
    (tmp_path / "net.py").write_text(MODEL_FILE)
    (tmp_path / "task.py").write_text(TASK_FILE)
    return PruneOptions(
        model=absolute_reference(f"{tmp_path / 'net.py'}:Net"),
        table=tmp_path / "table.parquet",
        latency="80%",
        input=("x=1x1x8x8:float32",),
        task=absolute_reference(f"{tmp_path / 'task.py'}:both"),
        backend="onnxruntime",
        allocator="exact",
        epochs=1,
        lr=5e-3,
    )


def test_a_verdict_per_objective_is_written(
    options: PruneOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = options.model_copy(update={"limit": ("total=1000%", "top=500%"), "pagcp": 1})
    begin(asked, tmp_path / "out", Output(json_mode=True))
    found = json.loads(capsys.readouterr().out)
    assert [one["objective"] for one in found["verdicts"]] == ["total", "top"]
    for one, factor in zip(found["verdicts"], (11, 6), strict=True):
        assert one["worst"] == pytest.approx(factor * one["dense"])
        assert one["kept"] is (one["pruned"] <= one["worst"])
        assert one["pruned"] == found["metrics_after"][one["objective"]]
    assert found["rounds"][0]["certificate"]["method"] == "pagcp"
    assert any(note.endswith("serve only top.") for note in found["notes"])
    record = PruningRecord.load(tmp_path / "out")
    assert record.options == asked
    assert [one.limit for one in record.verdicts] == ["1000%", "500%"]
    assert record.outputs == {"total": (0,), "top": (1,)}
    report = stored.load(tmp_path / "out" / stored.FILE_NAME)
    assert report.tasks is not None
    assert report.tasks.columns == ("dense", "round 1", "search", "batch norms", "tuned")
    for row, one in zip(report.tasks.rows, found["verdicts"], strict=True):
        assert (row.name, row.asked) == (one["objective"], record.verdicts[0 if row.name == "total" else 1].asked)
        assert row.cells[0] == f"{one['dense']:.4f}"
        assert row.cells[-1] == f"{one['pruned']:.4f}"
        assert row.verdict == ("good" if one["kept"] else "bad")
    needs = {group.name: group.tasks for group in report.served}
    assert needs["stem"] == ("total", "top")
    assert needs["sum_inner"] == ("total",)
    assert sum(share for _, share in report.task_latency) == pytest.approx(1)
    # Compiled, parity is told per objective.
    assert run(["compile", str(tmp_path / "out"), "--out", str(tmp_path / "artifact")]) == 0
    artifact = Artifact.load(tmp_path / "artifact")
    names = [tensor["name"] for tensor in artifact.model["outputs"]]
    assert {name: one.outputs for name, one in artifact.manifest.tasks.items()} == {
        "total": names[:1],
        "top": names[1:],
    }
    assert set(artifact.manifest.host_parity["tasks"]) == {"total", "top"}


def test_limits_of_several_objectives_choose_the_widths(
    options: PruneOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(options.model_copy(update={"limit": ("total=1000%", "top=500%")}), tmp_path / "out", Output(json_mode=True))
    found = json.loads(capsys.readouterr().out)
    assert found["recovery"][0]["step"] == "per_task"
    assert set(found["recovery"][0]["details"]["used"]) == {"total", "top"}
    assert any(note.startswith("A damage curve per objective") for note in found["notes"])
    with pytest.raises(BudgetInfeasibleError, match=r"keeps the limits \(total=0%, top=0%\) before tuning takes"):
        begin(
            options.model_copy(update={"limit": ("total=0%", "top=0%"), "hold_limits": True, "latency": "50%"}),
            tmp_path / "held",
            Output(),
        )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hold_limits": True}, ConfigError, "--hold-limits needs limits of objectives.*found no limit"),
        (
            {"hold_limits": True, "limit": ("top=2%",), "pagcp": 1},
            ConfigError,
            "--hold-limits needs limits of objectives.*found --pagcp",
        ),
        ({"limit": ("total=some",)}, ConfigError, r"a limit must be 2% \(of the dense model's metric\).*found 'some'"),
        ({"limit": ("total",)}, ConfigError, "a limit must be written NAME=LIMIT, found 'total'"),
        ({"limit": ("depth=2%",)}, TaskError, "found no 'depth' among total, top"),
        ({"limit": ("total=2%",), "task": None}, ConfigError, "--limit needs a task"),
    ],
)
def test_limits_that_cannot_be_used(
    options: PruneOptions, tmp_path: Path, changes: dict[str, Any], error: type[EdgepruneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        begin(options.model_copy(update=changes), tmp_path / "out", Output())
    assert not (tmp_path / "out" / "prune.json").exists()
