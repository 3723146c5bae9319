"""What ``deploy``, ``status`` and ``verify`` say of a release on trial, on this machine as the board."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune.cli.console import Output
from edgeprune.cli.status import show
from edgeprune.deployment.status import BoardStatus, Release
from edgeprune.testing import forking

torch = pytest.importorskip("torch")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with two artifacts."""
    import edgeprune

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("two words")
    for seed in (0, 1):
        torch.manual_seed(seed)
        edgeprune.compile(torch.nn.Linear(8, 4), torch.randn(1, 8), path / f"net{seed}", name=f"net{seed}")
    return path


@pytest.fixture
def edgeprune(folder: Path, tmp_path: Path) -> Run:
    """Runs a verb there, with a board of this test's own."""

    def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {
            "EDGEPRUNE_ROOT": str(tmp_path / "board"),
            "EDGEPRUNE_STATE": str(tmp_path / "state"),
            "EDGEPRUNE_CONFIG": str(tmp_path / "boards.toml"),
        }
        return forking.run(words, folder, {**os.environ, **own, **environment}, 120)

    return run


@pytest.mark.slow
def test_trial_is_told_while_it_lasts_and_ended_by_the_next_run(edgeprune: Run) -> None:
    first = edgeprune("deploy", "net0", "--rounds", "1", "--health", "true", "--steady", "0.2")
    assert first.returncode == 0, first.stderr
    killed = edgeprune("deploy", "net1", "--rounds", "1", EDGEPRUNE_FAULT="after:activate")
    assert killed.returncode == 137
    trial = edgeprune("status")
    assert "(net1), which has not passed its health check" in trial.stdout
    assert "it is on trial: the board puts the former release back in" in trial.stdout
    failed = edgeprune("deploy", "net1", "--rounds", "1", "--health", "echo no; exit 9", "--health-window", "5")
    assert failed.returncode == 6
    assert "was never confirmed by the run that had switched to it" in failed.stderr
    assert (
        "must have its health command end with exit code 0, found exit code 9: no; it was rolled back." in failed.stderr
    )
    verified = edgeprune("verify", "--parity")
    assert verified.returncode == 0, verified.stderr
    assert "(net0) on local: 5 files" in verified.stdout
    assert "golden outputs on the board: largest difference" in verified.stdout


@pytest.mark.parametrize(
    ("window", "said"),
    [
        ({}, "it is on trial: the board puts the former release back in 42 s unless it is confirmed\n"),
        ({"checks": 2}, "its health command was run 2 times and holds"),
        ({"checks": 2, "complaint": "must have it"}, "its health command was run 2 times and must have it"),
        ({"left_s": None}, "nobody guards it any more: the next run that holds the board puts the former release back"),
    ],
)
def test_status_tells_how_a_trial_goes(window: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    now = Release("0123456789abcdef", "net", "2026-01-01T00:00:00Z", 1000, "current")
    trial = {"left_s": 42.3, "checks": 0, "complaint": None, **window}
    show(BoardStatus("orin", True, 0.0, now, None, False, (now,), window=trial), "orin", Output(False))
    told = capsys.readouterr().out
    assert "orin runs 0123456789abcdef (net), which has not passed its health check" in told
    assert said in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "local", "--board", "local"), "boards must be named with --board or with --to, found both"),
        (("--to", "local,$(id)"), "the board must be one of local, found '$(id)'"),
        (("--at-once", "2"), "--at-once is of many boards, found one, local"),
        (("--health-window", "0"), "the health window must be at least 1 s"),
    ],
)
def test_options_that_cannot_be_end_with_a_usage_error(edgeprune: Run, words: tuple[str, ...], said: str) -> None:
    done = edgeprune("deploy", "net0", *words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_artifact_is_signed_as_it_is_compiled_and_refused_without(edgeprune: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "net.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(8, 4)\n")
    key = tmp_path / "a key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    made = edgeprune("compile", "net.py:build", "--input", "x=1x8", "--out", "signed", "--sign", str(key), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["files"][0]["path"].endswith("manifest.json.sig")
    (tmp_path / "board").mkdir()
    words = key.with_name("a key.pub").read_text().split()
    (tmp_path / "board" / "allowed_signers").write_text(f"ann {words[0]} {words[1]}\n")
    refused = edgeprune("deploy", "net0", "--rounds", "1")
    assert refused.returncode == 5
    assert "must have a signature by one of the board's signers, found none" in refused.stderr
    assert edgeprune("deploy", "signed", "--rounds", "1").returncode == 0
    assert "signed by ann" in edgeprune("verify", "--board", "local").stdout
