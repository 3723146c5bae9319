"""What the verbs tell of boards and models without measuring anything: this machine, boards that are away, groups in words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.boards.config import BoardConfig, BoardEntry
from edgeprune.cli.doctor import _config
from edgeprune.deployment import state
from edgeprune.testing.command_line import CommandLine, one_line

INPUT = ("--input", "image=1x3x16x16:float32")
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

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(MODEL_FILE)
    return tmp_path


@pytest.fixture
def edgeprune(folder: Path) -> Run:
    """Runs one command line in that folder, with a board, settings and state of its own."""
    return CommandLine(folder, folder / "board").run


def succeed(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert (result.returncode, result.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def fail(result: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    line = one_line(result.returncode, result.stdout, result.stderr, code)
    for part in parts:
        assert part in line


def test_boards_that_are_unknown_or_away_say_so(edgeprune: Run) -> None:
    fail(edgeprune("device", "probe", "nowhere"), 2, "the board must be one of local, found 'nowhere'")
    fail(edgeprune("status", "--board", "ssh://nobody@127.0.0.1:1"), 3, "127.0.0.1:1")
    fail(edgeprune("device", "add", "bench", "--ssh", "nobody@127.0.0.1:1"), 3, "must be reachable")
    fail(edgeprune("device", "add", "local", "--ssh", "a@b"), 2, "must not be 'local'")
    fail(edgeprune("device", "add", "bench", "--ssh", "a@b", "--type", "toaster"), 2, "device type", "toaster")
    cores = ("device", "add", "bench", "--ssh", "a@b", "--cores", "7-4")
    fail(edgeprune(*cores), 2, "--cores '7-4' cannot be used", "as taskset")
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


def test_explain_counts_units_and_axes_in_words(edgeprune: Run) -> None:
    told = edgeprune("explain", "net.py:Net", *INPUT).stdout
    assert "first: 32 channels, cut along 3 axes of weights" in told, told
    assert "of the latency" not in told


def test_doctor_names_every_backend_and_what_is_missing(edgeprune: Run) -> None:
    healthy = json.loads(edgeprune("doctor", "--board", "local", "--json").stdout)
    assert healthy["exit_code"] == 0
    assert healthy["next"] == "edgeprune profile MODEL --input NAME=1x3x32x32:float32 --board local"
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


def test_doctor_counts_boards_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
    config = BoardConfig()
    for name, said in (("one", "(1 board)"), ("two", "(2 boards)")):
        config.add(name, BoardEntry(ssh=f"user@{name}"))
        assert _config("here").found.endswith(said)
