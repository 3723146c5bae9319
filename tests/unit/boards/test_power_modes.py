"""A Jetson's power mode is chosen for a while and comes back: a program in place of nvpmodel, real processes. Emulated.

What it prints is as public logs have it: the modes (``nvpmodel -p --verbose``), the one that is on (``-q``), and the refusal of a
mode that needs a restart when nobody answers its question.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.local import LocalTransport
from edgeprune.errors import CommandError, ConfigError

NVPMODEL = """#!/bin/sh
case "$1" in
    -p)
        echo "NVPM VERB: Config file: /etc/nvpmodel.conf" >&2
        echo "NVPM VERB: POWER_MODEL: ID=0 NAME=15W"
        echo "NVPM VERB: POWER_MODEL: ID=1 NAME=25W"
        echo "NVPM VERB: POWER_MODEL: ID=2 NAME=MAXN_SUPER" ;;
    -q) echo "NV Power Mode: $(sed -n 1p "{mode}")"; sed -n 2p "{mode}" ;;
    -m)
        case "$2" in
            0) printf '15W\\n0\\n' > "{mode}" ;;
            2) printf 'MAXN_SUPER\\n2\\n' > "{mode}" ;;
            *)
                echo "NVPM WARN: Reboot required for changing to this power mode: $2"
                echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:"
                read -r answer || {{ echo "NVPM ERROR: bad input!"; echo "NVPM ERROR: optMask is 1, no request for power mode"; }}
                exit 0 ;;
        esac ;;
esac
"""
JETSON_CLOCKS = """#!/bin/sh
echo "$* in $(sed -n 1p "{mode}")" >> "{calls}"
case "$1" in
    --store) cp "{mode}" "$2" ;;
esac
"""


class Jetson:
    """A fake board: commands in a folder of the path, its mode in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mode, self.calls = folder / "bin", folder / "mode", folder / "calls"
        self.folder.mkdir()
        self.mode.write_text("15W\n0\n")
        scripts = {
            "nvpmodel": NVPMODEL.format(mode=self.mode),
            "jetson_clocks": JETSON_CLOCKS.format(mode=self.mode, calls=self.calls),
            "sudo": '#!/bin/sh\n[ "$1" = -n ] || exit 9\nshift\nexec "$@"\n',
        }
        for name, script in scripts.items():
            (self.folder / name).write_text(script)
            (self.folder / name).chmod(0o755)

    @property
    def name(self) -> str:
        return self.mode.read_text().split()[0]


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jetson:
    fake = Jetson(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def board(jetson: Jetson, tmp_path: Path) -> Iterator[Board]:
    device = device_type("jetson-orin-nano")
    with Board(
        LocalTransport(), name="orin", python=sys.executable, root=str(tmp_path / "board"), device=device
    ) as opened:
        yield opened


def test_a_mode_is_chosen_and_the_one_before_comes_back(board: Board, jetson: Jetson) -> None:
    with board.hold("test"), board.lock_clocks(clocks=False, power_mode="2") as told:
        assert jetson.name == "MAXN_SUPER"
        assert board.probe().identity("onnxruntime")["power_mode"] == "MAXN_SUPER"
        assert told["ways"] == ["nvpmodel"]
    assert jetson.name == "15W"
    assert told["restored"] is True
    states = [told[name]["power_mode"] for name in ("before", "during", "after")]
    assert states == [["NV Power Mode: 15W", "0"], ["NV Power Mode: MAXN_SUPER", "2"], ["NV Power Mode: 15W", "0"]]


def test_clocks_are_stored_and_restored_in_the_mode_before(board: Board, jetson: Jetson) -> None:
    with board.hold("test"), board.lock_clocks(power_mode="MAXN_SUPER") as told:
        assert told["ways"] == ["nvpmodel", "jetson_clocks"]
    calls = [line.split() for line in jetson.calls.read_text().splitlines() if "--show" not in line]
    assert [(call[0] if call[0] != "in" else "", call[-1]) for call in calls] == [
        ("--store", "15W"),
        ("", "MAXN_SUPER"),
        ("--restore", "15W"),
    ]


def test_the_mode_that_is_on_is_left_alone(board: Board, jetson: Jetson, tmp_path: Path) -> None:
    jetson.mode.write_text("25W\n1\n")
    with board.lock_clocks(power_mode="25W"):
        assert jetson.name == "25W"
        restoring = json.loads((tmp_path / "board" / "clocks.json").read_text())["restore"]
        assert ["nvpmodel" in entry["argv"] for entry in restoring] == [False]
    assert jetson.name == "25W"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("MAXN", r"nvpmodel must know power mode MAXN, it knows 15W \(0\), 25W \(1\), MAXN_SUPER \(2\)"),
        ("25W", r"nvpmodel: the power mode stayed 0"),
    ],
)
def test_a_mode_that_is_not_there_or_needs_a_restart_is_refused(
    board: Board, jetson: Jetson, tmp_path: Path, asked: str, words: str
) -> None:
    with pytest.raises(CommandError, match=words), board.lock_clocks(power_mode=asked):
        pytest.fail("it was not chosen")
    assert jetson.name == "15W"
    assert not (tmp_path / "board" / "clocks.json").exists()


def test_a_mode_outlives_a_restart_and_so_does_the_note_of_the_one_before(
    board: Board, jetson: Jetson, tmp_path: Path
) -> None:
    with board.lock_clocks(power_mode="MAXN_SUPER"):
        note = json.loads((tmp_path / "board" / "clocks.json").read_text())
    jetson.mode.write_text("MAXN_SUPER\n2\n")
    before = len(jetson.calls.read_text().splitlines())
    (tmp_path / "board" / "clocks.json").write_text(json.dumps({**note, "boot": "an earlier one"}))
    with board.hold("any other run"):
        assert jetson.name == "15W"
    assert len(jetson.calls.read_text().splitlines()) == before, "clocks are what the start made them"


def test_a_device_type_must_have_power_modes(tmp_path: Path) -> None:
    device = device_type("raspberry-pi-5")
    board = Board(LocalTransport(), name="pi", python=sys.executable, root=str(tmp_path / "board"), device=device)
    with board, pytest.raises(ConfigError, match="must say how its power mode is chosen, found a raspberry-pi-5"):
        board.lock_clocks(clocks=False, power_mode="MAXN").__enter__()
