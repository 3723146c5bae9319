"""`edgeprune prune` by a table that was measured elsewhere: what it says of what is not known, and several budgets at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from edgeprune.cli.commands import root
from edgeprune.errors import TableMismatchError, TableMissingError
from edgeprune.latency.table import LatencyTable

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"
MODEL_FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, image):
        return self.head(self.second(self.first(image).relu()).relu().mean((2, 3)))
"""

Prune = Callable[..., str]


@pytest.fixture
def prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prune:
    """Prunes in a folder of the test's own, and in this process; returns what was printed."""
    torch.set_num_threads(1)
    stored = LatencyTable.load(TABLE)
    LatencyTable({**stored.header, "board": "stored"}, stored._rows).save(tmp_path / "table.parquet")
    (tmp_path / "net.py").write_text(MODEL_FILE)
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> str:
        words = ("prune", "net.py:Net", "--input", "image=1x3x16x16:float32", "--table", "table.parquet", *options)
        root().main(args=list(words), prog_name="edgeprune", standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_without_a_task_it_says_that_accuracy_was_not_measured(prune: Prune) -> None:
    said = prune("--latency", "75%", "--out", "free")
    assert "Accuracy was not measured" in said
    assert "the pruned model is your own class Net with smaller parameters" in said
    assert "no --weights: the model is taken with the weights that its factory gives it" in said
    assert "interval of the prediction" in said
    assert "next: edgeprune compile free" in said


def test_several_budgets_hold_at_once(prune: Prune) -> None:
    answer = json.loads(prune("--latency", "90%", "--memory", "70%", "--params", "60%", "--out", "several", "--json"))
    spent = {one["name"]: one for one in answer["spent"]}
    assert set(spent) == {"parameters", "memory"}
    assert all(one["value"] <= one["at_most"] < one["dense"] for one in spent.values())
    assert spent["memory"]["unit"] == "bytes"
    assert spent["memory"]["at_most"] == pytest.approx(0.7 * spent["memory"]["dense"])


def test_a_budget_that_the_dense_model_meets_is_no_error(prune: Prune) -> None:
    said = prune("--latency", "1s", "--out", "whole")
    assert "within the budget of 1000 ms: there is nothing to prune" in said
    assert "plan that removes nothing" in said
    plan = json.loads(Path("whole", "plan.json").read_text())
    assert all(len(group["kept"]) == group["size"] for group in plan["groups"].values())


def test_a_table_of_another_runtime_is_refused_before_the_model_is_loaded(prune: Prune, tmp_path: Path) -> None:
    changed(tmp_path, runtime_version="1.20.1", runtime_sha256="another")
    with pytest.raises(
        TableMismatchError, match=r"another runtime_version \(table: 1\.20\.1, board: \d+\.\d+\.\d+\)[.,]"
    ):
        prune("--latency", "75%", "--board", "local")


def test_a_table_that_lacks_facts_is_refused_before_the_model_is_loaded(prune: Prune, tmp_path: Path) -> None:
    changed(tmp_path, isa=None)
    with pytest.raises(TableMismatchError, match="must say its device's architecture and isa, found no isa of"):
        prune("--latency", "75%")
    with pytest.raises(TableMissingError, match=r"must be a predictor at .*none\.json, found no file"):
        prune("--latency", "75%", "--table", "none.json")


def test_explain_reads_its_table_before_the_model(prune: Prune, tmp_path: Path) -> None:
    changed(tmp_path)
    words = ["explain", "net.py:Net", "--input", "image=1x3x16x16:float32", "--table", "none.parquet"]
    with pytest.raises(TableMissingError, match=r"there must be a latency table at none\.parquet"):
        root().main(args=words, prog_name="edgeprune", standalone_mode=False)


def changed(folder: Path, **facts: str | None) -> None:
    """Let the table be of another device, and the model be one that must not be loaded."""
    path = folder / "table.parquet"
    stored = LatencyTable.load(path)
    identity = {name: value for name, value in {**stored.header["identity"], **facts}.items() if value is not None}
    LatencyTable({**stored.header, "identity": identity}, stored._rows).save(path)
    (folder / "net.py").write_text("raise AssertionError('the model is loaded')")
