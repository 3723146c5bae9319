"""Set-ups with real wheels from the package index: the oldest and the newest ONNX Runtime that install here run what is compiled.

Every Python of this machine is a board of its own. For the nightly run: it downloads some hundred megabytes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeprune.boards.board import Board
from edgeprune.boards.downloading import download
from edgeprune.boards.local import LocalTransport
from edgeprune.boards.wheels import target_of
from edgeprune.deployment.compiling import compile as compile_artifact
from edgeprune.deployment.deploying import deploy
from edgeprune.deployment.environment import set_up
from edgeprune.errors import IncompatibleTargetError, WheelUnavailableError
from edgeprune.testing.backends import SmallNet

pytestmark = pytest.mark.slow

_OLDEST = (1, 10)


def pythons() -> list[str]:
    """This Python, and the oldest and newest others of this machine that start."""
    found = {}
    for minor in range(6, 15):
        for path in (shutil.which(f"python3.{minor}"), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3")):
            if path is not None and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0:
                found[minor] = str(path)
    ends = {found[min(found)], found[max(found)]} if found else set()
    return sorted(ends | {sys.executable})


def versions(board: Board, folder: Path) -> list[str]:
    """Every ONNX Runtime from 1.10 on with a wheel for the board."""
    try:
        download(["onnxruntime==0.0"], target_of(board.probe()), folder)
    except WheelUnavailableError as error:
        if error.fitting is None:
            pytest.skip("there is no package index here")
        whole = [version for version in error.fitting if re.fullmatch(r"\d+\.\d+\.\d+", version)]
        return [version for version in whole if tuple(map(int, version.split(".")[:2])) >= _OLDEST]
    raise AssertionError("there is no version 0.0")


@pytest.mark.parametrize("python", pythons())
@pytest.mark.parametrize("which", [0, -1], ids=["oldest", "newest"])
def test_what_is_compiled_for_a_board_runs_there(
    python: str, which: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_STATE", str(tmp_path / "state"))
    with Board(LocalTransport(), name="board", python=python, root=str(tmp_path / "root")) as board:
        wanted = versions(board, tmp_path)[which]
        found = set_up(board, runtime_version=wanted)
        assert found.version == wanted
        fingerprint = board.probe()
        assert fingerprint.runtimes["onnxruntime"]["version"] == wanted
        net, x = SmallNet().eval(), torch.randn(1, 3, 16, 16)
        artifact = compile_artifact(net, x, tmp_path / "net", fingerprint=fingerprint)
        assert deploy(artifact, board, rounds=1).parity.passed
        if artifact.manifest.requires["opset"] < 18:
            newest = replace(fingerprint, runtimes={"onnxruntime": {"version": "1.20.0", "sha256": ""}})
            newer = compile_artifact(net, x, tmp_path / "newer", fingerprint=newest)
            with pytest.raises(IncompatibleTargetError, match="to read opset 18 and IR version 9"):
                deploy(newer, board, rounds=1)
