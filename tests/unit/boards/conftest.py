"""Real surroundings of a board: a root folder of its own, a disk that is nearly full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.boards.board import Board


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Root folder of the board ``local`` for this test alone; it does not exist yet."""
    folder = tmp_path / "board root"
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(folder))
    monkeypatch.setenv("EDGEPRUNE_CONFIG", str(tmp_path / "boards.toml"))
    return folder


@pytest.fixture
def board(root: Path) -> Iterator[Board]:
    """This machine."""
    with Board.open("local") as opened:
        yield opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
