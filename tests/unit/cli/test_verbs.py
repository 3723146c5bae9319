"""The verbs one after another on a small model and this machine as the board, from a table to a rollback."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli.commands import root
from edgeprune.loop import verification
from edgeprune.testing.command_line import CommandLine

INPUT = ("--input", "image=1x3x16x16:float32")
MODEL_FILE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, image):
        hidden = torch.relu(self.second(torch.relu(self.first(image))))
        return self.head(hidden.mean((2, 3)))

def build():
    return Net()
"""
TASK_FILE = """
import edgeprune, torch

def colors():
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(6):
        targets = torch.randint(0, 3, (32,), generator=generator)
        images = torch.randn(32, 3, 16, 16, generator=generator) * 0.3
        images[torch.arange(32), targets] += 1
        batches.append((images, targets))
    return edgeprune.Task.single(train=batches[:4], validation=batches[4:], loss=torch.nn.functional.cross_entropy,
        metric=lambda outputs, targets: (outputs.argmax(1) == targets).float().mean().item())
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of the whole sequence."""
    path = tmp_path_factory.mktemp("verbs")
    (path / "net.py").write_text(MODEL_FILE)
    (path / "task.py").write_text(TASK_FILE)
    return path


@pytest.fixture(scope="module")
def line(folder: Path) -> CommandLine:
    """The command line in that folder, with a board, settings and state of its own."""
    return CommandLine(folder, folder / "board")


@pytest.fixture(scope="module")
def edgeprune(line: CommandLine) -> Run:
    """Runs one command line there."""
    return line.run


