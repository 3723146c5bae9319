"""``edgeprune device`` against a real OpenSSH server: host keys are shown, asked for, and never trusted silently."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edgeprune.testing import forking
from edgeprune.testing.sshd import OpenSshServer

pytestmark = pytest.mark.loopback

Run = Callable[..., subprocess.CompletedProcess[str]]
WRONG_KEY = "SHA256:" + "A" * 43


@pytest.fixture
def edgeprune(tmp_path: Path) -> Run:
    environment = {
        **os.environ,
        "EDGEPRUNE_CONFIG": str(tmp_path / "boards.toml"),
        "EDGEPRUNE_STATE": str(tmp_path / "state"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forking.run(("device", *arguments), Path.cwd(), environment, 60)

    return run


def test_a_board_is_added_only_with_an_accepted_host_key(sshd: OpenSshServer, edgeprune: Run, tmp_path: Path) -> None:
    address = f"{sshd.user}@{sshd.host}:{sshd.port}"
    core = str(min(os.sched_getaffinity(0)))
    add = ("add", "bench", "--ssh", address, "--identity", str(sshd.identity), "--root", str(tmp_path / "on board"))
    add = (*add, "--cores", core)

    asked = edgeprune(*add)
    assert asked.returncode == 3
    assert len(asked.stderr.splitlines()) == 1
    fingerprint = next(word for word in asked.stderr.split() if word.startswith("SHA256:"))
    assert f"Try: --host-key {fingerprint}".rstrip(",") in asked.stderr
    assert "there is no terminal to ask on" in asked.stderr
    assert not (tmp_path / "boards.toml").exists()

    wrong = edgeprune(*add, "--host-key", WRONG_KEY)
    assert wrong.returncode == 3
    assert f"must be the one given, {WRONG_KEY}, found ssh-ed25519 SHA256:" in wrong.stderr
    assert not (tmp_path / "boards.toml").exists()

    added = edgeprune(*add, "--host-key", fingerprint.rstrip(","), "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["host_key"] == fingerprint.rstrip(",")
    assert json.loads(added.stdout)["next"] == "edgeprune device setup bench"

    probed = edgeprune("probe", "bench", "--json")
    assert probed.returncode == 0, probed.stderr
    answer = json.loads(probed.stdout)
    assert answer["root"] == str(tmp_path / "on board")
    assert answer["fingerprint"]["architecture"] == os.uname().machine
    assert answer["fingerprint"]["cores"] == 1

    again = edgeprune(*add, "--host-key", fingerprint.rstrip(","))
    assert again.returncode == 2
    assert "name must be free" in again.stderr

    shown = json.loads(edgeprune("show", "bench", "--json").stdout)
    assert shown["ssh"] == address
    assert edgeprune("remove", "bench").returncode == 0
    assert json.loads(edgeprune("list", "--json").stdout)["boards"] == {}
