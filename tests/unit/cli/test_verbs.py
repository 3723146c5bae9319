"""The verbs one after another on a small model and this machine as the board; and what each says to bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.deployment import state
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
def edgeprune(folder: Path) -> Run:
    """Runs one command line in that folder, with a board, settings and state of its own."""
    return CommandLine(folder, folder / "board").run


def succeed(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    answer: dict[str, Any] = json.loads(result.stdout)
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
        edgeprune("profile", "net.py:build", *INPUT, "--minutes", "0.1", "--out", "tables/table.parquet", "--json")
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
    fail(edgeprune(*look, "--table", "absent.parquet"), 4, "there must be a latency table at absent.parquet")


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


def test_without_a_task_it_says_that_accuracy_was_not_measured(edgeprune: Run, table: Path) -> None:
    result = edgeprune("prune", "net.py:build", *INPUT, "--table", str(table), "--latency", "75%", "--out", "free")
    assert result.returncode == 0, result.stderr
    assert "Accuracy was not measured" in result.stdout
    assert "no --weights: the model is taken with the weights that its factory gives it" in result.stdout
    assert "interval of the prediction" in result.stdout
    assert "next: edgeprune compile free" in result.stdout


def test_several_budgets_hold_at_once(edgeprune: Run, table: Path) -> None:
    budgets = ("--latency", "90%", "--memory", "70%", "--params", "60%")
    answer = succeed(
        edgeprune("prune", "net.py:build", *INPUT, "--table", str(table), *budgets, "--out", "several", "--json")
    )
    spent = {one["name"]: one for one in answer["spent"]}
    assert set(spent) == {"parameters", "memory"}
    assert all(one["value"] <= one["at_most"] < one["dense"] for one in spent.values())
    assert spent["memory"]["unit"] == "bytes"
    assert spent["memory"]["at_most"] == pytest.approx(0.7 * spent["memory"]["dense"])


def test_a_budget_out_of_reach_says_what_can_be_reached_and_leaves_nothing(
    edgeprune: Run, folder: Path, table: Path
) -> None:
    result = edgeprune("prune", "net.py:build", *INPUT, "--table", str(table), "--latency", "1us", "--out", "never")
    fail(result, 4, "the smallest plan found reaches", "Try: --latency")
    assert not list(folder.glob("*never*"))
    assert not list(folder.glob(".*partial"))


def test_bad_input_is_one_line_with_the_right_exit_code(edgeprune: Run, folder: Path, table: Path) -> None:
    (folder / "corrupt.parquet").write_bytes(table.read_bytes()[:-500])
    (folder / "foreign.parquet").write_text("PAR1 not a table")
    prune = ("prune", "net.py:build", *INPUT, "--latency", "50%", "--out", "bad")
    fail(edgeprune(*prune, "--table", "missing.parquet"), 4, "missing.parquet")
    fail(edgeprune(*prune, "--table", "corrupt.parquet"), 2, "corrupt.parquet")
    fail(edgeprune("fit", "foreign.parquet"), 2, "foreign.parquet")
    fail(edgeprune(*prune, "--table", str(table), "--latency", "50"), 2, "a number with a unit", "--latency 12ms")
    fail(
        edgeprune(*prune, "--table", str(table), "--percentile", "95"),
        4,
        "it holds medians",
        "profile net.py:build --input image=1x3x16x16:float32 --percentiles",
    )
    energy = edgeprune(*prune, "--table", str(table), "--energy", "30mJ")
    fail(
        energy,
        4,
        "must hold the energy per inference of networks",
        "profile net.py:build --input image=1x3x16x16:float32 --energy",
    )
    fail(edgeprune(*prune, "--table", str(table), "--min-width", "first"), 2, "--min-width must be written")
    fail(edgeprune(*prune, "--table", str(table), "--keep", "frist"), 2, "frist")
    idle = edgeprune(*prune, "--table", str(table), "--reallocate-every", "9")
    fail(idle, 2, "--reallocate-every needs --soft-masking, found none")
    wrong_shape = ("prune", "net.py:build", "--input", "image=1x4x16x16", "--latency", "50%", "--table", str(table))
    fail(edgeprune(*wrong_shape), 2, "must run on its example inputs")
    fail(edgeprune("compile", "board"), 2, "no prune.json in it")
    fail(edgeprune("compile", "net.py:build", *INPUT, "--dla", "0"), 2, "--dla needs --backend tensorrt")
    fail(edgeprune("report", "."), 2, "there is no report.json")
    fail(edgeprune("deploy", "tables"), 2, "manifest.json")
    assert not (folder / "bad").exists()


def test_an_output_folder_of_something_else_is_left_alone(edgeprune: Run, folder: Path, table: Path) -> None:
    other = folder / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    result = edgeprune("prune", "net.py:build", *INPUT, "--table", str(table), "--latency", "75%", "--out", "precious")
    fail(result, 2, "must be empty or hold an earlier run")
    assert (other / "thesis.txt").read_text() == "years of work"


def test_boards_that_are_unknown_or_away_say_so(edgeprune: Run) -> None:
    fail(edgeprune("device", "probe", "nowhere"), 2, "the board must be one of local, found 'nowhere'")
    fail(edgeprune("status", "--board", "ssh://nobody@127.0.0.1:1"), 3, "127.0.0.1:1")
    fail(edgeprune("device", "add", "bench", "--ssh", "nobody@127.0.0.1:1"), 3, "must be reachable")
    fail(edgeprune("device", "add", "local", "--ssh", "a@b"), 2, "must not be 'local'")
    fail(edgeprune("device", "add", "bench", "--ssh", "a@b", "--type", "toaster"), 2, "device type", "toaster")
    fail(
        edgeprune("device", "add", "bench", "--ssh", "a@b", "--cores", "7-4"),
        2,
        "--cores '7-4' cannot be used",
        "as taskset",
    )
    listed = succeed(edgeprune("device", "list", "--json"))
    assert listed["boards"] == {}, "a board that was refused is not kept"


def test_a_board_that_is_away_is_told_from_memory_with_the_exit_code_of_one(
    edgeprune: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_STATE", str(folder / "state"))
    board = "ssh://nobody@127.0.0.1:1?root=/remembered"
    release = {"folder": "0" * 16, "state": "current", "name": "net", "created": "2026", "size_bytes": 1}
    state.remember(board, {"current": "0" * 16, "previous": None, "confirmed": True, "releases": [release]})
    away = edgeprune("status", "--board", board, "--json")
    assert away.returncode == 3
    assert away.stderr == ""
    assert json.loads(away.stdout)["online"] is False
    assert json.loads(away.stdout)["current"]["name"] == "net"


def test_this_machine_is_shown_as_a_board(edgeprune: Run, folder: Path) -> None:
    shown = succeed(edgeprune("device", "show", "local", "--json"))
    assert (shown["name"], shown["python"], shown["root"]) == ("local", sys.executable, str(folder / "board"))
    assert shown["next"] == "edgeprune device probe local"


def test_probe_says_what_power_can_be_read_and_why_not(edgeprune: Run) -> None:
    probed = succeed(edgeprune("device", "probe", "local", "--json"))
    assert {absence["source"] for absence in probed["power"]["absences"]} >= {"odpm", "tegrastats"}
    if not probed["power"]["sensors"]:
        assert probed["power"]["energy"].startswith("energy cannot be measured: the board's power must be readable")
    metered = edgeprune("device", "probe", "local", "--meter", "while echo 3.25; do sleep 0.02; done").stdout
    assert re.search(r"meter meter +.* power ", metered), metered
    assert "energy can be measured: what the external meter measures" in metered


def test_a_meter_or_a_rail_without_energy_is_a_mistake(edgeprune: Run) -> None:
    fail(edgeprune("profile", "net.py:build", *INPUT, "--meter", "echo 1"), 2, "--meter must come with --energy")
    here = ("profile", "net.py:build", *INPUT, "--host-meter", "echo 1")
    fail(edgeprune(*here), 2, "--host-meter must come with --energy and without --meter, found it alone")
    fail(edgeprune(*here, "--energy", "--meter", "echo 1"), 2, "without --meter, found --meter with it")
    fail(edgeprune("profile", "net.py:build", *INPUT, "--rail", "VIN"), 2, "--rail must come with --energy")


def test_a_power_mode_is_not_chosen_for_a_dry_run_nor_on_a_board_without_any(edgeprune: Run) -> None:
    mode = ("profile", "net.py:build", *INPUT, "--power-mode", "MAXN")
    fail(edgeprune(*mode, "--dry-run"), 2, "--dry-run leaves the board as it is")
    fail(edgeprune(*mode), 2, "must say how its power mode is chosen")


def test_a_run_that_is_not_there_is_not_taken_for_a_factory(edgeprune: Run) -> None:
    fail(edgeprune("compile", "prunde"), 2, "there is no folder 'prunde'", "edgeprune prune", "package.module:factory")


def test_what_is_written_wrong_comes_with_what_to_write(edgeprune: Run, folder: Path) -> None:
    compiling = ("compile", "net.py:build", "--out", "wrong")
    fail(edgeprune(*compiling, "--input", "1x3x16x16"), 2, "Try: --input x=1x3x16x16, with the input's name")
    fail(edgeprune(*compiling, "--input", "image=1x3x16x16:flot32"), 2, "Try: --input image=1x3x16x16:float32")
    (folder / "weights").mkdir()
    (folder / "weights" / "net.safetensors").touch()
    fail(edgeprune(*compiling, *INPUT, "--weights", "nett.safetensors"), 2, "Try: weights/net.safetensors")
    fail(edgeprune("compile", "models/net.py:build", *INPUT), 2, "there is no ", "Try: net.py")
    fail(edgeprune("compile", "elsewhere.py:build", *INPUT), 2, f"Try: a path from {folder}")
    wrong_key = ("device", "add", "bench", "--ssh", "a@b", "--host-key", "SHA256:abc")
    fail(edgeprune(*wrong_key), 2, "43 characters after SHA256:", "ssh-keygen -lf")
    assert "\\" not in edgeprune(*wrong_key).stderr
    assert "[A-Za-z" not in edgeprune(*wrong_key).stderr


def test_explain_counts_units_and_axes_in_words(edgeprune: Run) -> None:
    told = edgeprune("explain", "net.py:build", *INPUT).stdout
    assert "first: 32 channels, cut along 3 axes of weights" in told, told
    assert "of the latency" not in told


@pytest.mark.slow
def test_explain_shares_out_the_latency_of_a_table(edgeprune: Run, table: Path) -> None:
    answer = succeed(edgeprune("explain", "net.py:build", *INPUT, "--table", str(table), "--json"))
    shares = [entry["latency_share"] for kind in ("groups", "frozen") for entry in answer[kind]]
    assert all(0 <= share < 1 for share in shares)
    assert 0.5 < sum(shares) <= 1
    assert answer["next"].endswith(f"--table {table} --latency 50%")
    told = edgeprune("explain", "net.py:build", *INPUT, "--table", str(table)).stdout
    assert re.search(r"first: 32 channels, \d+\.\d% of the latency, cut along 3 axes of weights", told), told


def test_doctor_names_every_backend_and_what_is_missing(edgeprune: Run) -> None:
    healthy = json.loads(edgeprune("doctor", "--board", "local", "--json").stdout)
    assert healthy["exit_code"] == 0
    names = {check["name"] for check in healthy["checks"]}
    assert {"python", "torch", "backend onnxruntime", "board list", "write access", "connection", "disk"} <= names
    (power,) = (check for check in healthy["checks"] if check["name"] == "power")
    assert power["state"] in ("ok", "warn"), "energy is no requirement"
    assert power["found"]
    away = edgeprune("doctor", "--board", "ssh://nobody@127.0.0.1:1")
    assert away.returncode == 3
    line = next(line for line in away.stdout.splitlines() if "connection" in line)
    assert line.startswith("missing ")
    assert " -> " in line


def test_a_run_without_a_board_is_finished_when_there_is_one(
    edgeprune: Run, folder: Path, table: Path, pruned: dict[str, Any]
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
    finished = succeed(edgeprune(*resume, "--board", "local", "--json"))
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
