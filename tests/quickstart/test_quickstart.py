"""The main job from nothing, over a real OpenSSH server: `edgeprune quickstart` as a new user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune

KEYS = {
    *(
        "board",
        "dense_ms",
        "pruned_predicted_ms",
        "pruned_measured_ms",
        "budget_ms",
        "dense_accuracy",
        "pruned_accuracy",
    ),
    *("uniform_accuracy", "params_before", "params_after", "parity_max_abs", "table", "plan", "artifact", "report"),
    "seconds",
}


@pytest.fixture(scope="module")
def run(sshd, tmp_path_factory):
    """Folder of a finished run, its JSON, the board's root, and the environment."""
    folder = tmp_path_factory.mktemp("quickstart")
    out, root = folder / "out", folder / "root"
    environment = {
        **os.environ,
        "EDGEPRUNE_CONFIG": str(folder / "boards.toml"),
        "EDGEPRUNE_STATE": str(folder / "state"),
        "EDGEPRUNE_SSH_CONFIG": str(sshd.config),
    }

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "edgeprune", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    key = subprocess.run(
        ["ssh-keygen", "-lf", str(sshd.known_hosts)], capture_output=True, text=True, check=True
    ).stdout
    add = ["device", "add", "bench", "--ssh", f"{sshd.user}@{sshd.host}:{sshd.port}", "--identity", str(sshd.identity)]
    call(*add, "--host-key", key.split()[1], "--python", sys.executable, "--root", str(root))
    # The gate is wide: this test is about the way, the milliseconds are the benchmark's.
    text = call(
        *("quickstart", "--board", "bench", "--latency", "50%", "--minutes", "0.4", "--tolerance", "0.4"),
        *("--out", str(out), "--json"),
    )
    return out, json.loads(text), root, call


def test_summary_says_everything(run):
    out, answer, _, _ = run
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert {name: answer[name] for name in summary} == summary
    assert summary["board"] == "bench"
    assert summary["dense_ms"] > summary["pruned_measured_ms"] > 0
    assert summary["params_before"] > summary["params_after"] > 0
    assert summary["dense_accuracy"] > 0.95
    assert summary["pruned_accuracy"] > 0.9


def test_plan_holds_the_prediction_and_was_written_before_anything_pruned_was_compiled(run):
    out, answer, _, _ = run
    plan = edgeprune.PruningPlan.load(out / "plan.json")
    assert plan.predicted["latency_ms"] == pytest.approx(answer["pruned_predicted_ms"])
    assert plan.predicted["latency_ms"] <= answer["budget_ms"]
    written = (out / "plan.json").stat().st_mtime_ns
    compiled = [out / "uniform.onnx", *(out / "artifact").glob("*.onnx")]
    assert len(compiled) == 2
    assert all(path.stat().st_mtime_ns > written for path in compiled)


def test_table_was_measured_through_the_board(run):
    out, answer, _, _ = run
    table = edgeprune.LatencyTable.load(Path(answer["table"]))
    assert table.header["board"] == "bench"
    assert table.header["label"] == "measured"
    assert len(table.networks) >= 3
    assert not list(out.glob("*.jsonl"))


def test_board_runs_the_artifact(run):
    out, answer, root, call = run
    artifact = edgeprune.Artifact.load(out / "artifact")
    current = (root / "current").resolve()
    assert current.name == answer["release"] == artifact.release
    assert (current / artifact.engine.name).read_bytes() == artifact.engine.read_bytes()
    assert not list((root / "incoming").iterdir())
    assert json.loads(call("status", "--board", "bench", "--json"))["current"]["folder"] == artifact.release


def test_report_is_one_file_that_loads_nothing(run):
    _, answer, _, _ = run
    text = Path(answer["report"]).read_text()
    # The plotting library's own source is full of addresses that nobody loads; markup outside of scripts counts.
    markup = re.sub(r"<script\b[^>]*>.*?</script>", "<script></script>", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//|url\(|@import", markup)
    assert "<script src" not in text
    for wanted in ("Staircases", "before and after", "Predicted and measured", "uniform"):
        assert wanted in text


@pytest.mark.slow
def test_second_run_takes_the_model_and_the_table_of_the_first(run):
    out, answer, _, call = run
    table, checkpoint = Path(answer["table"]), out / "dense-seed0.safetensors"
    before = [path.stat().st_mtime_ns for path in (table, checkpoint)]
    call(
        *("quickstart", "--board", "bench", "--latency", "60%", "--minutes", "0.4", "--tolerance", "0.4"),
        *("--out", str(out), "--json"),
    )
    assert [path.stat().st_mtime_ns for path in (table, checkpoint)] == before
    assert json.loads((out / "summary.json").read_text())["budget_ms"] == pytest.approx(0.6 * answer["dense_ms"])
