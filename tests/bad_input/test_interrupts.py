"""Ctrl-C at every state of a deployment and at random instants of a profile: nothing half-done, and a re-run goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from edgeprune.deployment.deploying import STATES
from edgeprune.latency.table import LatencyTable
from edgeprune.testing.command_line import CommandLine, one_line

PROFILE = ("profile", "net.py:build", "--input", "image=1x3x16x16:float32", "--minutes", "0.02", "--seed", "1", "--out")
INSTANTS = 20


def test_ctrl_c_at_every_state_of_a_deployment(edgeprune: CommandLine) -> None:
    runs = edgeprune.current()
    artifacts = ["second", "first"]
    for state in STATES:
        deploy = ("deploy", artifacts[0], "--rounds", "1")
        done = edgeprune.run(*deploy, environment={"EDGEPRUNE_FAULT": f"interrupt:{state}"})
        line = one_line(done.returncode, done.stdout, done.stderr, 130)
        assert "interrupted" in line, state
        assert "run the same command again" in line
        edgeprune.assert_tidy()
        assert not (edgeprune.folder / f"{artifacts[0]}.local.deployment.json").exists() or state in ("health", "done")
        if STATES.index(state) < STATES.index("activate"):
            assert edgeprune.current() == runs, f"interrupted after {state}, before the switch"
            continue
        assert edgeprune.current() != runs, f"interrupted after {state}, after the switch"
        edgeprune.succeed(*deploy)
        assert edgeprune.current() != runs
        status = json.loads(edgeprune.succeed("status", "--json"))
        assert status["confirmed"] is True
        runs = edgeprune.current()
        artifacts.reverse()


def interrupted(edgeprune: CommandLine, started: Path, delay_s: float, *arguments: str) -> subprocess.Popen[str]:
    """A command whose whole process group gets SIGINT so long after its start, as a terminal sends it."""
    started.unlink(missing_ok=True)
    process = edgeprune.start(*arguments, started=started)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.002)
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    return process


@pytest.mark.slow
def test_ctrl_c_at_random_instants_of_a_profile(edgeprune: CommandLine, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = interrupted(edgeprune, started, 120, *PROFILE, "usual/table.parquet")
    assert process.communicate()[1] == ""
    usual_s = time.time() - started.stat().st_mtime
    current, board = edgeprune.current(), edgeprune.releases()
    chance = random.Random(2026)
    out = edgeprune.folder / "new"
    table = out / "table.parquet"
    recorded = 0
    stopped = 0
    for _ in range(INSTANTS):
        process = interrupted(edgeprune, started, chance.uniform(0.02, usual_s), *PROFILE, str(table))
        printed, said = process.communicate(timeout=60)
        if process.returncode == 0:
            assert said == ""
            LatencyTable.load(table)
            assert [path.name for path in out.iterdir()] == [table.name], "a finished run leaves its table alone"
            table.unlink()
            recorded = 0
            continue
        stopped += 1
        line = one_line(process.returncode, printed, said, 130)
        assert "run the same command again to go on" in line
        edgeprune.assert_tidy()
        assert edgeprune.current() == current
        kept = journals(out)
        assert kept >= recorded or table.exists(), "what was measured is kept for the next run"
        recorded = kept
        if table.exists():
            LatencyTable.load(table)
    assert stopped >= INSTANTS // 2, "most instants fall into the run"
    edgeprune.succeed(*PROFILE, str(table))
    assert LatencyTable.load(table).kernels
    assert [path.name for path in out.iterdir()] == [table.name]
    assert {name for name in edgeprune.releases() if "releases" in name} == {
        name for name in board if "releases" in name
    }


def journals(folder: Path) -> int:
    """Records in all journals of a folder; each line must be whole."""
    count = 0
    for path in folder.glob("*") if folder.is_dir() else ():
        assert path.name.endswith((".jsonl", ".parquet")), path
        if path.suffix == ".jsonl":
            lines = path.read_text().splitlines(keepends=True)
            assert all(line.endswith("\n") and json.loads(line) for line in lines)
            count += len(lines)
    return count
