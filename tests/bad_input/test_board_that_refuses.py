"""A board that somebody else holds, and one whose disk is full."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.testing.command_line import CommandLine, one_line

DEPLOY = ("deploy", "second", "--rounds", "1")
PROFILE = ("profile", "net.py:build", "--input", "image=1x3x16x16:float32", "--out", "new/table.parquet")
DISK_BYTES = 32 << 20


def test_a_second_run_is_told_who_holds_the_board(edgeprune: CommandLine) -> None:
    first = edgeprune.start(*PROFILE, "--minutes", "2")
    try:
        deadline = time.monotonic() + 60
        while not (holder := edgeprune.holder()):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert json.loads(holder)["pid"] == first.pid
        before = edgeprune.releases()
        for second in (DEPLOY, (*PROFILE[:-1], "other/table.parquet", "--minutes", "0.1")):
            done = edgeprune.run(*second)
            line = one_line(done.returncode, done.stdout, done.stderr, 3)
            assert "profile" in line
            assert str(first.pid) in line
            assert " Try: " in line
        assert {name: found for name, found in edgeprune.releases().items() if "releases" in name} == {
            name: found for name, found in before.items() if "releases" in name
        }
        assert not list((edgeprune.folder / "other").glob("*")), "the refused profile wrote nothing"
    finally:
        os.killpg(first.pid, signal.SIGINT)
        out, err = first.communicate(timeout=60)
    one_line(first.returncode, out, err, 130)
    edgeprune.succeed(*DEPLOY)


@pytest.fixture
def small_disk(edgeprune: CommandLine) -> Iterator[Path]:
    """The board's root on a disk of its own; the board runs the first artifact."""
    if os.geteuid() != 0:
        pytest.skip("a small disk of its own needs a tmpfs, which only root can mount")
    kept = edgeprune.board.with_name("kept")
    edgeprune.board.rename(kept)
    edgeprune.board.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(edgeprune.board)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a small disk of its own needs a tmpfs: {done.stderr.strip()}")
    try:
        shutil.copytree(kept, edgeprune.board, symlinks=True, dirs_exist_ok=True)
        yield edgeprune.board
    finally:
        # What was refused may still be letting go of its files for a moment.
        deadline = time.monotonic() + 20
        while subprocess.run(["umount", str(edgeprune.board)], capture_output=True, check=False).returncode != 0:
            assert time.monotonic() < deadline, "nothing of a refused run may go on using the board's folder"
            time.sleep(0.2)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Take the disk's space but so much."""
    path = folder / "somebody else's file"
    free = os.statvfs(folder)
    path.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - leave_bytes))
    return path


@pytest.mark.parametrize(
    ("command", "leave_bytes"),
    [
        pytest.param(DEPLOY, 0, id="deploy, no space"),
        pytest.param(DEPLOY, 8 << 20, id="deploy, less than the reserve"),
        pytest.param((*PROFILE, "--minutes", "0.03"), 0, id="profile, no space"),
    ],
)
def test_a_board_whose_disk_is_full(
    edgeprune: CommandLine, small_disk: Path, command: tuple[str, ...], leave_bytes: int
) -> None:
    filler = fill(small_disk, leave_bytes)
    before, runs = edgeprune.releases(), edgeprune.current()
    done = edgeprune.run(*command)
    line = one_line(done.returncode, done.stdout, done.stderr, 3)
    assert re.search(r"must have .*free .*found ([\d.]+ MB|none left)", line), line
    assert " Try: " in line
    assert edgeprune.current() == runs
    assert edgeprune.releases() == before
    edgeprune.assert_tidy()
    filler.unlink()
    edgeprune.succeed(*command)
