"""A small net, two artifacts of it, its latency table, and a board that runs the first one: made once for all tests."""

from __future__ import annotations

import shutil
import venv
from pathlib import Path

import pytest

from edgeprune.testing.command_line import CommandLine
from edgeprune.testing.sshd import OpenSshServer

INPUT = ("--input", "image=1x3x16x16:float32")
PROFILE = ("profile", "net.py:build", *INPUT, "--minutes", "0.05", "--out", "table.parquet")
MODEL_FILE = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )
"""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """Folder with ``net.py``, ``first`` (it runs on the board), ``second`` and ``table.parquet``; tests do not run in it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(MODEL_FILE)
    line = CommandLine(folder, folder / "board")
    for name, seed in (("first", "0"), ("second", "1")):
        line.succeed("compile", "net.py:build", *INPUT, "--seed", seed, "--out", name)
    line.succeed("deploy", "first", "--rounds", "1")
    line.succeed(*PROFILE)
    return line


@pytest.fixture
def edgeprune(made: CommandLine, tmp_path: Path) -> CommandLine:
    """The command line in a folder and with a board of its own, both as `made` left them."""

    folder, board = tmp_path / "here", tmp_path / "board root"
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("board", "state", "temporary"))
    shutil.copytree(made.board, board, symlinks=True)
    line = CommandLine(folder, board)
    assert line.current() is not None
    return line


@pytest.fixture
def over_ssh(edgeprune: CommandLine, sshd: OpenSshServer) -> CommandLine:
    """The same, with the server's own ssh_config."""
    edgeprune.environment["EDGEPRUNE_SSH_CONFIG"] = str(sshd.config)
    return edgeprune


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the standard library and nothing else."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"