def succeed(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return answered(result.stdout)


def answered(text: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(text)
    for file in answer["files"]:
        assert set(file) == {"path", "what"}
    return answer


def fail(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert result.returncode == code, (result.stdout, result.stderr)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def table(edgeprune: Run, folder: Path) -> Path:
    answer = succeed(
        edgeprune("profile", "net.py:build", *INPUT, "--minutes", "0.05", "--out", "tables/table.parquet", "--json")
    )
    assert answer["kernels"] > 0
    assert answer["dense_ms"] > 0
    assert "prune net.py:build" in answer["next"]
    assert answer["next"].endswith("--latency 50% --board local")
    assert [path.name for path in (folder / "tables").iterdir()] == ["table.parquet"], "no journal is left behind"
    return folder / "tables" / "table.parquet"


@pytest.mark.slow
def test_dry_run_says_what_a_further_model_would_take_and_measures_nothing(
    edgeprune: Run, folder: Path, table: Path
) -> None:
    (folder / "b.py").write_text(MODEL_FILE.replace("32", "48").replace("build", "wide"))
    before = table.read_bytes()
    look = ("profile", "b.py:wide", *INPUT, "--minutes", "0.1", "--dry-run")
    said = edgeprune(*look, "--table", str(table)).stdout
    found = re.search(r"(\d+) of (\d+) known, (\d+) to measure, 0.1 min", said)
    assert found is not None, said
    known, wanted, to_measure = map(int, found.groups())
    assert 0 < known < wanted == known + to_measure
    fresh = succeed(edgeprune("profile", "net.py:build", "b.py:wide", *INPUT, "--dry-run", "--json"))
    assert (fresh["known"], fresh["to_measure"]) == (0, fresh["wanted"])
    assert fresh["to_measure"] == fresh["kernels"] + fresh["networks"]
    assert not (folder / "table.parquet").exists()
    assert [path.name for path in (folder / "tables").iterdir() if path.suffix != ".json"] == ["table.parquet"]
    assert table.read_bytes() == before
    fail(edgeprune("profile", "net.py:build", "b.py:wide", *INPUT, "--weights", "x.pt"), 2, "belongs to one model")
    fail(edgeprune(*look, "--table", "absent.parquet"), 2, "there must be a latency table at absent.parquet")


@pytest.fixture(scope="module")
def pruned(edgeprune: Run, folder: Path, table: Path) -> dict[str, Any]:
    return succeed(
        edgeprune(
            *("prune", "net.py:build", *INPUT, "--table", str(table), "--latency", "75%", "--task", "task.py:colors"),
            *("--epochs", "1", "--keep", "first", "--out", "pruned", "--json"),
        )
    )


def test_the_way_from_table_to_rollback(edgeprune: Run, folder: Path, table: Path, pruned: dict[str, Any]) -> None:
    measured = table.read_bytes()
    fail(edgeprune("fit", str(table), "--out", str(table)), 2, "--out must be a .json file", "table.json")
    assert table.read_bytes() == measured
    fitted = succeed(edgeprune("fit", str(table), "--json"))
    assert fitted["next"].startswith("edgeprune prune net.py:build --input image=1x3x16x16:float32 --table ")
    assert (folder / "tables" / "table.json").is_file()
    assert {row["family"] for row in fitted["errors"]} >= {"conv", "end to end"}
    assert all(row["region"] for row in fitted["weak"])

    written = {Path(file["path"]).name for file in pruned["files"]}
    assert written == {path.name for path in (folder / "pruned").iterdir()}
    assert pruned["predicted_ms"] <= pruned["budget_ms"]
    assert pruned["parameters_after"] < pruned["parameters_before"]
    assert pruned["check_max_abs"] < 1e-4
    assert set(pruned["metrics_after"]) == {"metric"}
    plan = json.loads((folder / "pruned" / "plan.json").read_text())
    assert "first" not in {name for name, group in plan["groups"].items() if len(group["kept"]) < group["size"]}

    compiled = succeed(edgeprune("compile", "pruned", "--out", "pruned/artifact", "--dense", "pruned/dense", "--json"))
    manifest = json.loads((folder / "pruned" / "artifact" / "manifest.json").read_text())
    assert manifest["plan_hash"] == pruned["plan_hash"]
    deploy = "edgeprune deploy pruned/artifact --board local --threads 1"
    assert compiled["next"] == f"{deploy} --latency 75% --reference pruned/dense"
    alone = succeed(edgeprune("compile", "pruned", "--out", "pruned/artifact", "--json"))
    assert alone["next"] == deploy, "a share of the dense latency cannot be checked without the dense model"

    first = succeed(edgeprune("deploy", "pruned/dense", "--rounds", "3", "--json"))
    assert first["changed"] is True
    second = succeed(edgeprune("deploy", "pruned/artifact", "--reference", "pruned/dense", "--rounds", "3", "--json"))
    assert second["ratio"] < 1.0
    assert second["previous"] == first["release"]
    assert second["next"] == "edgeprune report pruned"
    running = succeed(edgeprune("status", "--json"))
    assert running["current"]["folder"] == second["release"]
    assert running["next"] is None, "whoever follows the printed commands must not undo the deployment"
    assert running["rollback"] == "edgeprune rollback --board local"
    assert "to go back to it: edgeprune rollback --board local" in edgeprune("status").stdout

    (folder / "pruned" / "dense.local.deployment.json").touch()  # the newest, but not of this plan
    report = succeed(edgeprune("report", "pruned", "--out", "page.html", "--json"))
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert report["deployments"] == {"local": "pruned/artifact.local.deployment.json"}
    assert second["release"] in page
    assert pruned["plan_hash"] in page
    assert "predicted from a table measured on local" in page, "prune was not given a board"
    assert "between engines that ran interleaved" not in page

    gated = edgeprune(
        *("deploy", "pruned/artifact", "--reference", "pruned/dense", "--rounds", "3", "--latency", "100%"),
        *("--tolerance", "0.5"),
    )
    assert gated.returncode == 0, gated.stderr
    assert "% for 100% of dense; the upper end of the interval may be up to 150.0% (--tolerance 0.5)" in gated.stdout
    record = json.loads((folder / "pruned" / "artifact.local.deployment.json").read_text())
    assert (record["budget"], record["tolerance"]) == ("100% of dense", 0.5)

    other = edgeprune("compile", "pruned", "--backend", "tensorrt", "--out", "trt")
    fail(other, 4, "trtexec")
    assert (
        "the run was for onnxruntime fp32: what it takes with tensorrt fp32 was neither predicted nor measured"
        in other.stdout
    )
    assert not (folder / "trt").exists()

    back = succeed(edgeprune("rollback", "--json"))
    assert back["current"]["folder"] == first["release"]

    record = folder / "pruned" / "dense.local.deployment.json"
    record.unlink()
    record.mkdir()
    unkept = edgeprune("deploy", "pruned/dense", "--rounds", "3")
    record.rmdir()
    assert unkept.returncode == 0, "the board runs it, whatever became of the record"
    assert unkept.stderr.startswith("warning: what was checked and measured could not be kept in ")


@pytest.mark.slow
def test_explain_shares_out_the_latency_of_a_table(edgeprune: Run, table: Path) -> None:
    answer = succeed(edgeprune("explain", "net.py:build", *INPUT, "--table", str(table), "--json"))
    shares = [entry["latency_share"] for kind in ("groups", "frozen") for entry in answer[kind]]
    assert all(0 <= share < 1 for share in shares)
    assert 0.5 < sum(shares) <= 1
    assert answer["next"].endswith(f"--table {table} --latency 50%")
    told = edgeprune("explain", "net.py:build", *INPUT, "--table", str(table)).stdout
    assert re.search(r"first: 32 channels, \d+\.\d% of the latency, cut along 3 axes of weights", told), told


def test_a_run_without_a_board_is_finished_when_there_is_one(
    edgeprune: Run,
    line: CommandLine,
    folder: Path,
    pruned: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resume = ("prune", "--resume", "--out", "later")
    fail(edgeprune(*resume), 2, "later holds no finished run", "without --resume")
    for name in (path for path in (folder / "pruned").rglob("*") if path.is_file() and "artifact" not in path.parts):
        target = folder / "later" / name.relative_to(folder / "pruned")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(name.read_bytes())
    fail(edgeprune(*resume), 2, "needs a board to measure on, found none", "--board local")
    fail(edgeprune(*resume, "--board", "local", "--latency", "50%"), 2, "found --latency too")
    fail(edgeprune("prune", "net.py:build"), 2, "found no --table, --latency")
    with monkeypatch.context() as patch:
        # In this process, where one comparison may do for what is measured to 0.7 % elsewhere.
        patch.setattr(verification, "PRECISION", 1.0)
        patch.chdir(folder)
        for name in ("EDGEPRUNE_CONFIG", "EDGEPRUNE_ROOT", "EDGEPRUNE_STATE"):
            patch.setenv(name, line.environment[name])
        root().main(args=[*resume, "--board", "local", "--json"], prog_name="edgeprune", standalone_mode=False)
    finished = answered(capsys.readouterr().out)
    first, *_ = finished["rounds"]
    assert first["widths"] == pruned["rounds"][0]["widths"]
    assert first["measured"]["board"] == "local"
    assert finished["measured_ms"] > 0
    assert finished["budget_met"] is not None
    assert finished["options"]["latency"] == "75%"
    if finished["plan_hash"] == pruned["plan_hash"]:
        assert finished["metrics_after"] == pruned["metrics_after"]
    assert finished["next"].startswith("edgeprune compile later")
    page = succeed(edgeprune("report", "later", "--out", "later.html", "--json"))
    assert page
    assert "Rounds of the closed loop" in (folder / "later.html").read_text(encoding="utf-8")
    fail(edgeprune(*resume), 2, "every plan of later was", "edgeprune compile later")
