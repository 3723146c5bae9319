"""`profile` with locked clocks and in thermal equilibrium: fake vendor command, real run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.boards.device_types import device_type
from edgeprune.boards.local import LocalTransport
from edgeprune.errors import CommandError
from edgeprune.latency.table_rows import network_key
from edgeprune.profiling import sustaining
from edgeprune.profiling.run import profile

INPUT = torch.zeros(1, 3, 16, 16)
FAKE = """#!/bin/sh
case "$1" in
    --show) cat "{clocks}" ;;
    --store) cp "{clocks}" "$2" ;;
    --restore) cp "$2" "{clocks}" ;;
    "") echo locked > "{clocks}" ;;
esac
"""


@pytest.mark.slow
def test_conditions_are_held_told_and_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, folder = tmp_path / "clocks", tmp_path / "bin"
    clocks.write_text("former\n")
    folder.mkdir()
    for name, script in (("jetson_clocks", FAKE.format(clocks=clocks)), ("sudo", '#!/bin/sh\nshift\nexec "$@"\n')):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    # A second of heating instead of up to ten minutes: that it is too short is then what is said.
    monkeypatch.setattr(sustaining.sustained, "__kwdefaults__", {**sustaining.sustained.__kwdefaults__, "limit_s": 1.0})
    seen: list[str] = []
    said: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 1)).eval()
    root, device = str(tmp_path / "board"), device_type("jetson-orin-nano")
    with Board(LocalTransport(), name="orin", python=sys.executable, root=root, device=device) as board:
        table = profile(
            model,
            INPUT,
            board,
            minutes=0.03,
            sustained=True,
            lock_clocks=True,
            out=tmp_path / "table.parquet",
            progress=lambda done, total, left_s, message: seen.append(clocks.read_text()),
            told=said.append,
        )
        assert clocks.read_text() == "former\n"
        assert {"former\n", "locked\n"} == set(seen)
        found = table.header["clocks"]
        assert (found["locked"], found["ways"], found["restored"]) == (True, ["jetson_clocks"], True)
        assert [found[name]["jetson_clocks"] for name in ("before", "during", "after")] == [
            ["former"],
            ["locked"],
            ["former"],
        ]
        heated = table.header["sustained"]
        timed = {network_key(row["kernels"]) for row in table.rows if row["kind"] == "network"}
        assert set(heated["networks"]) == timed
        assert not heated["settled"]
        assert said == [heated["statement"], "clocks were locked by jetson_clocks, and are restored"]
        assert "the board is not in equilibrium: too short to tell" in heated["statement"]
        (folder / "jetson_clocks").write_text("#!/bin/sh\necho sudo: a password is required\nexit 1\n")
        with pytest.raises(CommandError, match="a password is required") as caught:
            profile(model, INPUT, board, minutes=0.03, lock_clocks=True, out=tmp_path / "other.parquet")
    assert caught.value.exit_code == 3
    assert not list(tmp_path.glob("other.parquet*"))
